"""Group-relative advantages: how much better each completion was than its siblings.

Pure arithmetic. It knows no model and no simulator, and no group knows another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EQUAL_REWARDS = 1e-9
"""Rewards closer than this, relative to their size, are one reward: floats add up in any order."""


def group_advantages(
    rewards: Sequence[float], valid: Sequence[bool], *, scale_floor: float
) -> tuple[float, ...]:
    """Rewards centred over the valid completions and divided by max(deviation, scale_floor).

    A completion that is not valid gets 0 and takes no part in mean or deviation. The floor keeps
    instants where the choice hardly matters from being blown up to the size of those where it does.

    Example:
        group_advantages((-4.0, 4.0, 9.0), (True, True, False), scale_floor=8.0)
        == (-0.5, 0.5, 0.0)
    """
    if not scale_floor > 0:
        raise ValueError(f"scale_floor must be positive, got {scale_floor}")
    scored = _scored(rewards, valid)
    if _is_constant(scored):
        return (0.0,) * len(rewards)
    mean = math.fsum(scored) / len(scored)
    deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in scored) / len(scored))
    scale = max(deviation, scale_floor)
    return tuple((r - mean) / scale if v else 0.0 for r, v in zip(rewards, valid, strict=True))


def with_surprise(
    advantages: Tensor,
    logps: Tensor,
    strict: Tensor,
    valid: Tensor,
    *,
    coef: float,
    group_size: int,
) -> Tensor:
    """Advantages when each strict completion also earns -coef * log p; all of shape (rows,).

    Maximum-entropy reinforcement learning (Haarnoja et al. 2018, "Soft Actor-Critic", eq. 1) on
    actions: rare ones are worth more, so several stay alive while they are compared. Only an
    action's own spelling is paid: a policy that is paid for any rare text learns to misspell.

    Args:
        advantages: rows of a group side by side, groups of `group_size`.
        logps: log-probability of each completion as a whole.
        strict: completions that are paid.
        valid: completions that take part at all; the others get 0.
    """
    earned = -coef * logps * (strict & valid)
    rows = valid.view(-1, group_size)
    mean = earned.view(-1, group_size).sum(1, keepdim=True) / rows.sum(1, keepdim=True).clamp(min=1)
    centred = (earned.view(-1, group_size) - mean) * rows
    return advantages + centred.flatten()


def is_zero_variance(rewards: Sequence[float], valid: Sequence[bool]) -> bool:
    """True when the valid completions all earned the same, so that the group teaches nothing.

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
