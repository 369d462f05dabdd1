from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from envs.metrics import gridlock_rate, paired_difference, summarise
from rl_ft import findings, plots, report
from rl_ft.config import Config
from rl_ft.monitor import read_record
from rl_ft.run_folder import RunFolder

BASELINE = "max_pressure"
DELAYS_S = {
    "fixed": (43.0, 30.0, 52.0),
    "max_pressure": (24.5, 14.4, 31.0),
    "max_wave": (21.0, 17.5, 27.5),
    "lookahead": (13.8, 10.0, 19.0),
    "sft:max_pressure": (26.1, 15.0, 33.0),
    "grpo:max_pressure": (17.2, 13.1, 24.0),
    "sft:lookahead": (17.0, 12.6, 22.5),
    "grpo:lookahead": (15.6, 12.3, 21.0),
}
"""On cologne1, ingolstadt1 and an unseen generated junction: about what was measured."""
SCENARIOS = {
    "resco:cologne1": "held_out",
    "resco:ingolstadt1": "held_out",
    "generated:1001": "held_out",
    "generated:1": "train",
}


def sample_rows(seeds: int, jammed: str | None) -> list[dict]:
    rng = random.Random(0)
    rows = []
    for policy, delays in DELAYS_S.items():
        for column, (scenario, split) in enumerate(SCENARIOS.items()):
            for seed in range(1, seeds + 1):
                jam = policy == jammed and scenario == "resco:cologne1" and seed == 2
                base = 310.0 if jam else delays[min(column, 2)]
                is_model = ":" in policy
                rows.append(
                    {
                        "policy": policy,
                        "scenario": scenario,
                        "split": split,
                        "seed": seed,
                        "delay_s": base
                        + random.Random(f"{scenario}{seed}").gauss(0, 1.5)
                        + rng.gauss(0, 0.4),
                        "wait_s": base / 2,
                        "queue_veh": base / 5,
                        "throughput_veh": 1400 if jam else 1990 - seed,
                        "gridlock": jam,
                        "decisions": 360,
                        "invalid_answers": 3 if is_model else 0,
                        "fallbacks": 3 if is_model else 0,
                    }
                )
    return rows


def sample_results(*, seeds: int = 5, jammed: str | None = None) -> dict:
    """What `evaluate` writes, computed as it does, from invented episodes."""
    rows = sample_rows(seeds, jammed)
    pick = {
        (policy, scenario): [r for r in rows if r["policy"] == policy and r["scenario"] == scenario]
        for policy in DELAYS_S
        for scenario in SCENARIOS
    }
    pairs = [(policy, BASELINE) for policy in DELAYS_S if policy != BASELINE]
    pairs += [(f"grpo:{start}", f"sft:{start}") for start in ("max_pressure", "lookahead")]
    comparisons = []
    for policy, versus in pairs:
        for scenario in SCENARIOS:
            sides = [[r["delay_s"] for r in pick[p, scenario]] for p in (policy, versus)]
            found = paired_difference(*sides)
            comparisons.append(
                {"policy": policy, "scenario": scenario, "versus": versus, "n": found.n}
                | {"mean_difference_s": found.mean, "low_s": found.low, "high_s": found.high}
            )
    summary = []
    for (policy, scenario), chosen in pick.items():
        delay = summarise([r["delay_s"] for r in chosen])
        summary.append(
            {
                "policy": policy,
                "scenario": scenario,
                "split": SCENARIOS[scenario],
                "median_delay_s": delay.median,
                "mean_delay_s": delay.mean,
                "p95_delay_s": delay.p95,
                "gridlock_rate": gridlock_rate(r["gridlock"] for r in chosen),
                "throughput_veh": sum(r["throughput_veh"] for r in chosen) / len(chosen),
                "n": delay.n,
            }
        )
    summary.sort(key=lambda row: list(SCENARIOS).index(row["scenario"]))
    return {
        "baseline": BASELINE,
        "policies": list(DELAYS_S),
        "rows": rows,
        "comparisons": comparisons,
        "summary": summary,
    }


