"""Answers that the policy did not give: any phase can be tried, so any phase can teach.

A policy that is sure of a wrong phase never samples the right one: its groups are unanimous and
teach nothing, however long it trains. But the fork measures every legal phase from the identical
instant, said or not. So a repeated answer makes way for a legal answer that nobody gave.

Such a row is off-policy: nobody sampled it, and it enters the objective with a ratio of 1. With
`grpo.target_coef` above 0 it weighs there what it weighs in the policy, next to nothing, and what
lifts it is the target that the policy is drawn to (`rl_ft.target`). With 0 it counts like any other
row, and log-odds grow as long as training goes on.
"""

from __future__ import annotations

import random
from dataclasses import replace

from envs.answers import Parsed, answer_text, options
from rl_ft.asking import Asked
from rl_ft.types import Completion


def with_counterfactuals(asked: Asked, rng: random.Random) -> Asked:
    """The same question; repeats of an answer are replaced by legal answers that were not given.

    The group keeps its size, so of more missing answers than repeats a few are drawn. What was
    given once stays, right or wrong, and the first answer stays the first: it is what the policy
    does.

    Example:
        answers A A A B of the legal phases A, B, C become A C A B
    """
    first_place: dict[tuple[int, ...], int] = {}
    repeats = []
    for place, completion in enumerate(asked.completions):
        if first_place.setdefault(completion.token_ids, place) != place:
            repeats.append(place)
    decision = asked.telling.decision
    answers = zip(options(decision), asked.spelled, strict=True)
    missing = [(action, token_ids) for action, token_ids in answers if token_ids not in first_place]
    completions, parsed = list(asked.completions), list(asked.parsed)
    times_given = list(asked.times_given)
    drawn = rng.sample(missing, min(len(missing), len(repeats)))
    for place, (action, token_ids) in zip(repeats, drawn, strict=False):
        times_given[first_place[completions[place].token_ids]] += times_given[place]
        times_given[place] = 0
        completions[place] = Completion(
            token_ids=token_ids,
            logprobs=None,
            text=answer_text(decision, action),
            finish_reason="stop",
            weights_version=completions[place].weights_version,
        )
        parsed[place] = Parsed(action=action, strict=True)
    return replace(
        asked,
        completions=tuple(completions),
        parsed=tuple(parsed),
        times_given=tuple(times_given),
    )
