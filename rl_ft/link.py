"""What the learner is given: picklable callables around the buffer.

Groups come in and metrics go out through the buffer's actor; so do weights, by Ray's object store.
With `ray.weight_transport` nccl or gloo every engine that stands is sent them directly as well, and
the object store is for who comes later.
"""

from __future__ import annotations

import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from rl_ft.cluster import on_this_node
from rl_ft.config import Config
from rl_ft.meeting import Meeting, Offer, Place
from rl_ft.parity import MismatchGate, ParityError
from rl_ft.types import RolloutGroup

if TYPE_CHECKING:
    from torch import Tensor

    from rl_ft.transfer import Backend, Group

log = logging.getLogger(__name__)

WAIT_S = 3600.0
"""Before a step's groups there may be a check in the closed loop."""
GATHER_S = 1500.0
"""Before its weights are loaded there may be one, too; other ranks wait in a collective, for half
an hour and no longer."""
POLL_S = 10.0
MAX_MISSED = 3
"""After so many versions in a row that could not be sent, it is no longer tried."""


def transfer_limit_s(config: Config) -> float:
    """For the others to come, and then for all tensors: of what an engine may take for a call, the
    last third is for fetching what was not sent."""
    return config.generation.call_timeout_s / 3


@contextmanager
def reserved_port(host: str) -> Iterator[int]:
    """A port that is for a server of this machine alone, which may listen there meanwhile.

    Whoever asks for any port is given another one: engines that were told to come here would wait,
    with whoever took it, until their time is over. Servers that allow the address to be reused can
    be started, as those of torch and vLLM are.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((host, 0))
        yield holder.getsockname()[1]


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
        if not self._config.ray.broadcasts:
            ray.get(self._buffer.keep.remote(ref))
            return
        if self._sender is None:
            self._sender = Sender(self._config.ray.weight_transport, self._config)
        offer = self._sender.offer(state_dict, version)
        ray.get(self._buffer.keep.remote(replace(ref, offer=offer)))
        if offer is not None:
            self._sender.send(state_dict, version, offer, is_wanted=self._is_wanted)

    def _is_wanted(self) -> bool:
        return not ray.get(self._buffer.has_ended.remote())

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
        self._limit_s = transfer_limit_s(config)
        meeting = MeetingActor.options(scheduling_strategy=on_this_node())
        self._meeting = meeting.remote(settings.num_generators)
        self._members: tuple[str, ...] = ()
        self._group: Group | None = None
        self._name = uuid.uuid4().hex
        self._num_missed = 0

    def offer(self, state_dict: Mapping[str, Tensor], version: int) -> Offer | None:
        """What engines need to know of a version that will be sent; None: it will not."""
        from rl_ft.transfer import offer_of

        if self._num_missed > MAX_MISSED:
            return None
        ray.get(self._meeting.open.remote(version))
        return offer_of(state_dict, meeting=self._meeting, group=self._name)

    def send(
        self,
        state_dict: Mapping[str, Tensor],
        version: int,
        offer: Offer,
        *,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """To all engines, once the loop has told each of them to load this version.

        If they do not all come, or one dies, they fetch it; nobody waits for a loop that has ended.

        Raises:
            TransferError: it hangs. The learner must end, and begin again.
        """
        from rl_ft.transfer import TransferError, in_time

        with self._place(version, is_wanted) as place:
            if place is None:
                ray.get(self._meeting.call_off.remote())
                self._num_missed += is_wanted()
                return
            try:
                in_time(partial(self._broadcast, state_dict, place), self._limit_s)
                self._num_missed = 0
            except TransferError:
                raise
            except Exception:
                # Of an engine that died: the others notice, and fetch it as its successor does.
                log.warning("version %d was not sent, it is fetched", version, exc_info=True)
                self._leave()
                self._name = uuid.uuid4().hex
                self._num_missed += 1

    @contextmanager
    def _place(self, version: int, is_wanted: Callable[[], bool]) -> Iterator[Place | None]:
        """Where all engines were told to go, once all have come, and nobody else can listen."""
        members = self._gathered(version, is_wanted)
        if members is None:
            yield None
            return
        host = ray.util.get_node_ip_address()
        with reserved_port(host) as port:
            place = Place(members=members, host=host, port=port)
            yield place if ray.get(self._meeting.invite.remote(version, place)) else None

    def _gathered(self, version: int, is_wanted: Callable[[], bool]) -> tuple[str, ...] | None:
        """Who has come, by seat, once all engines have; None if they will not."""
        until = time.monotonic() + GATHER_S
        members = None
        while members is None:
            if time.monotonic() > until or not is_wanted():
                return None
            members = ray.get(self._meeting.gathered.remote(version, POLL_S))
            if members is None and ray.get(self._meeting.is_off.remote(version)):
                return None
        return members

    def _broadcast(self, state_dict: Mapping[str, Tensor], place: Place) -> None:
        from rl_ft.transfer import open_group

        if place.members != self._members:
            self._leave()
            self._group = open_group(self._backend, place.host, place.port, self._num_receivers)
            self._members = place.members
        self._group.send(state_dict)

    def _leave(self) -> None:
        """Who still waits in the group notices."""
        if self._group is not None:
            self._group.close()
        self._members, self._group = (), None


MeetingActor = ray.remote(num_cpus=0)(Meeting)
