"""The gate fires: four broken syncs on a real engine, each caught at once and named."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
import torch

from rl_ft.config import Config
from rl_ft.generation import Generator
from rl_ft.parity import (
    SAMPLER_IS_RIGHT,
    MismatchGate,
    ParityError,
    check,
    diagnose,
    mean_abs_diff,
    score,
)
from rl_ft.sections import TinyModelConfig
from rl_ft.tiny import build_tiny

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
BOUND = 1e-4


class Breakable(Generator):
    """A real generator whose sync can be broken in one way."""

    fault = "none"

    def load_weights(self, state_dict, version):
        if self.fault == "none":
            super().load_weights(state_dict, version)
            return
        if self.fault == "wrong scale":
            self._reload({name: tensor * 1.05 for name, tensor in state_dict.items()})
        elif self.fault == "tied head not reloaded":
            self._reload({n: tensor for n, tensor in state_dict.items() if n != "lm_head.weight"})
        elif self.fault == "stale prefix cache":
            self._reload(state_dict)
        elif self.fault == "one tensor garbled":
            self._reload({**state_dict, "model.norm.weight": state_dict["model.norm.weight"] + 1})
        if self.fault != "stale prefix cache":
            self.reset_prefix_cache()
        self.version = version


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model whose head is tied to its embeddings: the case that hides most faults."""
    from transformers import AutoModelForCausalLM

    path = build_tiny(tmp_path_factory.mktemp("tied"), config=SMALL, seed=1)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(folder):
    generator = Breakable(str(folder), config=CONFIG, seed=1)
    yield generator
    generator.close()


@pytest.fixture(scope="module")
def weights(folder) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture
def generator(engine, weights):
    engine.fault = "none"
    engine.load_weights(weights, 3)
    return engine


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(300, 700) for _ in range(rng.randrange(70, 130))] for _ in range(6)]


@pytest.mark.vllm
def test_a_sound_sync_passes_and_leaves_the_generator_as_it_was(
    generator, weights, folder, prompts
):
    before = generator.generate(prompts, num_samples=1, max_tokens=4, temperature=0.0)
    report = check(generator, weights, folder, prompts, max_tokens=4, bound=BOUND)
    assert max(report.perturbed_mean, report.restored_mean) < 1e-5
    assert max(report.perturbed_max, report.restored_max) < 1e-4
    assert report.visible_change > 10 * BOUND
    assert report.num_tokens == 2 * 4 * len(prompts)
    assert generator.version == 3
    after = generator.generate(prompts, num_samples=1, max_tokens=4, temperature=0.0)
    assert [c.token_ids for [c] in after] == [c.token_ids for [c] in before]


@pytest.mark.vllm
@pytest.mark.parametrize(
    "fault", ["no-op sync", "wrong scale", "stale prefix cache", "tied head not reloaded"]
)
def test_a_broken_sync_is_caught_at_the_start_by_name(generator, weights, folder, prompts, fault):
    generator.fault = fault
    with pytest.raises(ParityError) as caught:
        check(generator, weights, folder, prompts, max_tokens=4, bound=BOUND)
    assert caught.value.cause.startswith(fault)
    if fault == "wrong scale":
        assert caught.value.cause == "wrong scale (x1.05)"


@pytest.mark.vllm
def test_a_fault_of_no_known_pattern_is_called_unknown(generator, weights, folder, prompts):
    generator.fault = "one tensor garbled"
    with pytest.raises(ParityError) as caught:
        check(generator, weights, folder, prompts, max_tokens=4, bound=BOUND)
    assert caught.value.cause == "unknown"


