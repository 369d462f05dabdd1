"""A sweep: what is planned and shared, who is stopped, what counts as a result."""

from __future__ import annotations

import hashlib
import json

import pytest
import sweep_case
import yaml
from sweep_case import delays, planned, played

from envs.errors import UserError
from rl_ft.dataset import MANIFEST_FILE, write_dataset
from rl_ft.ranking import best, print_ranking, rank, write_results
from rl_ft.recipe import load_config
from rl_ft.run_folder import RunFolder
from rl_ft.sft import num_steps, teacher_jobs
from rl_ft.sweep import SweepError, halving, num_fitting, promoted_config, run_sweep
from rl_ft.sweep_folder import IRRELEVANT, SweepFolder, shared_stages
from rl_ft.trial import (
    GRIDLOCK_S,
    TrialError,
    note_ending,
    objective_s,
    read_outcome,
    run_shared_stages,
    run_trial,
)

RATES = "grpo.learning_rate: {grid: [0.001, 0.002, 0.004]}"


# ---- planning


def test_a_trial_is_the_recipe_with_the_overrides_and_its_settings(tmp_path):
    space = "grpo.num_generations: {grid: [2, 8]}\nsft.num_train_epochs: 7\n"
    sweep = planned(tmp_path, space, "grpo.epsilon=0.1", seed=5)
    for trial, num in zip(sweep.trials, (2, 8), strict=True):
        config = trial.config
        assert config.grpo.num_generations == num
        assert (config.sft.num_train_epochs, config.grpo.epsilon, config.seed) == (7, 0.1, 5)


def test_the_draws_follow_the_seed_of_the_run(tmp_path):
    space = "grpo.learning_rate: {loguniform: [0.0005, 0.005]}"
    settings = [
        [t.settings for t in planned(tmp_path / str(i), space, num_samples=3, seed=seed).trials]
        for i, seed in enumerate((5, 5, 6))
    ]
    assert settings[0] == settings[1] != settings[2]


def test_an_opened_sweep_is_the_one_that_was_planned(tmp_path):
    sweep = planned(tmp_path, RATES, "grpo.epsilon=0.1", seed=5)
    assert SweepFolder.open(sweep.root) == sweep


def test_a_recipe_that_changes_later_changes_no_trial(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("grpo: {max_steps: 8}\n")
    sweep = planned(tmp_path, RATES, recipe=str(recipe))
    recipe.write_text("grpo: {max_steps: 9}\n")
    assert SweepFolder.open(sweep.root).trials[0].config.grpo.max_steps == 8


def test_what_was_asked_is_in_the_folder(tmp_path):
    sweep = planned(tmp_path, RATES, "grpo.epsilon=0.1", num_samples=2)
    asked = yaml.safe_load((sweep.root / "sweep.yaml").read_text())
    assert asked["space"] == yaml.safe_load(RATES)
    assert (asked["recipe"], asked["overrides"]) == ("smoke", ["grpo.epsilon=0.1"])


def test_a_recipe_without_checks_gets_some(tmp_path):
    sweep = planned(tmp_path, RATES, recipe="small-scale")
    assert {t.config.check.every_steps for t in sweep.trials} == {2}


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ("grpo.learnin_rate: {grid: [1]}", r"space.yaml: grpo.learnin_rate=1: there is no key"),
        ("grpo.max_steps: {grid: [3, 0]}", "grpo.max_steps should be greater than 0, got 0"),
        ("grpo.max_steps: {uniform: [3, 4]}", "grpo.max_steps should be a whole number, got 3"),
        ("grpo.beta: {grid: [0, 0.1]}", r"space.yaml: with .*0.1.* does not fit together: .*beta"),
        ("prepare.teachers: {grid: [[max_pressure, lookahead]]}", "a trial reinforces one start"),
        ("monitor.mirror: {grid: [file:///far]}", "a copy is of one run, a sweep has many"),
        ("model.name_or_path: {grid: [nowhere]}", "model.name_or_path is 'nowhere': expected"),
    ],
)
def test_impossible_settings_are_found_before_anything_is_written(tmp_path, space, expected):
    with pytest.raises(UserError, match=expected):
        planned(tmp_path, space)
    assert not (tmp_path / "sweep").exists()


