"""What a group teaches when each of its answers weighs what it weighs in the policy.

The other way, TRL's, is that every row of a group counts alike, as often as it was sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The policy that a group is drawn to: softmax(reward / temperature) over its legal answers.

    That is the policy of maximum entropy (Haarnoja et al. 2018, "Soft Actor-Critic", section 4).
    """

    coef: float
    """Weight of KL(target || policy) against the reward."""
    temperature: float

    def advantages(
        self,
        rewards: Tensor,
        logps: Tensor,
        completion_ids: Tensor,
        times_given: Tensor,
        canonical: Tensor,
        valid: Tensor,
        *,
        group_size: int,
    ) -> Tensor:
        """By which a group ascends E_p[reward] - coef * KL(target || p); shape (rows,).

        p is the policy over the group's answers: canonical ones weigh what they weigh in the
        policy, instead of how often they were drawn; others, of which a group never holds all, as
        often as they were given. The first term is the group's policy gradient with less of the
        chance of sampling; alone, it leaves an answer alone that the policy never gives. The second
        one lifts it, however unlikely it is (Abdolmaleki et al. 2018, "Maximum a Posteriori Policy
        Optimisation", fits to such a target). Its gradient in the log-odds is p - target, so bad
        answers cost little once they are rare. Rows that hold the same answer share its weight;
        the sum over a group is 0.

        Args:
            rewards: rows of a group side by side, groups of `group_size`; any shift within a group.
            logps: log-probability of each completion as a whole.
            completion_ids: (rows, tokens), which say who holds the same answer.
            times_given: how often the policy gave each.
            canonical: a legal answer in its own tokens. A misspelling is never a target.
            valid: completions that take part at all; the others get 0.
        """
        by_group = (-1, group_size)
        alive, rewards = valid.view(by_group), rewards.view(by_group)
        good = alive & canonical.view(by_group)
        ids = completion_ids.view(*by_group, completion_ids.shape[1])
        same = (ids[:, :, None] == ids[:, None]).all(-1) & alive[:, None]
        share = -same.sum(-1).clamp(min=1).to(rewards.dtype).log()

        given = times_given.view(by_group) * alive
        others = given * ~good / given.sum(1, keepdim=True).clamp(min=1)
        among_good = _softmax(logps.view(by_group) + share, good)
        policy = others + (1 - others.sum(1, keepdim=True)) * among_good
        target = _softmax(rewards / self.temperature + share, good)
        target = torch.where(good.any(1, keepdim=True), target, policy)
        gain = policy * (rewards - (policy * rewards).sum(1, keepdim=True))
        return (group_size * (gain + self.coef * (target - policy))).flatten()


def _softmax(logits: Tensor, among: Tensor) -> Tensor:
    """Over those of a group that are among them; 0 for the others, and where nobody is."""
    return torch.softmax(logits.masked_fill(~among, -torch.inf), 1).nan_to_num(0.0)
