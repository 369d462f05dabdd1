"""The report of a run as one HTML file: what was asked, what came out, how it came about.

Reads only what the stages left in the run folder and computes nothing but summaries of it; a part
whose files are missing says which stage makes them. The file needs no network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from envs.metrics import t_difference
from rl_ft import findings, plots
from rl_ft.findings import Row
from rl_ft.monitor import read_record
from rl_ft.run_folder import RunFolder, write_atomically

NUM_EXAMPLES_PER_START = 3

CURVES = (
    ("reward/gain_over_max_pressure_veh_s", "Gain over max-pressure, veh s", ""),
    ("reward/regret_veh_s", "Regret to the best tried, veh s", ""),
    ("reward/mean", "Reward of its answers against their group", ""),
    ("format/strict_share", "Answers in exactly the asked format", "share"),
    ("format/invalid_share", "Invalid answers", "share"),
    ("entropy", "Entropy per token, nats", ""),
    ("health/zero_variance_share", "Groups of one reward only", "share"),
    ("health/distinct_actions", "Distinct answers to a question", ""),
    ("mismatch/mean_abs_logp_diff", "Log-prob gap, trainer to sampler", "log"),
)
"""Metric, title and scale of the learning curves."""

SFT_CURVES = (
    ("loss", "Loss of the supervised start", "log"),
    ("train/token_accuracy", "Answer tokens guessed right", "share"),
)
ROLLOUT_PARTS = ("observe", "generate", "branch")


def write_report(folder: RunFolder) -> Path:
    """Write `report.html` from what the run folder holds and return its path."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("rl_ft"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"svg": Markup, "policy": plots.label, "colour": plots.colour}
    metrics = read_record(folder.root)
    html = environment.get_template("report.html").render(
        recipe=folder.config.recipe,
        evaluation=evaluation(_read_json(folder.root / "eval" / "results.json")),
        training=training(metrics),
        checks=checks(metrics, _read_json(folder.root / "metrics.json") or {}),
        examples=examples(folder.root),
        manifest=manifest(_read_json(folder.root / "manifest.json")),
    )
    file = folder.path("report.html")
    write_atomically(file, html)
    return file


def evaluation(results: Row | None) -> Row | None:
    """Everything the page says about the closed loop."""
    if results is None:
        return None
    baseline = results["baseline"]
    return {
        "headline": findings.headline(results),
        "per_scenario": findings.per_scenario(results),
        "versus": [
            (baseline, difference_plot(results, lambda policy: baseline, "versus-baseline")),
            ("its own start", difference_plot(results, findings.start_of, "versus-start")),
        ],
        "added": findings.added_by_grpo(results),
        "scenarios": closed_loop(results),
        "policies": results["policies"],
        "baseline": baseline,
    }


def difference_plot(results: Row, versus: Callable[[str], str], name: str) -> str | None:
    """Every GRPO model against what `versus` names for it, scenario by scenario."""
    rows = [
        plots.Difference(
            label=verdict.where,
            policy=verdict.policy,
            mean=verdict.interval.mean,
            low=verdict.interval.low,
            high=verdict.interval.high,
        )
        for _, _, verdicts in findings.per_scenario(results)
        for verdict in verdicts
        if verdict.versus == versus(verdict.policy)
    ]
    return plots.differences(rows, name=name, xlabel="difference in delay, s") if rows else None


def closed_loop(results: Row) -> list[Row]:
    """One block per scenario, held-out first: its bars and its table."""
    verdicts = [findings.recorded_verdict(comparison) for comparison in results["comparisons"]]
    by_pair = {(v.policy, v.where): v for v in verdicts if v.versus == results["baseline"]}
    blocks = []
    for number, scenario in enumerate(findings.scenarios_of(results, "held_out", "train")):
        rows = []
        for summary in results["summary"]:
            if summary["scenario"] == scenario:
                policy = summary["policy"]
                episodes = findings.rows_of(results, policy, [scenario])
                rows.append(
                    {
                        **summary,
                        "episodes": episodes,
                        "verdict": by_pair.get((policy, scenario)),
                        "invalid_share": findings.invalid_share(episodes),
                    }
                )
        bars = [_bar(row["policy"], row["episodes"]) for row in rows]
        blocks.append(
            {
                "name": scenario,
                "split": findings.split_of(results, scenario),
                "plot": plots.delay_bars(bars, name=f"bars-{number}"),
                "rows": rows,
            }
        )
    return blocks


def _bar(policy: str, episodes: Sequence[Row]) -> plots.Bar:
    delays = [row["delay_s"] for row in episodes]
    interval = t_difference(delays, [0.0] * len(delays))
    return plots.Bar(
        policy=policy,
        mean=interval.mean,
        low=interval.low,
        high=interval.high,
        values=tuple(delays),
        gridlocks=sum(bool(row["gridlock"]) for row in episodes),
    )


def training(metrics: Sequence[Row]) -> Row:
    """Everything the page says about learning: curves, accuracy of the starts, time."""
    return {
        "sft": curve_panels(metrics, "sft", SFT_CURVES),
        "sft_policies": policies_of(metrics, "sft"),
        "sft_accuracy": sft_accuracy(metrics),
        "grpo": curve_panels(metrics, "grpo", CURVES),
        "grpo_policies": policies_of(metrics, "grpo"),
        "times": stage_times(metrics),
    }


def policies_of(metrics: Sequence[Row], kind: str) -> list[str]:
    """`sft/lookahead` is recorded as a stage and compared as the policy `sft:lookahead`."""
    stages = dict.fromkeys(line["stage"] for line in metrics)
    return [s.replace("/", ":", 1) for s in stages if s.startswith(f"{kind}/")]


