"""LoRA adapters: what a configuration asks for, and what a training changed, written as one.

A run merges its adapters: that of the supervised start into the start, and the model that it leaves
may be the mean of many merged versions. All of it together still is a change of low rank, which
`factors_between` recovers from the first and the last model alone. Which folders these are is not
decided here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from envs.errors import UserError
from rl_ft.sections import LoraSettings
from rl_ft.weights import EMBEDDINGS

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor
    from transformers import PreTrainedModel

Factors = dict[str, tuple["Tensor", "Tensor"]]
"""By module B (outputs x rank) and A (rank x inputs); B @ A is added to its weight."""

ROUNDING = 4.0
"""A remainder is rounding if its root mean square is at most this many last places of the weights.
"""


def lora_adapter(settings: LoraSettings | None) -> LoraConfig | None:
    """PEFT's settings, or None where all parameters train."""
    if settings is None:
        return None
    from peft import LoraConfig

    fields = settings.model_dump()
    if isinstance(fields["target_modules"], tuple):
        fields["target_modules"] = list(fields["target_modules"])
    return LoraConfig(task_type="CAUSAL_LM", **fields)


def factors_between(
    base: Mapping[str, Tensor], trained: Mapping[str, Tensor], *, max_rank: int
) -> Factors:
    """The adapter that turns one model into the other, in float32 and of one rank everywhere.

    That is the highest rank that any change has beyond float32 rounding, at most `max_rank`.
    PEFT and vLLM choose modules by kind (`q_proj`), so all of a kind that changed are there.

    Raises:
        UserError: the models are equal, or differ by what no such adapter holds.
    """
    import torch

    changed = [name for name, tensor in trained.items() if not torch.equal(base[name], tensor)]
    if not changed:
        raise UserError("the trained model equals the one that it began as: there is no adapter")
    for name in changed:
        if name == EMBEDDINGS or trained[name].dim() != 2:
            raise UserError(f"{name} was trained, which no adapter of matrices holds")
    kinds = {_kind(name) for name in changed}
    found = {
        name.removesuffix(".weight"): _leading_factors(name, base[name], tensor, max_rank)
        for name, tensor in trained.items()
        if _kind(name) in kinds
    }
    rank = max(b.shape[1] for b, _ in found.values())
    pad = torch.nn.functional.pad
    return {
        module: (pad(b, (0, rank - b.shape[1])), pad(a, (0, 0, 0, rank - a.shape[0])))
        for module, (b, a) in found.items()
    }


def save_adapter(factors: Factors, base_dir: Path, directory: Path) -> int:
    """Write `adapter_config.json`, which names the base, and the tensors; returns the rank."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    rank = next(iter(factors.values()))[0].shape[1]
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base_dir.absolute()),
        r=rank,
        # PEFT scales by alpha / r; these factors are the change itself.
        lora_alpha=rank,
        target_modules=sorted({module.rsplit(".", 1)[-1] for module in factors}),
        inference_mode=True,
    )
    settings.save_pretrained(str(directory))
    tensors = {}
    for module, (b, a) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return rank


def merged_with(model: PreTrainedModel, adapter_dir: Path) -> dict[str, Tensor]:
    """All tensors of a base model with the adapter of a folder merged in; the model is used up."""
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, str(adapter_dir))
    return {name: t.detach() for name, t in adapted.merge_and_unload().state_dict().items()}


def _kind(name: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    return name.removesuffix(".weight").rsplit(".", 1)[-1]


def _leading_factors(
    name: str, base: Tensor, trained: Tensor, max_rank: int
) -> tuple[Tensor, Tensor]:
    """B and A of one matrix, without the ranks that rounding makes up."""
    import torch

    before, change = base.double(), trained.double() - base.double()
    scale = before.square().mean().sqrt().item()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Exact for a change of this rank or lower, and far cheaper than all singular values.
        u, s, v = torch.svd_lowrank(change, q=min(max_rank, *change.shape), niter=4)
    # The largest singular value of independent rounding errors of one last place.
    floor = torch.finfo(torch.float32).eps * scale * sum(math.sqrt(n) for n in change.shape)
    rank = int((s > floor).sum())
    root = s[:rank].sqrt()
    b, a = (u[:, :rank] * root).float(), (v[:, :rank] * root).T.float()
    remainder = (change - b.double() @ a.double()).square().mean().sqrt().item()
    if remainder > ROUNDING * torch.finfo(trained.dtype).eps * scale:
        raise UserError(
            f"the change of {name} is no adapter of rank {max_rank}, which is the most that this "
            "run's settings explain"
        )
    return b, a
