"""The loop for real, worlds, vLLM, Ray Train and TRL, on a model that is trained in seconds."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal

import psutil
import pytest
import ray
import torch
from lesson_case import vouch
from loop_case import (
    STAGE,
    START,
    WatchedGenerator,
    first_legal,
    loop_config,
    num_logged,
    run_loop,
    train_worker_pids,
    wait_for,
    world_pids,
)

from envs.naming import phase_name, renamed
from rl_ft.dataset import GRPO_FILE
from rl_ft.learner import LearnerError
from rl_ft.parity import NO_OP_SYNC, ParityError
from rl_ft.series import SERIES
from rl_ft.weights import digest, read_folder

pytestmark = pytest.mark.e2e

# Instants are told again as early and as often as they may be.
RETOLD = ("rollout.tellings=3", "rollout.retell_after_steps=0")
CHECKED = (
    'check.scenarios=["generated:3"]',
    "check.episode_s=120",
    "check.every_steps=1",
    # The mean is left, whatever the checks say.
    "check.min_improvement_s=1000",
)
# So fast that the most likely answers change within three steps.
FAST = ("grpo.target_coef=0.3", "grpo.learning_rate=0.03")
SHORT = ("grpo.max_steps=3", "grpo.learning_rate=0.002", "grpo.save_steps=3")
TOY_STEPS = 30
TOY = (
    f"grpo.max_steps={TOY_STEPS}",
    "grpo.learning_rate=0.003",
    "grpo.warmup_steps=2",
    "grpo.save_steps=4",
    "rollout.num_groups=16",
    "rollout.num_worlds=8",
    # Where its first phase is hardly ever illegal: what is rare is not learnt in so few steps.
    'scenarios.train=["generated:2"]',
    "rollout.behaviour.policy=0",
    "reward.horizon_s=10",
)
TWIN = (*SHORT, *RETOLD, *CHECKED, *FAST)
WALL_CLOCK = ("time/", "system/", "rate/", "idle/")


@pytest.fixture(scope="module")
def start_digest(prepared):
    return digest(read_folder(prepared / "sft" / START))


# ---- from a dataset


@pytest.fixture(scope="module")
def offline(prepared, generator, tmp_path_factory):
    """Two trainings without a simulation; the second reads the rows in another order."""
    root = tmp_path_factory.mktemp("offline")
    shutil.copytree(prepared / "data", root / "two" / "data")
    rows = root / "two" / "data" / GRPO_FILE
    lines = rows.read_text().splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    rows.write_text("".join(lines))
    vouch(rows)
    simulations = {}
    settings = (*SHORT, *RETOLD, "grpo.target_coef=0.3", "rollout.offline=true")

    def watch(root, worlds):
        wait_for(lambda: num_logged(root))
        simulations[root.name] = len(world_pids())

    runs = [
        run_loop(prepared, root / name, generator, *settings, meanwhile=watch)
        for name in ("one", "two")
    ]
    return runs, simulations


def test_a_dataset_alone_trains(offline, start_digest):
    for run in offline[0]:
        assert run.error is None
        assert run.step_numbers == [1, 2, 3]
        assert run.final_digest != start_digest
        assert max(run.values("health/zero_variance_share")) < 1


def test_no_simulation_runs_meanwhile(offline):
    assert offline[1] == {"one": 0, "two": 0}


def test_the_order_of_the_rows_changes_nothing(offline):
    one, two = offline[0]
    assert measured(one.steps) == measured(two.steps)
    assert one.final_digest == two.final_digest


# ---- same seed, same run


@pytest.fixture(scope="module")
def twins(prepared, generator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("twins")
    return [
        run_loop(
            prepared,
            folder / name,
            generator,
            *TWIN,
        )
        for name in ("one", "two")
    ]


def measured(steps):
    """Every step's figures but those of the clock and the machine."""
    return [
        {
            name: value
            for name, value in step["values"].items()
            if not name.startswith(WALL_CLOCK)
            and not (name.startswith("learner/") and name.endswith("_s"))
        }
        for step in steps
    ]


def test_the_loop_reaches_its_last_step(twins):
    assert [run.error for run in twins] == [None, None]
    assert [run.step_numbers for run in twins] == [[1, 2, 3], [1, 2, 3]]


def test_a_step_has_a_figure_for_every_series_but_those_of_checks(twins):
    keys = {key for series in SERIES for key in series.of}
    of_checks = {key for key in keys if key.startswith("check/")} | {"time/check_s"}
    for step in twins[0].steps:
        assert keys - of_checks - {"progress/step"} <= step["values"].keys()


def test_two_runs_with_one_seed_measure_the_same(twins):
    one, two = (measured(run.steps) for run in twins)
    assert one == two


