"""What the learner is given: picklable callables around the buffer.

Groups come in and metrics go out through the buffer's actor; so do weights, by Ray's object store.
With `ray.weight_transport` nccl or gloo every engine that stands is sent them directly as well, and
the object store is for who comes later.
"""

from __future__ import annotations

import logging
import socket
import uuid
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from rl_ft.config import Config
from rl_ft.meeting import Meeting, Offer
from rl_ft.parity import MismatchGate, ParityError
from rl_ft.types import RolloutGroup

if TYPE_CHECKING:
    from torch import Tensor

    from rl_ft.transfer import Backend, Group

log = logging.getLogger(__name__)

WAIT_S = 3600.0
"""Before a step's groups, and before its weights are loaded, there may be a check in the closed
loop."""
SEND_S = 900.0
"""For all tensors of a version."""


class LearnerLink:
    """What the learner is told and tells; it never waits for a driver that is gone."""

    def __init__(
        self, buffer: Any, gate: MismatchGate, config: Config, *, base: str | None = None
    ) -> None:
        self._buffer, self._gate, self._base = buffer, gate, base
        self._config = config
        self._sender: Sender | None = None

    def check(self, step: int, mismatch: float, staleness: int) -> None:
        """The gate before every update; the loop finds the cause of a breach."""
        try:
            self._gate.observe(step, mismatch, staleness)
        except ParityError as breach:
            ray.get(self._buffer.refuse.remote(step, breach.detail))
            raise

    def fetch(self, step: int) -> tuple[RolloutGroup, ...]:
        """The groups of an optimiser step.

        Raises:
            TrainingEnded: there is to be no such step.
        """
        groups = ray.get(self._buffer.get_groups.remote(step, WAIT_S))
        if groups is None:
            raise TimeoutError(f"no groups for step {step} within {WAIT_S:g} s")
        return groups

    def publish(self, state_dict: dict[str, Any], version: int) -> None:
        """A new version of the weights."""
        from rl_ft.weights import publish

        ref = publish(state_dict, version, lambda arrays: arrays, base=self._base)
        transport = self._config.ray.weight_transport
        if transport not in ("nccl", "gloo"):
            ray.get(self._buffer.keep.remote(ref))
            return
        if self._sender is None:
            self._sender = Sender(transport, self._config)
        offer = self._sender.offer(state_dict, version)
        ray.get(self._buffer.keep.remote(replace(ref, offer=offer)))
        self._sender.send(state_dict, version, offer)

    def report(self, step: int, values: dict[str, float]) -> None:
        """Metrics of a finished step."""
        ray.get(self._buffer.report.remote(step, values))

    def await_record(self, step: int) -> None:
        """Until the metrics of a finished step are on disk."""
        if not ray.get(self._buffer.recorded.remote(step, WAIT_S)):
            raise TimeoutError(f"step {step} was not recorded within {WAIT_S:g} s")


class Sender:
    """The learner's end of direct transfers: one group with all engines, made anew when one of
    them is another one than before."""

    def __init__(self, backend: Backend, config: Config) -> None:
        settings = config.ray
        self._backend = backend
        self._num_receivers = settings.num_generators * config.generation.tensor_parallel_size
        self._meeting = MeetingActor.remote(settings.num_generators)
        self._members: tuple[str, ...] = ()
        self._group: Group | None = None
        self._name = uuid.uuid4().hex

    def offer(self, state_dict: Mapping[str, Tensor], version: int) -> Offer:
        """What engines need to know of a version that will be sent."""
        from rl_ft.transfer import checksum

        ray.get(self._meeting.open.remote(version))
        host = ray.util.get_node_ip_address()
        with socket.create_server((host, 0)) as free:
            port = free.getsockname()[1]
        return Offer(
            meeting=self._meeting,
            group=self._name,
            host=host,
            port=port,
            names=tuple(state_dict),
            dtypes=tuple(str(t.dtype).removeprefix("torch.") for t in state_dict.values()),
            shapes=tuple(tuple(t.shape) for t in state_dict.values()),
            sums=tuple(map(checksum, state_dict.values())),
        )

    def send(self, state_dict: Mapping[str, Tensor], version: int, offer: Offer) -> None:
        """To all engines, once the loop has told each of them to load this version.

        If they do not all come, or one dies, they fetch it.

        Raises:
            TransferError: it hangs. The learner must end, and begin again.
        """
        from rl_ft.transfer import TransferError, in_time

        members = ray.get(self._meeting.gathered.remote(version, WAIT_S))
        if members is None:
            log.warning("not every engine came for version %d: it is fetched", version)
            return
        try:
            in_time(partial(self._broadcast, state_dict, members, offer), SEND_S)
        except TransferError:
            raise
        except Exception:
            # Of an engine that died: the others notice, and fetch it as its successor does.
            log.warning("version %d was not sent, it is fetched", version, exc_info=True)
            self._leave()
            self._name = uuid.uuid4().hex

    def _broadcast(
        self, state_dict: Mapping[str, Tensor], members: tuple[str, ...], offer: Offer
    ) -> None:
        from rl_ft.transfer import open_group

        if members != self._members:
            self._leave()
            self._group = open_group(self._backend, offer.host, offer.port, self._num_receivers)
            self._members = members
        self._group.send(state_dict)

    def _leave(self) -> None:
        """Who still waits in the group notices."""
        if self._group is not None:
            self._group.close()
        self._members, self._group = (), None


MeetingActor = ray.remote(num_cpus=0)(Meeting)
