"""The gate: nothing is trained on unless trainer and sampler agree about real completions.

`check` proves at the start that weights arrive: it changes them visibly, samples, and compares the
sampler's log-probs with a Hugging Face float32 forward of the same weights; then it restores them
and compares again. `MismatchGate` watches the running difference, exactly where trainer and sampler
hold the same weights. A breach is a ParityError that names its cause. Nothing is repaired here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rl_ft.types import Completion
from rl_ft.weights import EMBEDDINGS, HEAD

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

NO_OP_SYNC = "no-op sync"
STALE_PREFIX_CACHE = "stale prefix cache"
TIED_HEAD = "tied head not reloaded"
WRONG_SCALE = "wrong scale"
SAMPLER_IS_RIGHT = "the sampler is right"
"""It said what the weights say that it was told to load: the trainer is where it should not be."""
UNKNOWN = "unknown"

PERTURBATIONS = (0.05, 0.1, 0.2, 0.4)
"""Relative changes tried, smallest first, until the change is visible beyond the bound."""
VISIBLE = 4.0
"""A change counts as visible when it moves log-probs by this many bounds on average."""
SCORE_ROWS = 32
"""Sequences per forward."""

Sampled = tuple[Sequence[int], Completion]
"""A prompt and what the sampler answered."""


class Sampler(Protocol):
    """What the gate needs of a generator, wherever it runs."""

    version: int

    def generate(
        self, prompts: Sequence[Sequence[int]], *, num_samples: int, max_tokens: int
    ) -> list[list[Completion]]: ...

    def load_weights(self, state_dict: Mapping[str, Tensor], version: int) -> None: ...

    def reset_prefix_cache(self) -> None: ...


class ParityError(Exception):
    """Trainer and sampler disagree; `cause` says why as far as the pattern tells."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause = cause
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return (ParityError, (self.cause, self.detail))


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReport:
    """What a passed check measured, in nats per token.

    Example:
        ParityReport(num_tokens=96, perturbed_mean=4e-7, perturbed_max=3e-6, restored_mean=4e-7,
                     restored_max=2e-6, visible_change=0.013, perturbation=0.05, bound=1e-3)
    """

    num_tokens: int
    perturbed_mean: float
    """Mean absolute difference of trainer and sampler after a change of the weights."""
    perturbed_max: float
    restored_mean: float
    restored_max: float
    visible_change: float
    """How far the change moved the log-probs: what a sync that does nothing would be off by."""
    perturbation: float
    bound: float


class MismatchGate:
    """Watches the mean |trainer - sampler| log-prob of every step; one breach stops the run.

    Where both hold the same weights, any difference is a fault. What older weights sampled differs
    also because the policy has moved, for which the ratio corrects; under `stale_bound` that much
    is believed. So a fault may hide in stale rows, but only up to the next step whose rows are not
    stale, and `rl_ft.admission` makes sure that such steps come.

    Example:
        gate = MismatchGate(parity.max_logprob_diff, stale_bound=parity.max_stale_logprob_diff)
        gate.observe(step, mean_abs_diff, staleness=1)
    """

    def __init__(self, bound: float, *, stale_bound: float = math.inf) -> None:
        self._bound, self._stale_bound = bound, stale_bound

    def observe(self, step: int, mean_abs_diff: float, staleness: int = 0) -> None:
        """ParityError if the difference is beyond the bound or no number.

        `staleness`: by how many versions the oldest rows are older than the trainer's weights.
        """
        bound = self._stale_bound if staleness else self._bound
        if mean_abs_diff <= bound:
            return
        name = "max_stale_logprob_diff" if staleness else "max_logprob_diff"
        raise ParityError(
            UNKNOWN,
            f"at step {step} trainer and sampler differ by {mean_abs_diff:.3g} nats per token on "
            f"average, more than parity.{name} = {bound:.3g}, on rows that are {staleness} "
            "version(s) old; nothing was updated",
        )