def test_two_runs_with_one_seed_check_the_same(twins):
    one, two = (measured(run.checks) for run in twins)
    assert one == two
    assert [check["step"] for check in twins[0].checks] == [0, 1, 2, 3]
    assert len({values["check/delay_s"] for values in one}) > 1


def test_instants_are_told_again_in_later_steps(twins):
    told, new = twins[0].values("rollout/groups"), twins[0].values("rollout/new_instants")
    assert told[0] == new[0]
    assert any(a > b for a, b in zip(told[1:], new[1:], strict=True))


def test_two_runs_with_one_seed_end_with_the_same_weights(twins):
    assert twins[0].final_digest == twins[1].final_digest


def test_training_moves_the_weights(twins, start_digest):
    assert twins[0].final_digest != start_digest


def test_the_sampler_gets_every_version_once_and_in_order(twins):
    assert [version for version, _ in twins[0].loaded] == [0, 1, 2, 3]


def test_where_one_version_is_kept_the_saved_model_is_the_last(twins):
    assert twins[0].final_digest == twins[0].loaded[-1][1]


def test_trainer_and_sampler_agree_while_the_weights_move(twins):
    assert max(twins[0].values("mismatch/mean_abs_logp_diff")) < 1e-4


def test_groups_differ_in_reward_and_losses_are_finite(twins):
    assert all(map(math.isfinite, twins[0].values("loss")))
    assert min(twins[0].values("health/zero_variance_share")) < 1
    assert max(twins[0].values("grad_norm")) > 0


def test_the_branch_of_the_executed_action_is_what_then_happens(twins):
    assert twins[0].values("health/branch_disagreements") == [0, 0, 0]


# ---- two learners, two samplers


@pytest.fixture(scope="module")
def many(prepared, generator, tmp_path_factory):
    """The settings of the twins, and two of everything."""
    config = loop_config()
    engine = ray.remote(WatchedGenerator).options(num_cpus=0)
    other = engine.remote(str(prepared / "sft" / START), config, config.seed)
    asked = []
    run = run_loop(
        prepared,
        tmp_path_factory.mktemp("many") / "run",
        generator,
        *(*TWIN, "ray.num_learners=2", "ray.num_world_actors=2"),
        others=[other],
        meanwhile=lambda root, _: asked.append(wait_for(lambda: len(train_worker_pids()) == 2)),
    )
    loaded = ray.get(other.take_loaded.remote())
    ray.kill(other)
    return run, loaded, asked


def test_two_learners_and_two_samplers_reach_the_last_step(many):
    run, _, two_ranks = many
    assert run.error is None
    assert run.step_numbers == [1, 2, 3]
    assert two_ranks == [True]


def test_every_sampler_gets_every_version(many):
    run, loaded, _ = many
    assert [version for version, _ in run.loaded] == [0, 1, 2, 3]
    assert loaded == run.loaded


def test_trainer_and_all_samplers_agree(many):
    run, *_ = many
    assert max(run.values("mismatch/mean_abs_logp_diff")) < 1e-4


# ---- an adapter, which travels alone


@pytest.fixture(scope="module")
def adapted(prepared, generator, tmp_path_factory):
    settings = ("model.lora.r=4", "ray.weight_transport=adapter", *FAST)
    return run_loop(
        prepared, tmp_path_factory.mktemp("adapted") / "run", generator, *SHORT, *settings
    )


def test_an_adapter_that_travels_alone_reaches_the_sampler(adapted, start_digest):
    assert adapted.error is None
    assert adapted.final_digest != start_digest
    assert max(adapted.values("mismatch/mean_abs_logp_diff")) < 1e-4


# ---- nothing to learn, and a world that dies


@pytest.fixture(scope="module")
def still(prepared, generator, tmp_path_factory):
    """Learning rate 0; a world is killed after the first step."""

    def kill_a_world(root, worlds):
        wait_for(lambda: num_logged(root) >= 1)
        assert world_pids()
        [pid, *_] = ray.get(worlds[0].post.actor.pids.remote())
        os.kill(pid, signal.SIGKILL)

    return run_loop(
        prepared,
        tmp_path_factory.mktemp("still") / "run",
        generator,
        "grpo.max_steps=4",
        "grpo.learning_rate=0",
        "grpo.save_steps=2",
        # So that every world is asked in every round.
        "rollout.behaviour.policy=0",
        "ray.num_world_actors=2",
        meanwhile=kill_a_world,
    )


def test_a_learning_rate_of_zero_moves_nothing(still, start_digest):
    assert {weights for _, weights in still.loaded} == {start_digest}
    assert still.final_digest == start_digest


def test_without_learning_the_mismatch_stays_flat(still):
    mismatch = still.values("mismatch/mean_abs_logp_diff")
    assert max(mismatch) < 1e-4
    assert max(mismatch) - min(mismatch) < 1e-5


def test_a_killed_world_does_not_end_the_run(still):
    assert still.error is None
    assert still.step_numbers == [1, 2, 3, 4]


