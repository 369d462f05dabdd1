from __future__ import annotations

import math
from dataclasses import replace

import pytest
from grpo_case import GROUP_SIZE, ragged_groups

from rl_ft.batch import collate, split

PAD = 0


@pytest.fixture(scope="module")
def groups():
    return ragged_groups(masked=[(1, 2)])


def test_prompts_end_and_completions_begin_at_the_seam(groups):
    batch = collate(groups, pad_token_id=PAD)
    rows = [(g.prompt_ids, c.token_ids) for g in groups for c in g.completions]
    for number, (prompt, answer) in enumerate(rows):
        assert tuple(batch["prompt_ids"][number, -len(prompt) :].tolist()) == prompt
        assert tuple(batch["completion_ids"][number, : len(answer)].tolist()) == answer
        assert batch["prompt_mask"][number].sum() == len(prompt)


def test_old_log_probs_are_the_samplers(groups):
    batch = collate(groups, pad_token_id=PAD)
    first = groups[0].completions[0].logprobs
    assert batch["old_per_token_logps"][0, : len(first)].tolist() == pytest.approx(first)


def test_a_row_that_nobody_sampled_says_so(groups):
    unsaid = replace(groups[0].completions[1], logprobs=None)
    completions = (groups[0].completions[0], unsaid, *groups[0].completions[2:])
    times = (2, 0) + (1,) * (GROUP_SIZE - 2)
    group = replace(groups[0], completions=completions, times_given=times)
    batch = collate([group], pad_token_id=PAD)
    assert batch["times_given"].tolist() == list(times)
    assert batch["completion_mask"][1].sum() == len(unsaid.token_ids)
    assert not batch["old_per_token_logps"][1].any()


@pytest.mark.parametrize(("times", "said"), [(0, "with"), (1, "without")])
def test_log_probs_are_there_exactly_where_somebody_sampled(groups, times, said):
    answer = groups[0].completions[0]
    first = answer if said == "with" else replace(answer, logprobs=None)
    broken = replace(
        groups[0],
        completions=(first, *groups[0].completions[1:]),
        times_given=(times, *groups[0].times_given[1:]),
    )
    with pytest.raises(ValueError, match=f"given {times} times, {said} log-probs"):
        collate([broken], pad_token_id=PAD)


def test_canonical_rows_are_marked(groups):
    canonical = (False,) + (True,) * (GROUP_SIZE - 1)
    batch = collate([replace(groups[0], canonical=canonical)], pad_token_id=PAD)
    assert batch["canonical_mask"].tolist() == list(canonical)


def test_a_failed_row_is_masked_and_not_counted(groups):
    batch = collate(groups, pad_token_id=PAD)
    failed = GROUP_SIZE + 2
    assert batch["completion_mask"][failed].sum() == 0
    assert batch["advantages"][failed] == 0
    lengths = [
        len(c.token_ids)
        for g in groups
        for c, valid in zip(g.completions, g.valid, strict=True)
        if valid
    ]
    assert batch["num_items_in_batch"] == sum(lengths) == batch["completion_mask"].sum()


def test_log_probs_of_a_failed_row_may_be_anything(groups):
    broken = replace(groups[1].completions[2], logprobs=(math.nan,))
    broken = replace(broken, token_ids=broken.token_ids[:1])
    completions = (*groups[1].completions[:2], broken, *groups[1].completions[3:])
    batch = collate([replace(groups[1], completions=completions)], pad_token_id=PAD)
    assert batch["old_per_token_logps"].isfinite().all()


def test_groups_of_different_size_are_refused(groups):
    short = replace(
        groups[0],
        completions=groups[0].completions[:2],
        advantages=groups[0].advantages[:2],
        valid=groups[0].valid[:2],
    )
    with pytest.raises(ValueError, match="same size"):
        collate([short, groups[1]], pad_token_id=PAD)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one group"):
        collate([], pad_token_id=PAD)


def test_an_empty_prompt_is_refused(groups):
    with pytest.raises(ValueError, match="prompt is empty"):
        collate([replace(groups[0], prompt_ids=())], pad_token_id=PAD)


def test_a_token_without_log_prob_is_refused(groups):
    bad = replace(groups[0].completions[0], logprobs=())
    with pytest.raises(ValueError, match="0 log-probs"):
        collate(
            [replace(groups[0], completions=(bad, *groups[0].completions[1:]))], pad_token_id=PAD
        )


def test_an_advantage_that_is_not_finite_is_refused(groups):
    with pytest.raises(ValueError, match="finite"):
        collate([replace(groups[0], advantages=(math.nan, 0.0, 0.0, 0.0))], pad_token_id=PAD)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5])
def test_split_keeps_every_group_whole_and_once(groups, num_parts):
    parts = split(groups, num_parts)
    assert len(parts) == num_parts
    assert sorted(g.group_id for part in parts for g in part) == sorted(g.group_id for g in groups)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_split_puts_like_lengths_together(groups):
    lengths = [len(g.prompt_ids) for part in split(groups, 2) for g in part]
    assert lengths == sorted(lengths)


def test_more_micro_batches_than_groups_are_refused(groups):
    with pytest.raises(ValueError, match="6 micro-batches"):
        split(groups, 6)
