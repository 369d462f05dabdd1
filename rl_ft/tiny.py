"""The laptop recipe's from-scratch model and tokenizer, saved as an ordinary Hugging Face folder.

Nothing downstream knows that it is special: AutoModel, AutoTokenizer, TRL and vLLM load it like any
other. The tokenizer is built for the dialect (a prompt is short) and complete (any text encodes and
decodes back exactly). Nothing is trained here.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from envs.answers import PIECES
from envs.dialect import VOCABULARY
from rl_ft.sections import TinyModelConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

MAX_INTEGER = 299
"""Integers up to here are one token each; larger ones are their digits."""
MAX_POSITION = 2048
_NUMBER_TOKEN = re.compile(r"([a-z]?)(\d{1,3})")
PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = (PAD, SYSTEM, USER, ASSISTANT, END)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_tiny(
    directory: Path,
    *,
    config: TinyModelConfig,
    seed: int,
    vocabulary: Sequence[str] = VOCABULARY,
) -> Path:
    """Write the untrained model and its tokenizer to `directory`, which is returned.

    Same arguments, same bytes.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer(vocabulary)
    end, pad = tokenizer.convert_tokens_to_ids([END, PAD])
    architecture = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=MAX_POSITION,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(architecture).to(torch.float32)
        _start_numbers_alike(model.get_input_embeddings().weight, tokenizer)
        _start_letters_alike(model.get_input_embeddings().weight, tokenizer)
        _start_by_copying(model)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def build_tokenizer(vocabulary: Sequence[str] = VOCABULARY) -> PreTrainedTokenizerFast:
    """A fast tokenizer: known pieces are one token, everything else is its bytes.

    Phase letters are bytes too, so a letter is the same token in the prompt and in the answer.
    """
    from tokenizers import AddedToken, Regex, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from transformers import PreTrainedTokenizerFast

    pieces: list[str] = []
    for bare in (*vocabulary, *map(str, range(MAX_INTEGER + 1))):
        pieces += [bare, f" {bare}"]
    pieces += PIECES
    tokens = dict.fromkeys([*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet())])
    tokens |= dict.fromkeys(_as_bytes(piece) for piece in pieces)
    # `ignore_merges` looks a whole piece up first; without merges the rest falls into bytes.
    backend = Tokenizer(
        BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], ignore_merges=True)
    )
    backend.pre_tokenizer = Sequence(
        [
            Split(Regex(_piece_pattern(vocabulary)), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_POSITION,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _piece_pattern(vocabulary: Sequence[str]) -> str:
    """Oniguruma pattern of the pieces that are one token; longer words are tried first."""
    words = sorted(set(vocabulary), key=lambda word: (-len(word), word))
    alternatives = [re.escape(piece) for piece in PIECES]
    for word in words:
        # A word inside a longer one ("in" in "minute") is not that word.
        before = "(?: |(?<![A-Za-z0-9]))" if word[0].isalnum() else " ?"
        after = "(?![A-Za-z0-9])" if word[-1].isalnum() else ""
        alternatives.append(before + re.escape(word) + after)
    alternatives.append("(?: |(?<![0-9]))(?:[12][0-9][0-9]|[1-9][0-9]|[0-9])(?![0-9])")
    return "|".join(alternatives)


def _as_bytes(text: str) -> str:
    """The text in the printable byte alphabet that byte-level vocabularies are written in."""
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return "".join(piece for piece, _ in pieces)


def _start_numbers_alike(embeddings: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> None:
    """Replace the rows of tokens that hold a number by a projection of smooth features of it.

    Neighbouring numbers begin alike, so what is learnt about 17 vehicles holds for 18. Plain
    integers and every field of the dialect (`q17`) have a random projection of their own, a field
    also a direction that all its numbers share. Rows keep the scale of the others.
    """
    import torch

    kinds: dict[str, list[tuple[int, int]]] = {}
    space = _as_bytes(" ")
    for token, row in sorted(tokenizer.get_vocab().items()):
        if match := _NUMBER_TOKEN.fullmatch(token.removeprefix(space)):
            kinds.setdefault(match[1], []).append((int(match[2]), row))
    every = torch.tensor([_number_features(n) for n in range(MAX_INTEGER + 1)])
    with torch.no_grad():
        for kind, found in sorted(kinds.items()):
            features = every[torch.tensor([number for number, _ in found])] - every.mean(0)
            projection = torch.randn(features.shape[1], embeddings.shape[1])
            shared = torch.randn(embeddings.shape[1]) if kind else 0.0
            rows = features @ projection / math.sqrt(features.shape[1]) + shared
            rows *= embeddings.std() / rows.std(dim=1, keepdim=True)
            embeddings[torch.tensor([row for _, row in found])] = rows


def _start_letters_alike(embeddings: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> None:
    """Give the letters that phases are named by a direction in common: whatever attends to one of
    them attends to all. Rows keep the scale of the others."""
    import torch

    rows = torch.tensor(tokenizer.convert_tokens_to_ids(list(string.ascii_uppercase)))
    with torch.no_grad():
        shared = torch.randn(embeddings.shape[1]) * embeddings.std()
        embeddings[rows] = (embeddings[rows] + shared) / math.sqrt(2.0)


def _start_by_copying(model: Qwen3ForCausalLM) -> None:
    """Begin with attention that hands on what it attends to, and a head that names it.

    An answer repeats a letter of the prompt. With independent random matrices each letter's way
    through values, output and head is learnt by itself, and slowly; with the output projection as
    the transpose of the values' their product is near a multiple of the identity, and a head equal
    to the embeddings reads the letter off. Nothing is tied: all of it is trained from there.
    """
    import torch

    with torch.no_grad():
        model.lm_head.weight.copy_(model.get_input_embeddings().weight)
        for layer in model.model.layers:
            attention = layer.self_attn
            values = attention.v_proj.weight.unflatten(0, (-1, attention.head_dim))
            of_heads = values.repeat_interleave(attention.num_key_value_groups, dim=0)
            attention.o_proj.weight.copy_(of_heads.flatten(0, 1).T)


def _number_features(n: int) -> list[float]:
    """Linear, waves and bumps over log(1 + n), scaled to 0..1."""
    x = math.log1p(n) / math.log1p(MAX_INTEGER)
    waves = [f(math.pi * k * x) for k in (1, 2, 3) for f in (math.sin, math.cos)]
    bumps = [math.exp(-(((x - i / 8) * 8) ** 2) / 2) for i in range(9)]
    return [2 * x, *waves, *bumps]
