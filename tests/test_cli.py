from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from envs.errors import UserError, WorldError
from rl_ft import cli, pipeline
from rl_ft.ending import named_cause
from rl_ft.recipe import recipe_names
from rl_ft.run_folder import RunFolder

HEAVY = ("torch", "ray", "vllm", "trl", "transformers", "peft", "libsumo", "datasets", "numpy")


def rl_ft(*arguments, cwd=None):
    """The command as a user runs it."""
    command = [sys.executable, "-m", "rl_ft.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


def call(monkeypatch, *arguments):
    """The same in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["rl-ft", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


def test_help_imports_no_heavy_library():
    code = (
        "import sys\n"
        "from rl_ft.cli import app\n"
        "try:\n    app(['--help'])\n"
        f"finally:\n    print('LOADED', [m for m in {HEAVY} if m in sys.modules])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "LOADED []" in ended.stdout
    for command in ("run", *pipeline.STAGES, "export", "doctor", "scenarios", "submit"):
        assert command in ended.stdout


def test_help_answers_within_about_a_second():
    def seconds():
        start = time.monotonic()
        assert rl_ft("--help").returncode == 0
        return time.monotonic() - start

    # A busy machine may double it, and what else runs here may hold it up now and then.
    assert any(seconds() < 2 for _ in range(3))


def test_bad_input_is_one_sentence_and_status_2():
    ended = rl_ft("run", "--set", "grpo.max_stps=1")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == [
        "rl-ft: --set grpo.max_stps=1: there is no key grpo.max_stps; did you mean grpo.max_steps?"
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "--recipe", "tiny-gpu"], "did you mean tiny-cpu"),
        (["run", "--set", "grpo.max_steps=many"], "should be a whole number"),
        (["run", "--set", "scenarios.held_out=[resco:colone1]"], "RESCO has the maps"),
        (["run", "--set", "check.scenarios=[generated:x]"], "named by one seed"),
        (["run", "--out", "file"], "is a file"),
        (["run", "--out", "other"], "holds no run (found notes)"),
        (["run", "--out", "nowhere", "--resume"], "expected a run in nowhere"),
        (["sft", "--out", "nowhere"], "expected a run in nowhere"),
        (["report", "--out", "other"], "expected a run in other to go on with, found only notes"),
        (["evaluate", "--out", "nowhere"], "expected a run in nowhere"),
        (["evaluate", "--scenario", "resco:cologne1"], "go with --controller or --model"),
        (
            ["evaluate", "--model", "nowhere", "--scenario", "generated:1"],
            "there is no such folder",
        ),
        (["data", "check", __file__], "holds no dataset"),
        (["evaluate", "--controller", "maxpressure"], "did you mean max_pressure"),
        (["evaluate", "--controller", "fixed", "--out", "file"], "is a file"),
        (["evaluate", "--controller", "fixed", "--out", "judged"], "already holds results"),
        (["export", "--run", "other"], "other is not the folder of a run"),
        (["export", "--run", "other", "--format", "merge"], "did you mean merged"),
        (["scenarios", "resco:nowhere"], "RESCO has the maps"),
        (["scenarios", "missing.sumocfg"], "missing.sumocfg"),
        (["recipes", "nothing"], "is neither a file nor one of"),
        (["doctor", "--recipe", "nothing"], "is neither a file nor one of"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(
    arguments, expected, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("other").mkdir()
    Path("other/notes").write_text("mine")
    Path("judged").mkdir()
    Path("judged/results.json").write_text("{}")
    assert call(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_an_option_that_does_not_exist_has_status_2(monkeypatch):
    assert call(monkeypatch, "run", "--nope") == 2


def test_recipes_are_listed(monkeypatch, capsys):
    assert call(monkeypatch, "recipes") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in recipe_names())
    assert "proves that a machine works, learns nothing." in " ".join(shown.split())


def test_a_recipe_shows_what_it_changes(monkeypatch, capsys):
    assert call(monkeypatch, "recipes", "smoke") == 0
    assert "grpo.max_steps" in capsys.readouterr().out


def test_scenarios_are_listed(monkeypatch, capsys):
    assert call(monkeypatch, "scenarios") == 0
    shown = capsys.readouterr().out
    assert "generated:<seed>" in shown
    assert "resco:cologne1" in shown


def test_a_scenario_shows_its_junctions_phases_and_demand(monkeypatch, capsys):
    assert call(monkeypatch, "scenarios", "resco:cologne1") == 0
    shown = capsys.readouterr().out
    assert "2015 vehicles (2015 per hour), 1 signalled junction" in " ".join(shown.split())
    assert "south through+right" in shown
    assert "choose" in shown


STAGE_LOG = "stages.log"


def note(name, config, folder):
    with folder.path(STAGE_LOG).open("a") as log:
        log.write(f"{name}\n")


@pytest.fixture
def noted_stages(monkeypatch):
    """Stages that only note that they ran: what is tested is their order, not their work."""
    monkeypatch.setattr(pipeline, "ON_RAY", ())
    for stage in pipeline.STAGES:
        monkeypatch.setitem(
            pipeline.STAGES, stage, lambda config, folder, stage=stage: note(stage, config, folder)
        )


def ran(out):
    return (out / STAGE_LOG).read_text().split()


@pytest.mark.usefixtures("noted_stages")
def test_run_does_every_stage_in_order(tmp_path, monkeypatch):
    assert call(monkeypatch, "run", "--out", tmp_path / "run") == 0
    assert ran(tmp_path / "run") == ["prepare", "sft", "grpo", "evaluate", "report"]


@pytest.mark.usefixtures("noted_stages")
def test_a_resumed_run_skips_what_is_done(tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert call(monkeypatch, "prepare", "--out", out, "--recipe", "smoke", "--seed", 7) == 0
    assert call(monkeypatch, "run", "--out", out, "--resume") == 0
    assert ran(out) == ["prepare", "sft", "grpo", "evaluate", "report"]


@pytest.mark.usefixtures("noted_stages")
def test_stages_go_on_with_the_folder_s_own_configuration(tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert call(monkeypatch, "prepare", "--out", out, "--set", "seed=4") == 0
    for stage in ("sft", "grpo", "evaluate", "report"):
        assert call(monkeypatch, stage, "--out", out) == 0
    assert ran(out) == ["prepare", "sft", "grpo", "evaluate", "report"]
    assert "seed: 4" in (out / "config.yaml").read_text()


@pytest.mark.usefixtures("noted_stages")
def test_a_stage_that_is_done_is_not_done_again_but_the_report_is(tmp_path, monkeypatch):
    out = tmp_path / "run"
    call(monkeypatch, "run", "--out", out)
    assert call(monkeypatch, "sft", "--out", out) == 0
    assert call(monkeypatch, "report", "--out", out) == 0
    assert ran(out)[5:] == ["report"]


@pytest.mark.usefixtures("noted_stages")
def test_a_report_is_of_what_there_is_and_done_when_all_is(tmp_path, monkeypatch):
    out = tmp_path / "run"
    call(monkeypatch, "prepare", "--out", out)
    assert call(monkeypatch, "report", "--out", out) == 0
    assert call(monkeypatch, "run", "--out", out, "--resume") == 0
    assert ran(out) == ["prepare", "report", "sft", "grpo", "evaluate", "report"]


@pytest.mark.usefixtures("noted_stages")
def test_a_stage_asks_for_the_one_before_it(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    call(monkeypatch, "prepare", "--out", out)
    capsys.readouterr()
    assert call(monkeypatch, "grpo", "--out", out) == 2
    assert "grpo needs sft" in capsys.readouterr().err


@pytest.mark.usefixtures("noted_stages")
def test_the_default_folder_is_named_after_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "run", "--recipe", "smoke") == 0
    assert ran(tmp_path / "runs" / "smoke")


def fail_with(monkeypatch, error):
    def stage(config, folder):
        raise error

    monkeypatch.setitem(pipeline.STAGES, "prepare", stage)


def ending(out):
    import json

    return json.loads((out / "manifest.json").read_text())["starts"][-1]["ending"]


def test_a_run_that_stops_for_a_named_reason_has_status_1(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    fail_with(monkeypatch, WorldError("died", "signal 9"))
    assert call(monkeypatch, "run", "--out", out) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "rl-ft: died: signal 9"
    assert ending(out) == "WorldError: died: signal 9"
    assert "Traceback" not in (out / "run.log").read_text()


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    out = tmp_path / "run"
    fail_with(monkeypatch, ZeroDivisionError("division by zero"))
    monkeypatch.setattr(sys, "argv", ["rl-ft", "run", "--out", str(out)])
    with pytest.raises(ZeroDivisionError):
        cli.main()
    assert ending(out) == "ZeroDivisionError: division by zero"
    assert "Traceback" in (out / "run.log").read_text()


def test_ctrl_c_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    code = (
        "import sys, time\n"
        "from rl_ft import cli, pipeline\n"
        "pipeline.STAGES['prepare'] = lambda config, folder: (print('ready'), time.sleep(60))\n"
        f"sys.argv = ['rl-ft', 'run', '--out', {str(out)!r}]\n"
        "cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGINT)
    _, shown = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"rl-ft: interrupted; to go on: rl-ft run --out {out} --resume" in shown
    assert ending(out) == "interrupted"


def test_ctrl_c_outside_a_run_has_status_130(monkeypatch, capsys):
    def interrupted(prog_name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    assert call(monkeypatch, "recipes") == 130
    assert capsys.readouterr().err == "rl-ft: interrupted\n"


def test_a_named_error_is_found_behind_what_ray_wraps_around_it():
    from ray.exceptions import RayTaskError
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    error = UserError("no such net")
    task = RayTaskError("f", "Traceback ...", error).as_instanceof_cause()
    assert named_cause(task) is error
    assert named_cause(WorkerGroupError("workers failed", {0: task})) is error
    assert named_cause(ControllerError(task)) is error


def test_an_error_that_is_not_ours_has_no_name():
    error = ValueError("bug")
    error.__cause__ = error
    assert named_cause(error) is None


def test_a_raised_from_chain_ends_in_the_named_error():
    outer = RuntimeError("wrapped")
    outer.__cause__ = WorldError("late", "120 s")
    assert isinstance(named_cause(outer), WorldError)


def test_a_resumed_run_folder_is_free_again_after_an_error(tmp_path, monkeypatch, smoke_config):
    out = tmp_path / "run"
    fail_with(monkeypatch, UserError("no"))
    call(monkeypatch, "run", "--recipe", "smoke", "--out", out)
    RunFolder.create(out, smoke_config, resume=True).finish("finished")
