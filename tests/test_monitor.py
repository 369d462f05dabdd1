from __future__ import annotations

import json
import logging
import math

import pytest

from rl_ft.monitor import LoadSampler, MetricLog, read_metrics, run_log, write_summary


def test_a_step_is_on_disk_when_it_is_logged(tmp_path):
    with MetricLog(tmp_path) as metrics:
        metrics.log("grpo", 1, {"reward/mean": 0.5})
        line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["values"] == {"reward/mean": 0.5}
    assert (line["stage"], line["step"]) == ("grpo", 1)
    assert line["time_s"] >= 0


def test_what_is_not_a_number_is_null_in_the_record(tmp_path):
    with MetricLog(tmp_path) as metrics:
        metrics.log("grpo", 1, {"a": math.nan, "b": math.inf})
    assert read_metrics(tmp_path, "grpo")[0]["values"] == {"a": None, "b": None}


def test_tensorboard_shows_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricLog(tmp_path) as metrics:
        metrics.log("grpo", 3, {"reward/mean": 0.25})
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (event,) = board.Tensors("grpo/reward/mean")
    assert (event.step, event.tensor_proto.float_val[0]) == (3, 0.25)


def test_a_resumed_run_forgets_the_steps_it_makes_again(tmp_path):
    with MetricLog(tmp_path) as metrics:
        metrics.log("sft", 9, {"loss": 1.0})
        for step in (1, 2, 3):
            metrics.log("grpo", step, {"reward": step})
    with MetricLog(tmp_path) as metrics:
        metrics.rewind("grpo", 1)
        metrics.log("grpo", 2, {"reward": 20})
    assert [line["values"]["reward"] for line in read_metrics(tmp_path, "grpo")] == [1, 20]
    assert len(read_metrics(tmp_path, "sft")) == 1


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    with MetricLog(tmp_path) as metrics:
        metrics.log("grpo", 1, {"reward": 1})
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"stage": "gr')
    with MetricLog(tmp_path) as metrics:
        metrics.log("grpo", 2, {"reward": 2})
    assert [line["step"] for line in read_metrics(tmp_path, "grpo")] == [1, 2]


def test_a_run_without_metrics_has_none(tmp_path):
    assert read_metrics(tmp_path, "grpo") == []


def test_sections_of_the_summary_do_not_touch_each_other(tmp_path):
    write_summary(tmp_path, "sft", {"loss": 0.1})
    write_summary(tmp_path, "grpo", {"reward": 0.2})
    write_summary(tmp_path, "sft", {"loss": 0.3})
    summary = json.loads((tmp_path / "metrics.json").read_text())
    assert summary == {"sft": {"loss": 0.3}, "grpo": {"reward": 0.2}}


def test_a_load_sample_is_within_the_machine():
    load = LoadSampler().sample()
    assert 0 <= load["system/cpu_share"] <= 1
    assert load["system/processes_core_s"] >= 0
    assert 0 < load["system/processes_memory_gib"] < 1000
    assert 0 < load["system/memory_used_gib"] < 10_000


def test_everything_is_in_the_log_and_ours_is_on_the_terminal(tmp_path, capsys):
    with run_log(tmp_path / "run.log"):
        logging.getLogger("rl_ft.somewhere").info("step %d", 3)
        logging.getLogger("elsewhere").warning("noise")
    text = (tmp_path / "run.log").read_text()
    shown = capsys.readouterr().err
    assert "rl_ft.somewhere: step 3" in text
    assert "noise" in text
    assert "step 3" in shown
    assert "noise" not in shown


def test_a_closed_log_takes_nothing_more(tmp_path):
    with run_log(tmp_path / "run.log", console=False):
        pass
    logging.getLogger("rl_ft").error("afterwards")
    assert "afterwards" not in (tmp_path / "run.log").read_text()


def test_a_closed_record_refuses_steps(tmp_path):
    metrics = MetricLog(tmp_path)
    metrics.close()
    with pytest.raises(ValueError, match="closed"):
        metrics.log("grpo", 1, {})
