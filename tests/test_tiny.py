"""The from-scratch model and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.dialect import VOCABULARY
from rl_ft.sections import TinyModelConfig
from rl_ft.tiny import MAX_INTEGER, build_tiny, build_tokenizer

SMALL = TinyModelConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)
PROMPT = (
    "A 7 12: south through+right 2 1 0 0 15, south left yield shared 1 0 0 0 40\n"
    "B 1 1: north2 left empty\ngreen A 25\nchoose A B"
)
TOKENIZER = build_tokenizer()
pieces = st.one_of(
    st.sampled_from([*VOCABULARY, *":,;+-\n ", *"ABCDXYZ", '{"phase": "', '"}']),
    st.integers(-5, 2000).map(str),
)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"), config=SMALL, seed=1)


@settings(deadline=None)
@given(st.text())
def test_any_text_survives_encoding(text):
    assert TOKENIZER.decode(ids(text)) == text


@settings(deadline=None)
@given(st.lists(pieces).map("".join))
def test_dialect_like_text_survives_encoding(text):
    assert TOKENIZER.decode(ids(text)) == text


def test_every_word_of_the_dialect_is_one_token_with_and_without_its_space():
    for word in VOCABULARY:
        assert len(ids(word)) == len(ids(f"{word} {word}")) - 1 == 1


def test_every_integer_up_to_the_largest_is_one_token():
    for n in range(MAX_INTEGER + 1):
        assert len(ids(f"{n}")) == len(ids(f" {n}\n")) - 1 == 1


def test_larger_integers_are_their_digits():
    assert [TOKENIZER.decode([i]) for i in ids("x 1234")] == ["x", " ", "1", "2", "3", "4"]


def test_a_word_inside_a_longer_one_is_not_that_word():
    assert len(ids("greenish")) == len("greenish")


def test_the_answer_is_three_tokens_with_the_letter_of_the_prompt():
    letters = {ids(letter)[0] for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    assert len(letters) == 26
    for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
        answer = ids(f'{{"phase": "{letter}"}}')
        assert len(answer) == 3
        assert answer[1] in ids(f"green {letter} 25")
        assert answer[1] in ids(f"choose A {letter}")


def test_a_prompt_is_short():
    # One token per word and number, a few for letters, their spaces and punctuation.
    assert len(ids(PROMPT)) == 40


def test_the_folder_loads_as_any_other(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "qwen3"
    assert model.dtype.is_floating_point
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    assert tokenizer.encode(PROMPT) == ids(PROMPT)
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()


def test_the_chat_template_extends_a_prompt_by_its_answer(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "green A"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|system|>S<|user|>green A<|assistant|>"
    chat.append({"role": "assistant", "content": "B"})
    assert tokenizer.apply_chat_template(chat, tokenize=False) == f"{prompt}B<|end|>"


def test_same_seed_same_bytes(folder, tmp_path):
    again = build_tiny(tmp_path / "again", config=SMALL, seed=1)
    other = build_tiny(tmp_path / "other", config=SMALL, seed=2)
    for file in folder.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()
    weights = "model.safetensors"
    assert (other / weights).read_bytes() != (folder / weights).read_bytes()


def test_building_leaves_the_random_state_alone(tmp_path):
    import torch

    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build_tiny(tmp_path, config=SMALL, seed=1)
    assert torch.equal(torch.rand(4), expected)


def test_neighbouring_numbers_begin_alike_at_the_scale_of_other_rows(folder):
    import torch
    from safetensors.torch import load_file

    rows = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    number = {n: rows[ids(f" {n}")[0]] for n in range(MAX_INTEGER + 1)}

    def alike(a: int, b: int) -> float:
        return torch.cosine_similarity(number[a], number[b], dim=0).item()

    assert min(alike(n, n + 1) for n in range(MAX_INTEGER)) > 0.7
    assert alike(3, 4) > alike(3, 6) > alike(3, 15)
    assert max(alike(0, 40), alike(5, 200)) < 0.5
    assert number[0].std().item() == pytest.approx(rows[ids("a")[0]].std().item(), rel=0.3)


def test_names_of_phases_begin_alike_and_apart(folder):
    import torch
    from safetensors.torch import load_file

    rows = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    letters = torch.nn.functional.normalize(rows[[ids(name)[0] for name in "ABCDEFGHIJKL"]], dim=1)
    alike = (letters @ letters.T)[~torch.eye(12, dtype=torch.bool)]
    assert alike.min() > 0.1
    assert alike.max() < 0.9
    assert alike.mean().item() == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("num_key_value_heads", [1, 2])
def test_attention_begins_by_handing_on_what_it_attends_to(tmp_path, num_key_value_heads):
    import torch
    from safetensors.torch import load_file

    config = SMALL.model_copy(update={"num_key_value_heads": num_key_value_heads})
    weights = load_file(build_tiny(tmp_path, config=config, seed=1) / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    attended = torch.randn(64, 100, generator=torch.Generator().manual_seed(1))
    for layer in range(SMALL.num_hidden_layers):
        v, o = (weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "vo")
        of_heads = (v @ attended).unflatten(0, (num_key_value_heads, SMALL.head_dim))
        handed_on = o @ of_heads.repeat_interleave(2 // num_key_value_heads, dim=0).flatten(0, 1)
        assert torch.cosine_similarity(handed_on, attended, dim=0).min() > 0.3


def test_the_config_reaches_the_model(folder):
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["head_dim"]) == (64, 2, 32)
    assert config["max_position_embeddings"] == 2048
