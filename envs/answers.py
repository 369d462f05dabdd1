"""What a junction may be told, and how: the decision formats.

`phase`: the next green, asked anew at every decision instant. `phase_duration`: the next green and
the seconds for which it is settled. `extend`: whether the running green goes on or makes way for
the next one in the program's order. An answer is JSON, strict if it is exactly what was asked for,
partial if one legal choice can be recognised in it.

Example of answers:
    {"phase": "C"}    {"phase": "C", "duration": 30}    {"extend": "yes"}
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import get_args

from envs.types import Action, Decision, DecisionFormat, ParseFailure

Said = tuple[tuple[str, str | int], ...]
"""Keys and values of an answer, in order."""

HOLD_INTERVALS = (1, 2, 3, 4)
"""Durations that may be chosen, in decision intervals: with RESCO's 10 s, up to 40 s."""
SECONDS_PER_VEH = 2.0
"""How long a queue needs to drive off, per vehicle of a lane: a saturation flow of 1800 an hour."""
PIECES = ('{"phase": "', '"}', '{"extend": "', '", "duration": ')
"""What answers consist of beside names and numbers, for tokenizers that are built for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parsed:
    """An action, and whether the completion was exactly the JSON asked for."""

    action: Action
    strict: bool


class Format(ABC):
    """One way to ask for a decision."""

    asks: str
    """The last sentence of the instructions."""

    def offered(self, decision: Decision) -> Decision:
        """The decision with what may be chosen in this format alone."""
        return decision

    @abstractmethod
    def options(self, decision: Decision) -> dict[Said, Action]:
        """Every legal action by what is said for it."""

    def act(self, decision: Decision, phase: int) -> Action:
        """What a controller that only chooses a phase does here."""
        return Action(phase=phase)


class _Phase(Format):
    asks = 'Choose the next phase. Answer with JSON only, like {"phase": "A"}.'

    def options(self, decision: Decision) -> dict[Said, Action]:
        phases = decision.junction.phases
        return {(("phase", phases[i].name),): Action(phase=i) for i in decision.legal}


class _PhaseDuration(Format):
    asks = (
        "Choose the next phase and for how many seconds it is settled. Answer with JSON only, like "
        '{"phase": "A", "duration": 20}.'
    )

    def options(self, decision: Decision) -> dict[Said, Action]:
        phases = decision.junction.phases
        return {
            (("phase", phases[i].name), ("duration", hold_s)): Action(phase=i, hold_s=hold_s)
            for i in decision.legal
            for hold_s in holds_s(decision)
        }

    def act(self, decision: Decision, phase: int) -> Action:
        """For as long as its longest queue needs, as far as that may be said."""
        lanes = (decision.observation.lanes[i] for i in decision.junction.phases[phase].lanes)
        needed_s = SECONDS_PER_VEH * max(lane.queue_veh for lane in lanes)
        if phase != decision.observation.current:
            needed_s += decision.timing.yellow_s + decision.timing.all_red_s
        offered = holds_s(decision)
        hold_s = next((hold for hold in offered if hold >= needed_s), offered[-1])
        return Action(phase=phase, hold_s=hold_s)


class _Extend(Format):
    asks = 'Shall the running green go on? Answer with JSON only, like {"extend": "yes"}.'

    def offered(self, decision: Decision) -> Decision:
        """The running phase, if it may go on, and the first legal one after it."""
        num, current = len(decision.junction.phases), decision.observation.current
        others = [i for i in decision.legal if i != current]
        following = sorted(others, key=lambda i: (i - current) % num)[:1]
        legal = {*following, *({current} & set(decision.legal))}
        return replace(decision, legal=tuple(sorted(legal)))

    def options(self, decision: Decision) -> dict[Said, Action]:
        current = decision.observation.current
        return {
            (("extend", "yes" if i == current else "no"),): Action(phase=i) for i in decision.legal
        }


FORMATS: dict[DecisionFormat, Format] = {
    "phase": _Phase(),
    "phase_duration": _PhaseDuration(),
    "extend": _Extend(),
}
assert set(FORMATS) == set(get_args(DecisionFormat))


def holds_s(decision: Decision) -> tuple[int, ...]:
    """Durations that may be chosen, ascending."""
    return tuple(n * decision.timing.decision_interval_s for n in HOLD_INTERVALS)


def offered(decision: Decision, name: DecisionFormat) -> Decision:
    """The decision as it is asked in a format."""
    return FORMATS[name].offered(replace(decision, format=name))


def options(decision: Decision) -> tuple[Action, ...]:
    """Everything that may be answered, in order."""
    return tuple(FORMATS[decision.format].options(decision).values())


def act(decision: Decision, phase: int) -> Action:
    """What a controller that chose this phase does, in the decision's format."""
    return FORMATS[decision.format].act(decision, phase)


