"""Staleness: a bound that no interleaving of sampler, learner and restarts exceeds."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from version_case import group, weights

from rl_ft.admission import Admission, staleness
from rl_ft.buffer import GroupBuffer
from rl_ft.types import RolloutGroup

NUM_STEPS = 8
GROUPS_PER_STEP = 2
NOW_S = 0.001
"""Long enough for what is there already."""

admissions = st.builds(
    Admission,
    max_staleness=st.integers(0, 3),
    fence_steps=st.integers(1, 5),
    num_steps=st.just(NUM_STEPS),
)
bursts = st.tuples(st.sampled_from(["sample", "learn", "learn", "die"]), st.integers(1, 8))
turns = st.lists(bursts, max_size=12).map(
    lambda drawn: [name for name, times in drawn for _ in range(1 if name == "die" else times)]
)
"""In bursts, so that each side at times is far ahead of the other."""


def admission(max_staleness: int, fence_steps: int = 100) -> Admission:
    return Admission(max_staleness=max_staleness, fence_steps=fence_steps, num_steps=NUM_STEPS)


@dataclass
class Scene:
    """A sampler and a learner around a real buffer; each turn is as little as can happen alone."""

    admission: Admission
    buffer: GroupBuffer = field(init=False)
    number: int = 0
    loaded: int = 0
    next_step: int = 0
    to_sample: list[int] = field(default_factory=list)
    version: int | None = None
    fetched: tuple[RolloutGroup, ...] | None = None
    reported: bool = False
    num_submitted: int = 0
    trained: list[tuple[int, int]] = field(default_factory=list)
    """Step and version of every group that was trained on, in order."""

    def __post_init__(self) -> None:
        self.buffer = GroupBuffer(self.admission)

    async def sample(self) -> None:
        """The loop submits the next step that is open, or looks for weights."""
        if self.to_sample:
            step = self.to_sample.pop(0)
            await self.buffer.put_groups(
                step, [group(self.loaded)] * GROUPS_PER_STEP, under=self.number
            )
            self.num_submitted += GROUPS_PER_STEP
            return
        found = await self.buffer.next_weights(self.number, NOW_S)
        if found is None:
            return
        self.number, self.loaded = found.number, found.weights.version
        if found.begins:
            self.next_step = self.loaded
        opened = self.admission.opened(self.next_step, self.loaded)
        self.to_sample, self.next_step = list(opened), opened.stop

    async def learn(self) -> None:
        """The learner begins, fetches, reports or publishes, whichever comes next."""
        if self.version is None:
            await self._publish(0)
        elif self.reported:
            await self._publish(self.version + 1)
        elif self.fetched is not None:
            self.trained += [(self.version, group.weights_version) for group in self.fetched]
            self.reported = True
            await self.buffer.report(self.version + 1, {})
        elif self.version < NUM_STEPS:
            self.fetched = await self.buffer.get_groups(self.version, NOW_S)

    async def die(self) -> None:
        """The learner dies where it is and goes on from its last checkpoint."""
        if self.version is not None:
            await self._publish(self.version - self.version % self.admission.fence_steps)

    async def _publish(self, version: int) -> None:
        self.version, self.fetched, self.reported = version, None, False
        await self.buffer.publish(weights(version))

    async def play(self, names: list[str]) -> None:
        for name in names:
            await getattr(self, name)()
            await self.check()

    async def finish(self) -> None:
        """Fair turns until the last step is trained; far more than it takes."""
        await self.play(["sample", "learn"] * 6 * NUM_STEPS)

    async def check(self) -> None:
        counts = await self.buffer.counts()
        submitted, trained, dropped, in_flight = counts.values()
        assert submitted == trained + dropped + in_flight
        assert (submitted, trained) == (self.num_submitted, len(self.trained))
        assert 0 <= in_flight <= GROUPS_PER_STEP * (self.admission.max_staleness + 1)
        assert all(0 <= s - v <= self.admission.max_staleness for s, v in self.trained)


def played(admission: Admission, names: list[str]) -> Scene:
    async def scene() -> Scene:
        scene = Scene(admission)
        await scene.play(names)
        await scene.finish()
        return scene

    return asyncio.run(scene())


@settings(deadline=None, max_examples=60)
@given(admissions, turns)
def test_whatever_happens_no_row_is_too_old_and_every_group_is_accounted_for(admission, turns):
    """`Scene.check` after every turn; and in the end nothing is left on the way."""
    scene = played(admission, turns)
    assert scene.version == NUM_STEPS
    assert (scene.trained[-1][0], scene.to_sample) == (NUM_STEPS - 1, [])
    assert asyncio.run(scene.buffer.counts())["buffer/in_flight_groups"] == 0


@settings(deadline=None, max_examples=60)
@given(admissions, turns)
def test_which_version_samples_a_step_depends_on_nothing_that_happens(admission, turns):
    trained = played(admission, turns).trained
    assert [v for _, v in trained] == [admission.oldest_version(step) for step, _ in trained]


@given(st.integers(0, NUM_STEPS - 1), st.integers(1, 5))
def test_without_staleness_every_version_samples_for_its_own_step_alone(version, fence_steps):
    assert [*admission(0, fence_steps).opened(version, version)] == [version]


@given(st.integers(1, 5), turns)
@settings(deadline=None, max_examples=30)
def test_without_staleness_the_learner_never_has_more_than_the_step_it_is_at(fence_steps, turns):
    scene = played(admission(0, fence_steps), turns)
    assert {step - version for step, version in scene.trained} == {0}


@pytest.mark.parametrize(
    ("max_staleness", "versions"),
    [(0, (0, 1, 2, 3, 4, 5, 6, 7)), (1, (0, 0, 1, 2, 4, 4, 5, 6)), (3, (0, 0, 0, 0, 4, 4, 4, 4))],
)
def test_between_fences_a_step_is_sampled_by_versions_before_it(max_staleness, versions):
    rule = admission(max_staleness, fence_steps=4)
    assert tuple(map(rule.oldest_version, range(NUM_STEPS))) == versions


def test_a_version_opens_no_step_across_a_fence_nor_after_the_last():
    rule = admission(1, fence_steps=4)
    assert [*rule.opened(3, version=2)] == [3]
    assert [*rule.opened(4, version=3)] == []
    assert [*rule.opened(4, version=4)] == [4, 5]
    assert [*rule.opened(NUM_STEPS, version=NUM_STEPS - 1)] == []


def test_a_run_that_begins_between_fences_opens_what_is_admitted_from_there():
    assert [*admission(2, fence_steps=4).opened(5, version=5)] == [5, 6, 7]


def test_staleness_is_counted_in_versions():
    groups = [group(4, 4), group(3, 4), group(3)]
    assert staleness(5, groups) == {"staleness/mean": pytest.approx(10 / 6), "staleness/max": 2.0}
