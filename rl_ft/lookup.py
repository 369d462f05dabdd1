"""Worlds without a simulation: instants and what they lead to come from a dataset.

Stands where `rl_ft.worlds.WorldPool` stands. What it says of an instant is what the fork measured
when the dataset was written, so rewards are the same; nothing is executed, and every instant comes
once before any comes again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from rl_ft.states import DecisionState
from rl_ft.worlds import Order, Standing, State, Trial, Tried


class LookupPool:
    """`num_worlds` instants at a time, in an order that the seed and the ids decide.

    The order of `states` does not matter: what belongs together is one row.
    """

    def __init__(self, states: Sequence[DecisionState], *, seed: int, num_worlds: int) -> None:
        self._states = sorted(states, key=lambda state: state.id)
        self._rng = random.Random(seed)
        self._num_worlds = num_worlds
        self._ahead: list[DecisionState] = []
        self._asked: list[DecisionState] = []

    def states(self) -> list[State]:
        """The next instants."""
        while len(self._ahead) < self._num_worlds:
            self._ahead = self._rng.sample(self._states, len(self._states)) + self._ahead
        self._asked = [self._ahead.pop() for _ in range(self._num_worlds)]
        return [state.decision for state in self._asked]

    def settle(self, orders: Sequence[Order | None]) -> list[Tried | None]:
        """What each trial led to."""
        return [
            _look_up(self._asked[i], order) if isinstance(order, Trial) else None
            for i, order in enumerate(orders)
        ]

    def standing(self) -> list[Standing]:
        """See `WorldPool.standing`; the instants that are ahead are named by their places."""
        places = {state.id: i for i, state in enumerate(self._states)}
        ahead = tuple(places[state.id] for state in self._ahead)
        return [Standing(random_state=self._rng.getstate(), ahead=ahead)]

    def stand(self, standings: Sequence[Standing]) -> None:
        """See `WorldPool.stand`."""
        [standing] = standings
        self._rng.setstate(standing.random_state)
        self._ahead = [self._states[place] for place in standing.ahead]

    def close(self) -> None:
        """Nothing to end."""


def _look_up(state: DecisionState, trial: Trial) -> Tried:
    # One action alone is not simulated, so it has no outcome here either.
    actions = trial.actions if len(trial.actions) > 1 else ()
    return Tried(outcomes={action: state.outcomes[action] for action in actions})
