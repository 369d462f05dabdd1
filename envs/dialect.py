"""How a junction speaks to a language model, and how an answer becomes an action.

Pure text on both sides; tokens are `rl_ft.render`'s business. A prompt holds only what detectors
could sense. Numbers come in a fixed order that the instructions explain, so a prompt is short.

Example of a prompt's user message:
    A 7 12: south through+right 2 1 0 0 15, south left yield shared 1 0 0 0 40, north ...
    B 1 1: south left 1 0 0 0 40, north left empty
    green A 25
    choose A B
and of an answer:
    {"phase": "B"}
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from envs.types import Action, Decision, LaneSpec, LaneState, ParseFailure, Turn

Message = dict[str, str]

INSTRUCTIONS = (
    "You control a traffic signal. Each line is a green phase: its queued vehicles, its queued "
    "and approaching vehicles, then every lane it opens with queued vehicles, moving vehicles at "
    "0-50, 50-100 and 100-200 m, and the seconds its first vehicle has waited. yield: must give "
    "way. shared: the lane also has turns that this phase does not open. full: the road behind "
    "the junction is full. Choose the next green phase to keep everyone's delay small. Answer "
    'with JSON only, like {"phase": "A"}.'
)

_SECTORS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
_TURN_ORDER: tuple[Turn, ...] = ("turnaround", "left", "through", "right")
_TURN_SETS = tuple(
    "+".join(turn for bit, turn in enumerate(_TURN_ORDER) if mask >> bit & 1)
    for mask in range(1, 16)
)
FULL_BELOW = 0.2
"""Share of free space behind the junction below which a phase is called full."""

VOCABULARY: tuple[str, ...] = (
    "yield",
    "shared",
    "empty",
    "full",
    "green",
    "choose",
    *_SECTORS,
    *(f"{sector}{i}" for sector in _SECTORS for i in (2, 3)),
    *_TURN_SETS,
)
"""The words of the prompts, for tokenizers that are built for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parsed:
    """An action, and whether the completion was exactly the JSON asked for."""

    action: Action
    strict: bool


def messages(decision: Decision, *, instructions: bool = True) -> list[Message]:
    """The chat that asks for a decision; a model trained on the dialect needs no instructions."""
    user = {"role": "user", "content": observation_text(decision)}
    return [{"role": "system", "content": INSTRUCTIONS}, user] if instructions else [user]


def observation_text(decision: Decision) -> str:
    """What the junction sees, one line per phase, then what runs and what may be chosen."""
    junction, observation = decision.junction, decision.observation
    lines = []
    for i, phase in enumerate(junction.phases):
        states = [observation.lanes[lane] for lane in phase.lanes]
        queue = sum(state.queue_veh for state in states)
        wave = queue + sum(sum(state.moving_veh) for state in states)
        full = " full" if observation.downstream_free[i] < FULL_BELOW else ""
        lanes = ", ".join(
            _lane_text(junction.lanes[lane], observation.lanes[lane], turns, protected)
            for lane, turns, protected in zip(
                phase.lanes, phase.turns, phase.protected, strict=True
            )
        )
        lines.append(f"{phase.name} {queue} {wave}{full}: {lanes}")
    running = junction.phases[observation.current].name
    lines.append(f"green {running} {round_s(observation.green_s)}")
    lines.append(f"choose {' '.join(decision.legal_names())}")
    return "\n".join(lines)


def _lane_text(lane: LaneSpec, state: LaneState, turns: Sequence[Turn], protected: bool) -> str:
    words = [lane.approach, "+".join(turns)]
    if not protected:
        words.append("yield")
    if set(turns) != set(lane.turns):
        words.append("shared")
    if state.queue_veh == 0 and not any(state.moving_veh):
        words.append("empty")
    else:
        numbers = (state.queue_veh, *state.moving_veh, round_s(state.first_wait_s))
        words.extend(str(number) for number in numbers)
    return " ".join(words)


def round_s(seconds: int) -> int:
    """Durations in steps of 5 s, from a minute on of 15 s, at most 240 s: fewer words to learn."""
    step = 5 if seconds < 60 else 15
    return min(240, step * round(seconds / step))


def answer_text(decision: Decision, action: Action) -> str:
    """The completion that names an action."""
    return json.dumps({"phase": decision.junction.phases[action.phase].name})


def parse(decision: Decision, completion: str) -> Parsed | ParseFailure:
    """The one legal phase the completion names, else why there is none.

    Strict is exactly the JSON asked for. Otherwise one phase must be recognisable; naming two is
    a failure: guessing which was meant would reward hedging.
    """
    names = [phase.name for phase in decision.junction.phases]
    name, strict = _json_phase(completion), True
    if name is None:
        found = set(re.findall(r"\b([A-Z]{1,2})\b", completion)) & set(names)
        if len(found) != 1:
            return ParseFailure(reason="no phase" if not found else "more than one phase")
        name, strict = found.pop(), False
    if name not in names:
        return ParseFailure(reason="unknown phase")
    index = names.index(name)
    if index not in decision.legal:
        return ParseFailure(reason="phase not legal now")
    return Parsed(action=Action(phase=index), strict=strict)


def _json_phase(completion: str) -> str | None:
    try:
        # As pairs: a dict would silently keep the last of two phases.
        answer = json.loads(completion, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return None
    if isinstance(answer, tuple) and len(answer) == 1:
        key, name = answer[0]
        return name if key == "phase" and isinstance(name, str) else None
    return None
