"""How a junction speaks to a language model.

Pure text; tokens are `rl_ft.render`'s business, answers are that of `envs.answers`. A prompt holds
only what detectors could sense: one line per green phase, its lanes first, then their totals, and
last the word that chooses the phase, if it may be chosen now. Every number carries its field's
letter, so that a word says by itself what it counts.

Example of a prompt's user message (B runs; both may be chosen):
    south through+right q2 n1 w15, north through empty: q2 n1 m0 f0 w15 choose A
    south left shared q1 w40, north left empty: green g25 t10 q1 n0 m0 f0 w40 choose B
and of an answer:
    {"phase": "A"}
"""

from __future__ import annotations

from collections.abc import Sequence

from envs.answers import FORMATS, choice_words
from envs.types import SECTORS, TURNS, Decision, LaneSpec, LaneState, Turn

Message = dict[str, str]

INSTRUCTIONS = (
    "You control a traffic signal. Each line is a green phase: the lanes it opens, then their "
    "totals. q: queued vehicles; n, m, f: moving vehicles at 0-50, 50-100 and 100-200 m; w: "
    "seconds the first vehicle has waited (the longest, in totals). yield: must give way. shared: "
    "the lane also has turns that this phase does not open. blocked: it has green, yet its first "
    "vehicle stands. full: the road behind the junction is full. inside, i: vehicles that stand "
    "within the junction on the phase's ways. u, v: more queued and moving vehicles within 200 m, "
    "on roads that lead here and elsewhere. green: the running phase; g: its seconds, t: "
    "those from one choice to the next."
)

_TURN_SETS = tuple(
    "+".join(turn for bit, turn in enumerate(TURNS) if mask >> bit & 1) for mask in range(1, 16)
)
BLOCKED_AFTER_S = 10
"""Seconds of green after which a first vehicle that has stood as long is called blocked: it waits
for a gap or for another turn's green, and nobody behind it gets through."""

FULL_BELOW = 0.2
"""A phase is called full where standing vehicles leave less than this share of a lane behind the
junction."""

COUNTS, DURATIONS = "qnmfiuv", "wgt"
"""Field letters of vehicle counts and of seconds."""
MAX_COUNT = 99


def round_s(seconds: int) -> int:
    """Durations in steps of 5 s, from a minute on of 15 s, at most 240 s: fewer words to learn."""
    step = 5 if seconds < 60 else 15
    return min(240, step * round(seconds / step))


VOCABULARY: tuple[str, ...] = (
    "yield",
    "shared",
    "blocked",
    "empty",
    "full",
    "green",
    "inside",
    "choose",
    "yes",
    "no",
    *(f"{letter}{n}" for letter in COUNTS for n in range(MAX_COUNT + 1)),
    *(f"{letter}{n}" for letter in DURATIONS for n in sorted({round_s(s) for s in range(241)})),
    *SECTORS,
    *(f"{sector}{i}" for sector in SECTORS for i in (2, 3)),
    *_TURN_SETS,
)
"""The words of the prompts, for tokenizers that are built for them."""


def messages(decision: Decision, *, instructions: bool = True) -> list[Message]:
    """The chat that asks for a decision; a model trained on the dialect needs no instructions."""
    user = {"role": "user", "content": observation_text(decision)}
    asks = f"{INSTRUCTIONS} Keep everyone's delay small. {FORMATS[decision.format].asks}"
    return [{"role": "system", "content": asks}, user] if instructions else [user]


def observation_text(decision: Decision) -> str:
    """What the junction sees, one line per phase."""
    choices = choice_words(decision)
    num = len(decision.junction.phases)
    return "\n".join(_phase_text(decision, i, choices.get(i)) for i in range(num))


def _phase_text(decision: Decision, index: int, choice: str | None) -> str:
    junction, observation = decision.junction, decision.observation
    phase = junction.phases[index]
    states = [observation.lanes[lane] for lane in phase.lanes]
    running = index == observation.current and observation.green_s >= BLOCKED_AFTER_S
    lanes = ", ".join(
        _lane_text(junction.lanes[lane], observation.lanes[lane], turns, protected, running=running)
        for lane, turns, protected in zip(phase.lanes, phase.turns, phase.protected, strict=True)
    )
    words = []
    if observation.downstream_free[index] < FULL_BELOW:
        words.append("full")
    if index == observation.current:
        interval_s = decision.timing.decision_interval_s
        words.append(f"green g{round_s(observation.green_s)} t{round_s(interval_s)}")
    if observation.inside_veh[index]:
        words.append(f"inside i{min(observation.inside_veh[index], MAX_COUNT)}")
    words.append(_fields(_total(states, observation.upstream_veh[index])))
    if choice is not None:
        words.append(f"choose {choice}")
    return f"{lanes}: {' '.join(words)}"


def _lane_text(
    lane: LaneSpec, state: LaneState, turns: Sequence[Turn], protected: bool, *, running: bool
) -> str:
    words = [lane.approach, "+".join(turns)]
    if not protected:
        words.append("yield")
    if set(turns) != set(lane.turns):
        words.append("shared")
    if running and state.first_wait_s >= BLOCKED_AFTER_S:
        words.append("blocked")
    words.append(_fields(state, skip_zeros=True) or "empty")
    return " ".join(words)


def _total(states: Sequence[LaneState], upstream_veh: tuple[int, int]) -> LaneState:
    near, mid, far = (sum(state.moving_veh[i] for state in states) for i in range(3))
    return LaneState(
        queue_veh=sum(state.queue_veh for state in states),
        moving_veh=(near, mid, far),
        first_wait_s=max((state.first_wait_s for state in states), default=0),
        upstream_veh=upstream_veh,
    )


def _fields(state: LaneState, *, skip_zeros: bool = False) -> str:
    near, mid, far = state.moving_veh
    counts = {"q": state.queue_veh, "n": near, "m": mid, "f": far}
    values = {letter: min(count, MAX_COUNT) for letter, count in counts.items()}
    values["w"] = round_s(state.first_wait_s)
    shown = {letter: value for letter, value in values.items() if value or not skip_zeros}
    # Most lanes have nothing upstream that is not theirs alone.
    upstream = dict(zip("uv", state.upstream_veh, strict=True))
    shown |= {letter: min(count, MAX_COUNT) for letter, count in upstream.items() if count}
    return " ".join(f"{letter}{value}" for letter, value in shown.items())
