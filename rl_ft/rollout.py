"""From decisions to scored groups: render, generate, parse, complete, branch, reward, advantage.

Knows neither Ray nor vLLM: worlds and the sampler are two small protocols. A world that fails
costs its group and is counted; it never becomes a reward.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from envs import dialect
from envs.answers import Parsed, label, options
from envs.errors import WorldError
from envs.reward import Reward, cost_veh_s, group_rewards
from envs.types import Action, Decision, ParseFailure
from rl_ft.advantage import group_advantages, is_zero_variance
from rl_ft.asking import Asked, Generate, Render, ask, tell
from rl_ft.config import Config
from rl_ft.counterfactual import with_counterfactuals
from rl_ft.recall import Instant, Recall
from rl_ft.states import reward_weights, state_id
from rl_ft.types import RolloutGroup
from rl_ft.worlds import Order, State, Tried

MAX_EMPTY_ROUNDS = 10
"""Rounds in a row with failures and no new instant, after which none is expected."""


class Worlds(Protocol):
    """`rl_ft.worlds.WorldPool`, wherever it runs."""

    async def states(self) -> list[State]:
        """Where every world stands."""
        ...

    async def settle(self, orders: Sequence[Order | None]) -> list[Tried | None]:
        """Branch and execute."""
        ...


@dataclass(kw_only=True, slots=True)
class Tally:
    """What happened while groups were collected; sums, so tallies of several workers add up."""

    counts: Counter[str] = field(default_factory=Counter)
    """groups, new, driven, zero_variance, failed, agreed, disagreed and failed/<cause>; of what the
    policy gave completions, strict, partial, invalid and distinct; how many of the groups'
    answers are counterfactual; sampled_tokens, and branches, the actions that were tried out."""
    sums: Counter[str] = field(default_factory=Counter)
    """reward with its parts format_reward and traffic_reward; gain_veh_s and regret_veh_s of new
    instants; and seconds by stage."""

    def add(self, other: Tally) -> None:
        """Take in another worker's tally."""
        self.counts.update(other.counts)
        self.sums.update(other.sums)


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """Groups in a fixed order, what happened on the way, and some decisions to show."""

    groups: tuple[RolloutGroup, ...]
    tally: Tally
    examples: tuple[dict[str, Any], ...]


_Questions = list[tuple[Asked, Instant]]

Score = Callable[[Asked, Sequence[str], Tried], Sequence[Reward]]
"""Rewards of one group from its answers, their formats (strict, partial or invalid), and what was
tried, both as they were told."""


async def collect_groups(
    worlds: Worlds,
    generate: Generate,
    render: Render,
    config: Config,
    *,
    quota: int,
    seed: int,
    recall: Recall,
    score: Score | None = None,
) -> Collected:
    """Rounds of questions until `quota` groups have something to teach.

    The first round asks about one new decision of every world that stands at one; the others are
    driven on by the policy. What is missing is asked about instants of earlier steps, where enough
    are ready in `recall`, else about new ones again. An instant
    returns to `recall` as long as it teaches and was told less than `rollout.tellings` times.
    Groups without variance are refilled for at most `rollout.max_refills` further rounds; what is
    still missing then is filled with them.

    Raises:
        WorldError: every world failed, again and again.
    """
    score = score or traffic_score(config)
    teaching: list[RolloutGroup] = []
    taught: list[Instant] = []
    idle: list[RolloutGroup] = []
    tally = Tally()
    examples: list[dict[str, Any]] = []
    rounds = num_refills = num_empty = 0
    while len(teaching) < quota:
        missing = quota - len(teaching)
        ask_worlds = not rounds or recall.ready() < missing
        num_failed = tally.counts["failed"]
        new, again = await _round(
            worlds if ask_worlds else None,
            recall,
            generate,
            render,
            config,
            missing=missing,
            seed=seed + rounds,
            tally=tally,
        )
        rounds += 1
        if new:
            num_empty = 0
        elif tally.counts["failed"] > num_failed:
            num_empty += 1
        if num_empty == MAX_EMPTY_ROUNDS:
            causes = ", ".join(sorted(k for k in tally.counts if k.startswith("failed/")))
            raise WorldError("no_groups", f"every world failed {num_empty} times: {causes}")
        for i, (question, instant) in enumerate(new + again):
            is_new = i < len(new)
            group, example = _group(question, instant, score, config, tally, is_new=is_new)
            examples.append(example)
            if is_zero_variance(group.rewards, group.valid):
                idle.append(group)
            else:
                teaching.append(group)
                taught.append(instant)
        if len(teaching) + len(idle) >= quota:
            if num_refills == config.rollout.max_refills:
                break
            num_refills += 1
    for i, instant in enumerate(taught):
        instant = instant.put_back(told=i < quota)
        if instant.times_told < config.rollout.tellings and instant.is_complete():
            recall.add(instant)
    groups = (teaching + idle)[:quota]
    return Collected(groups=tuple(groups), tally=tally, examples=tuple(examples[:4]))


