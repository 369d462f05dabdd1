"""Muon for hidden matrices and AdamW for the rest act as one optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from grpo_case import model_folder
from transformers import AutoModelForCausalLM

from rl_ft.optimizer import MuonAdamW


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("optimizer"))


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def optimizer_of(model, **changes):
    settings = {"lr": 1e-3, "muon_ratio": 3.0, "betas": (0.9, 0.99), "weight_decay": 0.0}
    return MuonAdamW(model, **{**settings, **changes})


def one_step(model, optimizer, seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(5, 200, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_every_parameter_is_trained_once_and_only_hidden_matrices_by_muon(model):
    muon, adam = optimizer_of(model).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon = {names[id(parameter)] for parameter in muon["params"]}
    by_adam = {names[id(parameter)] for parameter in adam["params"]}
    assert by_muon | by_adam == set(names.values())
    assert not by_muon & by_adam
    assert by_muon == {n for n in names.values() if n.endswith("_proj.weight")}


def test_a_step_moves_every_tensor(model):
    before = weights(model)
    one_step(model, optimizer_of(model))
    assert all(not torch.equal(before[name], tensor) for name, tensor in weights(model).items())


def test_a_rate_of_zero_moves_nothing(model):
    before = weights(model)
    one_step(model, optimizer_of(model, lr=0.0))
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())


def test_a_schedule_scales_both_rates(model):
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    one_step(model, optimizer)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1.5e-3, 5e-4])


def test_a_restored_optimizer_goes_on_as_if_nothing_had_happened(folder, model):
    optimizer = optimizer_of(model)
    one_step(model, optimizer)
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    twin.load_state_dict(model.state_dict())
    restored = optimizer_of(twin, lr=0.5)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its_optimizer in ((model, optimizer), (twin, restored)):
        one_step(each, its_optimizer, seed=1)
    theirs = weights(twin)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(model).items())


def test_a_model_of_which_only_an_adapter_is_trained_is_all_matrices(model):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    [muon] = optimizer_of(adapted).param_groups
    assert len(muon["params"]) == sum(p.requires_grad for p in adapted.parameters()) > 0