def sample_metrics(steps: int = 120) -> list[dict]:
    rng = random.Random(1)
    lines = []
    for start, shift in (("max_pressure", 0.0), ("lookahead", 0.3)):
        for step in range(1, 226):
            values = {
                "loss": 6 * math.exp(-step / 30) + 0.15 * rng.uniform(0.7, 1.3),
                "train/token_accuracy": 0.98 - 0.6 * math.exp(-step / 25) * rng.uniform(0.9, 1.1),
            }
            lines.append({"stage": f"sft/{start}", "step": step, "time_s": step, "values": values})
        final = {"eval/answer_accuracy": 0.91 - shift / 3, "train/loss": 0.16}
        lines.append({"stage": f"sft/{start}", "step": 225, "time_s": 226.0, "values": final})
    for start, shift in (("max_pressure", 0.0), ("lookahead", 6.0)):
        for step in range(1, steps + 1):
            learnt = 1 - math.exp(-step / 45)
            gain = -1 + shift + (14 - shift) * learnt + rng.gauss(0, 3)
            values = {
                "reward/gain_over_max_pressure_veh_s": gain,
                "reward/mean": -0.3 + 0.4 * learnt + rng.gauss(0, 0.08),
                "reward/regret_veh_s": 22 - shift - 12 * learnt + rng.gauss(0, 2),
                "format/strict_share": min(1.0, 0.97 + 0.03 * learnt + rng.gauss(0, 0.004)),
                "format/invalid_share": max(0.0, 0.01 - 0.01 * learnt + rng.gauss(0, 0.001)),
                "health/distinct_actions": 2.9 - 0.8 * learnt + rng.gauss(0, 0.1),
                "entropy": 0.19 - 0.11 * learnt + rng.gauss(0, 0.008),
                "mismatch/mean_abs_logp_diff": 1.5e-6 * math.exp(rng.gauss(0, 0.2)),
                "health/zero_variance_share": 0.12 + 0.15 * learnt + rng.gauss(0, 0.03),
                "time/observe_s": 0.4,
                "time/generate_s": 2.2 + rng.gauss(0, 0.1),
                "time/branch_s": 1.3,
                "time/rollout_s": 2.3,
                "time/train_s": 1.6,
                "time/sync_s": 0.06,
                "time/step_s": 4.2 + rng.gauss(0, 0.1),
            }
            if step == 7:
                values["reward/mean"] = None
            lines.append({"stage": f"grpo/{start}", "step": step, "time_s": step, "values": values})
    return lines


def sample_checks() -> list[dict]:
    """From the lookahead start the check of step 40 locks up."""
    lines = []
    for start, shift in (("max_pressure", 4.0), ("lookahead", 0.0)):
        for step in range(0, 121, 20):
            jam = start == "lookahead" and step == 40
            values = {
                "check/delay_s": 250.0 if jam else 14.0 + (4 + shift) * math.exp(-step / 40),
                "check/gridlocks": float(jam),
                "check/max_pressure_delay_s": 18.5,
                "check/max_pressure_gridlocks": 0.0,
            }
            lines.append({"stage": f"check/{start}", "step": step, "time_s": 1, "values": values})
    return lines


CHOSEN = {
    "check/max_pressure": {
        "left": "mean",
        "averaged": [100, 110, 120],
        "best_step": 120,
        "mean_delay_s": 14.1,
        "mean_gridlocks": 0.0,
        "best_delay_s": 14.4,
        "best_gridlocks": 0.0,
    },
    "check/lookahead": {
        "left": "step 80",
        "averaged": [100, 110, 120],
        "best_step": 80,
        "mean_delay_s": 61.0,
        "mean_gridlocks": 1.0,
        "best_delay_s": 14.2,
        "best_gridlocks": 0.0,
    },
}


def sample_examples() -> list[dict]:
    prompt = (
        "A 7 12: south through+right 2 1 0 0 15, south left yield shared 1 0 0 0 40, "
        "north through+right 4 2 1 1 25\nB 1 1: south left 1 0 0 0 40, north left empty\n"
        "C 3 9: east left+through+right 3 2 2 2 10, west through empty\ngreen A 27\nchoose A B C"
    )
    example = {
        "id": "generated:3/1/320/J0",
        "prompt": prompt,
        "answer": '{"phase": "C"}',
        "legal": ["A", "B", "C"],
        "cost_veh_s": {"A": 611.0, "C": 572.5},
        "chosen": "C",
        "teacher": "A",
    }
    garbled = {**example, "answer": "<b>A C</b>", "chosen": None, "cost_veh_s": {"A": 611.0}}
    return [example, garbled]


