from __future__ import annotations

import pytest
from rich.console import Console

from envs.errors import UserError
from rl_ft import doctor
from rl_ft.doctor import Check, attempt, examine
from rl_ft.recipe import load_config


def shown(monkeypatch, config, checks):
    monkeypatch.setattr(doctor, "CHECKS", checks)
    console = Console(width=160, record=True, quiet=False)
    fit = examine(console, config)
    return fit, console.export_text()


@pytest.mark.parametrize("name", ["Python", "packages", "SUMO", "exact branching", "GPU"])
def test_this_machine_passes(name, smoke_config):
    result = attempt(doctor.CHECKS[name], smoke_config)
    assert result.ok, result.found


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_ray_has_room_for_the_loop(smoke_config):
    assert attempt(doctor.CHECKS["Ray"], smoke_config).ok


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_loop_larger_than_the_cluster_is_told_how_many_cpus_it_needs():
    config = load_config("smoke", ["ray.cpus_per_learner=64", "ray.address=auto"])
    result = attempt(doctor.CHECKS["Ray"], config)
    assert not result.ok
    assert "ray.num_cpus=66" in result.fix


@pytest.mark.vllm
def test_a_change_of_the_weights_reaches_the_sampler(smoke_config):
    result = attempt(doctor.CHECKS["parity"], smoke_config)
    assert result.ok, result.found
    assert "nats per token" in result.found


def test_the_table_says_what_is_wrong_and_how_to_mend_it(monkeypatch, smoke_config):
    checks = {
        "good": lambda config: Check(ok=True, found="fine", fix="nothing to do"),
        "bad": lambda config: Check(ok=False, found="broken", fix="mend it"),
    }
    fit, text = shown(monkeypatch, smoke_config, checks)
    assert not fit
    assert "broken" in text
    assert "mend it" in text
    assert "nothing to do" not in text


def test_a_machine_is_fit_when_every_check_is_ok(monkeypatch, smoke_config):
    fit, text = shown(monkeypatch, smoke_config, {"good": lambda config: Check(ok=True, found="1")})
    assert fit
    assert "good" in text


def test_a_check_that_raises_has_failed(smoke_config):
    def check(config):
        raise UserError("no such program\nat all")

    result = attempt(check, smoke_config)
    assert not result.ok
    assert result.found == "UserError: no such program"


def test_a_missing_or_untested_package_is_named(monkeypatch, smoke_config):
    requirements = ["numpy>=1000", "no-such-package>=1; extra == 'train'", "pydantic>=2"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requirements)
    result = attempt(doctor.CHECKS["packages"], smoke_config)
    assert not result.ok
    assert "numpy" in result.found
    assert "no-such-package missing (tested >=1)" in result.found
    assert "pydantic" not in result.found


def test_an_untested_python_is_named(monkeypatch, smoke_config):
    monkeypatch.setattr(doctor.platform, "python_version_tuple", lambda: ("3", "14", "0"))
    assert not attempt(doctor.CHECKS["Python"], smoke_config).ok


def test_a_branch_that_differs_is_caught(monkeypatch, smoke_config):
    from envs.world import World

    play = World.play
    monkeypatch.setattr(World, "play", lambda self, action, h, f: play(self, action, h - 10, f))
    result = attempt(doctor.CHECKS["exact branching"], smoke_config)
    assert not result.ok
    assert "differs" in result.found


def test_a_gpu_build_without_a_gpu_is_named(monkeypatch, smoke_config):
    import torch

    monkeypatch.setattr(doctor, "_version", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in attempt(doctor.CHECKS["GPU"], smoke_config).found
