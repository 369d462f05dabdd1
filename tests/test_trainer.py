"""Contract with TRL: same batch, same loss, same gradient, for every loss type."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
import torch
from grpo_case import GROUP_SIZE, config, in_two_ranks, model_folder, ragged_groups
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from envs.errors import UserError
from rl_ft.batch import collate
from rl_ft.learner import build_trainer, grpo_args, load_model
from rl_ft.merging import full_state_dict
from rl_ft.trainer import LOSS_TYPES, GRPOTrainer

MASKED = [(0, 1), (3, 0), (3, 2)]
PER_ROW = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
PER_ROW += ("advantages", "old_per_token_logps")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("trainer"))


class Gradients(TrainerCallback):
    """Copies the gradient that the optimiser is about to use."""

    def on_pre_optimizer_step(self, *_, model, **__):
        self.vector = torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        ).clone()


class StockTrainer(GRPOTrainer):
    """TRL as it is, except that it is handed a batch; rows that failed are not in it."""

    def __init__(self, groups, **kwargs):
        from datasets import Dataset

        super().__init__(
            reward_funcs=lambda **_: [],
            train_dataset=Dataset.from_dict({"prompt": [""] * 64}),
            **kwargs,
        )
        self._groups = groups

    def _generate_and_score_completions(self, inputs):
        batch = collate(self._groups, pad_token_id=0)
        alive = [ok for group in self._groups for ok in group.valid]
        batch |= {name: batch[name][alive] for name in PER_ROW}
        if self.beta:
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
            with torch.no_grad():
                batch["ref_per_token_logps"] = self._get_per_token_logps_and_entropies(
                    self.ref_model, ids, mask, batch["completion_ids"].shape[1]
                )[0]
        return batch

    def log(self, logs, start_time=None):
        if "grad_norm" in logs:
            self.logged = {**logs, **{k: v[-1] for k, v in self._metrics["train"].items()}}


def stock(folder, groups, tmp_path, **grpo):
    """Loss, gradient and metrics of stock TRL: one batch, unpacked."""
    conf = config(**grpo)
    model, tokenizer = load_model(folder, conf)
    gradients = Gradients()
    trainer = StockTrainer(
        groups,
        model=model,
        args=grpo_args(conf, output_dir=tmp_path / "stock", num_groups=len(groups)),
        processing_class=tokenizer,
        callbacks=[gradients],
    )
    trainer.args.save_strategy = SaveStrategy.NO
    trainer.train()
    return trainer.logged["loss"], gradients.vector, trainer.logged


def packed(folder, groups, tmp_path, **grpo):
    """Loss, gradient and metrics of the learner."""
    conf = config(**grpo)
    model, tokenizer = load_model(folder, conf)
    gradients, logged = Gradients(), {}
    trainer = build_trainer(
        model=model,
        tokenizer=tokenizer,
        config=conf,
        output_dir=tmp_path / "packed",
        fetch=lambda _: groups,
        publish=lambda *_: None,
        on_metrics=lambda _, metrics: logged.update(metrics),
        num_groups=len(groups),
    )
    trainer.add_callback(gradients)
    trainer.args.save_strategy = SaveStrategy.NO
    trainer.train()
    return logged.get("loss"), gradients.vector, logged


def own_logps(folder, group, weights=None):
    """What the model, with other weights if any are given, thinks of each completion of a group,
    token by token."""
    model, _ = load_model(folder, config())
    if weights is not None:
        model.load_state_dict(weights)
    found = []
    for answer in group.completions:
        ids = torch.tensor([group.prompt_ids + answer.token_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1]
        scores = torch.log_softmax(logits, -1)
        found.append(scores[range(len(answer.token_ids)), answer.token_ids])
    return found


def near_the_policy(folder, groups, spread=0.4):
    """The same groups as if a policy some steps away had sampled them, so that ratios clip."""
    rng = random.Random(1)
    near = []
    for group in groups:
        completions = []
        for answer, scores in zip(group.completions, own_logps(folder, group), strict=True):
            noisy = tuple(score + rng.gauss(0, spread) for score in scores.tolist())
            completions.append(replace(answer, logprobs=noisy))
        near.append(replace(group, completions=tuple(completions)))
    return near


def unsaid(group, *rows):
    """The group as if nobody had sampled these rows."""
    completions = [
        replace(answer, logprobs=None) if row in rows else answer
        for row, answer in enumerate(group.completions)
    ]
    times = tuple(0 if row in rows else n for row, n in enumerate(group.times_given))
    return replace(group, completions=tuple(completions), times_given=times)


TARGET = {"target_coef": 0.4, "target_temperature": 0.5}


def drawn_to_target(folder, group):
    """The group with the weights of its answers reckoned into its advantages by hand, and what
    weighs as in the policy of now sampled by that."""
    now = own_logps(folder, group)
    logps = [float(tokens.sum()) for tokens in now]
    alive = [row for row, ok in enumerate(group.valid) if ok]
    good = [row for row in alive if group.canonical[row]]
    num = sum(group.times_given[row] for row in alive)
    policy = {row: group.times_given[row] / num for row in alive if row not in good}
    rest = 1 - sum(policy.values())
    canonical = shares([logps[row] for row in good])
    policy |= {row: rest * p for row, p in zip(good, canonical, strict=True)}
    scaled = [group.advantages[row] / TARGET["target_temperature"] for row in good]
    target = dict(zip(good, shares(scaled), strict=True))
    mean = sum(p * group.advantages[row] for row, p in policy.items())
    advantages = [0.0] * GROUP_SIZE
    for row, p in policy.items():
        pull = TARGET["target_coef"] * (target.get(row, 0.0) - p)
        advantages[row] = GROUP_SIZE * (p * (group.advantages[row] - mean) + pull)
    completions = [
        replace(answer, logprobs=tuple(now[row].tolist())) if row in good else answer
        for row, answer in enumerate(group.completions)
    ]
    return replace(group, advantages=tuple(advantages), completions=tuple(completions))


def shares(logits):
    return torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()


@pytest.fixture(scope="module")
def groups(folder):
    return near_the_policy(folder, ragged_groups())


@pytest.fixture(scope="module")
def masked_groups(folder):
    return near_the_policy(folder, ragged_groups(masked=MASKED))


def assert_same(ours, theirs, *, loss_type=""):
    # VESPO's loss differs from model to model by rounding of either sign; its gradient does not.
    rounding = 1e-5 if loss_type == "vespo" else 2e-6
    assert ours[0] == pytest.approx(theirs[0], rel=2e-6, abs=rounding)
    assert (ours[1] - theirs[1]).norm() <= 1e-5 * theirs[1].norm()
    assert theirs[1].norm() > 1e-4


def test_the_list_of_loss_types_is_that_of_trl():
    import inspect

    source = inspect.getsource(GRPOTrainer._compute_loss)
    branches = re.findall(r"self\.loss_type (?:==|in) (\[[^\]]*\]|\"\w+\")", source)
    assert set(re.findall(r"\w+", " ".join(branches))) == LOSS_TYPES


@pytest.mark.parametrize("loss_type", sorted(LOSS_TYPES))
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_loss_and_gradient_are_those_of_stock_trl(folder, groups, tmp_path, loss_type, level):
    settings = {"loss_type": loss_type, "importance_sampling_level": level}
    settings["epsilon_high"] = 1.3 if loss_type == "cispo" else 0.28
    ours = packed(folder, groups, tmp_path, **settings)
    theirs = stock(folder, groups, tmp_path, **settings)
    assert_same(ours, theirs, loss_type=loss_type)
    if "clip_ratio/region_mean" in theirs[2]:
        assert theirs[2]["clip_ratio/region_mean"] > 0.05
        for name in ("clip_ratio/low_mean", "clip_ratio/high_mean"):
            assert ours[2][name] == pytest.approx(theirs[2][name], abs=1e-6)
    assert ours[2]["entropy"] == pytest.approx(theirs[2]["entropy"], abs=1e-4)


@pytest.mark.parametrize("loss_type", sorted(LOSS_TYPES))
def test_failed_rows_and_micro_batches_change_nothing(folder, masked_groups, tmp_path, loss_type):
    """Stock TRL sees one batch that the failed rows are not in."""
    settings = {"loss_type": loss_type, "entropy_coef": 0.05}
    theirs = stock(folder, masked_groups, tmp_path, **settings)
    for groups_per_micro_batch in (100, 2):
        settings["groups_per_micro_batch"] = groups_per_micro_batch
        ours = packed(folder, masked_groups, tmp_path, **settings)
        assert_same(ours, theirs, loss_type=loss_type)
        assert ours[2]["entropy"] == pytest.approx(theirs[2]["entropy"], abs=1e-4)


def test_a_micro_batch_in_which_all_failed_changes_nothing(folder, tmp_path):
    groups = near_the_policy(folder, ragged_groups(masked=[(0, r) for r in range(GROUP_SIZE)]))
    for loss_type in ("grpo", "bnpo", "dapo"):
        settings = {"loss_type": loss_type, "groups_per_micro_batch": 1, "entropy_coef": 0.05}
        without = packed(folder, groups[1:], tmp_path, **settings)
        assert_same(packed(folder, groups, tmp_path, **settings), without)


def test_the_entropy_bonus_is_trls(folder, groups, tmp_path):
    plain = packed(folder, groups, tmp_path)
    bonus = packed(folder, groups, tmp_path, entropy_coef=0.1)
    assert_same(bonus, stock(folder, groups, tmp_path, entropy_coef=0.1))
    assert bonus[0] == pytest.approx(plain[0] - 0.1 * plain[2]["entropy"], abs=1e-5)
    assert (bonus[1] - plain[1]).norm() > 1e-3 * plain[1].norm()


def test_what_nobody_sampled_is_trained_on_as_if_the_policy_had_said_it(folder, groups, tmp_path):
    first, *others = groups
    by_policy = [
        replace(answer, logprobs=tuple(logps.tolist()))
        for answer, logps in zip(first.completions, own_logps(folder, first), strict=True)
    ]
    said = replace(first, completions=tuple(by_policy))
    ours = packed(folder, [unsaid(said, 1, 2, 3), *others], tmp_path)
    theirs = packed(folder, [said, *others], tmp_path)
    assert_same(ours, theirs)
    assert ours[2]["num_tokens"] == theirs[2]["num_tokens"]


@pytest.fixture(scope="module")
def stale(folder, tmp_path_factory):
    """Two updates on what the first weights sampled, nothing clipped: the metrics of the second,
    what the gate was shown, the groups, and the weights that the second update began with."""
    groups = near_the_policy(folder, ragged_groups(), spread=0)
    conf = config(max_steps=2, learning_rate=1e-2, epsilon=1.0, epsilon_high=100.0)
    model, tokenizer = load_model(folder, conf)
    published, logged, shown = {}, {}, []

    def publish(state_dict, version):
        published[version] = {name: tensor.clone() for name, tensor in state_dict.items()}

    trainer = build_trainer(
        model=model,
        tokenizer=tokenizer,
        config=conf,
        output_dir=tmp_path_factory.mktemp("stale"),
        fetch=lambda _: groups,
        publish=publish,
        on_metrics=logged.__setitem__,
        before_update=lambda *seen: shown.append(seen),
        num_groups=len(groups),
    )
    trainer.args.save_strategy = SaveStrategy.NO
    trainer.train()
    return logged[2], shown, groups, published[1]


def test_a_stale_row_weighs_by_how_much_likelier_it_has_become(folder, stale):
    metrics, _, groups, weights = stale
    losses, advantages = [], []
    for group in groups:
        now = own_logps(folder, group, weights)
        for answer, logps, advantage in zip(group.completions, now, group.advantages, strict=True):
            ratio = (logps - torch.tensor(answer.logprobs)).exp()
            losses += (-ratio * advantage).tolist()
            advantages += [advantage] * len(logps)
    loss = sum(losses) / len(losses)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    # What a ratio of 1 would have given.
    assert abs(metrics["loss"] + sum(advantages) / len(advantages)) > 0.01


def test_the_gate_is_told_how_old_the_rows_are(stale):
    _, shown, *_ = stale
    assert [(step, staleness) for step, _, staleness in shown] == [(0, 0), (1, 1)]
    assert shown[0][1] < 1e-5 < 1e-3 < shown[1][1]


def test_answers_weigh_what_the_model_thinks_of_them(folder, masked_groups, tmp_path):
    mixed = [
        replace(group, canonical=tuple(row != number % GROUP_SIZE for row in range(GROUP_SIZE)))
        for number, group in enumerate(masked_groups)
    ]
    by_hand = packed(folder, [drawn_to_target(folder, g) for g in mixed], tmp_path)
    ours = packed(folder, mixed, tmp_path, **TARGET)
    assert_same(ours, by_hand)
    plain = packed(folder, mixed, tmp_path)
    # The gate is shown what was sampled, whatever it weighs.
    seen = "mismatch/mean_abs_logp_diff"
    assert ours[2][seen] == pytest.approx(plain[2][seen], rel=1e-5)
    assert ours[2][seen] > by_hand[2][seen]
    assert (by_hand[1] - plain[1]).norm() > 1e-2 * plain[1].norm()
    all_canonical = packed(folder, masked_groups, tmp_path, **TARGET)
    assert (by_hand[1] - all_canonical[1]).norm() > 1e-2 * all_canonical[1].norm()


def test_what_nobody_sampled_is_drawn_to_the_target_too(folder, groups, tmp_path):
    before = [unsaid(group, 1, 2) for group in groups]
    by_hand = [unsaid(drawn_to_target(folder, group), 1, 2) for group in groups]
    ours = packed(folder, before, tmp_path, **TARGET, groups_per_micro_batch=2)
    assert_same(ours, packed(folder, by_hand, tmp_path))


def test_figures_weigh_an_answer_by_how_often_it_was_given(folder, groups, tmp_path):
    """As if the batch held it as often."""
    group = unsaid(groups[0], 3)
    figures = packed(folder, [replace(group, times_given=(2, 1, 1, 0))], tmp_path)[2]
    first, *others = groups[0].completions[:3]
    as_often = replace(
        groups[0],
        completions=(first, first, *others),
        advantages=(0.0, 0.1, -0.1, 0.0),
    )
    alike = packed(folder, [as_often], tmp_path)[2]
    for name in ("entropy", "mismatch/mean_abs_logp_diff", "mismatch/mean_logp_diff"):
        assert figures[name] == pytest.approx(alike[name], rel=1e-5)
    assert figures["mismatch/mean_abs_logp_diff"] > 0.1


def test_the_entropy_bonus_is_over_what_the_policy_gave(folder, groups, tmp_path):
    mixed = [replace(unsaid(group, 1, 3), times_given=(3, 0, 1, 0)) for group in groups]
    plain = packed(folder, mixed, tmp_path)
    bonus = packed(folder, mixed, tmp_path, entropy_coef=0.1, groups_per_micro_batch=2)
    assert bonus[0] == pytest.approx(plain[0] - 0.1 * plain[2]["entropy"], abs=1e-5)


def test_the_kl_term_is_trls_once_the_policy_has_left_its_reference(folder, groups, tmp_path):
    # Three steps by the optimizer that stock TRL takes.
    settings = {"beta": 0.3, "learning_rate": 1e-2, "max_steps": 3, "muon_ratio": None}
    ours = packed(folder, groups, tmp_path, **settings)
    theirs = stock(folder, groups, tmp_path, **settings)
    assert ours[2]["kl"] == pytest.approx(theirs[2]["kl"], rel=1e-3)
    assert ours[2]["kl"] > 1e-3
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3)


def test_a_nan_stops_the_step_and_changes_nothing(folder, groups, tmp_path):
    conf = config()
    model, tokenizer = load_model(folder, conf)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = build_trainer(
        model=model,
        tokenizer=tokenizer,
        config=conf,
        output_dir=tmp_path,
        fetch=lambda _: groups,
        publish=lambda *_: None,
        on_metrics=lambda *_: None,
        num_groups=len(groups),
    )
    with pytest.raises(FloatingPointError, match="step 0"):
        trainer.train()
    after = model.state_dict()
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)


def test_an_unknown_loss_type_is_refused(folder, groups, tmp_path):
    with pytest.raises(UserError, match=r"grpo\.loss_type is 'ppo'"):
        packed(folder, groups, tmp_path, loss_type="ppo")


def test_the_state_dict_has_the_head_when_it_is_tied():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=True,
        )
    )
    state = full_state_dict(model)
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])


def rank_main(rank, folder, groups, out, settings):
    """One of two ranks, each of which takes its share of the groups."""
    for number, grpo in enumerate(settings):
        loss, gradient, logged = packed(folder, groups, out / str(number), **grpo)
        if rank == 0:
            torch.save((loss, gradient, logged), out / f"{number}.pt")


def test_two_ranks_take_the_step_of_one(folder, masked_groups, tmp_path):
    groups = [unsaid(group, 2) for group in masked_groups[:4]]
    settings = [
        {
            "loss_type": loss_type,
            "groups_per_micro_batch": 1,
            "entropy_coef": 0.05,
            "target_coef": 0.3,
            "importance_sampling_level": level,
        }
        for loss_type, level in (
            ("dapo", "token"),
            ("cispo", "token"),
            ("grpo", "sequence"),
            ("bnpo", "token"),
        )
    ]
    in_two_ranks(rank_main, folder, groups, tmp_path, settings)
    for number, grpo in enumerate(settings):
        loss, gradient, logged = torch.load(tmp_path / f"{number}.pt")
        one = packed(folder, groups, tmp_path, **{**grpo, "groups_per_micro_batch": 100})
        assert_same((loss, gradient), one)
        assert logged.keys() == one[2].keys()
        for name, value in one[2].items():
            if not name.startswith("learner/"):
                assert logged[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
