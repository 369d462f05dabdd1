"""Who watches a run is told what was measured, and cannot stop it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from envs.errors import UserError
from rl_ft.figures import rates
from rl_ft.monitor import MetricLog, Relay
from rl_ft.recipe import load_config
from rl_ft.series import ENGINE, SERIES
from rl_ft.sinks import Sinks, open_sinks

STAGE = "grpo/max_pressure"


class Kept:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, dict[str, float]]] = []
        self.closed: list[bool] = []

    def log(self, stage, step, values):
        self.told.append((stage, step, dict(values)))

    def close(self, *, failed=False):
        self.closed.append(failed)


class Broken(Kept):
    """A sink that takes nothing."""

    def log(self, stage, step, values):
        raise ConnectionError("nobody there")


def sinks_of(*all_sinks) -> Sinks:
    sinks = Sinks()
    for sink in all_sinks:
        sinks.add(sink)
    return sinks


def test_a_sink_is_told_what_is_recorded(tmp_path):
    kept = Kept()
    with MetricLog(tmp_path, sinks_of(kept)) as record:
        record.log(STAGE, 3, {"reward/mean": 0.5})
    assert kept.told == [(STAGE, 3, {"reward/mean": 0.5})]


def test_a_sink_is_told_no_figure_that_is_not_a_number():
    kept = Kept()
    sinks_of(kept).log(STAGE, 1, {"a": math.nan, "b": math.inf, "c": 2})
    assert kept.told == [(STAGE, 1, {"c": 2.0})]


def test_a_sink_that_fails_is_reported_once_and_the_others_go_on(caplog):
    kept = Kept()
    sinks = sinks_of(Broken(), kept)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            sinks.log(STAGE, step, {})
    assert [step for _, step, _ in kept.told] == [1, 2, 3]
    assert [r.getMessage() for r in caplog.records] == [
        "Broken takes no figures, the run goes on: nobody there"
    ]


def test_what_another_process_records_is_told_once(tmp_path):
    kept = Kept()
    relay = Relay(tmp_path, ["sft/a"], sinks_of(kept))
    relay()
    with MetricLog(tmp_path) as record:
        for step in (1, 2):
            record.log("sft/a", step, {"loss": step})
            record.log("sft/b", step, {"loss": step})
            relay()
            relay()
    assert kept.told == [("sft/a", 1, {"loss": 1.0}), ("sft/a", 2, {"loss": 2.0})]


def test_a_stage_that_begins_anew_is_told_anew(tmp_path):
    kept = Kept()
    relay = Relay(tmp_path, ["sft/a"], sinks_of(kept))
    with MetricLog(tmp_path) as record:
        record.log("sft/a", 1, {"loss": 1})
        relay()
        record.rewind("sft/a", 0)
        relay()
        record.log("sft/a", 1, {"loss": 9})
        relay()
    assert [values["loss"] for _, _, values in kept.told] == [1.0, 9.0]


def test_rates_are_per_second_of_the_whole_step():
    values = {
        "time/step_s": 4.0,
        "time/sampler_s": 1.0,
        "learner/step_s": 4.0,
        "learner/fetch_s": 3.0,
        "rollout/sampled_tokens": 400.0,
        "rollout/branches": 20.0,
    }
    assert rates(values) == {
        "idle/learner_share": 0.75,
        "idle/sampler_share": 0.75,
        "rate/sampled_tokens_per_s": 100.0,
        "rate/branches_per_s": 5.0,
    }


@pytest.mark.parametrize(
    ("overrides", "exports"),
    [
        ([], False),
        (["ray.address=auto"], True),
        (["monitor.ray=true"], True),
        (["ray.address=auto", "monitor.ray=false"], False),
    ],
)
def test_ray_metrics_are_on_in_a_cluster_that_is_joined_or_where_asked(overrides, exports):
    assert load_config("smoke", overrides).exports_ray_metrics is exports


@pytest.mark.parametrize(
    ("override", "package"),
    [("monitor.mlflow=file:mlruns", "mlflow"), ("monitor.wandb=traffic", "wandb")],
)
def test_a_watcher_that_is_not_installed_is_asked_for_in_vain(
    monkeypatch, tmp_path, override, package
):
    monkeypatch.setitem(sys.modules, package, None)
    config = load_config("smoke", [override])
    with pytest.raises(UserError, match=rf"scripts/setup\.sh cpu,resco,{package}"):  # noqa: SIM117
        with open_sinks(config, tmp_path):
            pass


def mlflow_runs(store: Path):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store.as_uri())
    experiment = client.get_experiment_by_name("rl-ft")
    return client, client.search_runs([experiment.experiment_id])


def test_mlflow_keeps_the_figures_and_the_settings(tmp_path):
    pytest.importorskip("mlflow")
    config = load_config("smoke", [f"monitor.mlflow={(tmp_path / 'mlruns').as_uri()}"])
    with open_sinks(config, tmp_path) as sinks:
        sinks.log(STAGE, 3, {"reward/mean": 0.5, "check/delay_s/a.net.xml,b": 9.0})
    client, [run] = mlflow_runs(tmp_path / "mlruns")
    [figure] = client.get_metric_history(run.info.run_id, f"{STAGE}/reward.mean")
    assert (figure.step, figure.value) == (3, 0.5)
    assert run.data.metrics[f"{STAGE}/check.delay_s.a.net.xml.b"] == 9.0
    assert run.data.params["grpo.num_generations"] == str(config.grpo.num_generations)
    assert run.info.status == "FINISHED"


def test_a_resumed_run_goes_on_in_its_mlflow_run_and_says_how_it_ended(tmp_path):
    pytest.importorskip("mlflow")
    config = load_config("smoke", [f"monitor.mlflow={(tmp_path / 'mlruns').as_uri()}"])
    with open_sinks(config, tmp_path) as sinks:
        sinks.log(STAGE, 1, {"loss": 1.0})
    with contextlib.suppress(RuntimeError), open_sinks(config, tmp_path) as sinks:
        sinks.log(STAGE, 2, {"loss": 2.0})
        raise RuntimeError
    client, [run] = mlflow_runs(tmp_path / "mlruns")
    history = client.get_metric_history(run.info.run_id, f"{STAGE}/loss")
    assert [(figure.step, figure.value) for figure in history] == [(1, 1.0), (2, 2.0)]
    assert run.info.status == "FAILED"


def test_a_tracking_server_that_is_not_there_is_an_error_of_the_users(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = load_config("smoke", ["monitor.mlflow=http://127.0.0.1:9"])
    with pytest.raises(UserError, match=r"monitor\.mlflow is http://127\.0\.0\.1:9"):  # noqa: SIM117
        with open_sinks(config, tmp_path):
            pass


def wandb_history(root: Path) -> list[dict[str, str]]:
    """What an offline run's file holds: a log of LevelDB's, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = root.glob("wandb/offline-run-*/run-*.wandb")
    content, place, found = file.read_bytes(), 7, []
    while place + 7 <= len(content):
        length = int.from_bytes(content[place + 4 : place + 6], "little")
        assert content[place + 6] == 1, "a record in several parts"
        record = Record.FromString(content[place + 7 : place + 7 + length])
        place += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append({i.key or "/".join(i.nested_key): i.value_json for i in items})
    return found


