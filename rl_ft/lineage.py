"""Which weights sampled which groups: what it takes to find out why an update was refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rl_ft.types import RolloutGroup, WeightsRef


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspects:
    """Groups that the trainer disagrees with, and the weights that may have sampled them."""

    groups: tuple[RolloutGroup, ...]
    claimed: WeightsRef
    """What the sampler said it had loaded."""
    earlier: tuple[WeightsRef, ...]
    """Other weights that it may have had instead, the likeliest first."""


class Lineage:
    """The latest weights that were loaded and the groups sampled since; no more than may matter.

    An update is refused while the sampler is at most `max_staleness` versions ahead of what its
    groups were sampled under. Beside those versions and the one before them, the last one is kept
    at which trainer and sampler held the same weights and agreed: what a sync that has done nothing
    ever since still has.
    """

    def __init__(self, max_staleness: int) -> None:
        self._max_staleness = max_staleness
        self._loaded: list[WeightsRef] = []
        self._compared: list[WeightsRef] = []
        self._groups: dict[int, tuple[RolloutGroup, ...]] = {}

    def load(self, weights: WeightsRef) -> None:
        """The sampler was told to answer with these weights from now on."""
        self._loaded = [*self._loaded[-1 - self._max_staleness :], weights]
        # That they were published means that what was compared before them agreed.
        self._compared = self._compared[-1:]

    def sample(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """The groups of a step came from the weights loaded last."""
        first = step - self._max_staleness
        kept = {s: g for s, g in self._groups.items() if first <= s < step}
        self._groups = {**kept, step: tuple(groups)}
        if self._loaded[-1].version == step:
            self._compared.append(self._loaded[-1])

    def groups(self, step: int) -> tuple[RolloutGroup, ...]:
        """What was sampled for a step; KeyError once it cannot matter any more."""
        return self._groups[step]

    def suspects(self, step: int) -> Suspects:
        """What a refused update of this step may be about."""
        groups = self.groups(step)
        version = min(group.weights_version for group in groups)
        place = max(i for i, ref in enumerate(self._loaded) if ref.version == version)
        claimed = self._loaded[place]
        earlier = {ref.digest: ref for ref in (*self._loaded[:place][::-1], *self._compared)}
        earlier.pop(claimed.digest, None)
        return Suspects(groups=groups, claimed=claimed, earlier=tuple(earlier.values()))
