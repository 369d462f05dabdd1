"""Actors that die or hang are replaced, by name and not for ever; real ones, in a real cluster."""

from __future__ import annotations

import asyncio
import os
import time

import pytest
import ray
from ray import cloudpickle

from envs.errors import UserError
from rl_ft import cluster
from rl_ft.cluster import Places, take_back
from rl_ft.crew import DEAD, ActorError, Post, RemoteWorlds, Samplers
from rl_ft.types import Completion, WeightsRef
from rl_ft.worlds import WorldPool

pytestmark = pytest.mark.ray

SOON_S = 60.0


class Clerk:
    """Answers with its process id; dies or hangs when it is told to."""

    def __init__(self, notes: str = "") -> None:
        self._notes, self._version = notes, 0

    def work(self) -> int:
        return os.getpid()

    def die(self) -> None:
        os._exit(1)

    def hang(self) -> None:
        time.sleep(3600)

    def err(self) -> None:
        raise ValueError("as it is")

    def load(self, ref: WeightsRef) -> None:
        self._version = ref.version

    def generate(self, prompts, *, busy_s: float = 0.0, dies_on: int = -1, **_):
        if prompts and prompts[0][0] == dies_on and not os.path.exists(self._notes):
            open(self._notes, "w").close()
            os._exit(1)
        time.sleep(busy_s)
        given = {"logprobs": (0.0,), "finish_reason": "stop", "weights_version": self._version}
        return [[Completion(token_ids=(1,), text=str(os.getpid()), **given)] for _ in prompts]


@pytest.fixture(scope="module", autouse=True)
def by_value(ray_cluster):
    import sys

    # Workers do not have this folder on their path.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def start(tmp_path):
    return lambda _: ray.remote(num_cpus=0)(Clerk).remote(str(tmp_path / "died"))


def post(start, **settings) -> Post:
    return Post("clerk", start, **{"max_failures": 1, **settings})


def ask(place: Post, method: str, timeout_s: float = SOON_S):
    return asyncio.run(place.insist(method, timeout_s=timeout_s))


def replaced(place: Post, method: str, timeout_s: float = SOON_S) -> bool:
    from rl_ft.crew import Replaced

    try:
        asyncio.run(place.ask(method, timeout_s=timeout_s))
    except Replaced:
        return True
    return False


@pytest.mark.parametrize(("method", "timeout_s"), [("die", SOON_S), ("hang", 3.0)])
def test_who_dies_or_hangs_is_replaced(start, method, timeout_s):
    place = post(start)
    before = ask(place, "work")
    assert replaced(place, method, timeout_s)
    assert ask(place, "work") != before


def test_who_fails_too_often_ends_the_run_by_name(start):
    place = post(start)
    assert replaced(place, "die")
    cause = r"clerk failed 2 times, ray.max_failures is 1; the last time, it died \(.+ exit"
    with pytest.raises(ActorError, match=cause):
        replaced(place, "die")


def test_what_an_actor_cannot_begin_with_is_not_tried_again(tmp_path):
    class Lame:
        def __init__(self):
            raise ValueError("no such model")

        def work(self):
            return 1

    started = []

    def start(num_before):
        started.append(num_before)
        return ray.remote(num_cpus=0)(Lame).remote()

    with pytest.raises(ray.exceptions.ActorDiedError, match="no such model"):
        asyncio.run(post(start).insist("work", timeout_s=SOON_S))
    assert started == [0]


def test_a_successor_is_told_how_many_it_follows():
    told = []

    def start(num_before):
        told.append(num_before)
        return ray.remote(num_cpus=0)(Clerk).remote()

    assert replaced(post(start), "die")
    assert told == [0, 1]


def test_an_error_that_an_actor_raises_is_no_death(start):
    place = post(start)
    before = ask(place, "work")
    with pytest.raises(ValueError, match="as it is"):
        ask(place, "err")
    assert ask(place, "work") == before


def test_one_death_that_ends_several_calls_counts_once(start):
    place = post(start)

    async def at_once():
        calls = (place.ask(method, timeout_s=SOON_S) for method in ("die", "work", "work"))
        return await asyncio.gather(*calls, return_exceptions=True)

    assert {type(found).__name__ for found in asyncio.run(at_once())} == {"Replaced"}
    assert ask(place, "work")


