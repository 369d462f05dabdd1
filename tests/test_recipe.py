from __future__ import annotations

import pytest

from envs.errors import UserError
from rl_ft.config import Config
from rl_ft.recipe import (
    DEFAULT_RECIPE,
    differences,
    flatten,
    load_config,
    read_config,
    recipe_names,
)


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_builds(name):
    assert load_config(name).recipe == name


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_only_what_differs_from_the_defaults(name, tmp_path):
    from importlib import resources

    import yaml

    text = (resources.files("rl_ft") / "recipes" / f"{name}.yaml").read_text()
    said = set(flatten(yaml.safe_load(text)))
    assert said <= set(differences(Config(), load_config(name)))


def test_the_default_recipe_ships():
    assert DEFAULT_RECIPE in recipe_names()


def test_without_a_recipe_there_are_the_defaults():
    assert load_config(None) == Config()


def test_overrides_come_after_the_recipe_and_the_seed_after_them():
    config = load_config("smoke", ["grpo.max_steps=7", "seed=5"], seed=9)
    assert (config.grpo.max_steps, config.seed, config.grpo.num_generations) == (7, 9, 4)


def test_the_last_override_of_a_key_wins():
    assert load_config(None, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("grpo.learning_rate=1e-3", "grpo.learning_rate", 1e-3),
        ("model.lora={r: 4}", "model.lora.r", 4),
        ("model.lora.r=8", "model.lora.r", 8),
        ("prepare.teachers=[lookahead]", "prepare.teachers", ["lookahead"]),
        ("ray.address=null", "ray.address", None),
        ("generation.reproducible=true", "generation.reproducible", True),
    ],
)
def test_an_override_is_typed_as_yaml(override, key, value):
    assert flatten(load_config(None, [override]).model_dump(mode="json"))[key] == value


def test_a_nested_override_leaves_its_neighbours_at_the_section_s_own_defaults():
    behaviour = load_config(None, ["rollout.behaviour.policy=0.5"]).rollout.behaviour
    expected = Config().rollout.behaviour.model_copy(update={"policy": 0.5})
    assert behaviour == expected


def test_a_recipe_may_be_a_file_and_is_named_after_it(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("grpo: {max_steps: 3}\n")
    config = load_config(str(file))
    assert (config.recipe, config.grpo.max_steps) == ("mine", 3)


def test_an_empty_file_changes_nothing_but_the_name(tmp_path):
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing\n")
    assert set(differences(Config(), read_config(file))) == {"recipe"}


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        ("tiny-gpu", [], "recipe tiny-gpu is neither a file nor one of .*; did you mean tiny-cpu"),
        (None, ["grpo.max_stps=1"], "no key grpo.max_stps; did you mean grpo.max_steps"),
        (None, ["learning_rate=1"], "did you mean sft.learning_rate or grpo.learning_rate"),
        (None, ["gropo.max_steps=1"], "no key gropo; did you mean grpo"),
        (None, ["zzz=1"], "the top level knows recipe, seed"),
        (None, ["model.lora.q=8"], "no key model.lora.q"),
        (None, ["grpo.max_steps=abc"], "grpo.max_steps should be a whole number, got 'abc'"),
        (None, ["grpo.max_steps=0"], "grpo.max_steps should be greater than 0, got 0"),
        (None, ["grpo=3"], "grpo should be a section of keys with values, got 3"),
        (None, ["grpo.max_steps.x=3"], "grpo.max_steps should be a whole number"),
        (None, ["prepare.teachers=lookahead"], "prepare.teachers should be a list"),
        (None, ["prepare.teachers=[nobody]"], "'lookahead' or 'given', got 'nobody'"),
        (None, ["grpo.max_steps"], "expected key.path=value"),
        (None, ["=3"], "expected key.path=value"),
        (None, ["grpo.max_steps=[1"], "--set grpo.max_steps=.1: the value is not valid YAML"),
        (None, ["generation.max_model_len=100"], "generation.max_model_len is 100, but"),
    ],
)
def test_what_does_not_fit_is_one_sentence_that_names_it(recipe, overrides, expected):
    with pytest.raises(UserError, match=expected) as caught:
        load_config(recipe, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"grpo: [1", "is not valid YAML"),
        (b"- 1\n- 2\n", "expected keys with values, got list"),
        (b"1: 2\n", "expected keys with values"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        (b"grpo: {max_steps: many}", "wrong.yaml: grpo.max_steps should be a whole number"),
    ],
)
def test_a_broken_file_is_named(content, expected, tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=expected):
        load_config(str(file))


def test_the_message_names_the_override_that_was_wrong_not_the_recipe():
    with pytest.raises(UserError, match=r"^--set grpo.max_steps=-1: grpo.max_steps"):
        load_config("smoke", ["seed=3", "grpo.max_steps=-1"])