async def _round(
    worlds: Worlds | None,
    recall: Recall,
    generate: Generate,
    render: Render,
    config: Config,
    *,
    missing: int,
    seed: int,
    tally: Tally,
) -> tuple[_Questions, _Questions]:
    """Questions about a new instant of every world that has one; and, up to `missing` in all, about
    instants of earlier steps."""
    start = time.perf_counter()
    states = await worlds.states() if worlds else []
    for state in states:
        if isinstance(state, str):
            _count_failure(tally, state)
    decisions = [state for state in states if isinstance(state, Decision)]
    driving = [decision for state in states if isinstance(state, tuple) for decision in state]
    known = recall.draw(missing - len(decisions))
    rng = random.Random(seed)
    told = [tell(decision, rng) for decision in (*decisions, *(i.decision for i in known))]
    ways = [tell(decision, rng) for decision in driving]
    observed = time.perf_counter()
    asked, driven = await ask(told, ways, generate, render, config, seed=seed)
    tally.counts["sampled_tokens"] += sum(
        len(completion.token_ids) for one in (*asked, *driven) for completion in one.completions
    )
    if config.rollout.counterfactuals:
        asked = [with_counterfactuals(question, rng) for question in asked]
    generated = time.perf_counter()
    fresh, again = iter(asked[: len(decisions)]), asked[len(decisions) :]
    by_world = [next(fresh) if isinstance(state, Decision) else None for state in states]
    orders = _orders(states, by_world, driven, tellings=config.rollout.tellings)
    tried = await worlds.settle(orders) if worlds else []
    tally.counts["branches"] += sum(len(answer.outcomes) for answer in tried if answer)
    tally.sums.update(
        observe_s=observed - start,
        generate_s=generated - observed,
        branch_s=time.perf_counter() - generated,
    )
    new: _Questions = []
    for state, question, answer in zip(states, by_world, tried, strict=True):
        if answer and answer.failure:
            _count_failure(tally, answer.failure)
        elif question and answer and isinstance(state, Decision):
            new.append((question, Instant(decision=state, tried=answer)))
        elif answer:
            tally.counts["driven"] += 1
    return new, list(zip(again, known, strict=True))


def _orders(
    states: Sequence[State],
    by_world: Sequence[Asked | None],
    driven: Sequence[Asked],
    *,
    tellings: int,
) -> list[Order | None]:
    """A trial for a world with a question; for one that the policy drives, its choices."""
    choices = iter(driven)
    orders: list[Order | None] = []
    for state, question in zip(states, by_world, strict=True):
        if isinstance(state, tuple):
            orders.append({d.junction.tls_id: next(choices).to_execute() for d in state})
        else:
            orders.append(question.trial(tellings=tellings) if question else None)
    return orders


def _group(
    asked: Asked, instant: Instant, score: Score, config: Config, tally: Tally, *, is_new: bool
) -> tuple[RolloutGroup, dict[str, Any]]:
    tried = asked.telling.as_told(instant.tried)
    weights = reward_weights(config)
    kinds = [_kind(parsed) for parsed in asked.parsed]
    chosen = asked.chosen()
    decision, reference = asked.telling.decision, asked.telling.reference
    costs = {action: cost_veh_s(o, weights) for action, o in tried.outcomes.items()}
    rewards = score(asked, kinds, tried)
    totals = [reward.total for reward in rewards]
    valid = [True] * len(totals)
    group = RolloutGroup(
        group_id=state_id(decision),
        prompt_ids=asked.prompt_ids,
        completions=asked.completions,
        rewards=tuple(totals),
        advantages=group_advantages(totals, valid),
        valid=tuple(valid),
        canonical=asked.canonical(),
        times_given=asked.times_given,
    )
    # Of the policy speaks what it gave itself, as often as it did.
    given = [i for i, times in enumerate(asked.times_given) for _ in range(times)]
    tally.counts.update(
        groups=1,
        new=int(is_new),
        zero_variance=int(is_zero_variance(totals, valid)),
        completions=len(given),
        counterfactual=asked.times_given.count(0),
        distinct=len({chosen[i] for i in given}),
        agreed=int(tried.agreed is True),
        disagreed=int(tried.agreed is False),
        **Counter(kinds[i] for i in given),
    )
    paid = [costs[action] for i in given if (action := chosen[i]) in costs]
    tally.sums.update(
        reward=sum(totals[i] for i in given) / len(given),
        format_reward=sum(rewards[i].format for i in given) / len(given),
        traffic_reward=sum(rewards[i].traffic for i in given) / len(given),
    )
    if paid and is_new:
        mean = sum(paid) / len(paid)
        gain, regret = costs[reference] - mean, mean - min(costs.values())
        tally.sums.update(gain_veh_s=gain, regret_veh_s=regret)
    return group, _example(asked, costs)


