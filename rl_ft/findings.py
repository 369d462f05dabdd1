"""What evaluation results allow to be said: verdicts with their intervals, pooled and by scenario.

Pure functions of the content of `results.json`. A claim needs an interval of the paired difference
that excludes zero; everything else is called unclear.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from envs.metrics import Interval, paired_difference

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A paired comparison and what it allows to be said."""

    policy: str
    versus: str
    where: str
    interval: Interval

    @property
    def word(self) -> str:
        """better, worse or unclear: a claim needs an interval that excludes zero."""
        if not self.interval.excludes_zero:
            return "unclear"
        return "better" if self.interval.mean < 0 else "worse"

    @property
    def text(self) -> str:
        """The difference with its interval, in seconds."""
        return interval_text(self.interval)


def headline(results: Row) -> Row:
    """Does GRPO beat its own start and the baseline where it was not trained?

    Yes needs every GRPO model to be better than both, pooled over the held-out scenarios, with no
    more gridlocks than the baseline; partly needs one of those comparisons to be won.
    """
    baseline = results["baseline"]
    held_out = scenarios_of(results, "held_out")
    models = [_model(results, policy, held_out) for policy in grpo_policies(results)]
    verdicts = [verdict for model in models for verdict in model["verdicts"]]
    jams = gridlocks(results, baseline, held_out)
    if not verdicts:
        answer = "unknown"
    elif all(v.word == "better" for v in verdicts) and all(m["gridlocks"] <= jams for m in models):
        answer = "yes"
    else:
        answer = "partly" if any(v.word == "better" for v in verdicts) else "no"
    return {
        "answer": answer,
        "models": models,
        "baseline": baseline,
        "baseline_delay_s": mean_delay_s(results, baseline, held_out),
        "baseline_gridlocks": jams,
        "controllers": [
            (policy, mean_delay_s(results, policy, held_out), gridlocks(results, policy, held_out))
            for policy in results["policies"]
            if not policy.startswith(("sft:", "grpo:"))
        ],
        "num_held_out": len(held_out),
        "num_seeds": len({row["seed"] for row in results["rows"]}),
    }


def _model(results: Row, policy: str, held_out: Sequence[str]) -> Row:
    pairs = dict.fromkeys((start_of(policy), results["baseline"]))
    found = [pooled_verdict(results, policy, versus, "held_out") for versus in pairs]
    return {
        "policy": policy,
        "verdicts": [verdict for verdict in found if verdict],
        "delay_s": mean_delay_s(results, policy, held_out),
        "gridlocks": gridlocks(results, policy, held_out),
        "gap_closed": gap_closed(results, policy, held_out),
        "invalid_share": invalid_share(rows_of(results, policy, held_out)),
    }


def per_scenario(results: Row) -> list[tuple[str, str, list[Verdict]]]:
    """Scenario, split, and every comparison of a GRPO model with its start and the baseline."""
    found = []
    for scenario in scenarios_of(results, "held_out", "train"):
        verdicts = [
            verdict
            for verdict in (recorded_verdict(c) for c in results["comparisons"])
            if verdict.where == scenario
            and verdict.policy in grpo_policies(results)
            and verdict.versus in (start_of(verdict.policy), results["baseline"])
        ]
        found.append((scenario, split_of(results, scenario), verdicts))
    return found


def recorded_verdict(comparison: Row) -> Verdict:
    """A comparison as `evaluate` recorded it; a single pair has no bounds."""
    low, high = comparison["low_s"], comparison["high_s"]
    interval = Interval(
        mean=comparison["mean_difference_s"],
        low=-math.inf if low is None else low,
        high=math.inf if high is None else high,
        n=comparison["n"],
    )
    return Verdict(
        policy=comparison["policy"],
        versus=comparison["versus"],
        where=comparison["scenario"],
        interval=interval,
    )


def pooled_verdict(results: Row, policy: str, versus: str, split: str) -> Verdict | None:
    """The difference over a split: scenarios are averaged seed by seed, seeds are the pairs."""
    scenarios = scenarios_of(results, split)
    ours, theirs = (_delay_by_seed(results, name, scenarios) for name in (policy, versus))
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    interval = paired_difference([ours[s] for s in seeds], [theirs[s] for s in seeds])
    return Verdict(policy=policy, versus=versus, where=split, interval=interval)


