"""Decision states with the teachers' answers: what the supervised start learns from.

Walks the training scenarios under mixed behaviour and keeps instants at which the choice matters;
at each, every legal phase is tried by branching, so a row also says what each would have cost.
Every state is told several times with its phases in another order and under other names, so that
what is learnt is to read the traffic. Worlds run in parallel, one per core; the rows do not depend
on how many.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from envs import dialect
from envs.controllers import CONTROLLERS
from envs.errors import UserError
from envs.naming import retold
from envs.reward import RewardWeights, cost_veh_s
from envs.scenario import expand, load_scenario
from envs.types import Action, Decision
from envs.world import World
from rl_ft.config import Config
from rl_ft.progress import track
from rl_ft.run_folder import RunFolder
from rl_ft.tiny import build_tiny
from rl_ft.worlds import draw_driver, worth_asking

log = logging.getLogger(__name__)

Row = dict[str, Any]

SPARE = 1.25
"""Episodes beyond what is wanted: light traffic gives fewer states that matter than asked for."""


def prepare(config: Config, folder: RunFolder) -> None:
    """Write the base model to `model/` and the teachers' rows to `data/`."""
    prepare_model(config, folder.path("model"))
    data = folder.path("data")
    data.mkdir(exist_ok=True)
    states = collect_states(config)
    train, held_back = states[: config.prepare.num_states], states[config.prepare.num_states :]
    lessons = [row for tellings in train for row in tellings]
    temperature = config.prepare.lookahead_temperature_veh_s
    for teacher in config.prepare.teachers:
        taught = soften(lessons, temperature, config.seed) if teacher == "lookahead" else lessons
        _write_rows(data / f"sft_{teacher}.jsonl", taught, teacher)
        _write_rows(data / f"eval_{teacher}.jsonl", [first for first, *_ in held_back], teacher)
    log.info("prepared %d training and %d evaluation states", len(train), len(held_back))


def prepare_model(config: Config, directory: Path) -> Path:
    """The policy's starting point as a Hugging Face folder: built, or copied from where it is.

    Raises:
        UserError: `model.name_or_path` is not `tiny` and not a model folder.
    """
    name = config.model.name_or_path
    if name == "tiny":
        return build_tiny(directory, config=config.model.tiny, seed=config.seed)
    source = Path(name)
    if not (source / "config.json").is_file():
        raise UserError(
            f"model.name_or_path is {name!r}: expected 'tiny' or a folder with config.json, "
            "weights and tokenizer; download a Hugging Face model to a folder first"
        )
    shutil.copytree(source, directory, dirs_exist_ok=True)
    return directory


def collect_states(config: Config) -> list[list[Row]]:
    """All decision states, shuffled by the seed; as many as training and evaluation ask for.

    Each is `prepare.tellings` rows about one instant.
    """
    prepare = config.prepare
    wanted = prepare.num_states + prepare.num_eval_states
    scenarios = list(expand(config.scenarios.train))
    random.Random(config.seed).shuffle(scenarios)
    num_episodes = math.ceil(SPARE * wanted / prepare.states_per_episode)
    jobs = [(scenarios[i % len(scenarios)], config.seed * 100_003 + i) for i in range(num_episodes)]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        episodes = pool.map(lambda job: _episode_states(config, *job), jobs)
        shown = track(episodes, "decision states", total=len(jobs), unit="episodes")
        states = [state for part in shown for state in part]
    if len(states) < wanted:
        raise UserError(
            f"the training scenarios gave {len(states)} decision states that matter, "
            f"{wanted} are wanted; lower prepare.num_states or prepare.min_queue_veh"
        )
    random.Random(config.seed).shuffle(states)
    return states[:wanted]


def soften(rows: Sequence[Row], temperature_veh_s: float, seed: int) -> list[Row]:
    """The rows with lookahead's answers drawn from softmax(-cost / temperature).

    Where all phases cost nearly the same, the cheapest is decided by chance: to insist on it would
    teach noise, and leave nothing to explore.
    """
    rng = random.Random(seed)
    softened = []
    for row in rows:
        costs = list(row["cost_veh_s"].values())
        weights = [math.exp((min(costs) - cost) / temperature_veh_s) for cost in costs]
        [answer] = rng.choices(row["legal_answers"], weights=weights)
        softened.append({**row, "answers": {**row["answers"], "lookahead": answer}})
    return softened


