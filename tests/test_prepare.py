"""Prepare: the model and the dataset that everything after it stands on."""

from __future__ import annotations

import pytest

from envs.errors import UserError
from rl_ft.dataset import read_lessons, read_manifest, read_states
from rl_ft.prepare import prepare, prepare_model
from rl_ft.question import write_question
from rl_ft.run_folder import RunFolder


def test_a_model_that_is_no_folder_is_one_sentence(data_config, tmp_path):
    model = data_config.model.model_copy(update={"name_or_path": str(tmp_path / "nothing")})
    with pytest.raises(UserError, match="expected 'tiny' or a folder"):
        prepare_model(data_config.model_copy(update={"model": model}), tmp_path / "model")


def test_a_model_folder_is_copied(data_config, tmp_path):
    source = tmp_path / "mine"
    source.mkdir()
    (source / "config.json").write_text("{}")
    model = data_config.model.model_copy(update={"name_or_path": str(source)})
    copied = prepare_model(data_config.model_copy(update={"model": model}), tmp_path / "model")
    assert (copied / "config.json").read_text() == "{}"


def test_a_given_model_is_asked_as_it_was_taught(data_config, tmp_path):
    source = tmp_path / "mine"
    source.mkdir()
    (source / "config.json").write_text("{}")
    taught = data_config.model_copy(update={"decision_format": "extend"})
    write_question(source, taught)
    given = {
        "model": data_config.model.model_copy(update={"name_or_path": str(source)}),
        "prepare": data_config.prepare.model_copy(update={"teachers": ("given",)}),
    }
    with pytest.raises(UserError, match="taught to be asked otherwise: --set decision_format=ext"):
        prepare_model(data_config.model_copy(update=given), tmp_path / "model")
    prepare_model(taught.model_copy(update=given), tmp_path / "model")


def test_prepare_leaves_a_model_and_a_dataset_of_the_size_asked_for(data_config, tmp_path):
    folder = RunFolder(root=tmp_path / "run", config=data_config)
    prepare(data_config, folder)
    asked = data_config.prepare
    assert (folder.path("model") / "config.json").is_file()
    assert len(read_states(folder.path("data"))) == asked.num_states
    for teacher in asked.teachers:
        rows = read_lessons(folder.path("data", f"sft_{teacher}.jsonl"))
        assert len(rows) == asked.num_states * asked.tellings


def test_a_dataset_that_is_there_is_used(data_config, tmp_path):
    first, second = (RunFolder(root=tmp_path / name, config=data_config) for name in "ab")
    prepare(data_config, first)
    given = data_config.prepare.model_copy(update={"dataset": str(first.path("data"))})
    prepare(data_config.model_copy(update={"prepare": given}), second)
    assert read_manifest(second.path("data")) == read_manifest(first.path("data"))