def test_a_folder_with_something_in_it_is_not_taken(tmp_path):
    planned(tmp_path, RATES)
    with pytest.raises(UserError, match="is not empty; pass --resume"):
        planned(tmp_path, RATES)


def test_there_is_nothing_to_resume_where_no_sweep_was_started(tmp_path):
    with pytest.raises(UserError, match=r"expected a sweep in .*found no sweep\.yaml"):
        SweepFolder.open(tmp_path)


# ---- what is shared


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("grpo.learning_rate=1e-3", "grpo.learning_rate=2e-3"), {"prepare", "sft"}),
        (("reward.scale_veh_s=20", "reward.scale_veh_s=40"), {"prepare", "sft"}),
        (("rollout.num_groups=4", "rollout.num_groups=8"), {"prepare", "sft"}),
        (("sft.learning_rate=1e-3", "sft.learning_rate=2e-3"), {"prepare"}),
        (("model.lora={r: 4}", "model.lora={r: 8}"), {"prepare"}),
        (("model.tiny.hidden_size=32", "model.tiny.hidden_size=64"), set()),
        (("reward.horizon_s=30", "reward.horizon_s=60"), set()),
        (("reward.follow=max_wave", "reward.follow=max_pressure"), set()),
        (("reward.halting=0", "reward.halting=1"), set()),
        (("prepare.tellings=2", "prepare.tellings=3"), set()),
        (("scenarios.train=[generated:1]", "scenarios.train=[generated:2]"), set()),
        (("decision_format=phase", "decision_format=extend"), set()),
        (("seed=1", "seed=2"), set()),
    ],
)
def test_a_stage_is_shared_unless_what_is_tried_changes_it(values, expected):
    shared = shared_stages([load_config("smoke", [value]) for value in values])
    assert [set(stages) for stages in shared] == [expected, expected]


def test_trials_that_are_alike_share_among_themselves():
    tried = [
        load_config("smoke", [f"reward.horizon_s={horizon}", f"sft.num_train_epochs={epochs}"])
        for horizon in (30, 60)
        for epochs in (1, 1, 2)
    ]
    first = {"prepare": "prepare-1"}
    second = {"prepare": "prepare-2"}
    assert shared_stages(tried) == [
        first | {"sft": "sft-1"},
        first | {"sft": "sft-1"},
        first,
        second | {"sft": "sft-2"},
        second | {"sft": "sft-2"},
        second,
    ]


OTHERWISE = {
    "scenarios.held_out": ["generated:1005"],
    "reward.traffic": "tanh_relative",
    "reward.scale_veh_s": 77,
    "reward.max_regret_veh_s": 7,
    "reward.format_strict": 3,
    "reward.format_partial": -3,
    "reward.format_invalid": -4,
    "model.lora": {"r": 4},
    "model.dtype": "bfloat16",
    "model.max_prompt_length": 300,
}


