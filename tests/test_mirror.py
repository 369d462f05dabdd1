"""A copy of a run folder is whole, not larger than it must be, and comes back as it was sent."""

from __future__ import annotations

import json
import threading

import pytest

from envs.errors import UserError
from rl_ft import mirror
from rl_ft.mirror import Copier, Mirror

FILES = {
    "config.yaml": "seed: 1",
    "grpo/x/checkpoints/checkpoint-2/model.safetensors": "weights of 2",
    "grpo/x/memory/2.json": "{}",
    "metrics.jsonl": "a line\n",
}
LOCAL = {".lock": "12", "grpo/x/ray/state.json": "here", "grpo/x/checkpoints/.incomplete/m": "half"}


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    place = tmp_path / "far"
    return f"file://{place}" if request.param == "file" else f"memory://{tmp_path.name}"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    for name, text in (FILES | LOCAL).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def content(folder):
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_text() for file in files}


def stored(copies, place):
    return {name.rsplit("/", 1)[1] for name, _ in copies._sizes(place)}


def test_what_was_sent_comes_back_and_nothing_of_one_machine(url, run, tmp_path):
    Mirror(url).push(run)
    Mirror(url).pull(tmp_path / "again")
    assert content(tmp_path / "again") == FILES


@pytest.mark.parametrize("in_memory_bytes", [0, 2**20])
def test_the_newest_copy_comes_back(url, run, tmp_path, monkeypatch, in_memory_bytes):
    monkeypatch.setattr(mirror, "IN_MEMORY_BYTES", in_memory_bytes)
    copies = Mirror(url)
    copies.push(run)
    (run / "metrics.jsonl").write_text("a line\nanother\n")
    copies.push(run)
    Mirror(url).pull(tmp_path / "again")
    assert (tmp_path / "again" / "metrics.jsonl").read_text() == "a line\nanother\n"


def test_what_has_not_changed_is_not_sent_again(url, run, monkeypatch):
    copies = Mirror(url)
    copies.push(run)
    before = stored(copies, "blobs")
    (run / "metrics.jsonl").write_text("a line\nanother\n")
    sent = []
    pipe_file = type(copies._fs).pipe_file

    def counted(self, path, value, **rest):
        sent.append(path)
        return pipe_file(self, path, value, **rest)

    monkeypatch.setattr(type(copies._fs), "pipe_file", counted)
    copies.push(run)
    assert len(sent) == 2  # the file and the manifest
    assert len(stored(copies, "blobs") - before) == 1


def test_old_copies_and_what_only_they_hold_are_forgotten(url, run):
    copies = Mirror(url, keep=1)
    copies.push(run)
    (run / "metrics.jsonl").write_text("other lines\n")
    copies.push(run)
    assert stored(copies, "manifests") == {"2.json"}
    assert len(stored(copies, "blobs")) == len(FILES)


def test_a_copy_that_was_cut_short_is_passed_over_for_the_one_before(url, run, tmp_path, caplog):
    copies = Mirror(url)
    copies.push(run)
    (run / "metrics.jsonl").write_text("a line\nanother\n")
    before = stored(copies, "blobs")
    copies.push(run)
    [new] = stored(copies, "blobs") - before
    copies._fs.pipe_file(copies._blob(new), b"a li")
    Mirror(url).pull(tmp_path / "again")
    assert content(tmp_path / "again") == FILES
    assert "copy 2 is not whole: metrics.jsonl is not as it was sent" in caplog.text


def test_a_blob_that_was_cut_short_is_sent_again(url, run, tmp_path):
    copies = Mirror(url)
    copies.push(run)
    for name in stored(copies, "blobs"):
        copies._fs.pipe_file(copies._blob(name), b"")
    copies.push(run)
    Mirror(url).pull(tmp_path / "again")
    assert content(tmp_path / "again") == FILES


