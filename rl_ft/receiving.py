"""The receiving end of vLLM's weight transfer, within the processes of an engine.

vLLM's own receiver for NCCL and one like it for gloo, both of which also sum up what came: where
NCCL does not load, vLLM's broadcast sends nothing and says nothing. Named to vLLM as the extension
of its workers, so that every process of an engine imports this module, and vLLM with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)

from rl_ft.transfer import checksum, gloo_broadcast, gloo_group


class Receiver:
    """What is added to vLLM's worker."""

    def received_sums(self) -> dict[str, int]:
        """`checksum` of every tensor that came last."""
        return self.weight_transfer_engine.sums

    def abandon_weight_update(self) -> None:
        """Leave the group, and the model with whatever came: as good as new for the next load."""
        self._weight_update_active = False
        with set_current_vllm_config(self.vllm_config):
            self.weight_transfer_engine.finish_weight_update()
            self.weight_transfer_engine.shutdown()


class _SummedUp:
    """Keeps `checksum` of all tensors on their way into the model."""

    sums: dict[str, int]

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        self.sums = {}
        model, self.model = self.model, self
        self._load_weights = model.load_weights
        try:
            super().receive_weights(update_info)
        finally:
            self.model = model

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        def passing() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                self.sums[name] = checksum(tensor)
                yield name, tensor

        return self._load_weights(passing())


class _Gloo(NCCLWeightTransferEngine):
    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        self.model_update_group = gloo_group(
            init_info.master_address,
            init_info.master_port,
            init_info.rank_offset + self.parallel_config.rank,
            init_info.world_size,
        )

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # vLLM's own waits for an accelerator.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        described = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        for name, dtype, shape in described:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            gloo_broadcast(self.model_update_group, tensor)
            self.model.load_weights([(name, tensor.to(self.device))])

    def shutdown(self) -> None:
        # Its connections end with it.
        self.model_update_group = None


class NcclReceiver(_SummedUp, NCCLWeightTransferEngine):
    """By NCCL, from the sender's GPU."""


class GlooReceiver(_SummedUp, _Gloo):
    """By gloo, through the memory of both."""


WeightTransferEngineFactory.register_engine("rl_ft_nccl", NcclReceiver)
WeightTransferEngineFactory.register_engine("rl_ft_gloo", GlooReceiver)
