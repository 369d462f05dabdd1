"""What one way to train hands to another, so that both do the same."""

from __future__ import annotations

from dataclasses import dataclass

from envs.types import Decision
from rl_ft.config import Config


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What to train on, and how often; travels as a pickle."""

    config: Config
    """That of the run the decisions come from; its behaviour has no share for the policy."""
    model: str
    """Folder."""
    told: tuple[Decision, ...]
    """The decisions as they were told: the phases in that order, by these names."""
    prompt_ids: tuple[tuple[int, ...], ...]
    pools: tuple[tuple[int, int], ...]
    """Seed and number of worlds of every pool that the decisions come from."""
    num_steps: int
