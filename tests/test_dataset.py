"""Dataset: every row is a state that was asked for, with answers that are legal and measured."""

from __future__ import annotations

import json
import math
import os
import re

import pytest

from envs.errors import UserError
from rl_ft.config import Config
from rl_ft.dataset import collect_states, prepare, prepare_model, soften
from rl_ft.run_folder import RunFolder

NUM_STATES, NUM_EVAL, TELLINGS = 6, 2, 3


@pytest.fixture(scope="module")
def config(smoke_config) -> Config:
    small = {
        "num_states": NUM_STATES,
        "num_eval_states": NUM_EVAL,
        "states_per_episode": 10,
        "tellings": TELLINGS,
        "teachers": ("max_pressure", "lookahead"),
    }
    return smoke_config.model_copy(
        update={
            "prepare": smoke_config.prepare.model_copy(update=small),
            "reward": smoke_config.reward.model_copy(update={"horizon_s": 20.0}),
        }
    )


@pytest.fixture(scope="module")
def states(config):
    return collect_states(config)


@pytest.fixture(scope="module")
def rows(states):
    return [row for tellings in states for row in tellings]


def test_there_are_as_many_states_as_were_asked_for(states):
    assert len(states) == NUM_STATES + NUM_EVAL
    assert len({first["id"] for first, *_ in states}) == len(states)


def test_the_tellings_of_a_state_differ_in_names_only(states):
    for tellings in states:
        assert len(tellings) == TELLINGS
        [_] = {row["id"] for row in tellings}
        assert len({tuple(sorted(row["cost_veh_s"].values())) for row in tellings}) == 1
        for row in tellings:
            bare = [line.split(" choose ") for line in text_of(row).splitlines()]
            first = [line.split(" choose ") for line in text_of(tellings[0]).splitlines()]
            costs = {line[0]: row["cost_veh_s"][line[1]] for line in bare if len(line) > 1}
            assert costs == {
                line[0]: tellings[0]["cost_veh_s"][line[1]] for line in first if len(line) > 1
            }
            assert sorted(line[0] for line in bare) == sorted(line[0] for line in first)


def test_some_state_is_told_in_another_order(states):
    assert any(len({text_of(row) for row in tellings}) > 1 for tellings in states)


def text_of(row):
    return row["messages"][-1]["content"]


def test_every_cost_is_finite_and_belongs_to_a_legal_phase(rows):
    for row in rows:
        names = re.findall(r"choose ([A-Z]+)$", text_of(row), re.MULTILINE)
        assert list(row["cost_veh_s"]) == names
        assert row["legal_answers"] == [json.dumps({"phase": name}) for name in names]
        assert len(names) > 1
        assert all(math.isfinite(cost) and cost >= 0 for cost in row["cost_veh_s"].values())


def test_both_teachers_answer_legally_and_lookahead_answers_the_cheapest(rows):
    for row in rows:
        assert set(row["answers"].values()) <= set(row["legal_answers"])
        costs = row["cost_veh_s"]
        assert costs[json.loads(row["answers"]["lookahead"])["phase"]] == min(costs.values())


def test_same_seed_gives_the_same_rows_however_many_work(states, config, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert collect_states(config) == states


def test_another_seed_gives_other_rows(rows, config):
    other = collect_states(config.model_copy(update={"seed": config.seed + 1}))
    assert not {row["id"] for row in rows} & {first["id"] for first, *_ in other}


def test_scenarios_that_are_too_quiet_are_the_users_mistake(config):
    quiet = config.prepare.model_copy(update={"min_queue_veh": 500})
    with pytest.raises(UserError, match="gave 0 decision states"):
        collect_states(config.model_copy(update={"prepare": quiet}))


def test_a_model_that_is_no_folder_is_one_sentence(config, tmp_path):
    model = config.model.model_copy(update={"name_or_path": str(tmp_path / "nothing")})
    with pytest.raises(UserError, match="expected 'tiny' or a folder"):
        prepare_model(config.model_copy(update={"model": model}), tmp_path / "model")


def test_a_model_folder_is_copied(config, tmp_path):
    source = tmp_path / "mine"
    source.mkdir()
    (source / "config.json").write_text("{}")
    model = config.model.model_copy(update={"name_or_path": str(source)})
    copied = prepare_model(config.model_copy(update={"model": model}), tmp_path / "model")
    assert (copied / "config.json").read_text() == "{}"


def lookahead_answers(costs, temperature_veh_s, times=400):
    row = {
        "cost_veh_s": costs,
        "legal_answers": list(costs),
        "answers": {"lookahead": "?", "max_pressure": "C"},
    }
    drawn = soften([row] * times, temperature_veh_s, seed=1)
    assert drawn == soften([row] * times, temperature_veh_s, seed=1)
    assert all(row["answers"]["max_pressure"] == "C" for row in drawn)
    return [row["answers"]["lookahead"] for row in drawn]


def test_lookahead_insists_where_the_choice_matters():
    assert set(lookahead_answers({"A": 900.0, "B": 100.0}, 10.0)) == {"B"}


def test_lookahead_leaves_open_what_costs_the_same():
    answers = lookahead_answers({"A": 100.0, "B": 100.0}, 10.0)
    assert 150 < answers.count("A") < 250


def test_lookahead_is_followed_as_the_temperature_says():
    answers = lookahead_answers({"A": 110.0, "B": 100.0}, 10.0)
    assert answers.count("A") / len(answers) == pytest.approx(1 / (1 + math.e), abs=0.06)


def test_prepare_writes_the_rows_of_each_teacher_and_the_model(
    states, rows, config, tmp_path, monkeypatch
):
    monkeypatch.setattr("rl_ft.dataset.collect_states", lambda _: states)
    folder = RunFolder.create(tmp_path / "run", config, resume=False)
    prepare(config, folder)
    for teacher in config.prepare.teachers:
        written = {}
        for name in ("sft", "eval"):
            lines = folder.path("data").joinpath(f"{name}_{teacher}.jsonl").read_text().splitlines()
            written[name] = [json.loads(line) for line in lines]
        assert [row["id"] for row in written["sft"]] == [
            row["id"] for row in rows[: NUM_STATES * TELLINGS]
        ]
        assert [row["answer"] for row in written["eval"]] == [
            first["answers"][teacher] for first, *_ in states[NUM_STATES:]
        ]
        assert all(row["answer"] in row["legal_answers"] for row in written["sft"])
        assert all("answers" not in row for row in written["sft"])
    assert (folder.path("model") / "config.json").is_file()
    folder.finish("finished")
