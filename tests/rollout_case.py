"""Real worlds that remember what was asked of them, and a sampler that answers from a list.

Shared by the tests of rollouts.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from itertools import permutations

from envs import dialect
from envs.answers import answer_text
from envs.controllers import max_pressure
from envs.naming import renamed
from envs.types import Action, Decision, JointAction
from rl_ft.config import Config
from rl_ft.recall import Recall
from rl_ft.rollout import Collected, collect_groups
from rl_ft.types import Completion
from rl_ft.worlds import Order, State, Trial, Tried, WorldPool

NUM_WORLDS = 2
NAMED = re.compile(r" choose (\S+)$", re.MULTILINE)
NAMELESS = [f"-{i}" for i in range(10)]
"""What phases are called of which the prompt says no name, because they may not be chosen."""

Answer = str | Callable[[Decision], int | str]


class Letters:
    """Every character is a token."""

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        return tuple(ord(c) for m in messages for c in m["content"])

    def answer_ids(self, text: str) -> tuple[int, ...]:
        return (*map(ord, text), 0)


class Pool:
    """The worlds behind the protocol, remembering what may be told and what was tried."""

    def __init__(self, pool: WorldPool) -> None:
        self.pool = pool
        self.decisions: dict[str, Decision] = {}
        self.num_rounds = 0
        self.states_now: list[State] = []
        self.trials: list[tuple[Decision, Trial]] = []
        self.driven: list[tuple[tuple[Decision, ...], JointAction]] = []
        self.before_settle: Callable[[], None] = lambda: None

    async def states(self) -> list[State]:
        self.num_rounds += 1
        self.states_now = states = self.pool.states()
        for state in states:
            self._remember((state,) if isinstance(state, Decision) else state)
        return states

    def _remember(self, decisions: tuple[Decision, ...] | str) -> None:
        for decision in decisions:
            for order in permutations(range(len(decision.junction.phases))):
                told = renamed(decision, order, NAMELESS[: len(order)])
                self.decisions[NAMED.sub(" choose", dialect.observation_text(told))] = told

    def decision(self, prompt: str) -> Decision:
        """The decision that a prompt is about, in its order and under its names."""
        told = self.decisions[NAMED.sub(" choose", prompt)]
        found = [NAMED.search(line) for line in prompt.splitlines()]
        names = [name[1] if name else filler for name, filler in zip(found, NAMELESS, strict=False)]
        return renamed(told, range(len(names)), names)

    async def settle(self, orders: Sequence[Order | None]) -> list[Tried | None]:
        self.before_settle()
        pairs = list(zip(self.states_now, orders, strict=True))
        self.trials += [(s, o) for s, o in pairs if isinstance(o, Trial)]
        self.driven += [(s, o) for s, o in pairs if isinstance(s, tuple)]
        return self.pool.settle(orders)


class Sampler:
    """Answers each prompt from a list; what is callable there is asked for the phase or text."""

    def __init__(self, worlds: Pool, answers: Sequence[Answer]) -> None:
        self.worlds, self.answers = worlds, answers
        self.seeds: list[int] = []

    async def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        seed: int,
        greedy: Sequence[Sequence[int]] = (),
    ) -> list[list[Completion]]:
        assert num_samples == len(self.answers)
        self.seeds.append(seed)
        sampled = [self._completions(ids, self.answers) for ids in prompts]
        return sampled + [self._completions(ids, self.answers[:1]) for ids in greedy]

    def _completions(self, ids: Sequence[int], answers: Sequence[Answer]) -> list[Completion]:
        decision = self.worlds.decision("".join(map(chr, ids)))
        return [self._completion(decision, answer) for answer in answers]

    @staticmethod
    def _completion(decision: Decision, answer: Answer) -> Completion:
        if not isinstance(answer, str):
            answer = answer(decision)
        if not isinstance(answer, str):
            answer = answer_text(decision, Action(phase=answer))
        token_ids = Letters().answer_ids(answer)
        return Completion(
            token_ids=token_ids,
            logprobs=(0.0,) * len(token_ids),
            text=answer,
            finish_reason="stop",
            weights_version=3,
        )


def first(decision: Decision) -> int:
    return decision.legal[0]


def last(decision: Decision) -> int:
    return decision.legal[-1]


def reference(decision: Decision) -> int:
    return max_pressure(decision).phase


def partial_last(decision: Decision) -> str:
    return f"I take {decision.junction.phases[decision.legal[-1]].name}."


def rollout_config(smoke_config: Config) -> Config:
    """Questions at every instant, with vehicles to decide about; the policy drives, and groups hold
    what was sampled."""
    rollout = {
        "counterfactuals": False,
        "warm_up_s": 200.0,
        "max_refills": 1,
        "max_pause": 0,
        "min_queue_veh": 6,
        "behaviour": smoke_config.rollout.behaviour.model_copy(
            update={"policy": 1.0, "max_pressure": 0.0, "max_wave": 0.0, "random": 0.0}
        ),
    }
    return smoke_config.model_copy(
        update={
            "rollout": smoke_config.rollout.model_copy(update=rollout),
            "reward": smoke_config.reward.model_copy(update={"horizon_s": 30.0}),
            "model": smoke_config.model.model_copy(update={"instructions": False}),
        }
    )


def collect(
    worlds, config, answers, *, quota=4, seed=10, score=None, recall=None
) -> tuple[Collected, Sampler]:
    sampler = Sampler(worlds, answers)
    grpo = config.grpo.model_copy(update={"num_generations": len(answers)})
    config = config.model_copy(update={"grpo": grpo})
    collected = asyncio.run(
        collect_groups(
            worlds,
            sampler,
            Letters(),
            config,
            quota=quota,
            seed=seed,
            score=score,
            recall=recall or Recall(seed=1, num_waiting=0),
        )
    )
    return collected, sampler


def told(config: Config, times: int) -> Config:
    """The configuration under which an instant is told so many times."""
    return config.model_copy(
        update={"rollout": config.rollout.model_copy(update={"tellings": times})}
    )


def greens(decision: Decision) -> list[int]:
    """The legal phases in an order that does not depend on how they are told."""
    return sorted(decision.legal, key=lambda i: decision.junction.phases[i].state)


def extremes() -> list[Answer]:
    """Two answers that mean the same greens however they are told."""
    return [lambda d: greens(d)[0], lambda d: greens(d)[-1]]
