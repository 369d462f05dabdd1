"""Replay: rows that SUMO repeats pass, rows that it does not are told apart."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from envs.errors import UserError
from rl_ft.dataset import MANIFEST_FILE, read_manifest, write_dataset
from rl_ft.replay import check_dataset, replay


@pytest.fixture(scope="module")
def written(states, data_config, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("replay") / "data"
    write_dataset(directory, states, data_config.prepare.num_eval_states, data_config)
    return directory


def test_what_was_measured_is_measured_again(written):
    replayed = check_dataset(written, num_rows=3, seed=1)
    assert [row.difference for row in replayed] == [None] * 3


def test_an_outcome_that_was_made_up_is_found(written, states):
    action, outcome = next(iter(states[0].outcomes.items()))
    name = states[0].decision.junction.phases[action.phase].name
    invented = {**states[0].outcomes, action: replace(outcome, time_loss_veh_s=1.0)}
    replayed = replay(replace(states[0], outcomes=invented), read_manifest(written))
    assert replayed.difference == f"another outcome of {name}"


def test_another_way_leads_elsewhere(written, states):
    shorter = replace(states[0], way=states[0].way[:-1])
    assert "sees something else" in replay(shorter, read_manifest(written)).difference


def test_a_scenario_that_has_changed_is_named_with_its_rows(written, states, tmp_path):
    directory = Path(shutil.copytree(written, tmp_path / "data"))
    manifest = json.loads((directory / MANIFEST_FILE).read_text())
    manifest["scenarios"] = dict.fromkeys(manifest["scenarios"], "0" * 64)
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"scenario generated:\d+ has changed .*\(row \d+"):
        check_dataset(directory, num_rows=3, seed=1)


def test_another_sumo_is_named(written, tmp_path):
    directory = Path(shutil.copytree(written, tmp_path / "data"))
    manifest = json.loads((directory / MANIFEST_FILE).read_text())
    (directory / MANIFEST_FILE).write_text(json.dumps({**manifest, "sumo": "1.0.0"}))
    with pytest.raises(UserError, match=r"measured by SUMO 1\.0\.0"):
        check_dataset(directory, num_rows=3, seed=1)