# ---- samplers


def samplers(start, num: int = 2) -> Samplers:
    return Samplers([start] * num, max_failures=2, call_timeout_s=SOON_S)


def test_the_one_with_the_least_to_do_is_asked(start):
    both = samplers(start)

    async def at_once():
        calls = (both.generate([(1,)], busy_s=0.5) for _ in range(4))
        return [answers[0][0].text for answers in await asyncio.gather(*calls)]

    asked = asyncio.run(at_once())
    assert sorted(asked.count(pid) for pid in set(asked)) == [2, 2]


def test_what_a_dead_sampler_was_asked_is_asked_again(start):
    answers = asyncio.run(samplers(start).generate([(7,), (8,)], dies_on=7))
    assert len(answers) == 2


def test_a_new_sampler_answers_with_the_weights_of_the_others(start):
    one = samplers(start, num=1)

    async def loaded_then_killed():
        await one.load(WeightsRef(version=5, digest="", payload=None))
        return await one.generate([(7,)], dies_on=7)

    [[completion]] = asyncio.run(loaded_then_killed())
    assert completion.weights_version == 5


# ---- worlds


@pytest.fixture
def remote_worlds(smoke_config):
    pool = ray.remote(num_cpus=0)(WorldPool)

    def start(num_before):
        return pool.remote(smoke_config, ("generated:1",), seed=1, num_worlds=2)

    made = RemoteWorlds(post(start, max_failures=2), num_worlds=2, call_timeout_s=SOON_S)
    yield made
    made.close()


def test_worlds_of_a_dead_actor_have_failed_and_others_take_their_place(remote_worlds):
    async def story():
        first = await remote_worlds.states()
        ray.kill(remote_worlds.post.actor)
        lost = await remote_worlds.states()
        settled = await remote_worlds.settle([None, None])
        return first, lost, settled, await remote_worlds.states()

    first, lost, settled, then = asyncio.run(story())
    assert lost == [DEAD, DEAD]
    assert settled == [None, None]
    assert not {str} & set(map(type, (*first, *then)))


def test_what_a_dead_actor_was_to_try_has_failed(remote_worlds):
    async def story():
        await remote_worlds.states()
        ray.kill(remote_worlds.post.actor)
        return await remote_worlds.settle([{}, None])

    failed, skipped = asyncio.run(story())
    assert (failed.failure, failed.outcomes, skipped) == (DEAD, {}, None)


# ---- room


def test_a_cluster_without_room_is_named(monkeypatch):
    monkeypatch.setattr(cluster, "RESERVE_S", 1.0)
    with pytest.raises(UserError, match=r"no room for 4000 CPU \(free: "):
        Places([{"CPU": 2000.0}] * 2, strategy="PACK")


@pytest.fixture(scope="module")
def free_cpus(by_value):
    """Whatever other modules hold; asked once, since what was just given back shows late."""
    return ray.available_resources()["CPU"]


@pytest.fixture
def most_of_it(monkeypatch, free_cpus):
    """CPUs of which there are not twice as many free."""
    monkeypatch.setattr(cluster, "RESERVE_S", 5.0)
    return free_cpus * 0.6


def test_room_that_is_given_back_is_free_again(most_of_it):
    for _ in range(2):
        Places([{"CPU": most_of_it}], strategy="SPREAD").release()


def test_room_is_given_back_with_the_last_of_its_places(most_of_it):
    places = Places([{"CPU": most_of_it / 2}] * 2, strategy="PACK")
    places.release()
    with pytest.raises(UserError, match="no room"):
        Places([{"CPU": most_of_it}], strategy="PACK")
    places.release()
    Places([{"CPU": most_of_it}], strategy="PACK").release()


def test_room_of_a_run_that_was_killed_can_be_taken_back(most_of_it, tmp_path):
    Places([{"CPU": most_of_it}], strategy="PACK", holder=str(tmp_path / "run" / "data"))
    take_back(f"{tmp_path}/run/")
    Places([{"CPU": most_of_it}], strategy="PACK").release()
