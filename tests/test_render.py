"""Chat to ids and back."""

from __future__ import annotations

import pickle

import pytest

from envs.errors import UserError
from rl_ft.render import PromptTooLongError, Renderer
from rl_ft.sections import TinyModelConfig
from rl_ft.tiny import build_tiny

CHAT = [{"role": "user", "content": "green A 25\nchoose A B"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    config = TinyModelConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=1,
                             num_key_value_heads=1)  # fmt: skip
    return str(build_tiny(tmp_path_factory.mktemp("tiny"), config=config, seed=1))


@pytest.fixture(scope="module")
def renderer(folder) -> Renderer:
    return Renderer(folder, max_prompt_length=64)


def test_a_prompt_ends_where_the_answer_begins(renderer):
    ids = renderer.prompt_ids(CHAT)
    assert renderer._tokenizer.decode(ids) == f"<|user|>{CHAT[0]['content']}<|assistant|>"
    assert all(type(i) is int for i in ids)


def test_an_answer_ends_with_the_end_token_and_decodes_without_it(renderer):
    ids = renderer.answer_ids('{"phase": "C"}')
    assert len(ids) == 4
    assert ids[-1] == renderer.eos_id != renderer.pad_id
    assert renderer.decode_batch([ids]) == ['{"phase": "C"}']
    assert renderer.decode_batch([ids, ids[1:2]]) == ['{"phase": "C"}', "C"]


def test_a_prompt_that_does_not_fit_is_an_error_with_its_length(folder):
    length = len(Renderer(folder, max_prompt_length=64).prompt_ids(CHAT))
    assert Renderer(folder, max_prompt_length=length).prompt_ids(CHAT)
    with pytest.raises(PromptTooLongError, match=f"{length} tokens.*is {length - 1}") as caught:
        Renderer(folder, max_prompt_length=length - 1).prompt_ids(CHAT)
    assert isinstance(caught.value, UserError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.num_tokens, str(again)) == (length, str(caught.value))


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        Renderer(str(tmp_path), max_prompt_length=64)


@pytest.mark.parametrize(
    ("attribute", "named"), [("chat_template", "chat template"), ("eos_token", "eos_token")]
)
def test_a_tokenizer_without_what_sampling_needs_is_refused(folder, tmp_path, attribute, named):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    setattr(tokenizer, attribute, None)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=named):
        Renderer(str(tmp_path), max_prompt_length=64)


def test_a_tokenizer_without_a_pad_token_pads_with_its_end(folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    renderer = Renderer(str(tmp_path), max_prompt_length=64)
    assert renderer.pad_id == renderer.eos_id