def _episode_states(config: Config, name: str, seed: int) -> list[list[Row]]:
    with World(timeout_s=config.rollout.call_timeout_s) as world:
        return list(_walk(config, world, name, seed))


def _walk(config: Config, world: World, name: str, seed: int) -> Iterator[list[Row]]:
    prepare = config.prepare
    rng = random.Random(f"{name}/{seed}")
    scenario = load_scenario(name)
    world.reset(scenario, seed)
    time_s = scenario.begin_s
    driver, driver_until_s = draw_driver(prepare.behaviour, rng), time_s
    warm_s = time_s + prepare.warm_up_s
    gap_s = (scenario.end_s - warm_s) / (prepare.states_per_episode + 1)
    next_s = warm_s
    found = 0
    while time_s < scenario.end_s and found < prepare.states_per_episode:
        if time_s >= driver_until_s:
            driver = draw_driver(prepare.behaviour, rng)
            driver_until_s = time_s + prepare.behaviour.swap_interval_s
        if time_s >= next_s:
            worthy = [d for d in world.decisions() if worth_asking(d, prepare.min_queue_veh)]
            if worthy:
                yield tell(config, world, rng.choice(worthy), rng)
                found += 1
                next_s = time_s + rng.uniform(0.5, 1.5) * gap_s
        world.drive(driver, time_s + 1)
        time_s, _ = world.time()


def tell(config: Config, world: World, decision: Decision, rng: random.Random) -> list[Row]:
    """One state in rows that differ by the order of its phases and their names."""
    costs = _costs(config, world, decision)
    rows = []
    for _ in range(config.prepare.tellings):
        told, order = retold(decision, rng)
        by_place = {order.index(phase): cost for phase, cost in costs.items()}
        rows.append(_row(config, told, by_place))
    return rows


def _costs(config: Config, world: World, decision: Decision) -> dict[int, float]:
    """What every legal phase costs."""
    weights = reward_weights(config)
    tls_id = decision.junction.tls_id
    outcomes = world.branch(
        [{tls_id: phase} for phase in decision.legal],
        config.reward.horizon_s,
        config.reward.follow,
    )
    costs = (cost_veh_s(outcome, weights) for outcome in outcomes)
    return dict(zip(decision.legal, costs, strict=True))


def _row(config: Config, decision: Decision, costs: dict[int, float]) -> Row:
    """The prompt, what every legal phase costs, and each teacher's answer."""
    best = min(decision.legal, key=costs.__getitem__)
    answers = {
        "lookahead": dialect.answer_text(decision, Action(phase=best)),
        "max_pressure": dialect.answer_text(decision, CONTROLLERS["max_pressure"](decision)),
    }
    return {
        "id": state_id(decision),
        "messages": dialect.messages(decision, instructions=config.model.instructions),
        "answers": answers,
        "legal_answers": [
            dialect.answer_text(decision, Action(phase=phase)) for phase in decision.legal
        ],
        "cost_veh_s": {decision.junction.phases[p].name: costs[p] for p in decision.legal},
    }


def state_id(decision: Decision) -> str:
    """Names the instant: scenario, seed, time, junction."""
    return (
        f"{decision.scenario}/{decision.seed}/{decision.observation.time_s:g}/"
        f"{decision.junction.tls_id}"
    )


def reward_weights(config: Config) -> RewardWeights:
    """The reward section as `envs.reward` takes it."""
    return RewardWeights(**config.reward.model_dump(exclude={"horizon_s", "follow"}))


def _write_rows(file: Path, rows: list[Row], teacher: str) -> None:
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as out:
        for row in rows:
            chosen = {k: v for k, v in row.items() if k != "answers"}
            out.write(json.dumps({**chosen, "answer": row["answers"][teacher]}) + "\n")
    temporary.replace(file)
