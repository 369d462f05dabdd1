"""Scored groups to the tensors that TRL's GRPO objective reads.

Prompts are padded on the left and completions on the right, each to the longest of the batch. The
sampler's log-probs are the old policy: TRL's ratio is then that of the policy in training to
whatever sampled, however old its weights, and TRL clips it. (TRL's `vllm_importance_sampling_*`
options correct between a sampler and an old policy that is computed apart; they do nothing where
TRL does not sample by itself.) A row that nobody sampled has none, and was given 0 times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from rl_ft.types import RolloutGroup

if TYPE_CHECKING:
    from torch import Tensor


def collate(groups: Sequence[RolloutGroup], *, pad_token_id: int) -> dict[str, Tensor]:
    """One row per completion, the rows of a group side by side.

    A row that is not valid keeps its place, but its completion mask is 0: it is trained on by
    nothing and counted by nothing.
    """
    import torch

    _check(groups)
    rows = [
        (g.prompt_ids, *row)
        for g in groups
        for row in zip(
            g.completions, g.advantages, g.valid, g.canonical, g.times_given, strict=True
        )
    ]
    prompt_width = max(len(prompt) for prompt, *_ in rows)
    completion_width = max(1, *(len(c.token_ids) for _, c, *_ in rows))
    prompt_ids = [[pad_token_id] * (prompt_width - len(p)) + list(p) for p, *_ in rows]
    prompt_mask = [[0] * (prompt_width - len(p)) + [1] * len(p) for p, *_ in rows]
    completion_ids, completion_mask, logps, advantages = [], [], [], []
    for _, completion, advantage, valid, *_ in rows:
        advantages.append(advantage if valid else 0.0)
        length = len(completion.token_ids)
        padding = completion_width - length
        completion_ids.append(list(completion.token_ids) + [pad_token_id] * padding)
        completion_mask.append([int(valid)] * length + [0] * padding)
        known = completion.logprobs if valid and completion.logprobs else (0.0,) * length
        logps.append([*known] + [0.0] * padding)
    mask = torch.tensor(completion_mask)
    return {
        "prompt_ids": torch.tensor(prompt_ids),
        "prompt_mask": torch.tensor(prompt_mask),
        "completion_ids": torch.tensor(completion_ids),
        "completion_mask": mask,
        "advantages": torch.tensor(advantages, dtype=torch.float32),
        "old_per_token_logps": torch.tensor(logps, dtype=torch.float32),
        "canonical_mask": torch.tensor([canonical for *_, canonical, _ in rows]),
        "times_given": torch.tensor([times for *_, times in rows]),
        "num_items_in_batch": mask.sum(),
    }


def split(groups: Sequence[RolloutGroup], num_parts: int) -> list[list[RolloutGroup]]:
    """Whole groups in `num_parts` parts of nearly equal size, groups of like length together.

    Padding reaches only as far as the longest group of a part, so like goes with like.
    """
    if len(groups) < num_parts:
        raise ValueError(
            f"{num_parts} micro-batches need at least as many groups, got {len(groups)}"
        )
    by_length = sorted(groups, key=_length)
    bounds = [round(i * len(groups) / num_parts) for i in range(num_parts + 1)]
    return [by_length[a:b] for a, b in pairwise(bounds)]


def share_of(groups: Sequence[RolloutGroup], rank: int, num_ranks: int) -> list[RolloutGroup]:
    """The groups that one of several learners trains on: every one belongs to exactly one rank.

    Long and short ones are dealt in turn, so that nobody waits long for the others.
    """
    return sorted(groups, key=_length)[rank::num_ranks]


def _length(group: RolloutGroup) -> tuple[int, str]:
    return len(group.prompt_ids), group.group_id


def _check(groups: Sequence[RolloutGroup]) -> None:
    if not groups:
        raise ValueError("a batch needs at least one group")
    sizes = {len(g.completions) for g in groups}
    if len(sizes) != 1:
        raise ValueError(f"all groups of a batch need the same size, got {sorted(sizes)}")
    for group in groups:
        if not group.prompt_ids:
            raise ValueError(f"{group.group_id}: the prompt is empty")
        for completion, advantage, valid, times in zip(
            group.completions, group.advantages, group.valid, group.times_given, strict=True
        ):
            if (completion.logprobs is None) != (times == 0):
                raise ValueError(
                    f"{group.group_id}: a completion was given {times} times, "
                    f"{'without' if completion.logprobs is None else 'with'} log-probs"
                )
            logprobs = completion.logprobs or ()
            if completion.logprobs is not None and len(completion.token_ids) != len(logprobs):
                raise ValueError(
                    f"{group.group_id}: {len(completion.token_ids)} tokens but "
                    f"{len(logprobs)} log-probs"
                )
            if valid and not all(map(math.isfinite, (advantage, *logprobs))):
                raise ValueError(f"{group.group_id}: advantages and log-probs must be finite")
