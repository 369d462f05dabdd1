"""The LoRA adapter that a configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rl_ft.config import LoraSettings

if TYPE_CHECKING:
    from peft import LoraConfig


def lora_adapter(settings: LoraSettings | None) -> LoraConfig | None:
    """PEFT's settings, or None where all parameters train."""
    if settings is None:
        return None
    from peft import LoraConfig

    fields = settings.model_dump()
    if isinstance(fields["target_modules"], tuple):
        fields["target_modules"] = list(fields["target_modules"])
    return LoraConfig(task_type="CAUSAL_LM", **fields)