def test_a_file_that_vanishes_meanwhile_is_left_out(url, run, tmp_path, monkeypatch):
    files = mirror._files

    def vanishing(folder):
        for file in list(files(folder)):
            if file.name == "model.safetensors":
                file.unlink(missing_ok=True)
            yield file

    monkeypatch.setattr(mirror, "_files", vanishing)
    Mirror(url).push(run)
    Mirror(url).pull(tmp_path / "again")
    assert len(content(tmp_path / "again")) == len(FILES) - 1


@pytest.mark.parametrize("name", ["../escaped", "a/../../escaped", "/tmp/escaped"])
def test_a_copy_that_wants_to_be_elsewhere_is_not_pulled(url, run, tmp_path, name):
    copies = Mirror(url)
    copies.push(run)
    files = json.loads(copies._fs.cat_file(copies._manifest(1)))
    files[name] = next(iter(files.values()))
    copies._fs.pipe_file(copies._manifest(1), json.dumps(files).encode())
    with pytest.raises(UserError, match="is no file of a run folder"):
        Mirror(url).pull(tmp_path / "place" / "again")
    assert not (tmp_path / "place" / "again").exists()
    assert not list(tmp_path.rglob("escaped"))


def test_a_copy_that_the_storage_did_not_take_is_none(url, run, monkeypatch):
    copies = Mirror(url)
    pipe_file = type(copies._fs).pipe_file

    def without_blobs(self, path, value, **rest):
        if "/blobs/" in path:
            raise FileNotFoundError(path)
        pipe_file(self, path, value, **rest)

    monkeypatch.setattr(type(copies._fs), "pipe_file", without_blobs)
    with pytest.raises(FileNotFoundError):
        copies.push(run)
    assert stored(copies, "manifests") == set()


def test_a_storage_that_hangs_holds_no_run(url, run, monkeypatch, caplog):
    released = threading.Event()
    monkeypatch.setattr(mirror, "PATIENCE_S", 0.2)
    monkeypatch.setattr(Mirror, "push", lambda self, folder: released.wait(60))
    copier = Copier(url, run)
    copier.begin()
    copier.finish()
    released.set()
    assert "is still being copied: the run goes on" in caplog.text


def test_nothing_is_pulled_over_a_run(url, run):
    Mirror(url).push(run)
    with pytest.raises(UserError, match="is there already"):
        Mirror(url).pull(run)


def test_where_there_is_no_copy_it_is_said(url, tmp_path):
    with pytest.raises(UserError, match=r"there is no copy of a run in .+\(none\)"):
        Mirror(url).pull(tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "abfss://x@y/z"])
def test_a_path_that_cannot_be_opened_is_named_with_what_is_missing(url):
    with pytest.raises(UserError, match=r"is no path that fsspec can open: .+; expected one such"):
        Mirror(url)


def test_where_one_run_is_copied_to_no_other_is(url, tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"run_id": name}))
    Copier(url, tmp_path / "one").finish()
    with pytest.raises(UserError, match="another run"):
        Copier(url, tmp_path / "other")
    Mirror(url).pull(tmp_path / "elsewhere")
    Copier(url, tmp_path / "elsewhere").finish()
    assert (tmp_path / "elsewhere" / "manifest.json").read_text() == '{"run_id": "one"}'


def test_a_copy_that_fails_does_not_end_a_run(run, tmp_path, caplog):
    (tmp_path / "far").write_text("a file where a folder should be")
    Copier(f"file://{tmp_path}/far", run).finish()
    assert "was not copied: " in caplog.text


def test_a_run_without_a_mirror_is_not_copied(run):
    copier = Copier(None, run)
    copier.begin()
    copier.finish()


def test_a_manifest_names_every_file_by_what_it_holds(url, run):
    copies = Mirror(url)
    copies.push(run)
    named = json.loads(copies._fs.cat_file(copies._manifest(1)))
    assert named.keys() == FILES.keys()
    assert set(named.values()) == stored(copies, "blobs")