@pytest.mark.vllm
@pytest.mark.parametrize(
    "fault", ["no-op sync", "wrong scale", "stale prefix cache", "tied head not reloaded"]
)
def test_a_sync_that_breaks_during_a_run_stops_it_within_one_step(
    generator, weights, folder, prompts, fault
):
    trainer = _trained(folder, weights)
    causes = []

    def step(number: int, new: dict[str, torch.Tensor], old: dict[str, torch.Tensor]) -> None:
        generator.load_weights(new, number)
        answers = generator.generate(prompts, num_samples=1, max_tokens=4)
        sampled = [(p, c) for p, [c] in zip(prompts, answers, strict=True)]
        trainer.load_state_dict(new)
        scored = score(trainer, [(p, c.token_ids) for p, c in sampled])
        difference, _ = mean_abs_diff(scored, [c.logprobs for _, c in sampled])
        try:
            MismatchGate(BOUND).observe(number, difference)
        except ParityError:
            causes.append(
                diagnose(generator, folder, new=new, old=old, sampled=sampled, bound=BOUND)
            )
            raise

    updated = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
    step(1, updated, weights)
    step(2, weights, updated)
    generator.fault = fault
    with pytest.raises(ParityError, match="at step 3"):
        step(3, updated, weights)
    assert causes[0].startswith(fault)


@pytest.mark.vllm
def test_a_bound_that_no_change_exceeds_is_refused(generator, weights, folder, prompts):
    with pytest.raises(ParityError, match="lower the bound") as caught:
        check(generator, weights, folder, prompts, max_tokens=4, bound=10.0)
    assert caught.value.cause == "blind gate"


def test_the_running_gate_lets_small_differences_pass_and_stops_at_the_bound():
    gate = MismatchGate(1e-3)
    gate.observe(1, 1e-3)
    with pytest.raises(ParityError, match=r"at step 2 .* differ by 0\.002") as caught:
        gate.observe(2, 2e-3)
    assert caught.value.cause == "unknown"


def test_stale_rows_may_differ_as_far_as_the_policy_may_move():
    gate = MismatchGate(1e-3, stale_bound=0.5)
    gate.observe(1, 0.5, staleness=1)
    with pytest.raises(ParityError, match=r"max_stale_logprob_diff = 0\.5, on rows that are 2"):
        gate.observe(2, 0.6, staleness=2)


def test_rows_of_the_trainers_own_weights_are_held_to_the_exact_bound_whatever_stale_ones_are():
    with pytest.raises(ParityError, match=r"parity\.max_logprob_diff"):
        MismatchGate(1e-3, stale_bound=0.5).observe(1, 2e-3, staleness=0)


@pytest.mark.vllm
def test_a_sampler_that_said_what_its_weights_say_is_not_blamed(
    generator, weights, folder, prompts
):
    """Stale rows that the policy has left behind."""
    moved = _trained(folder, weights).state_dict()
    answers = generator.generate(prompts, num_samples=1, max_tokens=4)
    sampled = [(p, c) for p, [c] in zip(prompts, answers, strict=True)]
    cause = diagnose(generator, folder, new=weights, old=moved, sampled=sampled, bound=BOUND)
    assert cause == SAMPLER_IS_RIGHT


def test_a_difference_that_is_no_number_is_a_breach():
    assert mean_abs_diff([(0.0, float("nan"))], [(0.0, 0.0)]) == (float("inf"), float("inf"))
    assert mean_abs_diff([], []) == (float("inf"), float("inf"))
    with pytest.raises(ParityError):
        MismatchGate(1e-3).observe(1, float("nan"))


def test_scores_do_not_depend_on_the_batch(folder):
    pairs = [(list(range(300, 300 + n)), [5, 6, 7][: 1 + n % 3]) for n in range(3, 43)]
    together = score(folder, pairs)
    alone = [score(folder, [pair])[0] for pair in pairs[:3]]
    assert [len(row) for row in together] == [len(completion) for _, completion in pairs]
    assert mean_abs_diff(together[:3], alone)[1] < 1e-5


def test_a_parity_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(ParityError("no-op sync", "detail")))
    assert (error.cause, str(error)) == ("no-op sync", "no-op sync: detail")


def _trained(folder: Path, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The model one optimiser step away from `weights`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.load_state_dict(weights)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids = torch.arange(300, 360)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    return model