def answer_texts(decision: Decision) -> dict[Action, str]:
    """Everything that may be answered, in order, with the completion that names it."""
    every = FORMATS[decision.format].options(decision)
    return {action: json.dumps(dict(said)) for said, action in every.items()}


def answer_text(decision: Decision, action: Action) -> str:
    """The completion that names a legal action."""
    return json.dumps(dict(_said(FORMATS[decision.format].options(decision), action)))


def label(decision: Decision, action: Action) -> str:
    """A legal action in few words, such as `C`, `C 20` or `yes`."""
    every = FORMATS[decision.format].options(decision)
    return " ".join(str(value) for _, value in _said(every, action))


def choice_words(decision: Decision) -> dict[int, str]:
    """What the line of each legal phase ends with: the word that chooses it."""
    every = FORMATS[decision.format].options(decision)
    return {action.phase: str(said[0][1]) for said, action in every.items()}


def _said(every: dict[Said, Action], action: Action) -> Said:
    for said, option in every.items():
        if option == action:
            return said
    raise ValueError(f"{action} may not be answered; these may: {list(every.values())}")


def parse(decision: Decision, completion: str) -> Parsed | ParseFailure:
    """The one legal action that the completion names, else why there is none.

    Strict is exactly the JSON asked for. Otherwise one choice must be recognisable; naming two is
    a failure: guessing which was meant would reward hedging.
    """
    every = FORMATS[decision.format].options(decision)
    keys = [key for key, _ in next(iter(every))]
    said, strict = _json_pairs(completion), True
    if said is None or [key for key, _ in said] != keys:
        strict, found = False, []
        for key in keys:
            values = _mentioned(key, decision, completion)
            if len(values) != 1:
                return ParseFailure(reason=f"more than one {key}" if values else f"no {key}")
            found.append((key, values.pop()))
        said = tuple(found)
    if said in every:
        return Parsed(action=every[said], strict=strict)
    unknown = [key for key, value in said if value not in _known(key, decision)]
    return ParseFailure(reason=f"unknown {unknown[0]}" if unknown else f"{keys[0]} not legal now")


def _known(key: str, decision: Decision) -> set[str | int]:
    """Values that a key can have at this junction, legal now or not."""
    if key == "phase":
        return {phase.name for phase in decision.junction.phases}
    return set(holds_s(decision)) if key == "duration" else {"yes", "no"}


def _mentioned(key: str, decision: Decision, text: str) -> set[str | int]:
    if key == "duration":
        # Any number counts as one that was named, offered or not.
        return {int(number) for number in re.findall(r"(?<![\w.-])\d{1,4}(?![\d.]\d)", text)}
    pattern = r"\b([A-Z]{1,2})\b" if key == "phase" else r"\b(yes|no)\b"
    return set(re.findall(pattern, text)) & _known(key, decision)


def _json_pairs(completion: str) -> Said | None:
    try:
        # As pairs: a dict would silently keep the last of two phases.
        answer = json.loads(completion, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, tuple) or not answer:
        return None
    plain = all(type(value) in (str, int) for _, value in answer)
    return answer if plain else None