def score(
    model: str | Path | PreTrainedModel, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[tuple[float, ...]]:
    """Log-probs of every completion token, for (prompt ids, completion ids) pairs.

    A path is loaded in float32; a model is used as it is.
    """
    if isinstance(model, (str, Path)):
        model = _load(model)
    return _score(model, sequences)


def _score(
    forward: Callable[..., CausalLMOutput], sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[tuple[float, ...]]:
    import torch

    scored: list[tuple[float, ...]] = []
    for start in range(0, len(sequences), SCORE_ROWS):
        rows = sequences[start : start + SCORE_ROWS]
        tokens = [torch.tensor([*prompt, *completion]) for prompt, completion in rows]
        ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        lengths = torch.tensor([len(t) for t in tokens])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        with torch.no_grad():
            logits = forward(input_ids=ids, attention_mask=mask.long()).logits.float()
        for i, (prompt, completion) in enumerate(rows):
            # Position t predicts token t + 1.
            where = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
            logprobs = logits[i, where].log_softmax(-1)
            chosen = ids[i, len(prompt) : len(prompt) + len(completion), None]
            scored.append(tuple(logprobs.gather(-1, chosen)[:, 0].tolist()))
    return scored


def mean_abs_diff(
    trainer: Sequence[Sequence[float]], sampler: Sequence[Sequence[float]]
) -> tuple[float, float]:
    """Mean and largest absolute difference per token; infinite if any is not a number."""
    differences = [
        abs(a - b)
        for row, other in zip(trainer, sampler, strict=True)
        for a, b in zip(row, other, strict=True)
    ]
    if not differences or not all(map(math.isfinite, differences)):
        return math.inf, math.inf
    return sum(differences) / len(differences), max(differences)


def check(
    generator: Sampler,
    state_dict: Mapping[str, Tensor],
    model_path: str | Path,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    bound: float,
) -> ParityReport:
    """Change the weights, sync, compare; restore, sync, compare. The generator ends as it began.

    `state_dict` is what the generator runs with now; `model_path` gives the architecture. Prompts
    shorter than a cache block (32 tokens on CPU) cannot show a stale prefix cache.
    """
    version = generator.version
    model = _load(model_path)
    model.load_state_dict(dict(state_dict))
    original = _snapshot(model)
    # Fills the prefix cache under the original weights, as a running loop would have.
    first = _sample(generator, prompts, max_tokens)
    perturbed, perturbation, visible = _perturb(model, original, first, bound)

    def compare(new: Mapping[str, Tensor], old: Mapping[str, Tensor], what: str) -> list[float]:
        generator.load_weights(new, version)
        sampled = _sample(generator, prompts, max_tokens)
        mean, largest = _distance(model, new, sampled)
        if mean > bound:
            cause = diagnose(generator, model, new=new, old=old, sampled=sampled, bound=bound)
            raise ParityError(
                cause,
                f"after the {what} weights were loaded, trainer and sampler differ by {mean:.3g} "
                f"nats per token on average ({largest:.3g} at most), more than {bound:.3g}",
            )
        return [mean, largest, sum(len(c.token_ids) for _, c in sampled)]

    perturbed_mean, perturbed_max, num_changed = compare(perturbed, original, "changed")
    restored_mean, restored_max, num_restored = compare(original, perturbed, "original")
    return ParityReport(
        num_tokens=int(num_changed + num_restored),
        perturbed_mean=perturbed_mean,
        perturbed_max=perturbed_max,
        restored_mean=restored_mean,
        restored_max=restored_max,
        visible_change=visible,
        perturbation=perturbation,
        bound=bound,
    )


def diagnose(
    generator: Sampler,
    model: str | Path | PreTrainedModel,
    *,
    new: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    sampled: Sequence[Sampled],
    bound: float,
) -> str:
    """Which weights explain what the sampler said after it was told to load `new` over `old`.

    Both are full state dicts; `model` lends its architecture. Names a cause only where the
    explanation fits within the bound. The generator was told to load nothing since.
    """
    if isinstance(model, (str, Path)):
        model = _load(model)
    if _distance(model, new, sampled)[0] <= bound:
        return SAMPLER_IS_RIGHT
    if _distance(model, old, sampled)[0] <= bound:
        return NO_OP_SYNC
    max_tokens = max(len(completion.token_ids) for _, completion in sampled)
    generator.reset_prefix_cache()
    fresh = _sample(generator, [prompt for prompt, _ in sampled], max_tokens)
    if _distance(model, new, fresh)[0] <= bound:
        return STALE_PREFIX_CACHE
    if _distance(model, {**new, HEAD: old[HEAD]}, fresh)[0] <= bound:
        return TIED_HEAD
    scale = _best_scale(model, new, fresh)
    if _distance(model, _scaled(new, scale), fresh)[0] <= bound:
        return f"{WRONG_SCALE} (x{scale:.3g})"
    return UNKNOWN


def _sample(generator: Sampler, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Sampled]:
    answers = generator.generate(prompts, num_samples=1, max_tokens=max_tokens)
    return [(prompt, answer) for prompt, [answer] in zip(prompts, answers, strict=True)]


def _distance(
    model: PreTrainedModel, weights: Mapping[str, Tensor], sampled: Sequence[Sampled]
) -> tuple[float, float]:
    """Mean and largest |model with these weights - sampler| over what was sampled."""
    from torch.func import functional_call

    def forward(**inputs: Tensor) -> CausalLMOutput:
        # Tied weights are given one by one, so a head that differs from the embeddings is possible.
        return functional_call(model, dict(weights), kwargs=inputs, tie_weights=False)

    scored = _score(forward, [(p, c.token_ids) for p, c in sampled])
    return mean_abs_diff(scored, [c.logprobs for _, c in sampled])


def _perturb(
    model: PreTrainedModel,
    original: Mapping[str, Tensor],
    sampled: Sequence[Sampled],
    bound: float,
) -> tuple[dict[str, Tensor], float, float]:
    """Weights with every tensor changed at random, the change, and how far it moves log-probs.

    A change that moves less than the bound would let a broken sync pass.
    """
    import torch

    before = score(model, [(p, c.token_ids) for p, c in sampled])
    visible = 0.0
    for relative in PERTURBATIONS:
        model.load_state_dict(dict(original))
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=random)
                parameter += relative * parameter.square().mean().sqrt() * noise
        after = score(model, [(p, c.token_ids) for p, c in sampled])
        visible = mean_abs_diff(before, after)[0]
        if VISIBLE * bound <= visible < math.inf:
            return _snapshot(model), relative, visible
    raise ParityError(
        "blind gate",
        f"changing every weight by {PERTURBATIONS[-1]:.0%} moves log-probs by {visible:.3g}, too "
        f"little beside parity.max_logprob_diff = {bound:.3g}: lower the bound",
    )


def _best_scale(
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    sampled: Sequence[Sampled],
) -> float:
    """The factor on all weights that explains the sampler best: a coarse scan, then a section."""

    def distance(log_scale: float) -> float:
        return _distance(model, _scaled(weights, math.exp(log_scale)), sampled)[0]

    step = 0.1
    centre = min((i * step for i in range(-12, 13)), key=distance)
    low, high = centre - step, centre + step
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(24):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if distance(left) < distance(right) else (left, high)
    return math.exp((low + high) / 2)


def _scaled(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    return {name: tensor * scale for name, tensor in weights.items()}


def _snapshot(model: PreTrainedModel) -> dict[str, Tensor]:
    """A copy of all weights, the head included where it is tied."""
    weights = {name: t.detach().clone() for name, t in model.state_dict().items()}
    if EMBEDDINGS in weights:
        weights.setdefault(HEAD, weights[EMBEDDINGS])
    return weights


def _load(model_path: str | Path) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
