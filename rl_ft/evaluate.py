"""The closed loop that decides: every policy on the same scenarios and seeds, with intervals.

Writes `results.json` with one row per (policy, scenario, seed) and prints the table; what is named
on the command line keeps every episode as it ends. Training never looks at these numbers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from envs.errors import UserError
from envs.metrics import gridlock_rate, paired_difference, summarise
from envs.scenario import expand
from rl_ft.closed_loop import Ask, Episode, Job, play_controller, play_model
from rl_ft.cluster import ray_session
from rl_ft.config import Config
from rl_ft.monitor import run_log, write_summary
from rl_ft.played import Played, Row, signature
from rl_ft.progress import Progress
from rl_ft.question import asked_as_taught, require_model
from rl_ft.render import Renderer
from rl_ft.run_folder import RunFolder, take_lock, write_atomically
from rl_ft.vote import voting

log = logging.getLogger(__name__)

LOG_WIDTH = 140
EPISODES_FILE = "episodes.jsonl"


def evaluate_run(config: Config, folder: RunFolder) -> None:
    """A run's own models and the configured controllers, held out and on training scenarios."""
    models = {}
    for start in config.prepare.teachers:
        models[f"sft:{start}"] = folder.path("sft", start)
        models[f"grpo:{start}"] = folder.path("grpo", start, "model")
    held_out = expand(config.scenarios.held_out)
    train = list(dict.fromkeys(expand(config.scenarios.train)))
    train = train[: config.evaluate.num_train_scenarios]
    splits = {**dict.fromkeys(train, "train"), **dict.fromkeys(held_out, "held_out")}
    results = evaluate(
        config,
        controllers=config.evaluate.controllers,
        models=models,
        splits=splits,
        seeds=config.evaluate.seeds,
        baseline=config.evaluate.baseline,
        versus={f"grpo:{start}": f"sft:{start}" for start in config.prepare.teachers},
    )
    write_atomically(folder.path("eval", "results.json"), json.dumps(results, indent=1))
    write_summary(folder.root, "evaluate", {"summary": results["summary"]})
    print_table(results)


