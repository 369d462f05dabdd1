"""The sending end of vLLM's weight transfer: a learner broadcasts its tensors to all engines.

By NCCL from GPU to GPU, with vLLM's own sender; or by gloo, between processes that have none, which
is how all but NCCL itself is tested. `rl_ft.receiving` is the other end. Importing this module
imports torch; opening a group, vLLM.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from rl_ft.meeting import Offer

if TYPE_CHECKING:
    from torch import Tensor

Backend = Literal["nccl", "gloo"]
WAIT_S = 300.0
"""For the others to come, and for each of a group's messages."""


class TransferError(Exception):
    """The tensors could not be handed over, and this process cannot try again."""


class Group(Protocol):
    """A sender and the processes of all engines."""

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """Broadcast, in this order; returns when all is sent."""

    def close(self) -> None:
        """Leave it."""


def open_group(backend: Backend, host: str, port: int, num_receivers: int) -> Group:
    """Open it at this address and wait for the receivers."""
    kind = {"nccl": _NcclGroup, "gloo": _GlooGroup}[backend]
    return kind(host, port, num_receivers)


def checksum(tensor: Tensor) -> int:
    """The sum of its bits as integers: exact, and so the same on every device."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(integers[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64).item())


def offer_of(tensors: Mapping[str, Tensor], *, meeting: object, group: str) -> Offer:
    """What engines need to know of tensors that will be sent."""
    return Offer(
        meeting=meeting,
        group=group,
        names=tuple(tensors),
        dtypes=tuple(str(t.dtype).removeprefix("torch.") for t in tensors.values()),
        shapes=tuple(tuple(t.shape) for t in tensors.values()),
        sums=tuple(map(checksum, tensors.values())),
    )


def in_time(work: Callable[[], None], limit_s: float) -> None:
    """Do it in a thread, on the device of this one.

    Raises:
        TransferError: it takes longer. Nothing can end it then but the end of this process.
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    done: Future[None] = Future()

    def do(done: Future[None]) -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)
        finally:
            del done

    threading.Thread(target=do, args=(done,), name="transfer", daemon=True).start()
    if not wait([done], limit_s).done:
        raise TransferError(f"it was not done within {limit_s:g} s")
    try:
        done.result()
    finally:
        # Else it and an error hold each other, and the group whose end others wait for.
        del done


def gloo_group(host: str, port: int, rank: int, size: int) -> Any:
    """A process group beside the ones that torch knows of."""
    from vllm.distributed.utils import stateless_init_torch_distributed_process_group

    return stateless_init_torch_distributed_process_group(
        host, port, rank, size, "gloo", timeout=timedelta(seconds=WAIT_S)
    )


def gloo_broadcast(group: Any, tensor: Tensor) -> None:
    """From rank 0 to all others, in place."""
    options = torch.distributed.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()


class _GlooGroup:
    def __init__(self, host: str, port: int, num_receivers: int) -> None:
        self._group: Any = gloo_group(host, port, 0, 1 + num_receivers)

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        for tensor in tensors.values():
            gloo_broadcast(self._group, tensor.detach().cpu().contiguous())

    def close(self) -> None:
        # Its connections end with it.
        self._group = None


class _NcclGroup:
    def __init__(self, host: str, port: int, num_receivers: int) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerInitInfo,
            NCCLTrainerWeightTransferEngine,
        )

        self._source = _source()
        self._sender = NCCLTrainerWeightTransferEngine.trainer_init(
            NCCLTrainerInitInfo(
                rank=0, master_address=host, master_port=port, world_size=1 + num_receivers
            ),
            client=_NobodyToTell(),
            source=self._source,
        )
        if self._sender.model_update_group.disabled:
            raise RuntimeError("vLLM could not load NCCL, and would send nothing")

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        self._source.tensors = tensors
        try:
            self._sender.send_weights()
        finally:
            self._source.tensors = {}

    def close(self) -> None:
        self._sender.shutdown()


def _source() -> Any:
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        tensors: Mapping[str, Tensor] = {}

        def metadata(self) -> list[ParamMeta]:
            return [
                ParamMeta(name, tensor.dtype, tuple(tensor.shape))
                for name, tensor in self.tensors.items()
            ]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self.tensors.items():
                yield name, tensor.detach().to("cuda")

    return Source()


class _NobodyToTell:
    """vLLM's sender would drive the engines; here the loop does, and they come by themselves."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Engines are told by their `Offer`."""

    def start_weight_update(self) -> None:
        """They start by themselves."""

    def update_weights(self, update_info: object) -> None:
        """They know what comes."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """They finish by themselves."""