def series(metrics: Sequence[Row], policy: str, key: str) -> list[tuple[int, float]]:
    """One metric of one policy over steps; steps that did not measure it are left out."""
    stage = policy.replace(":", "/", 1)
    return [
        (line["step"], line["values"][key])
        for line in metrics
        if line["stage"] == stage and line["values"].get(key) is not None
    ]


def curve_panels(
    metrics: Sequence[Row], kind: str, curves: Iterable[tuple[str, str, str]]
) -> list[tuple[str, str]]:
    """Title and picture of the curves that were recorded, all policies of a kind in each."""
    panels = []
    for key, title, scale in curves:
        lines = {policy: series(metrics, policy, key) for policy in policies_of(metrics, kind)}
        lines = {policy: points for policy, points in lines.items() if points}
        if lines:
            log = scale == "log" and all(v > 0 for points in lines.values() for _, v in points)
            name = f"{kind}-{key.replace('/', '-')}"
            picture = plots.curve(lines, name=name, log=log, share=scale == "share")
            panels.append((title, picture))
    return panels


def checks(metrics: Sequence[Row], summary: Row) -> Row | None:
    """The closed loop while training ran, and what it chose; None if nothing was checked."""
    lines: dict[str, list[plots.Checked]] = {}
    for policy in policies_of(metrics, "check"):
        delays = series(metrics, policy, "check/delay_s")
        jams = dict(series(metrics, policy, "check/gridlocks"))
        lines[policy.replace("check:", "grpo:")] = [
            plots.Checked(step=step, delay_s=delay, gridlocks=int(jams[step]))
            for step, delay in delays
        ]
    if not lines:
        return None
    reference = next(
        line["values"] for line in metrics if "check/max_pressure_delay_s" in line["values"]
    )
    reference_s = reference["check/max_pressure_delay_s"]
    chosen = {policy: summary.get(policy.replace("grpo:", "check/")) for policy in lines}
    return {
        "plot": plots.check_curve(lines, reference_s=reference_s, name="checks"),
        "policies": ["max_pressure", *lines],
        "reference_s": reference_s,
        "reference_gridlocks": int(reference["check/max_pressure_gridlocks"]),
        "chosen": [(policy, row) for policy, row in chosen.items() if row],
    }


def sft_accuracy(metrics: Sequence[Row]) -> list[tuple[str, float]]:
    """How often each supervised model gives its teacher's answer on states it has not seen."""
    found = ((p, series(metrics, p, "eval/answer_accuracy")) for p in policies_of(metrics, "sft"))
    return [(policy, points[-1][1]) for policy, points in found if points]


def stage_times(metrics: Sequence[Row]) -> Row | None:
    """Median seconds of a step by stage.

    World actors work side by side, so their own clocks add up to more than the wall: the wall time
    of the rollout is split in the proportion of what they spent.
    """
    rows: dict[str, dict[str, float]] = {}
    for policy in policies_of(metrics, "grpo"):
        spent = {
            part: _median([value for _, value in series(metrics, policy, f"time/{part}_s")])
            for part in (*ROLLOUT_PARTS, "rollout", "train", "sync", "step")
        }
        if spent["step"] is None:
            continue
        known = {part: value or 0.0 for part, value in spent.items()}
        inside = sum(known[part] for part in ROLLOUT_PARTS)
        scale = known["rollout"] / inside if spent["rollout"] is not None and inside > 0 else 1.0
        parts = {part: known[part] * scale for part in ROLLOUT_PARTS}
        parts |= {"train": known["train"], "sync": known["sync"]}
        rows[policy] = parts | {"other": max(0.0, known["step"] - sum(parts.values()))}
    if not rows:
        return None
    stages = list(next(iter(rows.values())))
    return {
        "plot": plots.stage_bar(rows, name="stages"),
        "stages": [(stage, plots.stage_colour(i)) for i, stage in enumerate(stages)],
        "rows": [(policy, parts, sum(parts.values())) for policy, parts in rows.items()],
    }


def examples(root: Path) -> list[Row]:
    """Some decisions of every start: what was asked and answered, and what each phase cost."""
    found = []
    for file in sorted(root.glob("grpo/*/examples.json")):
        policy = f"grpo:{file.parent.name}"
        raw = json.loads(file.read_text(encoding="utf-8"))
        found += [_example(policy, example) for example in raw[:NUM_EXAMPLES_PER_START]]
    return found


def _example(policy: str, raw: Row) -> Row:
    costs = {name: cost for name, cost in raw["cost_veh_s"].items() if math.isfinite(cost)}
    cheapest = min(costs.values(), default=0.0)
    most = max(costs.values(), default=0.0) or 1.0
    return {
        **raw,
        "policy": policy,
        "phases": [
            {
                "name": name,
                "cost_veh_s": costs.get(name),
                "extra_veh_s": costs[name] - cheapest if name in costs else None,
                "width": 100 * costs[name] / most if name in costs else 0,
                "best": name in costs and costs[name] == cheapest,
            }
            for name in raw["legal"]
        ],
    }


def manifest(content: Row | None) -> list[tuple[str, str]] | None:
    """The provenance of the last start as lines of a table."""
    if content is None:
        return None
    starts = content.get("starts") or [{}]
    flat = {**{k: v for k, v in content.items() if k != "starts"}, **starts[-1]}
    flat["starts"] = len(starts)
    return [(key.replace("_", " "), _readable(key, value)) for key, value in flat.items()]


def _readable(key: str, value: Any) -> str:
    if key == "command" and isinstance(value, list):
        return " ".join([Path(value[0]).name, *value[1:]])
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _read_json(file: Path) -> Row | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
