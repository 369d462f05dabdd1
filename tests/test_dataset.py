"""Dataset: what is read is what was written, or an error that names file and row."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from lesson_case import vouch

from envs.errors import UserError
from envs.scenario import load_scenario
from rl_ft.config import Config
from rl_ft.dataset import (
    GRPO_FILE,
    MANIFEST_FILE,
    adopt_dataset,
    read_everything,
    read_lessons,
    read_manifest,
    read_states,
    write_dataset,
)
from rl_ft.lessons import lessons
from rl_ft.states import collect_states


@pytest.fixture(scope="module")
def written(states, data_config, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("dataset") / "data"
    write_dataset(directory, states, data_config.prepare.num_eval_states, data_config)
    return directory


@pytest.fixture
def dataset(written, tmp_path) -> Path:
    """One that may be broken."""
    return Path(shutil.copytree(written, tmp_path / "data"))


def change_row(directory: Path, name: str, number: int, **values) -> None:
    lines = (directory / name).read_text().splitlines()
    lines[number - 1] = json.dumps({**json.loads(lines[number - 1]), **values})
    (directory / name).write_text("\n".join(lines) + "\n")
    vouch(directory / name)


def test_states_are_read_as_they_were_written(written, states, data_config):
    num = data_config.prepare.num_states
    assert read_states(written) == states[:num]


def test_lessons_are_read_as_they_were_written(written, states, data_config):
    prepare = data_config.prepare
    for teacher in prepare.teachers:
        rows = [
            row.model_dump(mode="json") for row in read_lessons(written / f"sft_{teacher}.jsonl")
        ]
        assert rows == [
            row
            for state in states[: prepare.num_states]
            for row in lessons(state, teacher, data_config, num=prepare.tellings)
        ]


def test_lessons_may_be_about_fewer_states_than_the_rows(states, data_config, tmp_path):
    few = data_config.prepare.model_copy(update={"num_lesson_states": 2})
    config = data_config.model_copy(update={"prepare": few})
    write_dataset(tmp_path / "data", states, few.num_eval_states, config)
    taught = {row.id for row in read_lessons(tmp_path / "data" / "sft_max_pressure.jsonl")}
    assert taught == {state.id for state in read_states(tmp_path / "data")[:2]}
    assert len(read_states(tmp_path / "data")) == few.num_states


def test_nobody_trains_on_the_states_that_are_held_back(written, data_config):
    trained = {row.id for row in read_lessons(written / "sft_max_pressure.jsonl")}
    judged = {row.id for row in read_lessons(written / "eval_max_pressure.jsonl")}
    assert len(judged) == data_config.prepare.num_eval_states
    assert not trained & judged


@pytest.mark.parametrize("name", ["grpo", "sft_max_pressure", "sft_lookahead"])
def test_the_array_holds_the_rows_of_the_lines(written, name):
    lines = (written / f"{name}.jsonl").read_text().splitlines()
    assert json.loads((written / f"{name}.json").read_text()) == [json.loads(x) for x in lines]


def test_the_manifest_says_where_the_rows_come_from(written, states, data_config):
    manifest = read_manifest(written)
    assert manifest.seed == data_config.seed
    assert set(manifest.scenarios) == {state.decision.scenario for state in states}
    assert {f.name for f in written.iterdir()} == {*manifest.files, MANIFEST_FILE}


def test_the_same_states_give_the_same_bytes(written, states, data_config, tmp_path):
    write_dataset(tmp_path / "again", states, data_config.prepare.num_eval_states, data_config)
    assert read_manifest(tmp_path / "again") == read_manifest(written)


def test_a_cut_line_is_named(dataset):
    text = (dataset / GRPO_FILE).read_text()
    (dataset / GRPO_FILE).write_text(text[:-40])
    num = len(text.splitlines())
    with pytest.raises(UserError, match=rf"{GRPO_FILE}, row {num}: .*EOF"):
        read_states(dataset)


def test_missing_rows_are_counted(dataset):
    lines = (dataset / GRPO_FILE).read_text().splitlines(keepends=True)
    (dataset / GRPO_FILE).write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=f"ends after row {len(lines) - 1}, .* {len(lines)} rows"):
        read_states(dataset)


def test_a_changed_file_is_named(dataset):
    file = dataset / "sft_lookahead.jsonl"
    file.write_text(file.read_text().replace("q1", "q2", 1))
    with pytest.raises(UserError, match=r"sft_lookahead\.jsonl is not what was written"):
        read_lessons(file)


def test_another_schema_version_is_named(dataset):
    file = dataset / MANIFEST_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema_version": 7}))
    with pytest.raises(UserError, match=r"schema version 7, this rl-ft reads version 1.*prepare"):
        read_states(dataset)


def test_a_manifest_that_is_none_is_named(dataset):
    (dataset / MANIFEST_FILE).write_text("[]")
    with pytest.raises(UserError, match="is not a dataset's manifest"):
        read_states(dataset)


def test_a_folder_without_a_dataset_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no dataset"):
        read_states(tmp_path)


def test_an_empty_dataset_is_named(dataset):
    (dataset / GRPO_FILE).write_text("")
    vouch(dataset / GRPO_FILE)
    with pytest.raises(UserError, match=rf"{GRPO_FILE} holds no rows"):
        read_states(dataset)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_outcome_that_is_no_number_is_named_with_its_row(dataset, number):
    row = json.loads((dataset / GRPO_FILE).read_text().splitlines()[1])
    row["candidates"][0]["outcome"]["time_loss_veh_s"] = number
    change_row(dataset, GRPO_FILE, 2, candidates=row["candidates"])
    with pytest.raises(UserError, match=r"row 2: candidates\.0\.outcome\.time_loss_veh_s"):
        read_states(dataset)


def test_an_outcome_that_is_no_number_is_not_written_over_what_is_there(
    dataset, states, data_config
):
    before = {file.name: file.read_bytes() for file in dataset.iterdir()}
    last = states[-1]
    action, outcome = next(iter(last.outcomes.items()))
    outcomes = {**last.outcomes, action: replace(outcome, time_loss_veh_s=float("nan"))}
    broken = [*states[:-1], replace(last, outcomes=outcomes)]
    with pytest.raises(UserError, match=rf"row {len(states)} for {GRPO_FILE}.*no number"):
        write_dataset(dataset, broken, data_config.prepare.num_eval_states, data_config)
    assert {file.name: file.read_bytes() for file in dataset.iterdir()} == before


def test_a_name_that_nobody_knows_is_named_with_its_row(dataset):
    change_row(dataset, "sft_max_pressure.jsonl", 3, mood="fine")
    with pytest.raises(UserError, match=r"sft_max_pressure\.jsonl, row 3: mood"):
        read_lessons(dataset / "sft_max_pressure.jsonl")


def test_a_dataset_is_adopted_as_it_is(dataset, data_config, tmp_path):
    (dataset / "notes.txt").write_text("mine")
    adopt_dataset(dataset, tmp_path / "mine", data_config)
    copied = {file.name: file.read_bytes() for file in (tmp_path / "mine").iterdir()}
    assert copied == {name: (dataset / name).read_bytes() for name in copied}
    assert copied.keys() == {*read_manifest(dataset).files, MANIFEST_FILE}


def test_a_broken_dataset_is_not_adopted(dataset, data_config, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").write_text("")
    change_row(dataset, "eval_lookahead.jsonl", 1, id=None)
    with pytest.raises(UserError, match=r"eval_lookahead\.jsonl, row 1: id"):
        adopt_dataset(dataset, tmp_path / "mine", data_config)
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["kept"]


def test_lessons_without_rows_are_not_adopted(dataset, data_config, tmp_path):
    (dataset / "sft_max_pressure.jsonl").write_text("")
    vouch(dataset / "sft_max_pressure.jsonl")
    manifest = json.loads((dataset / MANIFEST_FILE).read_text())
    manifest["files"]["sft_max_pressure.jsonl"]["rows"] = 0
    (dataset / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="no lessons of max_pressure"):
        adopt_dataset(dataset, tmp_path / "mine", data_config)


def test_a_dataset_whose_network_has_changed_since_is_not_adopted(data_config, tmp_path):
    city = load_scenario("generated:1")
    routes = tmp_path / "my.rou.xml"
    shutil.copy(city.route_files[0], routes)
    scenario = f"{city.net_file},{routes}"
    content = data_config.model_dump()
    content["scenarios"]["train"] = [scenario]
    content["prepare"] |= {"num_states": 3, "num_eval_states": 1, "states_per_episode": 8}
    config = Config.model_validate(content)
    write_dataset(tmp_path / "data", collect_states(config), 1, config)
    adopt_dataset(tmp_path / "data", tmp_path / "first", config)
    routes.write_text(routes.read_text().replace('probability="0.', 'probability="0.0'))
    with pytest.raises(
        UserError, match=r"my\.rou\.xml has changed since its rows in .*grpo\.jsonl"
    ):
        adopt_dataset(tmp_path / "data", tmp_path / "second", config)
    assert not (tmp_path / "second").exists()


def test_outcomes_of_another_horizon_are_refused(dataset, data_config, tmp_path):
    reward = data_config.reward.model_copy(update={"horizon_s": 45.0})
    with pytest.raises(UserError, match=r"made with reward\.horizon_s 20.*wanted is 45"):
        adopt_dataset(dataset, tmp_path / "mine", data_config.model_copy(update={"reward": reward}))


@pytest.mark.parametrize(
    ("update", "complaint"),
    [
        ({"decision_format": "extend"}, "decision_format phase, wanted is extend"),
        ({"model": {"instructions": True}}, "model.instructions False, wanted is True"),
        ({"prepare": {"lookahead_temperature_veh_s": 1.0}}, "lookahead_temperature_veh_s 6.0"),
    ],
    ids=["format", "instructions", "temperature"],
)
def test_a_dataset_that_does_not_fit_is_refused(dataset, data_config, tmp_path, update, complaint):
    content = data_config.model_dump()
    for key, value in update.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=complaint):
        adopt_dataset(dataset, tmp_path / "mine", Config.model_validate(content))
    assert not (tmp_path / "mine").exists()


def test_nobody_is_judged_on_what_the_rows_are_about(dataset, data_config, tmp_path):
    name = next(iter(read_manifest(dataset).scenarios))
    scenarios = data_config.scenarios.model_copy(update={"held_out": (f"{name}@15",)})
    config = data_config.model_copy(update={"scenarios": scenarios})
    with pytest.raises(UserError, match=f"rows of {name}, on which models are chosen"):
        adopt_dataset(dataset, tmp_path / "mine", config)


def test_lessons_that_are_not_there_are_named(dataset, data_config, tmp_path):
    manifest = json.loads((dataset / MANIFEST_FILE).read_text())
    del manifest["files"]["sft_lookahead.jsonl"]
    (dataset / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="no lessons of lookahead"):
        adopt_dataset(dataset, tmp_path / "mine", data_config)


@pytest.mark.parametrize("name", ["grpo.json", "sft_lookahead.json", "eval_lookahead.jsonl"])
def test_every_file_counts(dataset, name):
    file = dataset / name
    file.write_text(file.read_text().replace("generated", "invented", 1))
    with pytest.raises(UserError, match=f"{name} is not what was written"):
        read_everything(dataset, read_manifest(dataset))


def test_a_row_without_one_of_its_answers_is_named(dataset):
    row = json.loads((dataset / GRPO_FILE).read_text().splitlines()[2])
    change_row(dataset, GRPO_FILE, 3, candidates=row["candidates"][1:])
    with pytest.raises(UserError, match=r"row 3: expected .* legal answers"):
        read_states(dataset)


def test_a_row_about_a_junction_that_nobody_knows_is_named(dataset):
    change_row(dataset, GRPO_FILE, 2, junction="nowhere")
    with pytest.raises(UserError, match=r"row 2: junctions\.json knows no junction nowhere"):
        read_states(dataset)


def test_text_in_the_place_of_a_number_is_named(dataset):
    change_row(dataset, GRPO_FILE, 1, seed="7")
    with pytest.raises(UserError, match="row 1: seed"):
        read_states(dataset)


def test_bytes_that_are_no_text_are_named(dataset):
    (dataset / GRPO_FILE).write_bytes(b"\xff\n")
    with pytest.raises(UserError, match=f"{GRPO_FILE} is not readable"):
        read_states(dataset)


def test_junctions_that_are_none_are_named(dataset):
    (dataset / "junctions.json").write_text("[]")
    vouch(dataset / "junctions.json")
    with pytest.raises(UserError, match="does not hold junctions"):
        read_states(dataset)


def test_a_run_folder_is_not_taken_for_a_dataset(tmp_path):
    (tmp_path / MANIFEST_FILE).write_text('{"starts": []}')
    with pytest.raises(UserError, match="a dataset is the folder data of a run"):
        read_states(tmp_path)