def test_wandb_keeps_the_figures_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with open_sinks(load_config("smoke", ["monitor.wandb=traffic"]), tmp_path) as sinks:
        sinks.log(STAGE, 3, {"reward/mean": 0.25})
    [line] = wandb_history(tmp_path)
    assert line[f"{STAGE}/reward/mean"] == "0.25"
    assert line[f"{STAGE}/step"] == "3"


def test_wandb_without_a_login_is_an_error_of_the_users(tmp_path, monkeypatch):
    # What an earlier run of this process read from the environment is kept.
    pytest.importorskip("wandb").teardown()
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="WANDB_MODE=offline"):  # noqa: SIM117
        with open_sinks(load_config("smoke", ["monitor.wandb=traffic"]), tmp_path):
            pass


def test_no_two_series_share_a_name_and_no_key_two_places():
    names = [series.name for series in SERIES]
    assert len(set(names)) == len(names)
    for series in SERIES:
        assert len(set(series.of.values())) == len(series.of)
        assert (series.label is None) == (set(series.of.values()) == {""})


SESSION = """
import time, urllib.request
from pathlib import Path
import ray
from rl_ft import sinks
from rl_ft.cluster import ray_session
from rl_ft.recipe import load_config

def scrape():
    with urllib.request.urlopen(url) as answer:
        lines = answer.read().decode().splitlines()
    return [line for line in lines if line.startswith("ray_rlft_")]

def wait_for(name):
    end = time.monotonic() + 300
    while not any(line.startswith(name) for line in scrape()):
        assert time.monotonic() < end, f"{name} did not appear"
        time.sleep(0.2)

sinks.REFRESH_S = 0.5
config = load_config("smoke", ["monitor.ray=true"])
with ray_session(config), sinks.open_sinks(config, Path("a-run")) as told:
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    told.log("grpo/max_pressure", 1, {"num_tokens": 30.0, "time/step_s": 3.0})
    told.log("grpo/max_pressure", 2, {"num_tokens": 12.0, "staleness/max": 2.0, "loss": -0.5})
    told.log("check/max_pressure", 0, {"check/delay_s": 17.25})
    wait_for("ray_rlft_loss")
    wait_for("ray_rlft_tokens_total")
    # Several times as long as Ray remembers a gauge that is not set again.
    time.sleep(8)
    print("\\n".join(scrape()))
"""


