"""Group-relative advantages: how much better each completion was than its siblings.

Pure arithmetic. It knows no model and no simulator, and no group knows another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

EQUAL_REWARDS = 1e-9
"""Rewards closer than this, relative to their size, are one reward: floats add up in any order."""


def group_advantages(rewards: Sequence[float], valid: Sequence[bool]) -> tuple[float, ...]:
    """Rewards centred over the valid completions; TRL's `scale_rewards="none"`.

    Not divided by the group's deviation, which would blow instants where the choice hardly matters
    up to the size of those where it does (Liu et al. 2025, "Understanding R1-Zero-Like Training").
    A completion that is not valid gets 0 and takes no part in the mean.

    Example:
        group_advantages((-4.0, 4.0, 9.0), (True, True, False)) == (-4.0, 4.0, 0.0)
    """
    scored = _scored(rewards, valid)
    if _is_constant(scored):
        return (0.0,) * len(rewards)
    mean = math.fsum(scored) / len(scored)
    return tuple(r - mean if v else 0.0 for r, v in zip(rewards, valid, strict=True))


def is_zero_variance(rewards: Sequence[float], valid: Sequence[bool]) -> bool:
    """True when the valid completions all earned the same, so that no reward tells them apart.

    A group with fewer than two valid completions has nothing to compare and counts as one.
    """
    return _is_constant(_scored(rewards, valid))


def _scored(rewards: Sequence[float], valid: Sequence[bool]) -> list[float]:
    if len(rewards) != len(valid):
        raise ValueError(f"{len(rewards)} rewards but {len(valid)} validity flags")
    for reward in rewards:
        # Also where it is masked: a NaN anywhere means that whoever computed it is broken.
        if not math.isfinite(reward):
            raise ValueError(f"a reward must be finite, got {reward}")
    return [r for r, v in zip(rewards, valid, strict=True) if v]


def _is_constant(scored: Sequence[float]) -> bool:
    if not scored:
        return True
    return max(scored) - min(scored) <= EQUAL_REWARDS * max(map(abs, scored))
