"""The carriers of the training loop: what generation, rollout, buffer and learner hand each other.

They hold plain Python values (ids, floats, text), so they travel through Ray as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rl_ft.meeting import Offer


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One answer, with what the sampler thought of every token.

    `token_ids` includes the end-of-sequence token when the model emitted it
    (`finish_reason == "stop"`); `logprobs` has one entry per token, at temperature 1, and is None
    for an answer that nobody sampled (`rl_ft.counterfactual`).

    Example:
        Completion(token_ids=(17, 5, 2), logprobs=(-0.01, -0.7, -0.0),
                   text='{"phase": "C"}', finish_reason="stop", weights_version=12)
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    text: str
    finish_reason: str
    """stop or length."""
    weights_version: int
    """The policy that sampled it, or that was asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """One decision state with its G scored completions.

    `valid[i]` is False where completion i must not be trained on because its simulation failed
    (a failed simulation is never a reward); its reward and advantage are then 0 and unused.
    """

    group_id: str
    """scenario/seed/time/junction: names the instant."""
    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    rewards: tuple[float, ...]
    advantages: tuple[float, ...]
    valid: tuple[bool, ...]
    canonical: tuple[bool, ...]
    """Completion i is a legal answer in exactly the tokens that it should have: what
    the target of `grpo.target_coef` is made of."""
    times_given: tuple[int, ...]
    """How often the policy gave completion i; 0 for one that nobody sampled, and what figures about
    the policy weigh it by."""

    @property
    def weights_version(self) -> int:
        """Version of the oldest completion."""
        return min(c.weights_version for c in self.completions)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsRef:
    """A published version of the policy; `payload` is what the transport needs to fetch it."""

    version: int
    digest: str
    """Hash over names, shapes and bytes of what travels: `rl_ft.weights.digest`."""
    payload: object
    base: str | None = None
    """What travels is an adapter of the model in this folder; None: it is the whole model."""
    offer: Offer | None = None
    """Where the learner hands it over directly; None: it does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """A version as it was handed over; one version may be published more than once.

    Example:
        Publication(number=8, weights=WeightsRef(version=4, ...), begins=True)
        # A learner that died after version 6 goes on from its checkpoint at 4.
    """

    number: int
    """Counts publications, from 1."""
    weights: WeightsRef
    begins: bool
    """A learner begins with it, or begins again: what was sampled before is trained on no more."""
