"""Muon for the hidden matrices, AdamW for everything else, behind one optimizer.

A small transformer from scratch learns from fewer rows than with AdamW alone (Jordan et al. 2024,
"Muon: An optimizer for hidden layers in neural networks"). The update of a matrix is scaled to the
root mean square of an AdamW update, so both learning rates speak of the same size of step (Liu et
al. 2025, "Muon is scalable for LLM training").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import Trainer


class MuonAdamW(torch.optim.Optimizer):
    """`lr` drives all parameters but the hidden matrices, which get `muon_ratio` times as much.

    Both live in `param_groups`, so a schedule scales both.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        lr: float,
        muon_ratio: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        matrices, rest = _split(model)
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(
                matrices,
                lr=lr * muon_ratio,
                weight_decay=weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
            self._parts.append(muon)
        if rest:  # nothing, where an adapter is all that is trained
            adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay)
            self._parts.append(adamw)
        super().__init__([*matrices, *rest], {})
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Any = None) -> Any:
        """One step of both."""
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Both states."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over both states."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self._parts for group in part.param_groups]


def use_muon(
    trainer: Trainer,
    muon_ratio: float | None,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    """Give a trainer this optimizer instead of its own, unless the ratio is None."""
    if muon_ratio is not None:
        trainer.optimizer = MuonAdamW(
            trainer.accelerator.unwrap_model(trainer.model),
            lr=lr,
            muon_ratio=muon_ratio,
            betas=betas,
            weight_decay=weight_decay,
        )


def _split(
    model: torch.nn.Module,
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Hidden matrices, and all other parameters that are trained."""
    outer = {
        id(parameter)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
        for parameter in module.parameters()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if p.ndim == 2 and id(p) not in outer]
    hidden = set(map(id, matrices))
    return matrices, [p for p in trained if id(p) not in hidden]
