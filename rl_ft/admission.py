"""Which weights may sample for which optimiser step: staleness bounded before anything is sampled.

Pure. Versions and steps are counted from 0, and step t trains the weights of version t. What is
bounded here is by how many versions its groups may be older. Nothing is sampled to be thrown away
for its age.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rl_ft.types import RolloutGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """The oldest version that may sample for a step: `max_staleness` back, never beyond a fence.

    With `max_staleness` 0 every version samples for its own step and no other: the loop is
    synchronous. Otherwise it is so at the fences alone, every `fence_steps` steps, where the
    checkpoints are. That costs one overlap each, and two things follow. A run that goes on from a
    checkpoint samples every step under the version under which it would have been sampled anyway.
    And at a fence trainer and sampler hold the same weights, so their log-probs can be compared
    exactly: a broken sync is found within `fence_steps` steps, whatever older rows may hide.

    Example:
        admission = Admission(max_staleness=1, fence_steps=10, num_steps=300)
        [admission.oldest_version(step) for step in (8, 9, 10, 11)]   # 7, 8, 10, 10
        admission.opened(10, version=10)   # range(10, 12)
    """

    max_staleness: int
    fence_steps: int
    num_steps: int
    """Steps from this one on are never trained, so nothing is sampled for them."""

    def oldest_version(self, step: int) -> int:
        """What may sample for a step, at the oldest."""
        return max(step - self.max_staleness, step - step % self.fence_steps)

    def admits(self, step: int, version: int) -> bool:
        """Whether a step may train on what a version sampled."""
        return self.oldest_version(step) <= version <= step

    def opened(self, next_step: int, version: int) -> range:
        """The steps, from `next_step` on, that are sampled for once `version` is loaded."""
        end = next_step
        while end < self.num_steps and self.oldest_version(end) <= version:
            end += 1
        return range(next_step, end)


def staleness(step: int, groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """By how many versions the groups of a step are older than the weights that they train."""
    ages = [step - group.weights_version for group in groups]
    return {"staleness/mean": sum(ages) / len(ages), "staleness/max": float(max(ages))}