@pytest.fixture(scope="module")
def scraped(tmp_path_factory) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What a session of its own exports: name and our labels, and the value."""
    # Ray exports every 10 s and remembers a gauge for two of these.
    environment = os.environ | {"RAY_metrics_report_interval_ms": "1000"}
    environment.pop("RAY_enable_metrics_collection", None)
    done = subprocess.run(
        [sys.executable, "-c", SESSION],
        env=environment,
        cwd=tmp_path_factory.mktemp("session"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    from prometheus_client.parser import text_string_to_metric_families

    for family in text_string_to_metric_families(done.stdout + "\n"):
        for sample in family.samples:
            ours = ("stage", "start", "run", "policy", "what", "over", "le")
            labels = frozenset((k, v) for k, v in sample.labels.items() if k in ours)
            found[sample.name, labels] = sample.value
    return found


def labels(stage: str, **more: str) -> frozenset[tuple[str, str]]:
    return frozenset({"stage": stage, "start": "max_pressure", "run": "a-run", **more}.items())


@pytest.mark.ray
@pytest.mark.parametrize(
    ("name", "of", "value"),
    [
        ("ray_rlft_loss", labels("grpo"), -0.5),
        ("ray_rlft_step", labels("grpo"), 2.0),
        ("ray_rlft_staleness_versions", labels("grpo", over="max"), 2.0),
        ("ray_rlft_closed_loop_delay_seconds", labels("check", policy="model"), 17.25),
        ("ray_rlft_tokens_total", labels("grpo", what="trained"), 42.0),
        ("ray_rlft_step_seconds_bucket", labels("grpo", le="2.0"), 0.0),
        ("ray_rlft_step_seconds_bucket", labels("grpo", le="5.0"), 1.0),
    ],
)
def test_prometheus_finds_the_figure_at_the_metrics_port(scraped, name, of, value):
    assert scraped[name, of] == value


@pytest.mark.vllm
def test_vllm_counts_the_tokens_that_it_samples(tmp_path):
    from rl_ft.generation import Generator
    from rl_ft.tiny import build_tiny

    config = load_config(
        "smoke", ["monitor.ray=true", "monitor.engine=true", "generation.kv_cache_gib=0.25"]
    )
    folder = build_tiny(tmp_path / "tiny", config=config.model.tiny, seed=1)
    generator = Generator(str(folder), config=config, seed=1)
    answers = generator.generate([[300] * 40, [301] * 30], num_samples=2, max_tokens=4)
    figures = generator.engine_figures()
    generator.close()
    assert figures.keys() == ENGINE.keys()
    assert figures["generation_tokens"] == sum(len(c.token_ids) for a in answers for c in a)
