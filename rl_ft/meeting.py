"""Where a learner and the engines agree to hand a version of the weights over directly.

All engines of the run come, or the version is left to whoever fetches it from the object store: a
broadcast that one of them missed would wait for it for ever. Plain asyncio; `rl_ft.link` makes it a
Ray actor, which belongs to the learner and ends with it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """What a learner sends, and where engines meet it for that."""

    meeting: object
    """Handle of the actor around a `Meeting`."""
    group: str
    """Changes when what sender and engines shared before is gone."""
    host: str
    port: int
    """Free: where a new group is made, if one is wanted."""
    names: tuple[str, ...]
    """Of the tensors, in the order in which they come."""
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sums: tuple[int, ...]
    """`rl_ft.transfer.checksum` of each."""


class Meeting:
    """One version after the other; everybody waits for all the others.

    Example:
        meeting = Meeting(num_seats=2)
        await meeting.open(version=3)
        members = await meeting.join(3, seat=0, member="a", wait_s=60)  # ("a", "b") once b has come
    """

    def __init__(self, num_seats: int) -> None:
        self._num_seats = num_seats
        self._version: int | None = None
        self._came: dict[int, str] = {}
        self._over = True
        self._met: tuple[str, ...] | None = None
        self._changed = asyncio.Condition()

    async def open(self, version: int) -> None:
        """From now on it is about this version."""
        async with self._changed:
            self._version, self._came, self._met, self._over = version, {}, None, False
            self._changed.notify_all()

    async def join(
        self, version: int, seat: int, member: str, wait_s: float
    ) -> tuple[str, ...] | None:
        """Who takes part, by seat, once there is somebody in each; None if it is, or will be,
        without this one: it came too late, or another one did not come in time.

        Who takes over a seat before all have come takes part in place of the one before.
        """
        async with self._changed:
            if version == self._version and not self._over:
                self._came[seat] = member
                if len(self._came) == self._num_seats:
                    self._met = tuple(self._came[i] for i in range(self._num_seats))
                    self._over = True
                self._changed.notify_all()
        met = await self.gathered(version, wait_s)
        return met if met is not None and met[seat] == member else None

    async def gathered(self, version: int, wait_s: float) -> tuple[str, ...] | None:
        """Who takes part; None if that is nobody. Whose time is up first ends it for all."""
        async with self._changed:
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait_for(lambda: self._over or self._version != version)
            except TimeoutError:
                self._over = True
                self._changed.notify_all()
            return self._met if self._version == version else None