def test_a_killed_world_is_counted_and_replaced(still):
    failed = still.values("health/failed_share")
    assert failed[0] == 0
    assert sum(share > 0 for share in failed) == 1


def test_a_killed_world_is_never_scored(still):
    """Every decision is either a group or a failure: each actor asks its two worlds at a time."""
    for step in still.steps:
        groups, share = step["values"]["rollout/groups"], step["values"]["health/failed_share"]
        failed = share * groups / (1 - share)
        assert failed == pytest.approx(round(failed))
        assert round(groups + failed) % 2 == 0


# ---- one step ahead, and a learner that dies

# A fence at step 3: its checkpoint is what the learner goes on from.
AHEAD = ("rollout.max_staleness=1", "grpo.max_steps=6", "grpo.save_steps=3")
AHEAD_VERSIONS = (0, 0, 1, 3, 3, 4)


@pytest.fixture(scope="module")
def ahead(prepared, generator, tmp_path_factory):
    """Rollout and training overlap; the learner's process is killed behind the fence."""

    def kill_the_learner(root, _):
        wait_for(lambda: num_logged(root) >= 4)
        [pid] = train_worker_pids()
        os.kill(pid, signal.SIGKILL)

    return run_loop(
        prepared,
        tmp_path_factory.mktemp("ahead") / "run",
        generator,
        *AHEAD,
        "grpo.learning_rate=0.002",
        meanwhile=kill_the_learner,
    )


def test_a_loop_that_runs_ahead_reaches_its_last_step_though_its_learner_died(ahead):
    assert ahead.error is None
    assert ahead.step_numbers == [1, 2, 3, 4, 5, 6]


def test_a_step_is_sampled_by_the_version_that_admission_names(ahead):
    staleness = [step - version for step, version in enumerate(AHEAD_VERSIONS)]
    assert ahead.values("staleness/max") == ahead.values("staleness/mean") == staleness


def test_trainer_and_sampler_agree_exactly_where_nothing_is_stale(ahead):
    mismatch = ahead.values("mismatch/mean_abs_logp_diff")
    fresh = {i for i, version in enumerate(AHEAD_VERSIONS) if version == i}
    assert {i for i, difference in enumerate(mismatch) if difference < 1e-4} == fresh


def test_what_was_on_its_way_to_a_killed_learner_is_dropped_and_nothing_else(ahead):
    [*_, last] = ahead.steps
    submitted, trained, dropped, in_flight = (
        last["values"][f"buffer/{what}_groups"]
        for what in ("submitted", "trained", "dropped", "in_flight")
    )
    assert submitted == trained + dropped + in_flight
    assert (dropped > 0, in_flight) == (True, 0)


# ---- an end before the last step


@pytest.fixture(scope="module")
def ended(prepared, generator, tmp_path_factory):
    """Weights that never move are never better; then the same command again."""
    settings = (
        *CHECKED,
        "check.patience=2",
        "grpo.max_steps=6",
        "grpo.learning_rate=0",
        "grpo.save_steps=5",
    )
    root = tmp_path_factory.mktemp("ended") / "run"
    return [run_loop(prepared, root, generator, *settings) for _ in range(2)]


def test_training_ends_when_checks_no_longer_improve(ended):
    assert [run.error for run in ended] == [None, None]
    assert ended[0].step_numbers == [1, 2]


def test_a_resumed_run_does_not_go_on_after_its_end(ended):
    assert [version for version, _ in ended[1].loaded] == [2]
    assert ended[1].step_numbers == [1, 2]


def test_a_resumed_run_checks_no_version_again(ended):
    assert [check["step"] for check in ended[0].checks] == [0, 1, 2]
    assert ended[1].checks == ended[0].checks


def test_an_early_end_leaves_a_model(ended, start_digest):
    assert [run.final_digest for run in ended] == [start_digest] * 2


# ---- something to learn, and a learner that dies


@pytest.fixture(scope="module")
def toy(prepared, generator, tmp_path_factory):
    """Rewarded for the first legal phase; the learner's process is killed on the way.

    Names are by place, for so few steps: to answer A is learnt sooner than to read the first line.
    """

    def kill_the_learner(root, _):
        wait_for(lambda: num_logged(root) >= 6)
        [pid] = train_worker_pids()
        os.kill(pid, signal.SIGKILL)

    def by_place(decision, rng):
        num = len(decision.junction.phases)
        order = rng.sample(range(num), num)
        return renamed(decision, order, [phase_name(i) for i in range(num)]), tuple(order)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rl_ft.asking.retold", by_place)
        return run_loop(
            prepared,
            tmp_path_factory.mktemp("toy") / "run",
            generator,
            *TOY,
            score=first_legal,
            meanwhile=kill_the_learner,
        )


