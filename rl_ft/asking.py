"""From decisions to answers: told in a random order and under random names, asked, parsed.

The sampler and the renderer are two small protocols; what an answer is worth is the business of
`rl_ft.rollout`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from envs import dialect
from envs.answers import Parsed, act, answer_texts, options, parse
from envs.controllers import max_pressure
from envs.naming import as_told, in_world, retold
from envs.types import Action, Decision, ParseFailure
from rl_ft.config import Config
from rl_ft.types import Completion
from rl_ft.worlds import Trial, Tried


class Generate(Protocol):
    """Sample completions of prompts; where the model runs is not the caller's business."""

    async def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        seed: int,
        greedy: Sequence[Sequence[int]] = (),
    ) -> list[list[Completion]]:
        """`num_samples` completions for each prompt, then the most likely one for each of
        `greedy`: one call, because a decode step costs nearly as much for few prompts as for many.
        """
        ...


class Render(Protocol):
    """What is used of `rl_ft.render.Renderer`."""

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Token ids of a chat up to where the answer starts."""
        ...

    def answer_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of an answer with its end token."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Telling:
    """A decision told with its phases in another order and under other names: place i holds the
    world's `order[i]`."""

    decision: Decision
    order: tuple[int, ...]
    reference: Action
    """What max-pressure would choose: branched too, to say what the policy gains over it."""

    def in_world(self, action: Action) -> Action:
        """An action of this telling as the world knows it."""
        return in_world(action, self.order)

    def as_told(self, tried: Tried) -> Tried:
        """What was tried in the world, by the places of this telling."""
        outcomes = {
            as_told(action, self.order): outcome for action, outcome in tried.outcomes.items()
        }
        return replace(tried, outcomes=outcomes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A telling with the answers of its group."""

    telling: Telling
    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    parsed: tuple[Parsed | ParseFailure, ...]
    spelled: tuple[tuple[int, ...], ...]
    """For each legal action the tokens that its answer should have."""
    times_given: tuple[int, ...]
    """How often the policy gave each, where it stands once for several; 0: it did not."""

    def chosen(self) -> list[Action | None]:
        """What each answer means in this telling; None where it means nothing."""
        return [p.action if isinstance(p, Parsed) else None for p in self.parsed]

    def canonical(self) -> tuple[bool, ...]:
        """Which answers are legal and in exactly the tokens that they should have."""
        return tuple(completion.token_ids in self.spelled for completion in self.completions)

    def to_execute(self) -> Action:
        """What the first answer does to its junction while the policy drives; max-pressure decides
        where it is invalid, as in the closed loop."""
        return self.telling.in_world(self.chosen()[0] or self.telling.reference)

    def trial(self, *, tellings: int) -> Trial:
        """What the world is to try; the first answer is executed where the policy drives.

        Every legal action, if the instant may be told again, but not where all answers of the group
        choose the same: to ask again would hardly teach.
        """
        telling, chosen = self.telling, self.chosen()
        actions = {action for action in chosen if action is not None}
        if tellings > 1 and len(actions) > 1:
            actions |= set(options(telling.decision))
        actions.add(telling.reference)
        return Trial(
            actions=tuple(sorted(map(telling.in_world, actions))),
            executed=None if chosen[0] is None else telling.in_world(chosen[0]),
        )


def tell(decision: Decision, rng: random.Random) -> Telling:
    """In a random order and under random names: what a name means changes with every question."""
    told, order = retold(decision, rng)
    return Telling(
        decision=told,
        order=order,
        reference=act(told, order.index(max_pressure(decision).phase)),
    )


async def ask(
    told: Sequence[Telling],
    driving: Sequence[Telling],
    generate: Generate,
    render: Render,
    config: Config,
    *,
    seed: int,
) -> tuple[list[Asked], list[Asked]]:
    """`grpo.num_generations` answers about each of `told`; the most likely one to `driving`."""
    tellings = [*told, *driving]
    prompts = [
        render.prompt_ids(
            dialect.messages(telling.decision, instructions=config.model.instructions)
        )
        for telling in tellings
    ]
    if not prompts:
        return [], []
    num = len(told)
    answered = await generate(
        prompts[:num],
        num_samples=config.grpo.num_generations,
        seed=seed,
        greedy=prompts[num:],
    )
    asked = [
        Asked(
            telling=telling,
            prompt_ids=tuple(prompt),
            completions=tuple(completions),
            parsed=tuple(parse(telling.decision, c.text) for c in completions),
            spelled=_spelled(telling.decision, render),
            times_given=(1,) * len(completions),
        )
        for telling, prompt, completions in zip(tellings, prompts, answered, strict=True)
    ]
    return asked[:num], asked[num:]


def _spelled(decision: Decision, render: Render) -> tuple[tuple[int, ...], ...]:
    return tuple(render.answer_ids(text) for text in answer_texts(decision).values())
