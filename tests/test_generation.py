"""The sampler, on a real vLLM engine."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file

from envs.errors import UserError
from rl_ft.config import Config
from rl_ft.generation import Generator, _engine_settings
from rl_ft.render import Renderer
from rl_ft.sections import TinyModelConfig
from rl_ft.tiny import build_tiny
from rl_ft.weights import WeightsError

CONFIG = Config.model_validate(
    {
        "model": {"max_prompt_length": 200},
        "generation": {"max_model_len": 256, "max_num_seqs": 64, "kv_cache_gib": 0.25},
    }
)
SMALL = TinyModelConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(build_tiny(tmp_path_factory.mktemp("tiny"), config=SMALL, seed=1))


@pytest.fixture(scope="module")
def renderer(folder) -> Renderer:
    return Renderer(folder, max_prompt_length=200)


@pytest.fixture(scope="module")
def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/model.safetensors")


@pytest.fixture(scope="module")
def engine(folder):
    generator = Generator(folder, config=CONFIG, seed=1)
    yield generator
    generator.close()


@pytest.fixture
def generator(engine, weights) -> Generator:
    """The engine with the folder's own weights, as version 0."""
    engine.load_weights(weights, 0)
    return engine


def prompts(number: int, *, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(300, 700) for _ in range(rng.randrange(40, 120))] for _ in range(number)]


pytestmark = pytest.mark.vllm


def test_answers_come_in_the_prompts_order_with_the_asked_number_of_samples(generator):
    answers = generator.generate(prompts(5), num_samples=3, max_tokens=4)
    assert [len(samples) for samples in answers] == [3] * 5
    assert generator.generate([], num_samples=3, max_tokens=4) == []
    alone = [
        generator.generate([p], num_samples=1, max_tokens=4, temperature=0.0)[0] for p in prompts(5)
    ]
    assert alone == generator.generate(prompts(5), num_samples=1, max_tokens=4, temperature=0.0)


def test_most_likely_answers_come_after_the_samples_of_the_same_call(generator):
    sampled, greedy = prompts(3), prompts(2, seed=5)
    mixed = generator.generate(sampled, num_samples=4, max_tokens=4, seed=7, greedy=greedy)
    assert mixed[:3] == generator.generate(sampled, num_samples=4, max_tokens=4, seed=7)
    assert mixed[3:] == generator.generate(greedy, num_samples=1, max_tokens=4, temperature=0.0)
    assert mixed[3:] == generator.generate([], num_samples=4, max_tokens=4, greedy=greedy)


def test_every_token_has_the_models_logprob(generator, folder):
    from rl_ft.parity import mean_abs_diff, score

    asked = prompts(6)
    for temperature, num_samples in ((0.0, 1), (0.7, 4), (1.0, 4)):
        answers = generator.generate(
            asked, num_samples=num_samples, max_tokens=5, temperature=temperature
        )
        pairs = [(p, c) for p, samples in zip(asked, answers, strict=True) for c in samples]
        scored = score(folder, [(p, c.token_ids) for p, c in pairs])
        mean, largest = mean_abs_diff(scored, [c.logprobs for _, c in pairs])
        assert mean < 1e-5
        assert largest < 1e-4


def test_an_answer_stops_at_the_end_token_and_keeps_it(generator, renderer, weights):
    generator.load_weights(_constant(weights, renderer.eos_id), 1)
    [[answer]] = generator.generate(prompts(1), num_samples=1, max_tokens=4, temperature=0.0)
    assert (answer.token_ids, answer.finish_reason, answer.text) == ((renderer.eos_id,), "stop", "")


def test_an_answer_without_an_end_is_cut_and_says_so(generator, renderer, weights):
    letter = renderer.answer_ids("C")[0]
    generator.load_weights(_constant(weights, letter), 1)
    [[answer]] = generator.generate(prompts(1), num_samples=1, max_tokens=3, temperature=0.0)
    assert (answer.token_ids, answer.finish_reason) == ((letter,) * 3, "length")
    assert answer.text == "CCC"


def test_completions_carry_the_version_of_the_weights(generator, weights):
    assert generator.generate(prompts(1), num_samples=1, max_tokens=1)[0][0].weights_version == 0
    generator.load_weights(weights, 5)
    assert generator.version == 5
    assert generator.generate(prompts(1), num_samples=1, max_tokens=1)[0][0].weights_version == 5


