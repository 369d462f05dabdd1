from __future__ import annotations

import pickle

import pytest
from pydantic import ValidationError

from envs.errors import UserError
from rl_ft.config import Config
from rl_ft.recipe import load_config
from rl_ft.sections import GrpoConfig


def test_the_defaults_are_a_valid_configuration():
    assert Config.model_validate(Config().model_dump()) == Config()


def test_a_configuration_survives_json():
    assert Config.model_validate_json(Config().model_dump_json()) == Config()


def test_a_configuration_survives_pickling():
    assert pickle.loads(pickle.dumps(Config())) == Config()


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValidationError):
        Config().grpo.max_steps = 3


def test_an_unknown_key_is_an_error():
    with pytest.raises(ValidationError):
        GrpoConfig.model_validate({"max_step": 3})


def test_a_kl_term_needs_answers_that_the_policy_gave():
    with pytest.raises(ValidationError, match="counterfactuals to false"):
        Config.model_validate({"grpo": {"beta": 0.1}})
    Config.model_validate({"grpo": {"beta": 0.1}, "rollout": {"counterfactuals": False}})


def test_a_given_start_needs_a_model_that_was_trained():
    prepare = {"teachers": ["given"]}
    with pytest.raises(ValidationError, match="to its folder"):
        Config.model_validate({"prepare": prepare})
    Config.model_validate({"prepare": prepare, "model": {"name_or_path": "runs/best/model"}})


@pytest.mark.parametrize(
    ("num_learners", "muon_ratio", "says"),
    [(1, None, "num_learners is 1: set it to 2"), (2, 3.0, "muon_ratio to null")],
)
def test_shards_need_several_learners_and_adamw(num_learners, muon_ratio, says):
    ray = {"learner_sharding": "fsdp", "num_learners": num_learners}
    with pytest.raises(ValidationError, match=says):
        Config.model_validate({"ray": ray, "grpo": {"muon_ratio": muon_ratio}})
    ray |= {"num_learners": 2, "num_cpus": 5}
    Config.model_validate({"ray": ray, "grpo": {"muon_ratio": None}})


def test_the_baseline_must_play():
    evaluate = {"controllers": ["fixed"]}
    with pytest.raises(ValidationError, match="choose one of fixed, sft:max_pressure, grpo:max"):
        Config.model_validate({"evaluate": evaluate})
    Config.model_validate({"evaluate": evaluate | {"baseline": "sft:max_pressure"}})


def test_lookahead_tries_as_far_as_rewards_are_measured():
    config = Config.model_validate({"reward": {"horizon_s": 60}})
    assert config.lookahead_horizon_s == 60
    config = Config.model_validate({"evaluate": {"lookahead_horizon_s": 20}})
    assert config.lookahead_horizon_s == 20


def test_a_squashed_cost_wants_a_scale_of_its_own_from_a_recipe_too():
    with pytest.raises(UserError, match=r"set reward\.scale_veh_s"):
        load_config("smoke", ["reward.traffic=tanh"])
    load_config("smoke", ["reward.traffic=tanh", "reward.scale_veh_s=300"])


def test_the_engine_must_have_room_for_prompt_and_completion():
    with pytest.raises(ValidationError, match="max_model_len is 100"):
        Config.model_validate({"generation": {"max_model_len": 100}})


def test_what_chooses_the_model_must_not_judge_it():
    check = {"every_steps": 10, "scenarios": ["generated:900-904"]}
    judged = {"held_out": ["generated:902"]}
    with pytest.raises(ValidationError, match="share generated:902"):
        Config.model_validate({"check": check, "scenarios": judged})
    with pytest.raises(ValidationError, match="share generated:902"):
        Config.model_validate({"check": check, "scenarios": {"held_out": ["generated:902@5"]}})
    Config.model_validate({"check": check | {"every_steps": 0}, "scenarios": judged})


def test_what_makes_the_model_must_not_choose_or_judge_it():
    for held_out in ("generated:7", "generated:7@15"):
        scenarios = {"train": ["generated:1-8*2"], "held_out": [held_out]}
        with pytest.raises(ValidationError, match=r"share generated:7.* must be something else"):
            Config.model_validate({"scenarios": scenarios})
    check = {"every_steps": 10, "scenarios": ["generated:8"]}
    scenarios = {"train": ["generated:1-8"]}
    with pytest.raises(ValidationError, match=r"check\.scenarios and scenarios\.train share"):
        Config.model_validate({"check": check, "scenarios": scenarios})
    Config.model_validate({"check": check | {"every_steps": 0}, "scenarios": scenarios})


@pytest.mark.parametrize("section", ["check.scenarios", "scenarios.held_out"])
def test_what_judges_names_each_scenario_once(section):
    part, key = section.split(".")
    with pytest.raises(ValidationError, match=f"{section} names a scenario twice"):
        Config.model_validate({part: {key: ["generated:5*2"]}})
