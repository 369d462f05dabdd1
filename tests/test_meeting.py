"""Learner and engines meet: all of them, or it is off."""

from __future__ import annotations

import asyncio

from rl_ft.meeting import Meeting

WAIT_S = 5.0


def meet(*events):
    """What each of `events`, coroutine functions of a meeting about version 1, got."""

    async def run():
        meeting = Meeting(2)
        await meeting.open(1)
        asked = [asyncio.ensure_future(event(meeting)) for event in events]
        # In this order.
        for _ in asked:
            await asyncio.sleep(0)
        return await asyncio.gather(*asked)

    return asyncio.run(run())


def joins(seat: int, member: str, *, version: int = 1, wait_s: float = WAIT_S):
    return lambda meeting: meeting.join(version, seat, member, wait_s)


def learner(wait_s: float = WAIT_S):
    return lambda meeting: meeting.gathered(1, wait_s)


def test_all_learn_who_takes_part():
    assert meet(learner(), joins(1, "b"), joins(0, "a")) == [("a", "b")] * 3


def test_who_takes_over_a_seat_before_all_have_come_takes_part_in_place_of_the_one_before():
    found = meet(joins(0, "dead"), joins(0, "next"), joins(1, "b"), learner())
    assert found == [None, ("next", "b"), ("next", "b"), ("next", "b")]


def test_who_takes_over_a_seat_afterwards_is_told_that_it_is_over():
    async def run():
        meeting = Meeting(1)
        await meeting.open(1)
        first = await meeting.join(1, 0, "a", WAIT_S)
        return first, await meeting.join(1, 0, "next", WAIT_S), await meeting.gathered(1, WAIT_S)

    assert asyncio.run(run()) == (("a",), None, ("a",))


def test_if_one_does_not_come_in_time_nobody_takes_part():
    assert meet(joins(0, "a", wait_s=0.05), learner()) == [None, None]


def test_who_comes_after_the_time_was_up_is_told_so_at_once():
    async def run():
        meeting = Meeting(2)
        await meeting.open(1)
        await meeting.gathered(1, 0.01)
        return await asyncio.wait_for(meeting.join(1, 0, "a", WAIT_S), WAIT_S / 2)

    assert asyncio.run(run()) is None


def test_another_version_ends_the_wait_for_the_one_before():
    async def run():
        meeting = Meeting(2)
        await meeting.open(1)
        waiting = asyncio.ensure_future(meeting.join(1, 0, "a", WAIT_S))
        await asyncio.sleep(0)
        await meeting.open(2)
        other = meeting.join(2, 1, "b", WAIT_S)
        return await waiting, await asyncio.gather(other, meeting.join(2, 0, "a", WAIT_S))

    assert asyncio.run(run()) == (None, [("a", "b")] * 2)


def test_a_version_that_nobody_offers_is_not_waited_for():
    assert meet(joins(0, "a", version=7)) == [None]