def test_loaded_weights_equal_an_engine_of_their_own(generator, folder, weights, tmp_path):
    other = build_tiny(tmp_path, config=SMALL, seed=2)
    from rl_ft.parity import mean_abs_diff, score

    before = generator.generate(prompts(4), num_samples=1, max_tokens=4)
    generator.load_weights(load_file(other / "model.safetensors"), 1)
    answers = generator.generate(prompts(4), num_samples=1, max_tokens=4)
    pairs = [(p, c) for p, [c] in zip(prompts(4), answers, strict=True)]
    scored = score(other, [(p, c.token_ids) for p, c in pairs])
    assert mean_abs_diff(scored, [c.logprobs for _, c in pairs])[0] < 1e-5
    assert before != answers


def test_partial_or_misshapen_weights_are_refused_and_change_nothing(generator, weights):
    asked = prompts(2)
    before = generator.generate(asked, num_samples=1, max_tokens=4, temperature=0.0)
    partial = {name: t + 1 for name, t in weights.items() if name != "lm_head.weight"}
    with pytest.raises(WeightsError, match=r"lm_head\.weight.*missing"):
        generator.load_weights(partial, 9)
    misshapen = {**weights, "model.norm.weight": torch.ones(3)}
    with pytest.raises(WeightsError, match=r"model\.norm\.weight came as \(3,\)"):
        generator.load_weights(misshapen, 9)
    assert generator.version == 0
    assert generator.generate(asked, num_samples=1, max_tokens=4, temperature=0.0) == before


def test_a_seed_fixes_the_answers_in_any_batching(generator):
    asked = prompts(6)
    together = generator.generate(asked, num_samples=4, max_tokens=4, seed=7)
    backwards = generator.generate(asked[::-1], num_samples=4, max_tokens=4, seed=7)[::-1]
    generator.reset_prefix_cache()
    alone = [generator.generate([p], num_samples=4, max_tokens=4, seed=7)[0] for p in asked]
    assert together == backwards == alone
    assert generator.generate(asked, num_samples=4, max_tokens=4, seed=8) != together
    assert len({c.token_ids for c in together[0]}) > 1


def test_equal_prompts_in_one_batch_get_answers_of_their_own(generator):
    first, second = generator.generate(prompts(1) * 2, num_samples=4, max_tokens=4, seed=7)
    assert first != second


def test_a_greedy_answer_is_asked_for_once(generator):
    with pytest.raises(ValueError, match="greedy answers are all the same"):
        generator.generate(prompts(1), num_samples=2, max_tokens=4, temperature=0.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_computes_in_the_precision_that_the_trainer_loads(dtype):
    model = CONFIG.model.model_copy(update={"dtype": dtype})
    settings = _engine_settings(CONFIG.model_copy(update={"model": model}), cuda=True)
    assert settings["dtype"] == dtype


def test_a_gpu_gets_chunked_prefill_unless_runs_must_repeat():
    free, seeded = (
        CONFIG.model_copy(
            update={"generation": CONFIG.generation.model_copy(update={"reproducible": repeat})}
        )
        for repeat in (False, True)
    )
    settings = _engine_settings(free, cuda=True)
    assert not {"enforce_eager", "enable_chunked_prefill"} & settings.keys()
    assert _engine_settings(seeded, cuda=True)["enable_chunked_prefill"] is False


def test_a_reproducible_generator_repeats_its_calls_after_a_restart(generator):
    def calls() -> list[object]:
        # What a fresh generator starts from.
        generator._num_calls = 0
        return [generator.generate(prompts(3), num_samples=4, max_tokens=4) for _ in range(2)]

    generator._reproducible = True
    try:
        first, again = calls(), calls()
    finally:
        generator._reproducible = False
    assert first == again
    assert first[0] != first[1]


def test_a_folder_that_is_no_model_is_named_before_an_engine_starts(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        Generator(str(tmp_path), config=CONFIG, seed=1)


def _constant(weights: dict[str, torch.Tensor], token: int) -> dict[str, torch.Tensor]:
    """Weights that always answer this token: all layers silent, every embedding the same."""
    state = {
        name: torch.zeros_like(t) if name.endswith(("o_proj.weight", "down_proj.weight")) else t
        for name, t in weights.items()
    }
    state["model.embed_tokens.weight"] = torch.ones_like(state["model.embed_tokens.weight"])
    state["lm_head.weight"] = torch.zeros_like(state["lm_head.weight"])
    state["lm_head.weight"][token] = 1.0
    return state
