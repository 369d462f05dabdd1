"""Memory: a pool and a recall that are brought back go on exactly as they would have."""

from __future__ import annotations

from dataclasses import replace

import pytest
from decision_case import decision, observation, outcome
from test_worlds import every_phase, rolling

from envs.answers import options
from envs.errors import WorldError
from envs.types import Action, Decision
from rl_ft.journal import JournaledWorld
from rl_ft.lookup import LookupPool
from rl_ft.memory import Memories, Memory
from rl_ft.recall import Instant, Recall
from rl_ft.worlds import Tried, WorldPool

ROUNDS = 12


def go_on(pool, rounds=ROUNDS):
    """What a pool says and measures, round by round; a bad answer now and then."""
    seen = []
    for number in range(rounds):
        states = pool.states()
        executed = None if number % 5 == 4 else -1
        orders = [None if isinstance(s, str) else every_phase(s, executed) for s in states]
        seen.append((states, pool.settle(orders)))
    return seen


def brought_back(memories, pool, other, recalls=()):
    """`other` where `pool` stands, by way of the disk."""
    memories.add(7, Memory.of([pool.standing()], recalls))
    memory = memories.get(7, num_worlds=(1,))
    other.stand(memory.standings[0])
    return other


@pytest.fixture
def memories(tmp_path):
    return Memories(tmp_path / "memory")


@pytest.fixture
def pools(smoke_config):
    """Two of the same settings, seeds apart, over two scenarios."""
    config = rolling(smoke_config, episode_s=300.0, max_pause=2)
    made = [
        WorldPool(config, ("generated:1", "generated:2"), seed=seed, num_worlds=2)
        for seed in (1, 2)
    ]
    yield made
    for pool in made:
        pool.close()


@pytest.mark.parametrize("rounds", [0, 3, 40])
def test_worlds_that_are_brought_back_go_on_exactly(pools, memories, rounds):
    one, other = pools
    go_on(one, rounds)
    go_on(other, 2)
    brought_back(memories, one, other)
    assert go_on(one) == go_on(other)


def test_a_world_that_cannot_be_brought_back_begins_anew(pools, memories, monkeypatch, caplog):
    one, other = pools
    go_on(one, 3)

    def late(self, journal):
        raise WorldError("timeout", "it took too long")

    monkeypatch.setattr(JournaledWorld, "replay", late)
    brought_back(memories, one, other)
    assert "cannot be brought back" in caplog.text
    assert not {str} & {type(state) for states, _ in go_on(other, 2) for state in states}


def test_worlds_that_are_not_brought_back_go_elsewhere(pools):
    one, other = pools
    assert go_on(one, 2) != go_on(other, 2)


def test_a_dataset_is_gone_on_with_where_it_was(states, memories):
    one, other = (LookupPool(states, seed=seed, num_worlds=2) for seed in (1, 2))
    go_on(one, 2)
    brought_back(memories, one, other)
    assert go_on(one) == go_on(other)


def recall(*, num: int) -> Recall:
    made = Recall(seed=3, num_waiting=0)
    for i in range(num):
        seen: Decision = replace(decision(observation()), seed=i)
        tried = {action: outcome(0.1 * i) for action in options(seen)}
        made.add(Instant(decision=seen, tried=Tried(outcomes=tried), times_told=i % 3))
    return made


def test_instants_that_wait_are_drawn_as_they_would_have_been(memories):
    one, other = recall(num=20), Recall(seed=9, num_waiting=0)
    one.draw(5)
    memories.add(7, Memory.of([[]], [one]))
    memories.get(7, num_worlds=(1,)).restore([other])
    assert one.draw(15) == other.draw(15)


def test_there_is_none_of_another_version(memories):
    memories.add(7, Memory.of([[]], []))
    assert memories.get(8, num_worlds=(1,)) is None


def test_worlds_of_two_actors_go_on_in_one(pools, memories):
    one, other = pools
    go_on(one, 3)
    first, second = one.standing()
    memories.add(7, Memory.of([[first], [second]], [recall(num=4), recall(num=3)]))
    memory = memories.get(7, num_worlds=(2,))
    other.stand(memory.standings[0])
    assert go_on(one) == go_on(other)
    [recalled] = memory.recalls
    assert len(recalled.waiting) == 7


def test_worlds_of_one_actor_are_dealt_to_two(memories, pools):
    memories.add(7, Memory.of([pools[0].standing()], [recall(num=7)]))
    memory = memories.get(7, num_worlds=(1, 1))
    assert [len(part) for part in memory.standings] == [1, 1]
    assert [len(recalled.waiting) for recalled in memory.recalls] == [4, 3]


def test_one_of_another_number_of_worlds_is_of_no_use(memories, caplog):
    memories.add(7, Memory.of([[], []], []))
    assert memories.get(7, num_worlds=(1,)) is None
    assert "2 world actors" in caplog.text


def test_a_broken_one_is_of_no_use(memories, tmp_path, caplog):
    memories.add(7, Memory.of([[]], [recall(num=2)]))
    file = tmp_path / "memory" / "7.json"
    file.write_bytes(file.read_bytes()[:-20])
    assert memories.get(7, num_worlds=(1,)) is None
    assert "not as it was written" in caplog.text


def test_others_are_forgotten(memories):
    for version in (10, 20, 30):
        memories.add(version, Memory.of([[]], []))
    memories.keep_only([20, 30])
    assert [memories.get(v, num_worlds=(1,)) is None for v in (10, 20, 30)] == [True, False, False]


def test_an_action_is_brought_back_as_it_was(memories):
    made = Recall(seed=1, num_waiting=0)
    held = Action(phase=1, hold_s=30)
    seen = decision(observation())
    made.add(Instant(decision=seen, tried=Tried(outcomes={held: outcome(1.0)})))
    other = Recall(seed=1, num_waiting=0)
    memories.add(7, Memory.of([[]], [made]))
    memories.get(7, num_worlds=(1,)).restore([other])
    assert other.waiting == made.waiting