def test_a_killed_learner_goes_on_to_the_last_step(toy):
    assert toy.error is None
    assert toy.step_numbers == list(range(1, TOY_STEPS + 1))


def test_a_killed_learner_goes_on_from_its_checkpoint_and_so_does_the_sampler(toy):
    versions = [version for version, _ in toy.loaded]
    [again] = [i for i in range(1, len(versions)) if versions[i] <= versions[i - 1]]
    version, weights = toy.loaded[again]
    assert version in (4, 8)
    assert dict(toy.loaded[:again])[version] == weights


@pytest.fixture(scope="module")
def hung(prepared, generator, tmp_path_factory):
    """The learner's process stops without ending, once more often than is borne; whose it was."""
    pids = []

    def stop_the_learner(root, _):
        for _ in range(2):
            [pid] = wait_for(lambda: set(train_worker_pids()) - set(pids))
            num = num_logged(root)
            wait_for(lambda num=num: num_logged(root) > num)
            os.kill(pid, signal.SIGSTOP)
            pids.append(pid)

    outcome = run_loop(
        prepared,
        tmp_path_factory.mktemp("hung") / "run",
        generator,
        *("grpo.max_steps=8", "grpo.save_steps=1", "ray.learner_timeout_s=20"),
        "ray.max_failures=1",
        meanwhile=stop_the_learner,
    )
    return outcome, pids


def test_a_learner_that_hangs_is_replaced_and_goes_on(hung):
    outcome, pids = hung
    assert len(pids) == 2
    assert outcome.step_numbers[:2] == [1, 2]


def test_a_learner_that_hangs_is_gone_afterwards(hung):
    _, pids = hung
    wait_for(lambda: not any(map(psutil.pid_exists, pids)), timeout_s=120)


def test_a_learner_that_hangs_too_often_ends_the_run_with_the_cause(hung):
    outcome, _ = hung
    assert isinstance(outcome.error, LearnerError)
    assert "published nothing for 20 s, 2 times" in str(outcome.error)


def test_the_saved_model_is_the_mean_of_the_later_checkpoints(toy):
    stage = toy.root / STAGE
    later = [
        read_folder(stage / "checkpoints" / f"checkpoint-{step}") for step in (24, 28, TOY_STEPS)
    ]
    for name, tensor in read_folder(stage / "model").items():
        mean = torch.stack([weights[name] for weights in later]).mean(0)
        assert torch.allclose(tensor, mean, atol=1e-6)
        assert not torch.equal(tensor, later[-1][name])


def test_a_toy_reward_is_learnt_by_the_real_path(toy):
    earned = toy.values("reward/mean")
    # More than the format was left to learn, which the supervised start knows most of.
    assert earned[0] < toy.values("format/strict_share")[0] - 0.1
    assert min(toy.values("rollout/counterfactual_share")) > 0
    assert sum(earned[-5:]) / 5 > 0.95


# ---- the gate


def run_unsynced(prepared, root, generator, *settings):
    """The sync does nothing, without a word, from the first step on."""
    ray.get(generator.break_after.remote(0))
    try:
        return run_loop(prepared, root, generator, *settings)
    finally:
        ray.get(generator.break_after.remote(None))


@pytest.fixture(scope="module")
def unsynced(prepared, generator, tmp_path_factory):
    return run_unsynced(prepared, tmp_path_factory.mktemp("gate") / "run", generator, *SHORT)


@pytest.fixture(scope="module")
def unsynced_ahead(prepared, generator, tmp_path_factory):
    """The same while rollout and training overlap, where stale rows hide it up to the fence."""
    return run_unsynced(prepared, tmp_path_factory.mktemp("fence") / "run", generator, *AHEAD)


def num_reserved() -> int:
    groups = ray.util.placement_group_table().values()
    return sum(group["state"] != "REMOVED" for group in groups)


def test_a_run_that_is_stopped_gives_back_what_its_learner_held(unsynced_ahead):
    assert unsynced_ahead.error is not None
    wait_for(lambda: not train_worker_pids() and not num_reserved(), timeout_s=120)


def test_a_sync_that_does_nothing_stops_an_overlapping_run_at_the_next_fence(unsynced_ahead):
    assert isinstance(unsynced_ahead.error, ParityError)
    assert unsynced_ahead.error.cause == NO_OP_SYNC
    assert unsynced_ahead.step_numbers == [1, 2, 3]


def test_a_sync_that_does_nothing_stops_the_run_within_one_step(unsynced):
    assert isinstance(unsynced.error, ParityError)
    assert unsynced.step_numbers == [1]


def test_the_cause_of_a_sync_that_does_nothing_is_named(unsynced):
    assert unsynced.error.cause == NO_OP_SYNC


def test_nothing_is_updated_on_groups_of_other_weights(unsynced):
    assert [version for version, _ in unsynced.loaded] == [0, 1]
