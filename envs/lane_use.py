"""Which lanes of an approach may turn where, drawn as streets are marked.

Lanes are counted from the kerb and turns from the right, so paths that keep both orders never
cross.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence


def target_lanes(num: int, lanes_out: int, turn: str) -> list[int]:
    """Right turns and through traffic keep to the kerb; left turns to the middle of the road."""
    if turn == "left":
        return list(range(lanes_out - num, lanes_out))
    return list(range(num))


def draw_lane_use(
    rng: random.Random, num_lanes: int, turns: Sequence[str]
) -> list[tuple[int, ...]]:
    """Lanes (from the kerb) of each turn (from the right), so that paths never cross.

    Neighbouring turns may share the lane between them. Drawn from all such layouts, weighted by
    how common they are.
    """
    layouts, weights = [], []
    for path in _monotone_paths(num_lanes, len(turns)):
        used = [tuple(lane for lane, t in path if t == i) for i in range(len(turns))]
        weight = 1.0
        for turn, own in zip(turns, used, strict=True):
            if turn != "through" and len(own) > 1:
                weight *= 0.06 if len(own) == 2 and turns.count("through") == 0 else 0.02
            if turn == "through" and len(own) == 1 and num_lanes > 1:
                weight *= 0.5
        for lane in range(num_lanes):
            sharing = [turns[i] for i, own in enumerate(used) if lane in own]
            if len(sharing) > 2 and num_lanes > 1:
                weight *= 0.1
            if sharing == ["right"]:
                weight *= 0.4
        layouts.append(used)
        weights.append(weight)
    return rng.choices(layouts, weights)[0]


def _monotone_paths(num_lanes: int, num_turns: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """All ways to walk from (0, 0) to the last lane and turn by steps of a lane, a turn or both."""

    def walk(path: tuple[tuple[int, int], ...]) -> Iterator[tuple[tuple[int, int], ...]]:
        lane, turn = path[-1]
        if (lane, turn) == (num_lanes - 1, num_turns - 1):
            yield path
            return
        for d_lane, d_turn in ((1, 0), (0, 1), (1, 1)):
            if lane + d_lane < num_lanes and turn + d_turn < num_turns:
                yield from walk((*path, (lane + d_lane, turn + d_turn)))

    return walk(((0, 0),))