def gap_closed(results: Row, policy: str, scenarios: Sequence[str]) -> float | None:
    """Share of the way from the baseline to one-step lookahead, over scenario means."""
    ours, base, bound = (
        mean_delay_s(results, name, scenarios)
        for name in (policy, results["baseline"], "lookahead")
    )
    if ours is None or base is None or bound is None or base <= bound:
        return None
    return (base - ours) / (base - bound)


def added_by_grpo(results: Row) -> list[Row]:
    """For every start and split: delay and gridlocks before and after, and the difference."""
    found = []
    for policy in grpo_policies(results):
        for split in ("train", "held_out"):
            verdict = pooled_verdict(results, policy, start_of(policy), split)
            if verdict is None:
                continue
            scenarios, pair = scenarios_of(results, split), (start_of(policy), policy)
            found.append(
                {
                    "verdict": verdict,
                    "split": split,
                    "delays_s": [mean_delay_s(results, p, scenarios) for p in pair],
                    "gridlocks": [gridlocks(results, p, scenarios) for p in pair],
                    "invalid": [invalid_share(rows_of(results, p, scenarios)) for p in pair],
                    "episodes": len(rows_of(results, policy, scenarios)),
                }
            )
    return found


def grpo_policies(results: Row) -> list[str]:
    """The reinforced models, in the order of evaluation."""
    return [policy for policy in results["policies"] if policy.startswith("grpo:")]


def start_of(policy: str) -> str:
    """`grpo:lookahead` started from `sft:lookahead`."""
    return policy.replace("grpo:", "sft:", 1)


def scenarios_of(results: Row, *splits: str) -> list[str]:
    """Scenario names of the splits, in that order."""
    found = [
        row["scenario"] for split in splits for row in results["rows"] if row["split"] == split
    ]
    return list(dict.fromkeys(found))


def split_of(results: Row, scenario: str) -> str:
    """train or held_out."""
    return next(row["split"] for row in results["rows"] if row["scenario"] == scenario)


def rows_of(results: Row, policy: str, scenarios: Sequence[str]) -> list[Row]:
    """The episodes of one policy on some scenarios."""
    rows = results["rows"]
    return [row for row in rows if row["policy"] == policy and row["scenario"] in scenarios]


def mean_delay_s(results: Row, policy: str, scenarios: Sequence[str]) -> float | None:
    """Mean over episodes; None where there is none."""
    delays = [row["delay_s"] for row in rows_of(results, policy, scenarios)]
    return math.fsum(delays) / len(delays) if delays else None


def gridlocks(results: Row, policy: str, scenarios: Sequence[str]) -> int:
    """Episodes that ended in gridlock."""
    return sum(bool(row["gridlock"]) for row in rows_of(results, policy, scenarios))


def invalid_share(rows: Iterable[Row]) -> float | None:
    """Share of a model's decisions whose answer was invalid; None for one that decided nothing."""
    rows = list(rows)
    decisions = sum(row["decisions"] for row in rows)
    return sum(row["invalid_answers"] for row in rows) / decisions if decisions else None


def interval_text(interval: Interval) -> str:
    """The mean with its bounds, signed.

    Example:
        -7.1 [-9.0, -5.2]
    """
    if math.isinf(interval.low):
        return f"{_signed(interval.mean)} (one pair: no interval)"
    return f"{_signed(interval.mean)} [{_signed(interval.low)}, {_signed(interval.high)}]"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def _delay_by_seed(results: Row, policy: str, scenarios: Sequence[str]) -> dict[int, float]:
    """Mean delay over the scenarios, for the seeds that were played on all of them."""
    by_seed: dict[int, list[float]] = {}
    for row in rows_of(results, policy, scenarios):
        by_seed.setdefault(row["seed"], []).append(row["delay_s"])
    full = {seed: delays for seed, delays in by_seed.items() if len(delays) == len(scenarios)}
    return {seed: math.fsum(delays) / len(delays) for seed, delays in full.items()}
