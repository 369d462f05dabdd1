"""Dataset: every row is a state that was asked for, with answers that are legal and measured."""

from __future__ import annotations

import json
import math
import os
import re

import pytest

from envs.errors import UserError
from rl_ft.config import Config
from rl_ft.dataset import by_worth, collect_rows, prepare, prepare_model
from rl_ft.run_folder import RunFolder

NUM_STATES, NUM_EVAL = 6, 2


@pytest.fixture(scope="module")
def config(smoke_config) -> Config:
    small = {
        "num_states": NUM_STATES,
        "num_eval_states": NUM_EVAL,
        "states_per_episode": 10,
        "teachers": ("max_pressure", "lookahead"),
    }
    return smoke_config.model_copy(
        update={
            "prepare": smoke_config.prepare.model_copy(update=small),
            "reward": smoke_config.reward.model_copy(update={"horizon_s": 20.0}),
        }
    )


@pytest.fixture(scope="module")
def rows(config):
    return collect_rows(config)


def test_there_are_as_many_rows_as_were_asked_for(rows):
    assert len(rows) == NUM_STATES + NUM_EVAL
    assert len({row["id"] for row in rows}) == len(rows)


def test_every_cost_is_finite_and_belongs_to_a_legal_phase(rows):
    for row in rows:
        names = re.findall(r"choose ([A-Z]+)$", row["messages"][-1]["content"], re.MULTILINE)
        assert list(row["cost_veh_s"]) == names
        assert row["legal_answers"] == [json.dumps({"phase": name}) for name in names]
        assert len(names) > 1
        assert all(math.isfinite(cost) and cost >= 0 for cost in row["cost_veh_s"].values())


def test_both_teachers_answer_legally_and_lookahead_answers_the_cheapest(rows):
    for row in rows:
        assert set(row["answers"].values()) <= set(row["legal_answers"])
        costs = row["cost_veh_s"]
        assert costs[json.loads(row["answers"]["lookahead"])["phase"]] == min(costs.values())


def test_same_seed_gives_the_same_rows_however_many_work(rows, config, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert collect_rows(config) == rows


def test_another_seed_gives_other_rows(rows, config):
    other = collect_rows(config.model_copy(update={"seed": config.seed + 1}))
    assert not {row["id"] for row in rows} & {row["id"] for row in other}


def test_scenarios_that_are_too_quiet_are_the_users_mistake(config):
    quiet = config.prepare.model_copy(update={"min_queue_veh": 500})
    with pytest.raises(UserError, match="gave 0 decision states"):
        collect_rows(config.model_copy(update={"prepare": quiet}))


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


def test_lessons_are_drawn_where_the_choice_matters():
    rows = [
        {"id": "idle", "cost_veh_s": {"A": 10.0, "B": 10.0}},
        {"id": "busy", "cost_veh_s": {"A": 10.0, "B": 810.0}},
    ]
    drawn = [row["id"] for row in by_worth(rows * 200, seed=1)]
    assert len(drawn) == 400
    assert drawn.count("busy") > 380
    assert drawn == [row["id"] for row in by_worth(rows * 200, seed=1)]


def test_prepare_writes_the_rows_of_each_teacher_and_the_model(rows, config, tmp_path, monkeypatch):
    monkeypatch.setattr("rl_ft.dataset.collect_rows", lambda _: rows)
    folder = RunFolder.create(tmp_path / "run", config, resume=False)
    prepare(config, folder)
    for teacher in config.prepare.teachers:
        written = []
        for name, expected in (("sft", NUM_STATES), ("eval", NUM_EVAL)):
            lines = folder.path("data").joinpath(f"{name}_{teacher}.jsonl").read_text().splitlines()
            assert len(lines) == expected
            written += map(json.loads, lines)
        by_id = {row["id"]: row for row in rows}
        assert all(row["answer"] == by_id[row["id"]]["answers"][teacher] for row in written)
        if teacher == "max_pressure":
            assert [row["id"] for row in written] == list(by_id)
        assert all("answers" not in row for row in written)
    assert (folder.path("model") / "config.json").is_file()
    folder.finish("finished")
