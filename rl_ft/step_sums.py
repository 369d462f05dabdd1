"""What an optimiser step adds up over micro-batches and ranks: the same however it is split."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

OBJECTIVE = ("clip_ratio", "cispo_clip", "vespo", "kl")
"""How TRL's metrics of the objective begin."""


class StepSums:
    """Figures over the tokens that the policy gave, as often as it gave them, and seconds."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("fetch", "forward", "backward", "publish"), 0.0)
        self._started = time.perf_counter()
        self._sizes: list[Tensor] = []
        self._sums: Tensor | None = None
        self._largest: Tensor | None = None

    def add_time(self, stage: str, seconds: float) -> None:
        """Of this rank."""
        self.seconds[stage] += seconds

    def add_size(self, mask: Tensor) -> None:
        """Tokens that a micro-batch trains on, and its rows."""
        self._sizes.append(torch.stack([mask.sum(), mask.new_tensor(len(mask))]))

    def add_tokens(
        self, logps: Tensor, entropies: Tensor, old_logps: Tensor, weights: Tensor
    ) -> None:
        """Of a micro-batch; `weights` say how often the policy gave each token."""
        difference = (logps - old_logps).detach().float()
        sums = torch.stack(
            [
                weights.sum().float(),
                (entropies * weights).detach().sum().float(),
                (difference.abs() * weights).sum(),
                (difference * weights).sum(),
            ]
        )
        largest = (difference.abs() * (weights > 0)).max()
        self._sums = sums if self._sums is None else self._sums + sums
        self._largest = largest if self._largest is None else self._largest.maximum(largest)

    def mean_abs_logp_diff(self, accelerator: Any) -> float:
        """Trainer against sampler, over all given tokens of all ranks so far."""
        tokens, _, absolute, _ = accelerator.reduce(self._sums, reduction="sum").tolist()
        return absolute / max(tokens, 1.0)

    def metrics(
        self, accelerator: Any, named: Mapping[str, Sequence[float]], *, level: str
    ) -> dict[str, float]:
        """Means over all given tokens of all ranks; `num_tokens` is how many were trained on.

        Of what TRL has `named`, one value per micro-batch each, the metrics of the objective;
        `level` is that of its importance sampling.
        """
        tokens, entropy, absolute, signed = accelerator.reduce(self._sums, reduction="sum").tolist()
        sizes = accelerator.reduce(torch.stack(self._sizes), reduction="sum").T.tolist()
        largest = accelerator.gather(self._largest).max().item()
        count = max(tokens, 1.0)
        total = time.perf_counter() - self._started
        seconds = {f"learner/{stage}_s": value for stage, value in self.seconds.items()}
        return {
            **_objective(named, *sizes, level=level),
            "entropy": entropy / count,
            "num_tokens": float(sum(sizes[0])),
            "mismatch/mean_abs_logp_diff": absolute / count,
            "mismatch/max_abs_logp_diff": largest,
            "mismatch/mean_logp_diff": signed / count,
            **seconds,
            "learner/other_s": total - sum(self.seconds.values()),
            "learner/step_s": total,
        }


def _objective(
    named: Mapping[str, Sequence[float]],
    tokens: Sequence[int],
    rows: Sequence[int],
    *,
    level: str,
) -> dict[str, float]:
    """TRL takes means over a micro-batch's tokens, or over its rows where there is one figure for
    each; their plain mean would depend on how the groups were split."""
    found = {}
    for name, values in named.items():
        if not name.startswith(OBJECTIVE):
            continue
        if name.endswith(("_min", "_max")):
            # Of a micro-batch whose rows all failed there is none.
            known = [value for value in values if not math.isnan(value)]
            if known:
                found[name] = (min if name.endswith("_min") else max)(known)
            continue
        by_row = name.startswith("vespo") or (level == "sequence" and name != "kl")
        sizes = rows if by_row else tokens
        total = sum(value * size for value, size in zip(values, sizes, strict=True))
        found[name] = total / max(sum(sizes), 1)
    return found