def evaluate_cli(
    *,
    controllers: Sequence[str],
    models: Sequence[Path],
    scenarios: Sequence[str],
    seeds: int,
    out: Path,
    baseline: str | None,
    config: Config,
    resume: bool,
) -> None:
    """`rl-ft evaluate --controller NAME --model DIR --scenario NAME`; goes on if `resume`."""
    for model in models:
        require_model(model, "--model")
    named = {str(model): Path(model) for model in models}
    policies = [*controllers, *named]
    if not policies:
        raise UserError("nothing to evaluate: give --controller NAME or --model DIR")
    if baseline is not None and baseline not in policies:
        raise UserError(f"--baseline {baseline} is not among the policies: {', '.join(policies)}")
    if baseline is None:
        baseline = "max_pressure" if "max_pressure" in policies else policies[0]
    splits = dict.fromkeys(expand(scenarios), "held_out")
    file = out / EPISODES_FILE
    if not file.exists() and (out / "results.json").exists():
        raise UserError(f"--out {out} already holds results; give another --out")
    if file.exists() and not resume:
        raise UserError(
            f"--out {out} already holds results; add --resume to play what is missing, or give "
            "another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    with take_lock(out, out), run_log(out / "run.log"):
        played = Played(file)
        num_before = len(played)
        for name in policies:
            for scenario in splits:
                played.begin(name, scenario, signature(config, named.get(name), scenario))
        try:
            results = evaluate(
                config,
                controllers=controllers,
                models=named,
                splits=splits,
                seeds=seeds,
                baseline=baseline,
                versus={},
                played=played,
            )
        except BaseException:
            log.warning("%s has %d episodes; --resume plays the others", file, len(played))
            raise
        write_atomically(out / "results.json", json.dumps(results, indent=1))
    print_table(results)
    new = len(played) - num_before
    print(f"{out / 'results.json'}; episodes played: {new} now, {num_before} before")


def evaluate(
    config: Config,
    *,
    controllers: Sequence[str],
    models: dict[str, Path],
    splits: dict[str, str],
    seeds: int,
    baseline: str,
    versus: dict[str, str],
    players: Mapping[str, Ask] | None = None,
    played: Played | None = None,
) -> dict[str, Any]:
    """Play everything that `played` has not; `versus` names a further policy to compare with.

    `players` are policies that answer as a model does but are no model folder.
    """
    players = players or {}
    played = Played() if played is None else played
    jobs = [Job(scenario=name, seed=seed) for name in splits for seed in range(1, seeds + 1)]
    policies = [*players, *controllers, *models]
    missing = {name: played.missing(name, jobs) for name in policies}

    def play(name: str, episodes: Callable[..., Iterator[Episode]]) -> None:
        what = f"evaluate {name} ({policies.index(name) + 1} of {len(policies)})"
        if missing[name]:
            with Progress(what, total=len(missing[name]), unit="episodes") as shown:
                for episode in episodes(on_played=shown.add):
                    played.add(_row(episode, splits))

    def answering(name: str, ask: Ask, own: Config) -> Callable[..., Iterator[Episode]]:
        worlds = config.evaluate.num_worlds
        return partial(play_model, name, ask, missing[name], own, num_worlds=worlds)

    for name, ask in players.items():
        play(name, answering(name, ask, config))
    for name in controllers:
        play(name, partial(play_controller, name, missing[name], config))
    asked = {name: path for name, path in models.items() if missing[name]}
    if asked:
        with _sampler(config, asked) as ask_as:
            for name, path in asked.items():
                own = asked_as_taught(path, config)
                play(name, answering(name, ask_as(path, own), own))
    rows = played.chosen(policies, jobs)
    pairs = [(policy, baseline) for policy in policies if policy != baseline]
    pairs += [pair for pair in versus.items() if pair[1] != baseline]
    return {
        "baseline": baseline,
        "policies": policies,
        "rows": rows,
        "comparisons": list(_comparisons(rows, splits, pairs)),
        "summary": list(_summary(rows, splits, policies)),
    }


@contextmanager
def _sampler(config: Config, models: dict[str, Path]) -> Iterator[Callable[[Path, Config], Ask]]:
    """One vLLM engine for models of one architecture; greedy, rendered as in training."""
    renderers = {
        path: Renderer(str(path), max_prompt_length=config.model.max_prompt_length)
        for path in models.values()
    }
    with ray_session(config):
        from rl_ft.actors import RemoteAsk, start_generators
        from rl_ft.crew import Samplers

        engines: dict[str, Samplers] = {}

        def engine_for(path: Path) -> Samplers:
            architecture = (path / "config.json").read_text(encoding="utf-8")
            if architecture not in engines:
                while engines:
                    engines.popitem()[1].close()
                engines[architecture] = start_generators(config, str(path))
            return engines[architecture]

        def ask_as(path: Path, own: Config) -> Ask:
            samplers = engine_for(path)
            asyncio.run(samplers.load_folder(str(path)))
            asked_once = RemoteAsk(samplers, renderers[path], own)
            return voting(asked_once, num_tellings=config.evaluate.num_tellings)

        try:
            yield ask_as
        finally:
            for engine in engines.values():
                engine.close()


def _row(episode: Episode, splits: dict[str, str]) -> Row:
    trips = episode.trips
    return {
        "policy": episode.policy,
        "scenario": episode.job.scenario,
        "split": splits[episode.job.scenario],
        "seed": episode.job.seed,
        "delay_s": trips.delay_s,
        "wait_s": trips.wait_s,
        "queue_veh": trips.queue_veh,
        "throughput_veh": trips.throughput_veh,
        "unfinished_veh": trips.unfinished_veh,
        "not_departed_veh": trips.not_departed_veh,
        "num_trips": trips.num_trips,
        "gridlock": trips.gridlock,
        "decisions": episode.decisions,
        "invalid_answers": episode.invalid_answers,
        "partial_answers": episode.partial_answers,
        "fallbacks": episode.fallbacks,
    }


def _select(rows: Iterable[Row], policy: str, scenario: str) -> list[Row]:
    return [row for row in rows if row["policy"] == policy and row["scenario"] == scenario]


def _comparisons(
    rows: Sequence[Row], splits: dict[str, str], pairs: Sequence[tuple[str, str]]
) -> Iterator[Row]:
    for policy, other in pairs:
        for scenario in splits:
            a, b = _select(rows, policy, scenario), _select(rows, other, scenario)
            found = paired_difference([r["delay_s"] for r in a], [r["delay_s"] for r in b])
            yield {
                "policy": policy,
                "scenario": scenario,
                "versus": other,
                "mean_difference_s": found.mean,
                # JSON has no infinity: one pair has no bounds.
                "low_s": found.low if found.n > 1 else None,
                "high_s": found.high if found.n > 1 else None,
                "n": found.n,
            }


def _summary(rows: Sequence[Row], splits: dict[str, str], policies: Sequence[str]) -> Iterator[Row]:
    for scenario, split in splits.items():
        for policy in policies:
            chosen = _select(rows, policy, scenario)
            delay = summarise([row["delay_s"] for row in chosen])
            yield {
                "policy": policy,
                "scenario": scenario,
                "split": split,
                "median_delay_s": delay.median,
                "mean_delay_s": delay.mean,
                "p95_delay_s": delay.p95,
                "gridlock_rate": gridlock_rate(row["gridlock"] for row in chosen),
                "throughput_veh": sum(row["throughput_veh"] for row in chosen) / len(chosen),
                "decisions": sum(row["decisions"] for row in chosen),
                "invalid_answers": sum(row["invalid_answers"] for row in chosen),
                "fallbacks": sum(row["fallbacks"] for row in chosen),
                "n": delay.n,
            }


def print_table(results: dict[str, Any]) -> None:
    """The results as a person reads them."""
    from rich.console import Console
    from rich.table import Table

    baseline = results["baseline"]
    differences = {
        (c["policy"], c["scenario"]): c for c in results["comparisons"] if c["versus"] == baseline
    }
    seeds = " to ".join(str(n) for n in sorted({row["n"] for row in results["summary"]}))
    title = f"Delay per vehicle in s over {seeds} seeds"
    if differences:
        title += f"; differences to {baseline}, 95 % interval"
    table = Table(title=title)
    table.add_column("scenario", overflow="fold")
    table.add_column("policy", overflow="fold")
    for heading in ("median", "mean", f"vs {baseline}", "gridlock", "arrived", "invalid"):
        table.add_column(heading, justify="right")
    for row in results["summary"]:
        found = differences.get((row["policy"], row["scenario"]))
        table.add_row(
            row["scenario"],
            row["policy"],
            f"{row['median_delay_s']:.1f}",
            f"{row['mean_delay_s']:.1f}",
            _interval_text(found) if found else "",
            f"{row['gridlock_rate']:.0%}",
            f"{row['throughput_veh']:.0f}",
            _share_text(row["invalid_answers"], row["decisions"]),
            end_section=row["policy"] == results["policies"][-1],
        )
    if any(row["fallbacks"] for row in results["summary"]):
        table.caption = "where an answer was invalid, a controller decided instead"
    # Nobody makes a file or a log wider.
    Console(width=None if sys.stdout.isatty() else LOG_WIDTH).print(table)


def _share_text(count: int, total: int) -> str:
    return f"{count / total:.0%}" if total else ""


def _interval_text(found: Row) -> str:
    """A comparison as one reads it; of one pair, there are no bounds."""
    mean = f"{found['mean_difference_s']:+.1f}"
    if found["low_s"] is None:
        return mean
    return f"{mean} [{found['low_s']:+.1f}, {found['high_s']:+.1f}]"
