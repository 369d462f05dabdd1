from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest

from envs.errors import UserError
from rl_ft import run_folder as module
from rl_ft.pipeline import STAGES
from rl_ft.recipe import load_config, read_config
from rl_ft.run_folder import STAGE_SECTIONS, RunFolder, run_id, stage_hash, write_atomically


@pytest.fixture
def config():
    return load_config("smoke")


def started(path, config, **kwargs):
    folder = RunFolder.create(path, config, resume=False, **kwargs)
    folder.finish("finished")
    return folder


def test_a_new_folder_says_what_the_run_was_told(run_folder):
    assert read_config(run_folder.root / "config.yaml") == run_folder.config


def test_the_manifest_tells_what_made_the_run(run_folder):
    manifest = json.loads((run_folder.root / "manifest.json").read_text())
    (start,) = manifest["starts"]
    assert manifest["seed"] == run_folder.config.seed
    assert manifest["evaluation_seeds"] == [1, 2]
    assert start["versions"]["eclipse-sumo"] == start["sumo"]
    assert start["python"] == ".".join(map(str, sys.version_info[:3]))
    assert start["machine"]["cores"] >= 1
    assert start["machine"]["memory_gib"] > 0
    assert start["command"] == sys.argv


def test_the_manifest_tells_how_each_start_ended(tmp_path, config):
    started(tmp_path / "run", config)
    again = RunFolder.create(tmp_path / "run", config, resume=True)
    again.finish("interrupted")
    starts = json.loads((tmp_path / "run" / "manifest.json").read_text())["starts"]
    assert [start["ending"] for start in starts] == ["finished", "interrupted"]
    assert all(start["start"] <= start["end"] for start in starts)


def test_a_stage_is_done_when_it_is_marked(run_folder):
    assert not run_folder.stage_done("prepare")
    run_folder.mark_done("prepare")
    assert run_folder.stage_done("prepare")
    assert not run_folder.stage_done("sft")


def test_part_of_a_stage_is_marked_on_its_own(run_folder):
    run_folder.mark_done("grpo/lookahead")
    assert run_folder.stage_done("grpo/lookahead")
    assert not run_folder.stage_done("grpo/max_pressure")


def test_a_run_is_known_by_the_same_name_when_it_goes_on(tmp_path, config):
    known = set()
    for resume in (False, True):
        RunFolder.create(tmp_path / "run", config, resume=resume).finish("finished")
        known.add(run_id(tmp_path / "run"))
    assert len(known) == 1
    assert known != {None}
    RunFolder.create(tmp_path / "other", config, resume=False)
    assert run_id(tmp_path / "other") not in known


def test_stages_and_their_sections_are_the_same_list():
    assert list(STAGES) == list(STAGE_SECTIONS)


def test_a_stage_depends_on_what_decides_its_result(config):
    other = load_config("smoke", ["evaluate.seeds=3"])
    assert stage_hash(config, "grpo") == stage_hash(other, "grpo")
    assert stage_hash(config, "evaluate") != stage_hash(other, "evaluate")


def test_a_stage_done_under_another_configuration_is_not_taken_for_done(run_folder):
    run_folder.mark_done("sft")
    other = RunFolder(root=run_folder.root, config=load_config("smoke", ["sft.weight_decay=0.5"]))
    with pytest.raises(UserError, match=r"sft in .* under another configuration"):
        other.stage_done("sft")


def test_a_path_lies_in_a_folder_that_exists(run_folder):
    assert run_folder.path() == run_folder.root
    assert run_folder.path("sft", "lookahead").parent.is_dir()


def test_a_started_run_is_not_started_again(tmp_path, config):
    started(tmp_path / "run", config).mark_done("prepare")
    with pytest.raises(UserError, match=r"\(stages done: prepare\); pass --resume"):
        RunFolder.create(tmp_path / "run", config, resume=False)


def test_a_folder_with_other_files_is_left_alone(tmp_path, config):
    (tmp_path / "thesis.tex").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UserError, match=r"found .*thesis.tex"):
            RunFolder.create(tmp_path, config, resume=resume)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_run_folder(tmp_path, config):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(tmp_path / "run", config, resume=False)


def test_there_is_nothing_to_resume_in_a_new_folder(tmp_path, config):
    with pytest.raises(UserError, match=r"expected a run in .* found nothing"):
        RunFolder.create(tmp_path / "run", config, resume=True)
    assert not (tmp_path / "run").exists()


def test_resuming_with_another_configuration_names_the_keys(tmp_path, config):
    started(tmp_path / "run", config)
    other = load_config("smoke", ["grpo.max_steps=9", "seed=2"])
    with pytest.raises(UserError, match=r"seed \(was 1, now 2\), grpo.max_steps \(was 2, now 9\)"):
        RunFolder.create(tmp_path / "run", other, resume=True)


def test_a_run_may_be_resumed_on_a_machine_with_other_resources(tmp_path, config):
    started(tmp_path / "run", config)
    other = load_config("smoke", ["ray.num_cpus=16"])
    RunFolder.create(tmp_path / "run", other, resume=True).finish("finished")
    assert read_config(tmp_path / "run" / "config.yaml") == other


def test_a_half_written_configuration_is_named(tmp_path, config):
    folder = started(tmp_path / "run", config)
    (folder.root / "config.yaml").write_text("grpo: {max_st")
    with pytest.raises(UserError, match=r"cannot be resumed: .* not valid YAML"):
        RunFolder.create(tmp_path / "run", config, resume=True)


def test_a_run_that_died_before_its_manifest_can_be_resumed(tmp_path, config):
    folder = started(tmp_path / "run", config)
    (folder.root / "manifest.json").unlink()
    RunFolder.create(tmp_path / "run", config, resume=True).finish("finished")
    assert (folder.root / "manifest.json").is_file()


def test_two_processes_cannot_use_one_folder(run_folder):
    code = (
        "import sys\n"
        "from rl_ft.recipe import load_config\n"
        "from rl_ft.run_folder import RunFolder\n"
        "RunFolder.create(sys.argv[1], load_config('smoke'), resume=True)\n"
    )
    command = [sys.executable, "-c", code, str(run_folder.root)]
    other = subprocess.run(command, capture_output=True, text=True)
    assert other.returncode != 0
    assert "in use by another run" in other.stderr


def test_the_lock_ends_with_the_run(tmp_path, config):
    started(tmp_path / "run", config)
    RunFolder.create(tmp_path / "run", config, resume=True).finish("finished")


def test_a_folder_travels_to_other_processes_without_its_lock(run_folder):
    copy = pickle.loads(pickle.dumps(run_folder))
    copy.mark_done("sft")
    assert run_folder.stage_done("sft")


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_atomically(file, "old")

    def full_disk(fd):
        raise OSError("no space left")

    monkeypatch.setattr(module.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomically(file, "new")
    assert file.read_text() == "old"


def test_the_commit_is_unknown_outside_a_source_tree(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "rl_ft" / "run_folder.py"))
    assert module.git_commit() is None


def test_an_image_says_from_which_commit_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "rl_ft" / "run_folder.py"))
    monkeypatch.setenv("RLFT_GIT_COMMIT", "0123abc")
    assert module.git_commit() == "0123abc"
