"""What a group teaches when each of its answers weighs what it weighs in the policy.

The other way, TRL's, is that every row of a group counts alike, as often as it was sampled.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expected_advantages(
    rewards: Tensor,
    logps: Tensor,
    completion_ids: Tensor,
    canonical: Tensor,
    valid: Tensor,
    *,
    coef: float,
    temperature: float,
    group_size: int,
) -> Tensor:
    """Advantages by which a group ascends E_p[reward] - coef * KL(target || p); shape (rows,).

    p is the policy over the group's answers, each weighing what it weighs there instead of how
    often it was drawn, and target is softmax(reward / temperature) over the canonical ones, the
    policy of maximum entropy (Haarnoja et al. 2018, "Soft Actor-Critic", section 4). The first term
    is the group's policy gradient without the chance of sampling; alone, it leaves an answer alone
    that the policy never gives. The second one lifts it, however unlikely it is (Abdolmaleki et al.
    2018, "Maximum a Posteriori Policy Optimisation", fits to such a target). Its gradient in the
    log-odds is p - target, so bad answers cost little once they are rare. Rows that hold the same
    answer share its weight; the sum over a group is 0.

    Args:
        rewards: rows of a group side by side, groups of `group_size`; any shift within a group.
        logps: log-probability of each completion as a whole.
        completion_ids: (rows, tokens), which say who holds the same answer.
        canonical: a legal answer in its own tokens. A misspelling is never a target.
        valid: completions that take part at all; the others get 0.
    """
    by_group = (-1, group_size)
    alive, rewards = valid.view(by_group), rewards.view(by_group)
    ids = completion_ids.view(*by_group, completion_ids.shape[1])
    same = (ids[:, :, None] == ids[:, None]).all(-1) & alive[:, None]
    share = -same.sum(-1).clamp(min=1).to(logps.dtype).log()
    nothing = torch.full_like(rewards, -torch.inf)
    policy = _shares(torch.where(alive, logps.view(by_group) + share, nothing))
    good = alive & canonical.view(by_group)
    target = _shares(torch.where(good, rewards / temperature + share, nothing))
    target = torch.where(good.any(1, keepdim=True), target, policy)
    gain = policy * (rewards - (policy * rewards).sum(1, keepdim=True))
    return (group_size * (gain + coef * (target - policy))).flatten()


def _shares(logits: Tensor) -> Tensor:
    """Softmax over a group; 0 everywhere in one in which nobody takes part."""
    return torch.softmax(logits, 1).nan_to_num(0.0)
