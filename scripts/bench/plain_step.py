"""GRPO steps as anybody would assemble them: stock TRL, and a new SUMO process per completion.

`whole.py` runs this in a process of its own. The prompts are those of an `Assignment`, all of them
in every step. Their states are met again by the same pool of worlds over TraCI, and saved: neither
is in the seconds of a step. In it are: generating with Hugging Face, a reward function that starts
SUMO from the saved state for every completion with a legal answer and goes on as a branch does, and
TRL's own forward, backward and optimiser.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# First: envs.sumo over TraCI in this process.
from saved_state import SavedState, TraciSimulation  # isort: skip
from assignment import Assignment

from envs import dialect
from envs.answers import parse
from envs.reward import group_rewards
from envs.types import Action, Decision, JointAction, Outcome, ParseFailure, Scenario
from rl_ft import journal
from rl_ft.states import reward_weights, state_id
from rl_ft.worlds import Trial, WorldPool

MAX_ROUNDS = 1000


def saved_states(assignment: Assignment, folder: Path) -> dict[str, SavedState]:
    """The instants of the assignment by `state_id`, from pools that live through the same again.

    Where the policy never drives, a pool's worlds do not depend on what is answered.
    """
    wanted = {state_id(decision) for decision in assignment.told}
    found: dict[str, SavedState] = {}

    class TraciWorld:
        """As much of `envs.world.World` as a pool needs that tries nothing."""

        def __init__(self, *, timeout_s: float) -> None:
            self._simulation: TraciSimulation | None = None

        def _speaking(self) -> TraciSimulation:
            assert self._simulation is not None
            self._simulation.switch_to()
            return self._simulation

        def reset(self, scenario: Scenario, seed: int) -> None:
            self.close()
            self._simulation = TraciSimulation(scenario, seed)

        def time(self) -> tuple[float, bool]:
            simulation = self._speaking()
            return simulation.time_s, simulation.done

        def decisions(self) -> tuple[Decision, ...]:
            simulation = self._speaking()
            decisions = simulation.decisions()
            for name in {state_id(d) for d in decisions} & wanted - found.keys():
                found[name] = simulation.save(folder / f"{len(found)}.xml")
            return decisions

        def drive(self, controller: str, until_s: float) -> None:
            self._speaking().drive(controller, until_s)

        def close(self) -> None:
            if self._simulation is not None:
                self._speaking().close()
                self._simulation = None

    journal.World = TraciWorld
    pools = [
        WorldPool(
            assignment.config, assignment.config.scenarios.train, seed=seed, num_worlds=num_worlds
        )
        for seed, num_worlds in assignment.pools
    ]
    for _ in range(MAX_ROUNDS):
        waiting = [len(pool.states()) for pool in pools]
        if not wanted - found.keys():
            break
        for pool, num_worlds in zip(pools, waiting, strict=True):
            pool.settle([Trial(actions=(), executed=None)] * num_worlds)
    for pool in pools:
        pool.close()
    if missing := wanted - found.keys():
        raise SystemExit(f"not met again: {sorted(missing)}")
    return found


class Trials:
    """The reward function: what each completion costs the traffic, each in a new SUMO process."""

    def __init__(self, assignment: Assignment, states: dict[str, SavedState]) -> None:
        self._assignment, self._states = assignment, states
        self.num_processes = 0

    def __call__(
        self, completions: Sequence[list[dict[str, str]]], number: Sequence[int], **_: Any
    ) -> list[float]:
        """Rewards of whole groups, one behind the other; `number` is that of the decision."""
        config = self._assignment.config
        rewards: list[float] = []
        rows = zip(completions, number, strict=True)
        for _number, group in itertools.groupby(rows, key=lambda row: row[1]):
            decision = self._assignment.told[_number]
            parsed = [parse(decision, chat[0]["content"]) for chat, _ in group]
            kinds = [
                "invalid" if isinstance(p, ParseFailure) else "strict" if p.strict else "partial"
                for p in parsed
            ]
            outcomes = [
                None if isinstance(p, ParseFailure) else self._outcome(decision, p.action)
                for p in parsed
            ]
            found = group_rewards(outcomes, kinds, reward_weights(config))
            rewards += [reward.total for reward in found]
        return rewards

    def _outcome(self, decision: Decision, told: Action) -> Outcome:
        settings = self._assignment.config.reward
        tls_id, shown = decision.junction.tls_id, decision.junction.phases[told.phase].state
        self.num_processes += 1
        with self._states[state_id(decision)].opened() as simulation:
            (spec,) = [spec for spec in simulation.junctions if spec.tls_id == tls_id]
            # The decision was told with the phases in another order.
            (phase,) = [i for i, phase in enumerate(spec.phases) if phase.state == shown]
            action: JointAction = {tls_id: replace(told, phase=phase)}
            return simulation.play(action, settings.horizon_s, settings.follow)


def train(assignment: Assignment, trials: Trials, folder: Path) -> list[dict[str, float]]:
    """Seconds of every step by stage, and the SUMO processes that it started."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from transformers.utils.logging import disable_progress_bar

    from rl_ft.learner import grpo_args, load_model
    from rl_ft.trainer import GRPOTrainer

    config = assignment.config
    torch.set_num_threads(config.ray.torch_threads)
    disable_progress_bar()
    steps: list[dict[str, float]] = []

    class Clocked(GRPOTrainer):
        """Stock, with a look at the clock."""

        def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
            started = time.perf_counter()
            found = super()._generate(prompts)
            steps[-1]["generate_s"] = time.perf_counter() - started
            if {tuple(ids) for ids in found[0]} != set(assignment.prompt_ids):
                raise SystemExit("TRL renders other prompts than ours: nothing can be compared")
            return found

        def _calculate_rewards(self, *arguments: Any) -> Any:
            started, before = time.perf_counter(), trials.num_processes
            found = super()._calculate_rewards(*arguments)
            steps[-1]["reward_s"] = time.perf_counter() - started
            steps[-1]["num_processes"] = trials.num_processes - before
            return found

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            steps.append({"step_s": -time.perf_counter(), "core_s": -sum(os.times()[:4])})

        def on_step_end(self, *_: object, **__: object) -> None:
            steps[-1]["step_s"] += time.perf_counter()
            steps[-1]["core_s"] += sum(os.times()[:4])

    model, tokenizer = load_model(assignment.model, config)
    arguments = grpo_args(config, output_dir=folder, num_groups=len(assignment.told))
    arguments.max_steps, arguments.save_strategy = assignment.num_steps, "no"
    chats = [
        dialect.messages(decision, instructions=config.model.instructions)
        for decision in assignment.told
    ]
    Clocked(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        reward_funcs=trials,
        train_dataset=Dataset.from_dict({"prompt": chats, "number": range(len(chats))}),
        callbacks=[Clock()],
    ).train()
    return steps


def main() -> None:
    """Prints the steps of the assignment in the file that is named, as one line of JSON."""
    assignment = pickle.loads(Path(sys.argv[1]).read_bytes())
    with tempfile.TemporaryDirectory() as place:
        trials = Trials(assignment, saved_states(assignment, Path(place)))
        steps = train(assignment, trials, Path(place, "trainer"))
    print(json.dumps(steps))


if __name__ == "__main__":
    main()