MANIFEST = {
    "seed": 1,
    "evaluation_seeds": [1, 2, 3, 4, 5],
    "starts": [
        {
            "command": ["/usr/local/bin/rl-ft", "run", "--out", "run"],
            "start": "2026-11-20T13:00:00+00:00",
            "git_commit": "0123abc",
            "python": "3.11.7",
            "versions": {"torch": "2.13.0", "trl": "1.16.0"},
            "machine": {"cores": 2, "memory_gib": 24.0},
            "end": "2026-11-20T13:25:00+00:00",
            "ending": "finished",
        }
    ],
}


def write_run(root: Path, *, results: dict | None) -> RunFolder:
    folder = RunFolder(root=root, config=Config())
    if results is not None:
        folder.path("eval", "results.json").write_text(json.dumps(results))
    lines = [json.dumps(line) + "\n" for line in sample_metrics() + sample_checks()]
    folder.path("metrics.jsonl").write_text("".join(lines) + '{"stage": "grpo/loo')
    for start in ("max_pressure", "lookahead"):
        folder.path("grpo", start, "examples.json").write_text(json.dumps(sample_examples()))
    folder.path("manifest.json").write_text(json.dumps(MANIFEST))
    folder.path("metrics.json").write_text(json.dumps(CHOSEN))
    return folder


class Page(HTMLParser):
    """Text, ids and links of a page; complains about elements that are not closed in order."""

    VOID = frozenset({"meta", "br", "link", "img", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href"):
                self.sources.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    folder = write_run(tmp_path_factory.mktemp("run"), results=sample_results())
    return Page(report.write_report(folder).read_text())


def test_the_page_is_well_formed_and_its_ids_are_unique(page):
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))


def test_the_page_needs_no_network(page):
    assert all(source.startswith("#") for source in page.sources)


def test_pictures_follow_the_theme_and_the_width(tmp_path):
    svg = plots.curve({"grpo:lookahead": [(1, 0.5), (2, 0.25)]}, name="x")
    assert "var(--ink)" in svg
    assert not re.search(plots.INK, svg)
    assert " width=" not in svg.split(">")[0]
    assert "DejaVu" not in svg


def test_the_headline_answers_for_held_out_scenarios(page):
    assert "GRPO beats both its supervised start and max-pressure" in page.text
    assert "3 held-out scenarios, 5 paired seeds" in page.text


def test_every_policy_and_scenario_is_in_the_closed_loop_table(page):
    for policy in DELAYS_S:
        assert plots.label(policy) in page.text
    for scenario in SCENARIOS:
        assert scenario in page.text


def test_the_torn_last_line_of_a_killed_run_is_left_out(tmp_path):
    write_run(tmp_path, results=None)
    lines = read_record(tmp_path)
    assert len(lines) == 2 * 226 + 2 * 120 + 2 * 7


def test_what_a_model_wrote_cannot_become_markup(page, tmp_path):
    html = report.write_report(write_run(tmp_path, results=None)).read_text()
    assert "&lt;b&gt;A C&lt;/b&gt;" in html
    assert "<b>A C</b>" not in html
    assert "invalid" in page.text


def test_missing_parts_say_which_stage_makes_them(tmp_path):
    html = report.write_report(RunFolder(root=tmp_path, config=Config())).read_text()
    text = Page(html).text
    assert "not been measured yet" in text
    for stage in ("evaluate", "grpo", "sft", "run"):
        assert f"rl-ft {stage} makes this part" in text


def test_a_gridlock_is_counted_and_takes_the_yes_away():
    results = sample_results(jammed="grpo:lookahead")
    found = findings.headline(results)
    assert found["answer"] == "partly"
    assert [model["gridlocks"] for model in found["models"]] == [0, 1]
    added = findings.added_by_grpo(results)
    assert [row["gridlocks"] for row in added if row["verdict"].policy == "grpo:lookahead"] == [
        [0, 0],
        [0, 1],
    ]


def test_one_seed_proves_nothing(tmp_path):
    results = sample_results(seeds=1)
    assert findings.headline(results)["answer"] == "no"
    html = report.write_report(write_run(tmp_path, results=results)).read_text()
    assert "one pair: no interval" in html


def test_without_a_grpo_model_the_headline_claims_nothing():
    results = sample_results()
    results["policies"] = ["fixed", "max_pressure"]
    assert findings.headline(results)["answer"] == "unknown"


