"""Asks again in other words where a model is not sure, and lets the answers vote.

The order of a prompt's lines and the names of its phases say nothing about the traffic, yet what a
model answers depends on them a little. Where it is sure this changes nothing; where it is not, the
mean over several tellings is closer to what it has learnt than any one of them.

Sources: permutation self-consistency (Tang et al. 2024, arXiv:2310.07712); to ask again only where
it may matter is adaptive consistency (Aggarwal et al. 2023, arXiv:2305.11860).
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from envs.answers import Parsed, answer_text, parse
from envs.types import Action, Decision
from rl_ft.asking import Telling, tell
from rl_ft.closed_loop import Ask
from rl_ft.types import Completion

SURE = 0.95
"""A most likely answer of at least this probability is taken at its word."""


def doubts(decision: Decision, answer: Completion, *, num_tellings: int) -> list[Telling]:
    """How else to ask: none if the answer is sure, `num_tellings` - 1 in other words if it is not.

    None either if it is not strict: such an answer counts as what it is. The same question is
    always told in the same ways.
    """
    parsed = parse(decision, answer.text)
    if not (isinstance(parsed, Parsed) and parsed.strict) or _probability(answer) >= SURE:
        return []
    rng = random.Random(f"{decision.junction.tls_id}/{decision.observation.time_s:g}")
    return [tell(decision, rng) for _ in range(num_tellings - 1)]


def elected(
    decision: Decision,
    answer: Completion,
    tellings: Sequence[Telling],
    answers: Sequence[Completion],
) -> Completion:
    """The first answer with the text of what won: the action whose answers are together the most
    probable. An invalid one has no vote."""
    if not tellings:
        return answer
    votes: dict[Action, float] = defaultdict(float)
    if isinstance(first := parse(decision, answer.text), Parsed):
        votes[first.action] += _probability(answer)
    for telling, other in zip(tellings, answers, strict=True):
        if isinstance(parsed := parse(telling.decision, other.text), Parsed):
            votes[telling.in_world(parsed.action)] += _probability(other)
    return replace(answer, text=answer_text(decision, max(votes, key=votes.__getitem__)))


def voting(ask: Ask, *, num_tellings: int) -> Ask:
    """Asks all questions once, and then all those again of whose answers the model is not sure."""

    def answers(decisions: list[Decision]) -> list[Completion]:
        first = ask(decisions)
        told = [
            doubts(decision, answer, num_tellings=num_tellings)
            for decision, answer in zip(decisions, first, strict=True)
        ]
        others = iter(ask([telling.decision for tellings in told for telling in tellings]))
        return [
            elected(decision, answer, tellings, [next(others) for _ in tellings])
            for decision, answer, tellings in zip(decisions, first, told, strict=True)
        ]

    return answers


def _probability(answer: Completion) -> float:
    assert answer.logprobs is not None, "nobody was asked"
    return math.exp(sum(answer.logprobs))
