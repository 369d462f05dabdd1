"""Where a learner and the engines agree to hand a version of the weights over directly.

All engines of the run come, or the version is left to whoever fetches it from the object store: a
broadcast that one of them missed would wait for it for ever. Plain asyncio; `rl_ft.link` makes it a
Ray actor, which belongs to the learner and ends with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """What a learner sends, and where engines hear about it."""

    meeting: object
    """Handle of the actor around a `Meeting`."""
    group: str
    """Changes when what sender and engines shared before is gone."""
    names: tuple[str, ...]
    """Of the tensors, in the order in which they come."""
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sums: tuple[int, ...]
    """`rl_ft.transfer.checksum` of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where all who take part meet, and who that is."""

    members: tuple[str, ...]
    """By seat."""
    host: str
    port: int
    """Free: where a new group is made, if one is wanted."""


class Meeting:
    """One version after the other; everybody waits for all the others.

    Example:
        meeting = Meeting(num_seats=2)
        await meeting.open(version=3)
        # the engines                                     # the learner
        place = await meeting.join(3, 0, "a", wait_s=60)  # members = await meeting.gathered(3, 60)
                                                          # await meeting.invite(3, place)
    """

    def __init__(self, num_seats: int) -> None:
        self._num_seats = num_seats
        self._version: int | None = None
        self._came: dict[int, str] = {}
        self._is_off = True
        self._place: Place | None = None
        self._changed = asyncio.Condition()

    async def open(self, version: int) -> None:
        """From now on it is about this version."""
        async with self._changed:
            self._version, self._came, self._place, self._is_off = version, {}, None, False
            self._changed.notify_all()

    async def join(self, version: int, seat: int, member: str, wait_s: float) -> Place | None:
        """Where to go, once somebody has come to each seat and the learner has invited them; None
        if it is, or will be, without this one: it came too late or again, or another one did not
        come in time, which ends it for all.

        Who takes over a seat before all have come takes part in place of the one before.
        """
        async with self._changed:
            if version != self._version or self._is_off or self._is_full:
                return None
            self._came[seat] = member
            self._changed.notify_all()
            await self._wait(lambda: self._place is not None, version, wait_s)
            if version != self._version:
                return None
            if self._place is None:
                self._is_off = True
                self._changed.notify_all()
                return None
            return self._place if self._place.members[seat] == member else None

    async def gathered(self, version: int, wait_s: float) -> tuple[str, ...] | None:
        """Who has come, by seat, once all have; None if they have not in this time."""
        async with self._changed:
            await self._wait(lambda: self._is_full, version, wait_s)
            if version != self._version or self._is_off or not self._is_full:
                return None
            return tuple(self._came[seat] for seat in range(self._num_seats))

    async def is_off(self, version: int) -> bool:
        """Whether nobody will meet about this version any more."""
        return self._is_off or version != self._version

    async def invite(self, version: int, place: Place) -> bool:
        """Tell all who have come where; False if somebody has not waited for that."""
        async with self._changed:
            if version != self._version or self._is_off:
                return False
            self._place = place
            self._changed.notify_all()
            return True

    async def call_off(self) -> None:
        """Nobody is to wait any more."""
        async with self._changed:
            self._is_off = True
            self._changed.notify_all()

    @property
    def _is_full(self) -> bool:
        return len(self._came) == self._num_seats

    async def _wait(self, ready: Callable[[], bool], version: int, wait_s: float) -> None:
        def over() -> bool:
            return ready() or self._is_off or self._version != version

        try:
            async with asyncio.timeout(wait_s):
                await self._changed.wait_for(over)
        except TimeoutError:
            pass
