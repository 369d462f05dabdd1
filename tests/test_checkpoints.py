"""Checkpoints: the newest that is as it was written, and no more of them than asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl_ft.checkpoints import SEAL_FILE, admit, checkpoint_steps, latest_checkpoint


def write(folder: Path, step: int, *, keep: int = 10) -> Path:
    aside = folder / ".incomplete" / f"checkpoint-{step}"
    aside.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt"):
        (aside / name).write_bytes(f"{name} of {step}".encode())
    admit(aside, folder / aside.name, keep=keep)
    return folder / aside.name


@pytest.fixture
def folder(tmp_path):
    for step in (9, 10):
        write(tmp_path, step)
    return tmp_path


def test_the_latest_has_the_highest_step(folder):
    assert latest_checkpoint(folder) == folder / "checkpoint-10"


@pytest.mark.parametrize("absent", ["nothing", "."])
def test_without_any_there_is_none(tmp_path, absent):
    assert latest_checkpoint(tmp_path / absent) is None


@pytest.mark.parametrize("name", [".incomplete/checkpoint-11", "checkpoint-11.old"])
def test_what_was_not_finished_is_none(folder, name):
    (folder / name).mkdir(parents=True)
    assert latest_checkpoint(folder) == folder / "checkpoint-10"


def flip(file):
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(bytes(data))


def cut(file):
    file.write_bytes(file.read_bytes()[:-2])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", SEAL_FILE])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink], ids=["flipped", "cut", "gone"])
def test_a_damaged_one_is_passed_over_and_named(folder, name, damage, caplog):
    damage(folder / "checkpoint-10" / name)
    assert latest_checkpoint(folder) == folder / "checkpoint-9"
    assert "checkpoint-10 is passed over" in caplog.text
    assert name in caplog.text


def test_where_all_are_damaged_there_is_none(folder):
    for step in (9, 10):
        flip(folder / f"checkpoint-{step}" / "model.safetensors")
    assert latest_checkpoint(folder) is None


def test_no_more_stay_than_asked_for(tmp_path):
    for step in (8, 9, 10, 11):
        write(tmp_path, step, keep=2)
    assert checkpoint_steps(tmp_path) == [10, 11]


def test_one_that_is_written_again_replaces_the_old_one(folder):
    flip(folder / "checkpoint-10" / "model.safetensors")
    write(folder, 10)
    assert latest_checkpoint(folder) == folder / "checkpoint-10"
