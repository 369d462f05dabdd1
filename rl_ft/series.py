"""What Prometheus is told of a run: the names, and which figures of the record stand behind them.

Pure data. Ray puts `ray_` before each name and, behind a counter's, `_total`. Besides what is its
own each has the labels stage (sft, grpo or check), start (whose imitation the model began as) and
run (the run folder's name).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LABELS = ("stage", "start", "run")


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One metric.

    Example:
        Series(name="rlft_loss", about="Of the step.", of={"loss": ""})
    """

    name: str
    about: str
    """Ends with the unit."""
    of: Mapping[str, str]
    """Key of the record, and what the series' own label says of it."""
    label: str | None = None
    kind: Literal["gauge", "counter", "histogram"] = "gauge"
    """A gauge has the latest step's figure, a counter the sum of all steps' since the process
    began, a histogram how the steps' are distributed (its sum is Ray's estimate)."""

    @property
    def exported(self) -> str:
        """The name in Prometheus; of a histogram without `_bucket`, `_sum` or `_count`."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label that a value needs."""
        return LABELS if self.label is None else (*LABELS, self.label)


PARTS = ("observe", "generate", "branch", "sync", "rollout", "train", "step", "check")
FORMATS = ("strict", "partial", "invalid")
STEP_BOUNDS_S = [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0]

SERIES = (
    Series(name="rlft_step", about="Optimiser steps so far.", of={"progress/step": ""}),
    Series(name="rlft_reward", about="Mean of the answers, units.", of={"reward/mean": ""}),
    Series(
        name="rlft_regret_veh_s",
        about="What the answers cost above the best of their group, vehicle seconds.",
        of={"reward/regret_veh_s": ""},
    ),
    Series(
        name="rlft_gain_veh_s",
        about="What the answers save over max-pressure's, vehicle seconds.",
        of={"reward/gain_over_max_pressure_veh_s": ""},
    ),
    Series(
        name="rlft_closed_loop_delay_seconds",
        about="Mean delay in the latest check, seconds.",
        of={"check/delay_s": "model", "check/max_pressure_delay_s": "max_pressure"},
        label="policy",
    ),
    Series(
        name="rlft_closed_loop_gridlocks",
        about="Episodes of the latest check that locked up.",
        of={"check/gridlocks": "model", "check/max_pressure_gridlocks": "max_pressure"},
        label="policy",
    ),
    Series(
        name="rlft_part_seconds",
        about="Of the latest step by part; of several workers at once the sum, seconds.",
        of={f"time/{part}_s": part for part in PARTS},
        label="part",
    ),
    Series(
        name="rlft_step_seconds",
        about="From one step's end to the next one's, seconds.",
        of={"time/step_s": ""},
        kind="histogram",
    ),
    Series(
        name="rlft_tokens",
        about="Sampled by the policy, and trained on; tokens.",
        of={"rollout/sampled_tokens": "sampled", "num_tokens": "trained"},
        label="what",
        kind="counter",
    ),
    Series(
        name="rlft_branches",
        about="Actions tried out, each in a simulation or, offline, looked up.",
        of={"rollout/branches": ""},
        kind="counter",
    ),
    Series(
        name="rlft_groups",
        about="Groups of answers that were scored.",
        of={"rollout/groups": ""},
        kind="counter",
    ),
    Series(
        name="rlft_tokens_per_second",
        about="Sampled in the latest step, tokens per second.",
        of={"rate/sampled_tokens_per_s": ""},
    ),
    Series(
        name="rlft_branches_per_second",
        about="Tried out in the latest step, per second.",
        of={"rate/branches_per_s": ""},
    ),
    Series(
        name="rlft_queue_groups",
        about="Groups that wait for the learner.",
        of={"buffer/in_flight_groups": ""},
    ),
    Series(
        name="rlft_staleness_versions",
        about="By how many versions of the weights the groups were older than what they trained.",
        of={"staleness/mean": "mean", "staleness/max": "max"},
        label="over",
    ),
    Series(
        name="rlft_failed_share",
        about="Of the worlds' work, 0 to 1.",
        of={"health/failed_share": ""},
    ),
    Series(
        name="rlft_zero_variance_share",
        about="Of the groups, 0 to 1: all answers earned the same.",
        of={"health/zero_variance_share": ""},
    ),
    Series(
        name="rlft_format_share",
        about="Of the answers, 0 to 1.",
        of={f"format/{kind}_share": kind for kind in FORMATS},
        label="format",
    ),
    Series(
        name="rlft_branch_disagreements",
        about="Executed actions that did not lead where their branch led.",
        of={"health/branch_disagreements": ""},
    ),
    Series(name="rlft_entropy", about="Of the policy per token, nats.", of={"entropy": ""}),
    Series(name="rlft_loss", about="Of the latest step.", of={"loss": ""}),
    Series(name="rlft_grad_norm", about="Before it is clipped.", of={"grad_norm": ""}),
    Series(
        name="rlft_logprob_mismatch",
        about="Mean absolute difference of trainer and sampler, nats.",
        of={"mismatch/mean_abs_logp_diff": ""},
    ),
    Series(
        name="rlft_idle_share",
        about="Of the latest step, 0 to 1: the learner waits for groups, the sampler for prompts.",
        of={"idle/learner_share": "learner", "idle/sampler_share": "sampler"},
        label="who",
    ),
    Series(
        name="rlft_cpu_share",
        about="Of the cores of the machine that drives the run, 0 to 1.",
        of={"system/cpu_share": ""},
    ),
)

WORLDS = {
    "rlft_worlds_cores": "Kept busy by a world actor and its simulations.",
    "rlft_worlds_memory_bytes": "Resident memory of a world actor and its simulations, bytes.",
}
"""Gauges that every world actor exports by itself: Ray's own count no child processes."""

ENGINE = {
    "num_requests_running": Series(name="rlft_engine_requests", about="That vLLM works on.", of={}),
    "kv_cache_usage_perc": Series(
        name="rlft_engine_cache_share", about="Of vLLM's key-value cache, 0 to 1.", of={}
    ),
    "prompt_tokens": Series(
        name="rlft_engine_prompt_tokens", about="Read by vLLM, tokens.", of={}, kind="counter"
    ),
    "generation_tokens": Series(
        name="rlft_engine_generated_tokens",
        about="Sampled by vLLM, tokens.",
        of={},
        kind="counter",
    ),
}
"""What the generator actor exports of vLLM's own metrics, by their names there."""


def exported_names() -> set[str]:
    """Every name of ours that a query may use."""
    names = {series.exported for series in SERIES if series.kind != "histogram"}
    histograms = [series.exported for series in SERIES if series.kind == "histogram"]
    names |= {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}
    names |= {series.exported for series in ENGINE.values()}
    return names | {f"ray_{name}" for name in WORLDS}
