"""Answers that the policy did not give: any phase can be tried, so any phase can teach.

A policy that is sure of a wrong phase never samples the right one: its groups are unanimous and
teach nothing, however long it trains. But the fork measures every legal phase from the identical
instant, said or not. So a repeated answer, which would only say again what its twin says, makes
way for a legal answer that nobody gave. Together with `grpo.surprise_coef` the policy then goes
where the measured costs want it, from wherever it stands: where no answer of a group can gain from
another any more, its probabilities are those of the maximum-entropy policy,
softmax(reward / surprise_coef) (Haarnoja et al. 2018, "Soft Actor-Critic", section 4).
"""

from __future__ import annotations

import random
from dataclasses import replace

from envs import dialect
from envs.types import Action
from rl_ft.asking import Asked, Render
from rl_ft.types import Completion


def with_counterfactuals(asked: Asked, render: Render, rng: random.Random) -> Asked:
    """The same question; repeats of an answer are replaced by legal answers that were not given.

    The group keeps its size, so of more missing answers than repeats a few are drawn. What was
    sampled once stays, right or wrong, and the first answer stays the first: it is what the policy
    does.

    Example:
        answers A A A B of the legal phases A, B, C become A C A B
    """
    decision = asked.telling.decision
    given = {p.action.phase for p in asked.parsed if isinstance(p, dialect.Parsed) and p.strict}
    missing = [phase for phase in decision.legal if phase not in given]
    repeats, seen = [], set()
    for place, completion in enumerate(asked.completions):
        if completion.token_ids in seen:
            repeats.append(place)
        seen.add(completion.token_ids)
    completions, parsed = list(asked.completions), list(asked.parsed)
    drawn = rng.sample(missing, min(len(missing), len(repeats)))
    for place, phase in zip(repeats, drawn, strict=False):
        text = dialect.answer_text(decision, Action(phase=phase))
        completions[place] = Completion(
            token_ids=render.answer_ids(text),
            logprobs=None,
            text=text,
            finish_reason="stop",
            weights_version=completions[place].weights_version,
        )
        parsed[place] = dialect.Parsed(action=Action(phase=phase), strict=True)
    return replace(asked, completions=tuple(completions), parsed=tuple(parsed))