def test_pooling_pairs_seeds_over_the_scenario_means():
    results = sample_results()
    verdict = findings.pooled_verdict(results, "grpo:lookahead", "max_pressure", "held_out")
    assert verdict.interval.n == 5
    held_out = findings.scenarios_of(results, "held_out")
    ours, theirs = (
        findings.mean_delay_s(results, p, held_out) for p in ("grpo:lookahead", "max_pressure")
    )
    assert verdict.interval.mean == pytest.approx(ours - theirs)
    assert verdict.word == "better"


def test_a_seed_that_a_scenario_lacks_is_left_out_of_the_pool():
    results = sample_results()
    results["rows"] = [
        row
        for row in results["rows"]
        if (row["policy"], row["scenario"], row["seed"]) != ("grpo:lookahead", "generated:1001", 4)
    ]
    verdict = findings.pooled_verdict(results, "grpo:lookahead", "max_pressure", "held_out")
    assert verdict.interval.n == 4


def test_lookahead_itself_closes_the_whole_gap():
    results = sample_results()
    assert findings.gap_closed(results, "lookahead", ["resco:cologne1"]) == 1.0
    assert findings.gap_closed(results, "max_pressure", ["resco:cologne1"]) == 0.0
    assert findings.gap_closed(results, "absent", ["resco:cologne1"]) is None


def test_stage_times_add_up_to_the_step():
    times = report.stage_times(sample_metrics())
    for _, parts, total in times["rows"]:
        assert total == pytest.approx(4.2, abs=0.05)
        rollout = parts["observe"] + parts["generate"] + parts["branch"]
        assert rollout == pytest.approx(2.3)
    assert report.stage_times([]) is None


def test_the_last_accuracy_of_every_start_is_shown(page):
    assert report.sft_accuracy(sample_metrics()) == [
        ("sft:max_pressure", 0.91),
        ("sft:lookahead", pytest.approx(0.81)),
    ]
    assert "91.0 %" in page.text


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    assert plots.smooth([3.0] * 20) == pytest.approx([3.0] * 20)
    assert plots.smooth([1.0, 9.0])[0] == 1.0


def test_policies_have_readable_names_and_steady_colours():
    assert plots.label("grpo:max_pressure") == "GRPO from max-pressure"
    assert plots.label("/models/my_policy/") == "my-policy"
    assert plots.colour("/models/my_policy/") == plots.colour("/models/my_policy/")


def test_a_gridlocked_bar_is_cut_and_labelled():
    bars = [
        plots.Bar(policy=name, mean=mean, low=mean - 1, high=mean + 1, values=(mean,))
        for name, mean in (("fixed", 40.0), ("max_wave", 20.0), ("max_pressure", 22.0))
    ]
    jam = plots.Bar(
        policy="sft:lookahead", mean=300.0, low=100.0, high=500.0, values=(300.0,), gridlocks=2
    )
    svg = plots.delay_bars([*bars, jam], name="x")
    assert "\N{RIGHTWARDS ARROW} 300  gridlock 2x" in svg


def test_the_manifest_names_the_command_without_its_folder():
    lines = dict(report.manifest(MANIFEST))
    assert lines["command"] == "rl-ft run --out run"
    assert lines["machine"] == "cores 2, memory gib 24.0"
    assert report.manifest(None) is None


def test_a_difference_off_the_scale_is_marked_not_hidden():
    rows = [
        plots.Difference(
            label=name, policy="grpo:lookahead", mean=mean, low=mean - 1, high=mean + 1
        )
        for name, mean in (("a", -8.0), ("b", -1.0), ("c", -2.0), ("d", -60.0), ("e", 90.0))
    ]
    svg = plots.differences(rows, name="x", xlabel="s")
    assert "\N{MINUS SIGN}60<" in svg
    assert "+90<" in svg
    assert "\N{MINUS SIGN}8<" in svg


def test_the_checks_are_drawn_with_a_line_per_start_and_one_for_max_pressure():
    found = report.checks(sample_metrics() + sample_checks(), CHOSEN)
    assert found["policies"] == ["max_pressure", "grpo:max_pressure", "grpo:lookahead"]
    assert found["reference_s"] == 18.5
    for policy in found["policies"]:
        assert plots.colour(policy) in found["plot"]


def test_the_page_says_which_weights_the_checks_left(page):
    assert "GRPO from lookahead step 80" in page.text
    assert "the mean of steps 100, 110, 120" in page.text


def test_without_checks_the_page_does_not_speak_of_them(tmp_path):
    assert report.checks(sample_metrics(), {}) is None
    html = report.write_report(RunFolder(root=tmp_path, config=Config())).read_text()
    assert "while it learned" not in html
