"""Answers that the policy did not give: any phase can be tried, so any phase can teach.

A policy that is sure of a wrong phase never samples the right one: its groups are unanimous and
teach nothing, however long it trains. But the fork measures every legal phase from the identical
instant, said or not. So a repeated answer makes way for a legal answer that nobody gave.

Such a row is off-policy: nobody sampled it, it enters the objective with a ratio of 1, and without
the repeats a group no longer weighs answers by how likely they are. What is descended is therefore
not the policy's expected cost but, together with `grpo.surprise_coef`, how far the log-odds of each
instant's answers are from their rewards. Where nothing is left to descend, the legal answers have
the odds of the maximum-entropy policy, softmax(reward / surprise_coef) (Haarnoja et al. 2018, "Soft
Actor-Critic", section 4), wherever the policy began.
"""

from __future__ import annotations

import random
from dataclasses import replace

from envs import dialect
from envs.types import Action
from rl_ft.asking import Asked, Render, phase_of
from rl_ft.types import Completion


def with_counterfactuals(asked: Asked, render: Render, rng: random.Random) -> Asked:
    """The same question; repeats of an answer are replaced by legal answers that were not given.

    The group keeps its size, so of more missing answers than repeats a few are drawn. What was
    given once stays, right or wrong, and the first answer stays the first: it is what the policy
    does.

    Example:
        answers A A A B of the legal phases A, B, C become A C A B
    """
    decision = asked.telling.decision
    pairs = zip(asked.parsed, asked.canonical, strict=True)
    present = {phase_of(answer) for answer, canonical in pairs if canonical}
    missing = [phase for phase in decision.legal if phase not in present]
    repeats, seen = [], set()
    for place, completion in enumerate(asked.completions):
        if completion.token_ids in seen:
            repeats.append(place)
        seen.add(completion.token_ids)
    completions, parsed = list(asked.completions), list(asked.parsed)
    canonical = list(asked.canonical)
    drawn = rng.sample(missing, min(len(missing), len(repeats)))
    for place, phase in zip(repeats, drawn, strict=False):
        action = Action(phase=phase)
        text = dialect.answer_text(decision, action)
        completions[place] = Completion(
            token_ids=render.answer_ids(text),
            logprobs=None,
            text=text,
            finish_reason="stop",
            weights_version=completions[place].weights_version,
        )
        parsed[place], canonical[place] = dialect.Parsed(action=action, strict=True), True
    return replace(
        asked, completions=tuple(completions), parsed=tuple(parsed), canonical=tuple(canonical)
    )