@pytest.mark.parametrize("key", IRRELEVANT["prepare"])
def test_what_does_not_count_changes_no_row(key, data_config, states, tmp_path):
    def written(name, config):
        write_dataset(tmp_path / name, states, 2, config)
        manifest = json.loads((tmp_path / name / MANIFEST_FILE).read_text())
        return {file: entry["sha256"] for file, entry in manifest["files"].items()}

    section, field = key.split(".")
    tree = data_config.model_dump(mode="json")
    tree[section][field] = OTHERWISE[key]
    other = type(data_config).model_validate(tree)
    assert other != data_config
    assert written("other", other) == written("plain", data_config)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Prepared once for three trials; each has its own number of epochs."""
    root = tmp_path_factory.mktemp("shared")
    small = ("prepare.num_states=8", "prepare.num_eval_states=2", "prepare.tellings=1")
    sweep = planned(root, "sft.num_train_epochs: {grid: [1, 2, 3]}", *small)
    run_shared_stages(sweep, sweep.trials)
    return sweep


def adopted(sweep, trial, root):
    from rl_ft.trial import _stage

    folder = RunFolder.create(root, trial.config, resume=False)
    _stage(sweep, trial, folder, "prepare", own="grpo")
    return folder


def test_a_shared_stage_is_an_ordinary_run_folder(shared):
    folder = RunFolder.create(shared.shared_path("prepare-1"), shared.trials[0].config, resume=True)
    assert folder.stage_done("prepare")
    folder.finish("finished")


def test_a_trial_goes_on_from_what_is_shared(shared):
    for trial in shared.trials:
        folder = adopted(shared, trial, shared.trial_path(trial))
        assert folder.stage_done("prepare")
        assert (folder.root / "model" / "config.json").is_file()
        (job,) = teacher_jobs(trial.config, folder)
        assert num_steps(trial.config, job) == trial.settings["sft.num_train_epochs"]
        folder.finish("finished")


def test_what_is_shared_is_not_made_again(shared):
    folder = shared.shared_path("prepare-1")
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    run_shared_stages(shared, shared.trials)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_a_trial_fails_with_the_cause_of_what_it_shares(tmp_path):
    sweep = planned(tmp_path, RATES, "scenarios.train=[nowhere.sumocfg]")
    run_shared_stages(sweep, sweep.trials)
    with pytest.raises(TrialError, match=r"shared/prepare-1: UserError: .*nowhere\.sumocfg"):
        run_trial(sweep, sweep.trials[0], lambda figures: None)
    assert read_outcome(sweep, sweep.trials[0]).state == "failed"


# ---- what counts as a result


@pytest.fixture
def sweep(tmp_path):
    """Finished at 14 and 12 s, stopped at 11, failed, killed, never begun."""
    space = "grpo.learning_rate: {grid: [0.001, 0.002, 0.003, 0.004, 0.005, 0.006]}"
    sweep = planned(tmp_path, space, "grpo.max_steps=8", "check.every_steps=2")
    first, second, third, fourth, fifth, _ = sweep.trials
    played(sweep, first, {0: 30, 2: 20, 8: 14})
    played(sweep, second, {0: 30, 2: 16, 8: 13}, left=delays("mean_", 12))
    played(sweep, third, {0: 30, 2: 11}, ending="stopped at step 2: others were better")
    played(sweep, fourth, {0: 9}, ending="HealthError: health/failed_share was 0.5")
    played(sweep, fifth, {0: 5}, ending=None)
    return sweep


def outcomes(sweep):
    return [read_outcome(sweep, trial) for trial in sweep.trials]


def test_how_a_trial_stands_is_read_from_its_folder(sweep):
    states = [outcome.state for outcome in outcomes(sweep)]
    assert states == ["finished", "finished", "stopped", "failed", "unfinished", "unfinished"]


def test_finished_trials_come_first_and_the_less_delay_the_better(sweep):
    assert [o.trial.name for o in rank(outcomes(sweep))] == [
        *("002", "001", "003", "005", "006", "004")
    ]


def test_the_delay_that_counts_is_that_of_the_model_that_is_left(sweep):
    assert best(outcomes(sweep)).result.delay_s == 12


def test_a_failed_or_unfinished_trial_has_no_result_however_it_drove(sweep):
    assert [o.result is None for o in outcomes(sweep)] == [False] * 3 + [True] * 3


def test_a_gridlock_is_worse_than_any_delay_and_a_fallback_is_no_answer(tmp_path):
    sweep = planned(tmp_path, RATES)
    found = (delays("mean_", 14), delays("mean_", 9, 1), delays("mean_", 13, invalid_share=0.5))
    for trial, left in zip(sweep.trials, found, strict=True):
        played(sweep, trial, {0: 30}, left=left)
    ranked = rank(outcomes(sweep))
    assert [o.trial.name for o in ranked] == ["001", "003", "002"]
    assert objective_s(ranked[-1].result) == 9 + GRIDLOCK_S


def test_results_hold_every_trial_with_settings_and_ending(sweep):
    write_results(sweep)
    results = json.loads((sweep.root / "results.json").read_text())
    assert (results["best"], results["complete"]) == ("002", False)
    rows = {row["trial"]: row for row in results["trials"]}
    assert rows["002"]["result"]["delay_s"] == 12
    assert rows["002"]["settings"] == {"grpo.learning_rate": 0.002}
    assert rows["004"]["result"] is None
    assert rows["004"]["ending"].startswith("HealthError")
    assert len(rows) == 6


def test_the_table_names_causes_and_keys(sweep, capsys):
    print_ranking(sweep, write_results(sweep))
    table = capsys.readouterr().out
    for text in ("grpo.learning_rate", "12.0 s", "HealthError", "stopped at step 2", "unfinished"):
        assert text in table


def test_the_picture_is_a_png_of_all_trials_and_keys(sweep):
    write_results(sweep)
    assert (sweep.root / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_can_show_words_and_lists(tmp_path):
    space = "grpo.loss_type: {grid: [dapo, grpo]}\nprepare.behaviour: {grid: [{random: 1}]}\n"
    sweep = planned(tmp_path, space)
    for trial in sweep.trials:
        played(sweep, trial, {0: 30, 2: 20})
    write_results(sweep)
    content = (sweep.root / "sweep.png").read_bytes()
    assert hashlib.sha256(content).hexdigest()
    assert len(content) > 10_000


def test_an_ending_that_the_trial_noted_itself_stays(sweep):
    for trial in sweep.trials:
        note_ending(sweep, trial, "died")
    endings = [o.ending for o in outcomes(sweep)]
    assert [ending == "died" for ending in endings] == [False] * 4 + [True, False]


# ---- who runs, who is stopped


def test_a_trial_behind_those_that_are_done_is_stopped(sweep):
    from types import SimpleNamespace

    scheduler = halving(sweep.trials, outcomes(sweep)[:2])
    for name, objective, decision in (("bad", 25.0, "STOP"), ("good", 15.0, "CONTINUE")):
        trial = SimpleNamespace(trial_id=name)
        scheduler.on_trial_add(None, trial)
        result = {"step": 2, "objective_s": objective}
        assert scheduler.on_trial_result(None, trial, result) == decision


def test_the_start_decides_nothing(sweep):
    from types import SimpleNamespace

    scheduler = halving(sweep.trials, outcomes(sweep)[:2])
    trial = SimpleNamespace(trial_id="new")
    scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, trial, {"step": 0, "objective_s": 1e6}) == "CONTINUE"


@pytest.mark.parametrize(
    ("wants", "resources", "expected"),
    [
        ({"CPU": 2.6, "GPU": 0.0}, {"CPU": 4.0}, 1),
        ({"CPU": 2.6, "GPU": 0.0}, {"CPU": 7.8}, 3),
        ({"CPU": 2.6, "GPU": 2.0}, {"CPU": 64.0, "GPU": 8.0}, 4),
        ({"CPU": 2.6, "GPU": 1.0}, {"CPU": 64.0, "GPU": 1.0}, 1),
    ],
)
def test_as_many_trials_run_as_the_cluster_takes(wants, resources, expected):
    assert num_fitting(wants, resources) == expected


def test_a_cluster_that_is_too_small_is_said_to_be():
    with pytest.raises(UserError, match=r"one trial wants .*2.6.* which has .*2.0"):
        num_fitting({"CPU": 2.6, "GPU": 0.0}, {"CPU": 2.0})


def test_a_sweep_that_is_done_runs_nothing_and_is_shown(tmp_path, capsys):
    sweep = planned(tmp_path, RATES)
    for trial in sweep.trials:
        played(sweep, trial, {0: 30, 2: 20})
    assert len(run_sweep(sweep, concurrent=None, retry=True)) == 3
    assert "20.0 s" in capsys.readouterr().out


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, ray_cluster):
    """Tune for real over trials that only say how they drive: good, better, worse, failed, dead."""
    import ray

    # Workers do not have this folder on their path.
    ray.cloudpickle.register_pickle_by_value(sweep_case)
    space = "prepare.warm_up_s: {grid: [20, 10, 30, 40, 50]}"
    sweep = planned(tmp_path_factory.mktemp("tuned"), space, "grpo.max_steps=8")
    ranked = run_sweep(sweep, concurrent=1, retry=False, run=sweep_case.drive_towards)
    return sweep, ranked


@pytest.mark.ray
def test_tune_runs_every_trial_and_each_ends_in_its_own_way(tuned):
    _, ranked = tuned
    states = {o.trial.settings["prepare.warm_up_s"]: o.state for o in ranked}
    assert states == {
        10: "finished",
        20: "finished",
        30: "stopped",
        40: "failed",
        50: "failed",
    }


@pytest.mark.ray
def test_a_trial_that_is_behind_ends_at_the_first_rung(tuned):
    _, ranked = tuned
    (stopped,) = [o for o in ranked if o.state == "stopped"]
    assert stopped.ending == "stopped at step 2: others were better"
    assert stopped.result.delay_s == 30


@pytest.mark.ray
def test_a_failed_trial_is_named_and_is_no_result(tuned):
    sweep, ranked = tuned
    endings = {o.trial.name: o.ending for o in ranked if o.state == "failed"}
    assert endings["004"] == "UserError: no such net"
    assert endings["005"].startswith("died: The actor died")
    results = json.loads((sweep.root / "results.json").read_text())
    assert (results["best"], results["complete"]) == ("002", True)


def num_starts(sweep, trial):
    return len(json.loads((sweep.trial_path(trial) / "manifest.json").read_text())["starts"])


@pytest.mark.ray
def test_a_resumed_sweep_tries_again_what_failed_and_nothing_else(tuned):
    sweep, _ = tuned
    before = [num_starts(sweep, trial) for trial in sweep.trials]
    again = SweepFolder.open(sweep.root)
    run_sweep(again, concurrent=1, retry=True, run=sweep_case.drive_towards)
    after = [num_starts(sweep, trial) for trial in sweep.trials]
    assert [b - a for a, b in zip(before, after, strict=True)] == [0, 0, 0, 1, 1]


@pytest.mark.ray
def test_a_sweep_of_which_all_trials_fail_is_an_error_with_the_causes(tmp_path, ray_cluster):
    sweep = planned(tmp_path, "prepare.warm_up_s: {grid: [40]}")
    with pytest.raises(SweepError, match="no trial has a result: UserError: no such net"):
        run_sweep(sweep, concurrent=1, retry=True, run=sweep_case.drive_towards)


# ---- promotion


def test_the_full_run_is_its_recipe_with_the_settings():
    config = promoted_config("tiny-cpu", {"grpo.learning_rate": 0.003, "sft.label_noise": 0.2})
    expected = load_config("tiny-cpu", ["grpo.learning_rate=0.003", "sft.label_noise=0.2"])
    assert config == expected


def test_a_recipe_whose_model_is_not_there_cannot_be_promoted_to():
    with pytest.raises(UserError, match=r"--promote full-scale: model.name_or_path is"):
        promoted_config("full-scale", {})


def test_full_scale_is_for_gpus():
    config = load_config("full-scale")
    assert (config.model.dtype, config.parity.max_logprob_diff) == ("bfloat16", 0.05)
    assert config.model.lora is not None
