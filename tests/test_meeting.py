"""Learner and engines meet: all of them, or it is off."""

from __future__ import annotations

import asyncio

import pytest

from rl_ft.meeting import Meeting, Place

WAIT_S = 5.0


def meet(*events):
    """What each of `events`, coroutine functions of a meeting of two about version 1, got."""

    async def run():
        meeting = Meeting(2)
        await meeting.open(1)
        asked = []
        for event in events:
            asked.append(asyncio.ensure_future(event(meeting)))
            # One after the other.
            await asyncio.sleep(0.01)
        return await asyncio.wait_for(asyncio.gather(*asked), WAIT_S / 2)

    return asyncio.run(run())


def place(*members: str) -> Place:
    return Place(members=members, host="here", port=1)


def joins(seat: int, member: str, *, version: int = 1, wait_s: float = WAIT_S):
    return lambda meeting: meeting.join(version, seat, member, wait_s)


def learner(wait_s: float = WAIT_S):
    """Invites whoever has come."""

    async def wait(meeting):
        members = await meeting.gathered(1, wait_s)
        return members and await meeting.invite(1, place(*members))

    return wait


def test_all_go_where_the_learner_invites_them():
    met = place("a", "b")
    assert meet(learner(), joins(1, "b"), joins(0, "a")) == [True, met, met]


def test_who_takes_over_a_seat_before_all_have_come_takes_part_in_place_of_the_one_before():
    met = place("next", "b")
    found = meet(joins(0, "dead"), joins(0, "next"), joins(1, "b"), learner())
    assert found == [None, met, met, True]


@pytest.mark.parametrize("member", ["next", "a"])
def test_who_comes_after_all_have_is_told_so_at_once(member):
    met = place("a", "b")
    found = meet(learner(), joins(0, "a"), joins(1, "b"), joins(0, member))
    assert found == [True, met, met, None]


def test_if_one_does_not_come_in_time_nobody_takes_part():
    assert meet(joins(0, "a", wait_s=0.05), learner()) == [None, None]


def test_who_has_not_waited_for_the_learner_is_not_waited_for():
    async def late(meeting):
        members = await meeting.gathered(1, WAIT_S)
        # Meanwhile the time of one of them is up.
        await asyncio.sleep(0.5)
        return members, await meeting.invite(1, place(*members))

    found = meet(late, joins(0, "a"), joins(1, "b", wait_s=0.1))
    assert found == [(("a", "b"), False), None, None]


def test_what_is_called_off_is_waited_for_by_nobody():
    found = meet(joins(0, "a"), lambda meeting: meeting.call_off(), joins(1, "b"))
    assert found == [None, None, None]


def test_a_learner_that_looks_again_finds_who_has_come_meanwhile():
    met = place("a", "b")
    looks = learner(wait_s=0.001)
    assert meet(looks, joins(0, "a"), joins(1, "b"), looks) == [None, met, met, True]


def test_another_version_ends_the_wait_for_the_one_before():
    found = meet(joins(0, "a"), lambda meeting: meeting.open(2), joins(0, "a", version=1))
    assert found == [None, None, None]


def test_a_version_that_nobody_offers_is_not_waited_for():
    assert meet(joins(0, "a", version=7)) == [None]