def traffic_score(config: Config) -> Score:
    """The reward of the configuration: what each answer cost the traffic, and its format."""
    weights = reward_weights(config)

    def score(asked: Asked, kinds: Sequence[str], tried: Tried) -> Sequence[Reward]:
        if tried.outcomes:
            outcomes = [None if a is None else tried.outcomes[a] for a in asked.chosen()]
            reference = tried.outcomes.get(asked.telling.reference)
            return group_rewards(outcomes, kinds, weights, reference=reference)
        # One distinct action, the reference's own, is not simulated: the format alone differs.
        earned = group_rewards([None] * len(kinds), kinds, weights)
        return [Reward(traffic=0.0, format=r.format, cost_veh_s=None) for r in earned]

    return score


def _kind(parsed: Parsed | ParseFailure) -> str:
    if isinstance(parsed, ParseFailure):
        return "invalid"
    return "strict" if parsed.strict else "partial"


def _count_failure(tally: Tally, cause: str) -> None:
    tally.counts.update({"failed": 1, f"failed/{cause}": 1})


def _example(asked: Asked, costs: dict[Action, float]) -> dict[str, Any]:
    decision = asked.telling.decision
    first = asked.chosen()[0]
    return {
        "id": state_id(decision),
        "prompt": dialect.observation_text(decision),
        "answer": asked.completions[0].text,
        "legal": [label(decision, action) for action in options(decision)],
        "cost_veh_s": {label(decision, action): cost for action, cost in costs.items()},
        "chosen": None if first is None else label(decision, first),
        "teacher": label(decision, asked.telling.reference),
    }


def metrics(tally: Tally) -> dict[str, float]:
    """The tally as the step's metrics: means and shares."""
    counts, sums = tally.counts, tally.sums
    groups, answers = max(1, counts["groups"]), max(1, counts["completions"])
    # Instants told again touch no world and were picked because they taught: they say nothing of
    # failures, nor of how good the policy is where it drives.
    new = max(1, counts["new"])
    attempts = max(1, counts["new"] + counts["driven"] + counts["failed"])
    return {
        "reward/mean": sums["reward"] / groups,
        "avg_final_reward": sums["reward"] / groups,
        "avg_format_reward": sums["format_reward"] / groups,
        "avg_tsc_reward": sums["traffic_reward"] / groups,
        "format_accuracy": counts["strict"] / answers,
        "format/strict": float(counts["strict"]),
        "format/partial": float(counts["partial"]),
        "format/invalid": float(counts["invalid"]),
        "reward/gain_over_max_pressure_veh_s": sums["gain_veh_s"] / new,
        "reward/regret_veh_s": sums["regret_veh_s"] / new,
        "format/strict_share": counts["strict"] / answers,
        "format/partial_share": counts["partial"] / answers,
        "format/invalid_share": counts["invalid"] / answers,
        "health/failed_share": counts["failed"] / attempts,
        "health/zero_variance_share": counts["zero_variance"] / groups,
        "health/distinct_actions": counts["distinct"] / groups,
        "health/branch_disagreements": float(counts["disagreed"]),
        "rollout/groups": float(counts["groups"]),
        "rollout/new_instants": float(counts["new"]),
        "rollout/sampled_tokens": float(counts["sampled_tokens"]),
        "rollout/branches": float(counts["branches"]),
        "rollout/counterfactual_share": counts["counterfactual"] / answers,
        "time/observe_s": sums["observe_s"],
        "time/generate_s": sums["generate_s"],
        "time/branch_s": sums["branch_s"],
    }
