"""GroupBuffer: nothing stale is admitted, every wait ends, every group is accounted for."""

from __future__ import annotations

import asyncio
import time

import pytest
from version_case import group, weights

from rl_ft.admission import Admission
from rl_ft.buffer import GroupBuffer, StaleGroups, TrainingEnded


def new_buffer(max_staleness: int = 0) -> GroupBuffer:
    """A buffer without fences."""
    return GroupBuffer(Admission(max_staleness=max_staleness, fence_steps=100, num_steps=100))


def following(buffer: GroupBuffer, after: int) -> tuple[int, int, bool] | None:
    """Number and version of the next publication, and whether a learner begins with it."""
    found = asyncio.run(buffer.next_weights(after, 0.01))
    return found and (found.number, found.weights.version, found.begins)


@pytest.mark.parametrize(
    ("max_staleness", "step", "versions", "admitted"),
    [
        (0, 5, (5, 5), True),
        (0, 5, (5, 4), False),
        (1, 5, (5, 4), True),
        (1, 5, (3,), False),
        (0, 0, (), True),
    ],
)
def test_the_oldest_completion_decides_admission(max_staleness, step, versions, admitted):
    async def scene() -> None:
        buffer = new_buffer(max_staleness)
        groups = [group(v) for v in versions]
        if admitted:
            await buffer.put_groups(step, groups, under=1)
            assert await buffer.get_groups(step, 0.01) == tuple(groups)
        else:
            with pytest.raises(StaleGroups, match=f"step {step}"):
                await buffer.put_groups(step, groups, under=1)
            assert await buffer.get_groups(step, 0.01) is None

    asyncio.run(scene())


def test_one_old_completion_makes_its_group_old():
    async def scene() -> None:
        with pytest.raises(StaleGroups):
            await new_buffer().put_groups(2, [group(2, 1)], under=1)

    asyncio.run(scene())


def test_waits_end_with_their_timeout():
    async def scene() -> None:
        buffer = new_buffer()
        start = time.monotonic()
        assert await buffer.get_groups(0, 0.05) is None
        assert await buffer.next_weights(0, 0.05) is None
        assert 0.1 <= time.monotonic() - start < 5
        # Abandoned waits hold nothing: the next call goes through.
        await buffer.put_groups(0, [group(0)], under=1)
        assert await buffer.get_groups(0, 0.05) == (group(0),)

    asyncio.run(scene())


def test_a_waiting_learner_wakes_when_its_step_comes():
    async def scene() -> None:
        buffer = new_buffer()
        waiting = asyncio.create_task(buffer.get_groups(1, 10))
        await buffer.put_groups(0, [group(0)], under=1)
        await asyncio.sleep(0)
        assert not waiting.done()
        await buffer.put_groups(1, [group(1)], under=2)
        assert await waiting == (group(1),)

    asyncio.run(scene())


def test_publications_come_one_by_one_however_late_they_are_asked_for():
    buffer = new_buffer(max_staleness=2)
    for version in (7, 8, 9):
        asyncio.run(buffer.publish(weights(version)))
    assert following(buffer, 0) == (1, 7, True)
    assert following(buffer, 1) == (2, 8, False)
    assert following(buffer, 2) == (3, 9, False)
    assert following(buffer, 3) is None


def test_weights_are_numbered_by_publication_not_by_version():
    buffer = new_buffer()
    asyncio.run(buffer.publish(weights(7)))
    assert following(buffer, 0) == (1, 7, True)
    # After a restart the learner publishes the version it resumed from, once more.
    asyncio.run(buffer.publish(weights(7)))
    assert following(buffer, 1) == (2, 7, True)


def test_what_a_dead_learner_published_is_not_handed_out_after_its_successor_began():
    buffer = new_buffer(max_staleness=2)
    for version in (7, 8, 9, 8):
        asyncio.run(buffer.publish(weights(version)))
    assert following(buffer, 1) == (4, 8, True)


def test_what_was_sampled_for_a_dead_learner_is_dropped_whenever_it_comes():
    async def scene() -> None:
        buffer = new_buffer(max_staleness=1)
        await buffer.publish(weights(4))
        await buffer.put_groups(4, [group(4), group(4)], under=1)
        await buffer.publish(weights(4))
        await buffer.put_groups(5, [group(4)], under=1)
        assert await buffer.get_groups(4, 0.01) is None
        assert await buffer.get_groups(5, 0.01) is None
        assert (await buffer.counts())["buffer/dropped_groups"] == 3

    asyncio.run(scene())


def test_groups_are_in_flight_until_the_learner_reports_their_step():
    async def scene() -> None:
        buffer = new_buffer(max_staleness=1)
        await buffer.publish(weights(0))
        await buffer.put_groups(0, [group(0)], under=1)
        await buffer.put_groups(1, [group(0), group(0)], under=1)
        await buffer.get_groups(0, 1)
        assert (await buffer.counts())["buffer/in_flight_groups"] == 3
        await buffer.report(1, {})
        assert await buffer.counts() == {
            "buffer/submitted_groups": 3,
            "buffer/trained_groups": 1,
            "buffer/dropped_groups": 0,
            "buffer/in_flight_groups": 2,
        }

    asyncio.run(scene())


def test_a_waiting_sampler_wakes_when_weights_come():
    async def scene() -> None:
        buffer = new_buffer()
        waiting = asyncio.create_task(buffer.next_weights(0, 10))
        await asyncio.sleep(0)
        await buffer.publish(weights(1))
        assert (await waiting).weights == weights(1)

    asyncio.run(scene())


def test_metrics_are_handed_over_once():
    async def scene() -> None:
        buffer = new_buffer()
        await buffer.report(0, {"loss": 1.0})
        await buffer.report(1, {"loss": 0.5})
        assert await buffer.take_metrics() == [(0, {"loss": 1.0}), (1, {"loss": 0.5})]
        assert await buffer.take_metrics() == []

    asyncio.run(scene())


def test_a_step_counts_as_recorded_once_it_is_confirmed():
    async def scene() -> None:
        buffer = new_buffer()
        await buffer.report(1, {"loss": 1.0})
        assert not await buffer.recorded(1, 0.01)
        waiting = asyncio.create_task(buffer.recorded(1, 10))
        await asyncio.sleep(0)
        await buffer.confirm(1)
        assert await waiting
        # A restarted learner makes the step again: what was confirmed before does not count.
        await buffer.report(1, {"loss": 1.0})
        assert not await buffer.recorded(1, 0.01)

    asyncio.run(scene())


def test_the_end_reaches_whoever_waits_for_groups():
    async def scene() -> None:
        buffer = new_buffer()
        waiting = asyncio.create_task(buffer.get_groups(3, 60))
        await asyncio.sleep(0.01)
        await buffer.end()
        with pytest.raises(TrainingEnded, match="step 3"):
            await waiting

    asyncio.run(scene())


def test_groups_that_came_before_the_end_are_handed_over():
    async def scene() -> None:
        buffer = new_buffer()
        await buffer.put_groups(3, [group(3)], under=1)
        await buffer.end()
        assert await buffer.get_groups(3, 1) == (group(3),)

    asyncio.run(scene())
