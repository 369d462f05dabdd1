"""TRL's `GRPOTrainer`, fed from outside: ready groups in, one optimiser step, new weights out.

TRL owns the objective (loss types, clipping, KL, optimiser, schedule); this module owns the data
flow. Three private hooks of TRL are overridden, so TRL is pinned to a tested range and contract
tests compare loss and gradient with stock TRL on the same batch. Importing this module imports TRL.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import trl.import_utils as trl_imports
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor

# TRL would import vLLM just because it is installed (6 s), and this process never samples.
trl_imports.is_vllm_available = lambda *_args, **_kwargs: False

from datasets import Dataset  # noqa: E402
from transformers import Trainer, TrainerCallback  # noqa: E402
from trl.trainer.grpo_config import GRPOConfig  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.utils import use_adapter  # noqa: E402

from envs.errors import UserError  # noqa: E402
from rl_ft.batch import collate, share_of, split  # noqa: E402
from rl_ft.checkpoints import admit  # noqa: E402
from rl_ft.merging import adapter_tensors, full_state_dict  # noqa: E402
from rl_ft.packing import logps_and_entropies, pack, require_packable  # noqa: E402
from rl_ft.sharding import shard_on_cpus  # noqa: E402
from rl_ft.step_sums import StepSums  # noqa: E402
from rl_ft.target import Target  # noqa: E402
from rl_ft.types import RolloutGroup  # noqa: E402

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Fetch = Callable[[int], Sequence[RolloutGroup]]
"""The groups of an optimiser step, all of them: each rank takes its share."""
Publish = Callable[[dict[str, Tensor], int], None]
"""Takes tensors, all of the model's or those of its adapter, and their version; the tensors are
live: copy them before returning."""
OnMetrics = Callable[[int, dict[str, float]], None]
BeforeUpdate = Callable[[int, float, int], None]
"""Sees a step, its mean |trainer - sampler| and by how many versions its oldest rows are older."""

MEAN_OVER_ROWS = frozenset({"grpo", "sapo", "dr_grpo", "luspo"})
MEAN_OVER_TOKENS = frozenset({"bnpo"})
GLOBAL_TOKENS = frozenset({"cispo", "dapo", "vespo"})
"""TRL's loss types by what it divides a micro-batch's loss by."""
LOSS_TYPES = MEAN_OVER_ROWS | MEAN_OVER_TOKENS | GLOBAL_TOKENS


class PackedGRPOTrainer(GRPOTrainer):
    """GRPO on groups that `fetch` hands over, through the shared-prefix forward.

    One call of `fetch` is one optimiser step is one published version. The loss is that of the
    undivided batch, however it is split into micro-batches of whole groups and over ranks, and
    whatever rows are masked: a row that is not valid is in no denominator.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: GRPOConfig,
        processing_class: PreTrainedTokenizerBase,
        fetch: Fetch,
        publish: Publish,
        on_metrics: OnMetrics,
        on_checkpoint: Callable[[Path], None] | None = None,
        before_update: BeforeUpdate | None = None,
        before_checkpoint: Callable[[int], None] | None = None,
        target: Target | None = None,
        num_checkpoints: int = 3,
        adapter_only: bool = False,
        peft_config: PeftConfig | None = None,
    ) -> None:
        if args.loss_type not in LOSS_TYPES:
            raise UserError(
                f"grpo.loss_type is {args.loss_type!r}, expected one of "
                f"{', '.join(sorted(LOSS_TYPES))}."
            )
        require_packable(model.config)
        # TRL would load the reference from the folder that the model's config names, which may
        # have changed or never existed; a copy of what training starts from cannot be wrong.
        beta, reference = args.beta, None
        if beta != 0.0 and peft_config is None and not hasattr(model, "peft_config"):
            reference = copy.deepcopy(model).requires_grad_(False).eval()
            args.beta = 0.0
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            reward_funcs=_never_called,
            train_dataset=Dataset.from_dict({"prompt": [""]}),
            peft_config=peft_config,
            callbacks=[_PublishCallback(self)],
        )
        if self.aux_loss_enabled:
            raise UserError(
                "Mixture-of-experts models with a load-balancing loss cannot be packed; set "
                "router_aux_loss_coef to 0 in the model's config."
            )
        args.beta = self.beta = beta
        if reference is not None and self.is_fsdp_enabled:
            self.ref_model = fsdp2_prepare_model(self.accelerator, reference)
        elif reference is not None:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        # TRL's bonus is a mean per micro-batch; ours, in `_compute_loss`, one of the whole batch.
        self._entropy_bonus_enabled = False
        self._fetch, self._publish = fetch, publish
        self._on_metrics, self._on_checkpoint = on_metrics, on_checkpoint
        self._before_update, self._before_checkpoint = before_update, before_checkpoint
        self._waiting: list[dict[str, Tensor]] = []
        self._target, self._num_checkpoints = target, num_checkpoints
        self._adapter_only = adapter_only
        self._inputs: dict[str, Tensor]
        self._forward: tuple[Tensor, Tensor]
        self._sums = StepSums()

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's, which can shard the model on CPUs too."""
        super().create_accelerator_and_postprocess()
        shard_on_cpus(self)

    def _send_telemetry(self) -> None:
        """Training says nothing to anybody."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the inputs that Trainer sees are not the ones that are trained on."""
        return 0

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Empty batches, one per micro-batch: the loop's clock, since `fetch` brings the data."""
        clock = range(self.args.max_steps * self.args.gradient_accumulation_steps)
        return torch.utils.data.DataLoader(clock, batch_size=1, collate_fn=lambda _: {})

    # ---- data

    def _prepare_inputs(self, generation_batch: dict[str, Any]) -> dict[str, Tensor]:
        if not self._waiting:
            started = time.perf_counter()
            groups = self._fetch(self.state.global_step)
            self._sums.add_time("fetch", time.perf_counter() - started)
            self._staleness = self.state.global_step - min(g.weights_version for g in groups)
            ranks = self.accelerator.process_index, self.accelerator.num_processes
            self._waiting = self._micro_batches(share_of(groups, *ranks))
        inputs = self._waiting.pop(0)
        inputs = {name: tensor.to(self.args.device) for name, tensor in inputs.items()}
        if self.beta != 0.0:
            inputs["ref_per_token_logps"] = self._reference_logps(inputs)
        return inputs

    def _micro_batches(self, groups: Sequence[RolloutGroup]) -> list[dict[str, Tensor]]:
        """The step's groups as micro-batches that know the totals they are a part of."""
        batches = [
            collate(part, pad_token_id=self._tokenizer.pad_token_id)
            for part in split(groups, self.args.gradient_accumulation_steps)
        ]
        num_rows = sum(sum(group.valid) for group in groups)
        num_tokens = sum(int(batch["num_items_in_batch"]) for batch in batches)
        num_given = sum(int(_weights(batch).sum()) for batch in batches)
        totals = torch.tensor([num_rows, num_tokens, num_given], device=self.args.device)
        totals = self.accelerator.reduce(totals, reduction="sum").clamp(min=1)
        num_rows, num_tokens, num_given = totals
        # DDP and FSDP average over ranks, TRL over micro-batches: both are undone by this factor.
        parts = self.accelerator.num_processes * len(batches)
        for batch in batches:
            rows, tokens = len(batch["advantages"]), batch["num_items_in_batch"].clamp(min=1)
            if self.loss_type in MEAN_OVER_ROWS:
                batch["loss_scale"] = parts * rows / num_rows
            elif self.loss_type in MEAN_OVER_TOKENS:
                batch["loss_scale"] = parts * tokens.to(num_tokens.device) / num_tokens
            else:
                batch["loss_scale"] = torch.ones(())
            batch["num_items_in_batch"] = num_tokens
            batch["entropy_scale"] = self.accelerator.num_processes / num_given
        return batches

    # ---- objective

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, None]:
        prompt, completion = slice(None, -logits_to_keep), slice(-logits_to_keep, None)
        packed = pack(
            input_ids[:, prompt],
            attention_mask[:, prompt],
            input_ids[:, completion],
            attention_mask[:, completion],
            group_size=self.num_generations,
        )
        with self.accelerator.autocast():
            logps, entropies = logps_and_entropies(model, packed, temperature=self.temperature)
        if torch.is_grad_enabled():
            self._forward = (logps, entropies)
            self._take_in(logps.detach())
        return logps, entropies, None

    def _take_in(self, logps: Tensor) -> None:
        """What only the forward can say of the batch; TRL reads these inputs after it.

        How much each answer weighs, and which ratio is 1: of what nobody sampled, since one batch
        is one update, and of what weighs as much as it does in the policy of now.
        """
        inputs, mask = self._inputs, self._inputs["completion_mask"]
        of_now = inputs["times_given"] == 0
        sampled = torch.where(of_now[:, None], logps, inputs["old_per_token_logps"])
        inputs["sampled_per_token_logps"] = inputs["old_per_token_logps"] = sampled
        if self._target is not None:
            canonical = inputs["canonical_mask"]
            inputs["old_per_token_logps"] = torch.where(canonical[:, None], logps, sampled)
            inputs["advantages"] = self._target.advantages(
                inputs["advantages"],
                (logps * mask).sum(1),
                inputs["completion_ids"],
                inputs["times_given"],
                inputs["canonical_mask"],
                mask.any(1),
                group_size=self.num_generations,
            )

    def _reference_logps(self, inputs: dict[str, Tensor]) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        width = inputs["completion_ids"].shape[1]
        with torch.no_grad():
            if self.ref_model is not None:
                return self._get_per_token_logps_and_entropies(self.ref_model, ids, mask, width)[0]
            model = self.accelerator.unwrap_model(self.model)
            with use_adapter(model, "ref" if "ref" in model.peft_config else None):
                return self._get_per_token_logps_and_entropies(model, ids, mask, width)[0]

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        started = time.perf_counter()
        self._inputs = inputs = dict(inputs)
        loss = super()._compute_loss(model, inputs) * inputs["loss_scale"]
        logps, entropies = self._forward
        weights = _weights(inputs)
        if self.args.entropy_coef:
            bonus = (entropies * weights).sum() * inputs["entropy_scale"]
            loss = loss - self.args.entropy_coef * bonus
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {self.state.global_step} is {loss.item()}; nothing was updated"
            )
        del self._forward, self._inputs
        self._sums.add_tokens(logps, entropies, inputs["sampled_per_token_logps"], weights)
        self._sums.add_size(inputs["completion_mask"])
        self._sums.add_time("forward", time.perf_counter() - started)
        return loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Tensor:
        """Fetch when a step begins, then forward and backward of one micro-batch."""
        before = self._sums.seconds["fetch"] + self._sums.seconds["forward"]
        started = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        inside = self._sums.seconds["fetch"] + self._sums.seconds["forward"] - before
        self._sums.add_time("backward", time.perf_counter() - started - inside)
        return loss

    # ---- what leaves the trainer

    def publish_weights(self) -> None:
        """Hand over the weights as they are now, under the version `global_step`."""
        if self.accelerator.is_main_process or self.is_fsdp_enabled:
            started = time.perf_counter()
            model = self.accelerator.unwrap_model(self.model)
            tensors = adapter_tensors(model) if self._adapter_only else full_state_dict(model)
            # Shards are put together by all ranks, and by none are they published but the first.
            if self.accelerator.is_main_process:
                self._publish(tensors, self.state.global_step)
            self._sums.add_time("publish", time.perf_counter() - started)

    def check_mismatch(self) -> None:
        """Show `before_update` the step's mean |trainer - sampler|; it raises to stop in time."""
        if self._before_update is not None:
            mismatch = self._sums.mean_abs_logp_diff(self.accelerator)
            self._before_update(self.state.global_step, mismatch, self._staleness)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """After every step: its metrics go to `on_metrics`, and nowhere else; then its weights.

        In this order, so that whoever sees the weights finds the metrics.
        """
        if "grad_norm" not in logs:  # the closing summary of Trainer
            return
        sums, self._sums = self._sums, StepSums()
        measured = sums.metrics(
            self.accelerator, self._metrics["train"], level=self.importance_sampling_level
        )
        self._metrics["train"].clear()
        if self.accelerator.is_main_process:
            self._on_metrics(self.state.global_step, {**logs, **measured})
        self.publish_weights()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """A whole checkpoint or none: written aside, then renamed."""
        if self._before_checkpoint is not None:
            self._before_checkpoint(self.state.global_step)
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            # What a process left that died while it wrote.
            shutil.rmtree(folder / ".incomplete", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(folder / ".incomplete")
        try:
            # Past TRL's own method, which only adds a model card for the hub.
            Trainer._save_checkpoint(self, model, trial)
        finally:
            self.args.output_dir = str(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            admit(folder / ".incomplete" / name, folder / name, keep=self._num_checkpoints)
            shutil.rmtree(folder / ".incomplete")
        self.accelerator.wait_for_everyone()
        if self._on_checkpoint is not None:
            self._on_checkpoint(folder / name)


class _PublishCallback(TrainerCallback):
    """Publishes the weights that a run starts from; guards every update."""

    def __init__(self, trainer: PackedGRPOTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer.publish_weights()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._trainer.check_mismatch()


def _weights(batch: dict[str, Tensor]) -> Tensor:
    """How often the policy gave each token; 0 for padding and for what nobody sampled."""
    return batch["completion_mask"] * batch["times_given"][:, None]


def _never_called(*_: Any, **__: Any) -> list[float]:
    raise AssertionError("rewards come with the groups")
