"""Reward health: what is counted every step, and when a run must stop instead of learning noise.

Pure. A budget is exceeded only after `patience` steps in a row, so one bad batch stops nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from rl_ft.config import Config


class HealthError(Exception):
    """The run stopped itself; the message names the budget that was exceeded."""


class HealthMonitor:
    """Watches the shares of failed, invalid and zero-variance work, and the entropy."""

    def __init__(self, config: Config) -> None:
        health, grpo = config.health, config.grpo
        self._budgets = {
            "health/failed_share": (health.max_failed_share, health.patience),
            "format/invalid_share": (health.max_invalid_share, health.patience),
            "health/zero_variance_share": (health.max_zero_variance_share, health.patience),
            "health/branch_disagreements": (0.0, 1),
        }
        self._min_entropy, self._entropy_patience = grpo.min_entropy, grpo.patience
        self._over: dict[str, int] = {}

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step's metrics.

        Raises:
            HealthError: a budget was exceeded for as many steps in a row as it tolerates.
        """
        for name, (bound, patience) in self._budgets.items():
            if name in metrics:
                self._count(step, name, metrics[name], metrics[name] > bound, bound, patience)
        if "entropy" in metrics:
            entropy, bound = metrics["entropy"], self._min_entropy
            self._count(step, "entropy", entropy, entropy < bound, bound, self._entropy_patience)

    def _count(
        self, step: int, name: str, value: float, bad: bool, bound: float, patience: int
    ) -> None:
        self._over[name] = self._over.get(name, 0) + 1 if bad else 0
        if self._over[name] >= patience:
            side = "below" if name == "entropy" else "above"
            raise HealthError(
                f"{name} has been {side} {bound:g} for {patience} steps (now {value:.3g} at step "
                f"{step}); look at metrics.jsonl, or change health.* and grpo.min_entropy"
            )
