"""The shared-prefix forward: a group's prompt goes through the model once, not G times.

A packed row holds the prompt without its last token, then for every completion the last prompt
token and the completion without its last token: each of these positions predicts one completion
token. A block mask keeps completions from seeing each other and positions restart behind the
prompt, so log-probs, entropies and gradients are those of G separate rows.

Needs full causal attention in every layer and the `sdpa` implementation, whose boolean mask is
exact. It computes no loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from envs.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PretrainedConfig

PADDING = -1
"""Segment of padding; the prompt is segment 0, completion g is segment g + 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRows:
    """R groups as R rows of L positions, aligned at the right, with the way back to (R*G, C)."""

    input_ids: Tensor
    attention_mask: Tensor
    """Boolean (R, 1, L, L): who may look at whom."""
    position_ids: Tensor
    num_scored: int
    """K: the last K positions of a row contain all that predict a completion token."""
    targets: Tensor
    """(R, K) completion token predicted there; 0 where none is."""
    source: Tensor
    """(R*G, C) flat index into (R, K) of the position that predicts each completion token."""
    scored: Tensor
    """(R*G, C) boolean: which completion tokens are scored at all."""


def require_packable(config: PretrainedConfig) -> None:
    """Raise a `UserError` when the block mask would not mean the same as separate rows."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UserError(
            f"Shared-prefix packing needs full attention in every layer, but {text.model_type} has "
            f"{', '.join(sorted(kinds))}; choose another model in model.name_or_path."
        )
    if config._attn_implementation != "sdpa":
        raise UserError(
            "Shared-prefix packing needs attn_implementation='sdpa', but the model was loaded with "
            f"{config._attn_implementation!r}; load it with 'sdpa'."
        )


def pack(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    group_size: int,
) -> PackedRows:
    """Pack rows (left-padded prompt, right-padded completion) that come in whole groups.

    Completion tokens whose mask is 0 take no room: a masked completion costs nothing.
    """
    import torch

    num_rows = prompt_ids.shape[0] // group_size
    grouped = prompt_ids.view(num_rows, group_size, -1)
    assert bool((grouped == grouped[:, :1]).all()), "the completions of a group share one prompt"
    prompts, present = grouped[:, 0], prompt_mask.view(num_rows, group_size, -1)[:, 0].bool()
    answers = completion_ids.view(num_rows, group_size, -1)
    scored = completion_mask.bool().view_as(answers)

    # The padded layout first; its empty columns are then squeezed out to the left, row by row.
    shifted = torch.cat([prompts[:, None, -1:].expand(-1, group_size, 1), answers[..., :-1]], dim=2)
    last = present.sum(1) - 1
    steps = torch.arange(answers.shape[2], device=answers.device)
    segments = torch.arange(1, group_size + 1, device=answers.device)[None, :, None]
    tokens = torch.cat([prompts[:, :-1], shifted.flatten(1)], dim=1)
    filled = torch.cat([present[:, :-1], scored.flatten(1)], dim=1)
    positions = torch.cat(
        [
            (present.cumsum(1) - 1)[:, :-1],
            (last[:, None, None] + steps).expand_as(answers).flatten(1),
        ],
        dim=1,
    )
    segment = torch.cat(
        [torch.zeros_like(prompts[:, :-1]), segments.expand_as(answers).flatten(1)], dim=1
    ).masked_fill(~filled, PADDING)

    length = max(1, int(filled.sum(1).max()))
    num_scored = max(1, int(scored.flatten(1).sum(1).max()))
    order = torch.argsort(filled.to(torch.int8), dim=1, stable=True)
    keep = order[:, -length:]
    segment = segment.gather(1, keep)
    answer_at = torch.cat([torch.zeros_like(prompts[:, :-1]), answers.flatten(1)], dim=1)
    is_answer = segment > 0
    # Rank of every padded column in its squeezed row, counted from where scoring begins.
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    ) - (order.shape[1] - num_scored)
    source = rank[:, prompts.shape[1] - 1 :].clamp(min=0)
    source = source + torch.arange(num_rows, device=source.device)[:, None] * num_scored
    return PackedRows(
        input_ids=tokens.gather(1, keep).masked_fill(segment == PADDING, 0),
        attention_mask=block_mask(segment),
        position_ids=positions.gather(1, keep).clamp(min=0),
        num_scored=num_scored,
        targets=(answer_at.gather(1, keep) * is_answer)[:, -num_scored:],
        source=source.view_as(completion_ids),
        scored=completion_mask.bool(),
    )


def block_mask(segment: Tensor) -> Tensor:
    """Boolean (R, 1, L, L): causal, own segment and the prompt, padding only itself.

    The diagonal of padding stays true: a row of nothing but False is NaN after the softmax.
    """
    import torch

    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    query, key = segment[:, :, None], segment[:, None, :]
    visible = causal & ((key == 0) | (key == query))
    return visible.unsqueeze(1)


def logps_and_entropies(
    model: Module, packed: PackedRows, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy at every completion token, (R*G, C), 0 where not scored.

    Logits are computed only for the last `num_scored` positions, never for the prompt.
    """
    import torch

    logits = model(
        input_ids=packed.input_ids,
        attention_mask=packed.attention_mask,
        position_ids=packed.position_ids,
        logits_to_keep=packed.num_scored,
        use_cache=False,
    ).logits
    log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
    chosen = log_probs.gather(2, packed.targets.unsqueeze(2)).squeeze(2)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return _unpack(chosen, packed), _unpack(entropy, packed)


def _unpack(values: Tensor, packed: PackedRows) -> Tensor:
    return values.reshape(-1)[packed.source].masked_fill(~packed.scored, 0.0)
