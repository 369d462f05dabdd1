"""A version of the policy on its way, and what a complete one is."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from envs.errors import UserError
from rl_ft.weights import (
    WeightsError,
    check_complete,
    checkpoint_shapes,
    digest,
    fetch,
    publish,
    read_folder,
    save_folder,
)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
    }


def keep(value: object) -> object:
    return value


def test_digest_does_not_depend_on_order(state):
    assert digest(dict(reversed(state.items()))) == digest(state)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {**s, "a": s["a"] + torch.tensor([0, 0, 1e-6])},
        lambda s: {**s, "a": s["a"].reshape(3, 2)},
        lambda s: {**s, "b": s["b"].view(torch.float16)},
        lambda s: {"c" if name == "a" else name: t for name, t in s.items()},
        lambda s: {name: t for name, t in s.items() if name != "empty"},
    ],
    ids=["bytes", "shape", "dtype", "name", "number"],
)
def test_digest_changes_with(state, change):
    assert digest(change(state)) != digest(state)


def test_fetch_returns_what_was_published(state):
    ref = publish(state, 7, keep)
    came = fetch(ref, keep)
    assert (ref.version, ref.digest) == (7, digest(state))
    assert came.keys() == state.keys()
    for name, tensor in state.items():
        assert came[name].dtype == tensor.dtype
        assert torch.equal(came[name], tensor)


def test_non_contiguous_tensors_travel(state):
    turned = {"a": state["a"].t()}
    assert torch.equal(fetch(publish(turned, 1, keep), keep)["a"], turned["a"])


@pytest.mark.filterwarnings("error")
def test_read_only_memory_is_used_as_it_is(state):
    def freeze(arrays: object) -> object:
        for _, array in arrays.values():
            array.flags.writeable = False
        return arrays

    assert torch.equal(fetch(publish(state, 1, freeze), keep)["a"], state["a"])


def test_an_altered_version_is_refused(state):
    def alter(arrays: object) -> object:
        dtype, array = arrays["a"]
        return {**arrays, "a": (dtype, array + 1)}

    with pytest.raises(WeightsError, match="version 3 arrived altered"):
        fetch(publish(state, 3, alter), keep)


def test_a_version_that_is_gone_is_named(state):
    ref = publish(state, 4, keep)

    def lost(_: object) -> object:
        raise ConnectionError("owner died")

    with pytest.raises(WeightsError, match="version 4 cannot be fetched: owner died"):
        fetch(ref, lost)
    with pytest.raises(WeightsError, match="version 4 is missing"):
        fetch(ref, lambda _: None)


def test_a_tied_head_is_part_of_a_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    save_file({"model.embed_tokens.weight": torch.zeros(5, 2)}, tmp_path / "model.safetensors")
    assert checkpoint_shapes(tmp_path) == {
        "model.embed_tokens.weight": (5, 2),
        "lm_head.weight": (5, 2),
    }


def test_a_checkpoint_in_several_files_is_read_whole(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    for i in (1, 2):
        save_file({f"w{i}": torch.zeros(i)}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    assert checkpoint_shapes(tmp_path) == {"w1": (1,), "w2": (2,)}


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        checkpoint_shapes(tmp_path)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path):
    """A model folder as save_pretrained leaves it."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"tie_word_embeddings": request.param}))
    (path / "tokenizer.json").write_text("words")
    tensors = {"model.embed_tokens.weight": torch.arange(6.0).reshape(3, 2)}
    if not request.param:
        tensors["lm_head.weight"] = torch.ones(3, 2)
    save_file(tensors, path / "model.safetensors")
    return path


def test_a_saved_folder_reads_back_with_everything_else_of_its_template(folder, tmp_path):
    state = read_folder(folder)
    assert state.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    embeddings = state["model.embed_tokens.weight"] + 1
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    new = {
        "model.embed_tokens.weight": embeddings,
        "lm_head.weight": embeddings if tied else state["lm_head.weight"] - 1,
    }
    saved = tmp_path / "saved"
    for _ in range(2):
        save_folder(new, folder, saved)
    assert digest(read_folder(saved)) == digest(new)
    assert (saved / "tokenizer.json").read_text() == "words"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "saved"]
    assert checkpoint_shapes(saved) == checkpoint_shapes(folder)


def test_an_incomplete_model_is_not_saved(folder, tmp_path):
    with pytest.raises(WeightsError, match=r"1 .*missing"):
        save_folder({"lm_head.weight": torch.ones(3, 2)}, folder, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_only_exactly_the_tensors_of_the_checkpoint_are_complete():
    expected = {"a": (2, 3), "b": (1,)}
    check_complete({"b": (1,), "a": (2, 3)}, expected)
    with pytest.raises(WeightsError, match=r"1 \(a, \.\.\.\) missing, none unknown"):
        check_complete({"b": (1,)}, expected)
    with pytest.raises(WeightsError, match=r"none missing, 1 \(c, \.\.\.\) unknown"):
        check_complete({**expected, "c": (1,)}, expected)
    with pytest.raises(WeightsError, match=r"a came as \(3, 2\), expected \(2, 3\)"):
        check_complete({**expected, "a": (3, 2)}, expected)
