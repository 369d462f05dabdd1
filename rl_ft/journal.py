"""What was done to a simulation since its episode began, so that another one can be brought there.

SUMO's own saved states do not continue exactly; the same moves from the same beginning do. Only
what changes a world is written down: looking and branching leave no trace.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from envs.scenario import load_scenario
from envs.types import JointAction, Outcome
from envs.world import World

PLAYED_S = 1.0
"""Of a played action only the executed interval changes the world, not what would follow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """One thing that was done: followed a controller, stepped, or played an action."""

    kind: Literal["drive", "step", "play"]
    controller: str = ""
    until_s: float = 0.0
    actions: JointAction = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Journal:
    """An episode's beginning, and every move since."""

    scenario: str
    seed: int
    moves: tuple[Move, ...] = ()


class JournaledWorld:
    """A `World` that writes down what is done to it.

    Example:
        world.reset("generated:1", seed=7)
        world.drive("max_wave", 300)
        other.replay(world.journal())   # stands where world stands, vehicle for vehicle
    """

    def __init__(self, *, timeout_s: float) -> None:
        self.plain = World(timeout_s=timeout_s)
        self._begin: Journal | None = None
        self._moves: list[Move] = []

    def reset(self, scenario: str, seed: int) -> None:
        """Begin an episode of a scenario, by its name."""
        self.plain.reset(load_scenario(scenario), seed)
        self._begin, self._moves = Journal(scenario=scenario, seed=seed), []

    def drive(self, controller: str, until_s: float) -> None:
        """See `World.drive`."""
        self._do(Move(kind="drive", controller=controller, until_s=until_s))

    def step(self, actions: JointAction) -> None:
        """See `World.step`."""
        self._do(Move(kind="step", actions=actions))

    def play(self, actions: JointAction, follow: str) -> Outcome:
        """See `World.play`: one decision interval."""
        outcome = self._do(Move(kind="play", controller=follow, actions=actions))
        assert outcome is not None
        return outcome

    def journal(self) -> Journal:
        """All of it; consecutive stretches of one controller are one."""
        assert self._begin is not None
        moves: list[Move] = []
        for move in self._moves:
            if moves and move.kind == "drive" and replace(moves[-1], until_s=move.until_s) == move:
                moves.pop()
            moves.append(move)
        return replace(self._begin, moves=tuple(moves))

    def replay(self, journal: Journal) -> None:
        """Begin the episode of a journal and do all that it says."""
        self.reset(journal.scenario, journal.seed)
        for move in journal.moves:
            self._do(move)

    def _do(self, move: Move) -> Outcome | None:
        outcome = None
        if move.kind == "drive":
            self.plain.drive(move.controller, move.until_s)
        elif move.kind == "step":
            self.plain.step(move.actions)
        else:
            outcome = self.plain.play(move.actions, PLAYED_S, move.controller)
        self._moves.append(move)
        return outcome
