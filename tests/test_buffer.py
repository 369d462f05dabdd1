"""GroupBuffer: nothing stale is admitted, every wait ends, nothing is handed over twice."""

from __future__ import annotations

import asyncio
import time

import pytest

from rl_ft.buffer import GroupBuffer, StaleGroups, TrainingEnded
from rl_ft.types import Completion, RolloutGroup, WeightsRef


def group(*versions: int) -> RolloutGroup:
    """A group whose completions were sampled under these versions."""
    return RolloutGroup(
        group_id="g",
        prompt_ids=(1,),
        completions=tuple(
            Completion(
                token_ids=(1,), logprobs=(0.0,), text="", finish_reason="stop", weights_version=v
            )
            for v in versions
        ),
        rewards=(0.0,) * len(versions),
        advantages=(0.0,) * len(versions),
        valid=(True,) * len(versions),
        canonical=(True,) * len(versions),
        times_given=(1,) * len(versions),
    )


def weights(version: int) -> WeightsRef:
    return WeightsRef(version=version, digest="", payload=None)


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
        buffer = GroupBuffer(max_staleness=max_staleness)
        groups = [group(v) for v in versions]
        if admitted:
            await buffer.put_groups(step, groups)
            assert await buffer.get_groups(step, 0.01) == tuple(groups)
        else:
            with pytest.raises(StaleGroups, match=f"step {step}"):
                await buffer.put_groups(step, groups)
            assert await buffer.get_groups(step, 0.01) is None

    asyncio.run(scene())


def test_one_old_completion_makes_its_group_old():
    async def scene() -> None:
        with pytest.raises(StaleGroups):
            await GroupBuffer().put_groups(2, [group(2, 1)])

    asyncio.run(scene())


def test_waits_end_with_their_timeout():
    async def scene() -> None:
        buffer = GroupBuffer()
        start = time.monotonic()
        assert await buffer.get_groups(0, 0.05) is None
        assert await buffer.next_weights(0, 0.05) is None
        assert 0.1 <= time.monotonic() - start < 5
        # Abandoned waits hold nothing: the next call goes through.
        await buffer.put_groups(0, [group(0)])
        assert await buffer.get_groups(0, 0.05) == (group(0),)

    asyncio.run(scene())


def test_a_waiting_learner_wakes_when_its_step_comes():
    async def scene() -> None:
        buffer = GroupBuffer()
        waiting = asyncio.create_task(buffer.get_groups(1, 10))
        await buffer.put_groups(0, [group(0)])
        await asyncio.sleep(0)
        assert not waiting.done()
        await buffer.put_groups(1, [group(1)])
        assert await waiting == (group(1),)
        assert await buffer.get_groups(0, 0.01) is None

    asyncio.run(scene())


def test_weights_are_numbered_by_publication_not_by_version():
    async def scene() -> None:
        buffer = GroupBuffer()
        await buffer.publish(weights(7))
        assert await buffer.next_weights(0, 1) == (1, weights(7))
        assert await buffer.next_weights(1, 0.01) is None
        # After a restart the learner publishes the version it resumed from, once more.
        await buffer.publish(weights(7))
        assert await buffer.next_weights(1, 1) == (2, weights(7))
        await buffer.publish(weights(8))
        await buffer.publish(weights(9))
        assert await buffer.next_weights(2, 1) == (4, weights(9))

    asyncio.run(scene())


def test_a_waiting_sampler_wakes_when_weights_come():
    async def scene() -> None:
        buffer = GroupBuffer()
        waiting = asyncio.create_task(buffer.next_weights(0, 10))
        await asyncio.sleep(0)
        await buffer.publish(weights(1))
        assert await waiting == (1, weights(1))

    asyncio.run(scene())


def test_metrics_are_handed_over_once():
    async def scene() -> None:
        buffer = GroupBuffer()
        await buffer.report(0, {"loss": 1.0})
        await buffer.report(1, {"loss": 0.5})
        assert await buffer.take_metrics() == [(0, {"loss": 1.0}), (1, {"loss": 0.5})]
        assert await buffer.take_metrics() == []

    asyncio.run(scene())


def test_a_step_counts_as_recorded_once_it_is_confirmed():
    async def scene() -> None:
        buffer = GroupBuffer()
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
        buffer = GroupBuffer()
        waiting = asyncio.create_task(buffer.get_groups(3, 60))
        await asyncio.sleep(0.01)
        await buffer.end()
        with pytest.raises(TrainingEnded, match="step 3"):
            await waiting

    asyncio.run(scene())


def test_groups_that_came_before_the_end_are_handed_over():
    async def scene() -> None:
        buffer = GroupBuffer()
        await buffer.put_groups(3, [group(3)])
        await buffer.end()
        assert await buffer.get_groups(3, 1) == (group(3),)

    asyncio.run(scene())
