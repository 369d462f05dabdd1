from __future__ import annotations

import pytest
import torch
from grpo_case import GROUP_SIZE, model_folder, ragged_groups
from transformers import AutoModelForCausalLM, Qwen3Config

from envs.errors import UserError
from rl_ft.batch import collate
from rl_ft.packing import block_mask, logps_and_entropies, pack, require_packable


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = model_folder(tmp_path_factory.mktemp("packing"))
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


def packed_forward(model, batch, temperature=1.0):
    packed = pack(
        batch["prompt_ids"],
        batch["prompt_mask"],
        batch["completion_ids"],
        batch["completion_mask"],
        group_size=GROUP_SIZE,
    )
    return packed, *logps_and_entropies(model, packed, temperature=temperature)


def one_row_at_a_time(model, groups, temperature=1.0):
    """Log-probs and entropies with no padding and no mask at all."""
    for group in groups:
        for answer in group.completions:
            ids = torch.tensor([group.prompt_ids + answer.token_ids])
            scores = model(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1] / temperature
            every = torch.log_softmax(scores, dim=-1)
            chosen = every[range(len(answer.token_ids)), answer.token_ids]
            yield chosen, -(every.exp() * every).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_rows_score_like_separate_rows(model, temperature):
    groups = ragged_groups()
    _, logps, entropies = packed_forward(model, collate(groups, pad_token_id=0), temperature)
    for row, (chosen, entropy) in enumerate(one_row_at_a_time(model, groups, temperature)):
        length = len(chosen)
        torch.testing.assert_close(logps[row, :length], chosen, atol=2e-5, rtol=0)
        torch.testing.assert_close(entropies[row, :length], entropy, atol=2e-5, rtol=0)
        assert not logps[row, length:].any()


def test_packed_gradients_are_those_of_separate_rows(model):
    groups = ragged_groups()
    batch = collate(groups, pad_token_id=0)
    weights = torch.randn(batch["completion_ids"].shape, generator=torch.Generator().manual_seed(0))
    _, logps, entropies = packed_forward(model, batch)
    model.zero_grad()
    ((logps + 0.1 * entropies) * weights * batch["completion_mask"]).sum().backward()
    packed = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    for row, (chosen, entropy) in enumerate(one_row_at_a_time(model, groups)):
        ((chosen + 0.1 * entropy) * weights[row, : len(chosen)]).sum().backward()
    separate = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (packed - separate).norm() / separate.norm() < 1e-5


def test_a_masked_completion_takes_no_room_and_disturbs_nobody(model):
    whole, _, _ = packed_forward(model, collate(ragged_groups(1), pad_token_id=0))
    batch = collate(ragged_groups(1, masked=[(0, 1)]), pad_token_id=0)
    packed, logps, _ = packed_forward(model, batch)
    _, unmasked, _ = packed_forward(model, collate(ragged_groups(1), pad_token_id=0))
    assert packed.input_ids.shape[1] < whole.input_ids.shape[1]
    assert not logps[1].any()
    torch.testing.assert_close(logps[[0, 2, 3]], unmasked[[0, 2, 3]], atol=2e-5, rtol=0)


def test_a_batch_of_only_masked_rows_is_finite_and_differentiable(model):
    everything = [(0, row) for row in range(GROUP_SIZE)]
    _, logps, entropies = packed_forward(
        model, collate(ragged_groups(1, masked=everything), pad_token_id=0)
    )
    model.zero_grad()
    (logps + entropies).sum().backward()
    assert not any(p.grad.any() for p in model.parameters())


def test_a_prompt_of_one_token_can_be_packed(model):
    groups = [
        g.__class__(**{f: getattr(g, f) for f in g.__slots__} | {"prompt_ids": (7,)})
        for g in ragged_groups(2)
    ]
    _, logps, _ = packed_forward(model, collate(groups, pad_token_id=0))
    for row, (chosen, _) in enumerate(one_row_at_a_time(model, groups)):
        torch.testing.assert_close(logps[row, : len(chosen)], chosen, atol=2e-5, rtol=0)


def test_the_prompt_is_in_a_packed_row_once():
    groups = ragged_groups(1)
    batch = collate(groups, pad_token_id=0)
    packed = pack(
        *(batch[k] for k in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")),
        group_size=GROUP_SIZE,
    )
    answers = sum(len(c.token_ids) for c in groups[0].completions)
    assert packed.input_ids.shape == (1, len(groups[0].prompt_ids) - 1 + answers)
    assert packed.num_scored == answers


def test_the_mask_hides_siblings_and_the_future_and_keeps_the_diagonal():
    mask = block_mask(torch.tensor([[-1, 0, 0, 1, 1, 2]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 0, 0, 1],
    ]


def test_groups_must_share_their_prompt():
    batch = collate(ragged_groups(1), pad_token_id=0)
    batch["prompt_ids"][1, -1] += 1
    with pytest.raises(AssertionError, match="share one prompt"):
        pack(
            *(batch[k] for k in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")),
            group_size=GROUP_SIZE,
        )


def test_sliding_window_attention_is_refused():
    config = Qwen3Config(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(UserError, match="sliding_attention"):
        require_packable(config)


def test_an_attention_that_cannot_read_the_mask_is_refused():
    config = Qwen3Config(num_hidden_layers=2, attn_implementation="eager")
    with pytest.raises(UserError, match="sdpa"):
        require_packable(config)
