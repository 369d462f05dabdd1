"""What of a model in training is published: all its tensors, or its adapter alone.

Either way whoever samples ends up with the tensors of a plain Hugging Face model, adapters merged
in. The merge is computed beside the weights, never in place: merging and unmerging after every step
would wear the base weights down by rounding. Of a model in shards all ranks must ask, and the first
one has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rl_ft.sharding import whole

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from torch import Tensor
    from torch.nn import Module

DOWN, UP, SCALE = ".lora_A", ".lora_B", ".lora_scaling"
"""After a module's name: the two factors of its change and the number that scales their product."""


def full_state_dict(model: Module) -> dict[str, Tensor]:
    """All tensors of the model as a plain Hugging Face model would name them, adapters merged in.

    `lm_head.weight` is there even when it is tied.
    """
    import torch

    if not hasattr(model, "peft_config"):
        return whole(model.state_dict())
    merged = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.get_base_model().state_dict().items()
        if ".lora_" not in name
    }
    with torch.no_grad():
        for name, layer in _lora_layers(model):
            weight = merged[f"{name}.weight"]
            for adapter in layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
            merged[f"{name}.weight"] = weight
        return whole(merged)


def adapter_tensors(model: Module) -> dict[str, Tensor]:
    """What `merge` adds to the model that training began with; a small part of the whole."""
    import torch

    tensors = {}
    for name, layer in _lora_layers(model):
        [adapter] = layer.active_adapters
        tensors[name + DOWN] = layer.lora_A[adapter].weight
        tensors[name + UP] = layer.lora_B[adapter].weight
        tensors[name + SCALE] = torch.tensor([float(layer.scaling[adapter])])
    return whole(tensors)


def merge(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base's tensors with those of `adapter_tensors` merged in."""
    merged = dict(base)
    for module in (name.removesuffix(UP) for name in adapter if name.endswith(UP)):
        change = adapter[module + UP] @ adapter[module + DOWN] * adapter[module + SCALE].item()
        weight = merged[f"{module}.weight"]
        merged[f"{module}.weight"] = weight + change.to(weight.dtype)
    return merged


def _lora_layers(model: Module) -> Iterator[tuple[str, LoraLayer]]:
    from peft.tuners.lora import LoraLayer

    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            yield name, layer
