"""The search space: what may be written down, and the points that come out of it."""

from __future__ import annotations

import pytest

from envs.errors import UserError
from rl_ft.space import parse_space, read_space

EVERY_KIND = {
    "grpo.learning_rate": {"loguniform": [0.0005, 0.005]},
    "grpo.epsilon": {"uniform": [0.1, 0.3]},
    "grpo.max_steps": {"randint": [10, 12]},
    "grpo.num_generations": {"choice": [4, 8]},
    "reward.horizon_s": {"grid": [30, 60]},
    "sft.num_train_epochs": 2,
}


def points(tree, num_samples=1, seed=1):
    return parse_space(tree, source="space.yaml").points(num_samples, seed)


def test_a_file_is_read_with_its_fixed_keys(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text("grpo.num_generations: {choice: [4, 8]}\nsft.num_train_epochs: 2  # fixed\n")
    space = read_space(file)
    assert [d.key for d in space.dimensions] == ["grpo.num_generations"]
    assert space.fixed == {"sft.num_train_epochs": 2}


def test_the_same_seed_gives_the_same_points():
    assert points(EVERY_KIND, 5, seed=3) == points(EVERY_KIND, 5, seed=3)


def test_another_seed_gives_other_points():
    assert points(EVERY_KIND, 5, seed=3) != points(EVERY_KIND, 5, seed=4)


def test_more_samples_only_add_points():
    assert points(EVERY_KIND, 6)[:6] == points(EVERY_KIND, 3)


def test_a_key_is_drawn_alike_whatever_else_is_tried():
    alone = points({"grpo.learning_rate": EVERY_KIND["grpo.learning_rate"]}, 4)
    among = points({k: v for k, v in EVERY_KIND.items() if k != "reward.horizon_s"}, 4)
    assert [p["grpo.learning_rate"] for p in alone] == [p["grpo.learning_rate"] for p in among]


def test_keys_are_drawn_apart_from_each_other():
    tree = {key: {"uniform": [0, 1]} for key in ("grpo.epsilon", "grpo.epsilon_high")}
    found = points(tree, 200)
    below = [(p["grpo.epsilon"] < 0.5) == (p["grpo.epsilon_high"] < 0.5) for p in found]
    assert 70 < sum(below) < 130


def test_every_draw_is_made_at_every_point_of_the_grid():
    found = points(EVERY_KIND | {"sft.label_noise": {"grid": [0, 0.1, 0.2]}}, 3)
    assert len(found) == 3 * 2 * 3
    drawn = {(p["grpo.learning_rate"], p["grpo.epsilon"], p["grpo.max_steps"]) for p in found}
    assert len(drawn) == 3


def test_no_point_comes_twice():
    found = points({"grpo.num_generations": {"choice": [4, 8]}}, 50)
    assert sorted(p["grpo.num_generations"] for p in found) == [4, 8]


def test_draws_stay_within_their_ends_and_reach_both():
    found = points(EVERY_KIND, 200)
    rates = [p["grpo.learning_rate"] for p in found]
    assert 0.0005 <= min(rates) < 0.0006
    assert 0.004 < max(rates) <= 0.005
    assert {p["grpo.max_steps"] for p in found} == {10, 11, 12}


def test_loguniform_is_even_over_orders_of_magnitude():
    found = points({"grpo.learning_rate": {"loguniform": [1e-6, 1e-2]}}, 400)
    below = sum(p["grpo.learning_rate"] < 1e-4 for p in found)
    assert 160 < below < 240


def test_drawn_numbers_are_short():
    for point in points(EVERY_KIND, 20):
        assert len(f"{point['grpo.learning_rate']:.12g}".lstrip("0.")) <= 4


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"grpo.epsilon": {"normal": [0, 1]}}, "grpo.epsilon should be .* uniform, loguniform"),
        ({"grpo": {"epsilon": {"grid": [1]}}}, "keys are dotted"),
        ({"grpo.epsilon": {"grid": [1], "choice": [2]}}, "grpo.epsilon should be one value or"),
        ({"grpo.epsilon": {"grid": []}}, "grpo.epsilon: grid wants a list of values"),
        ({"grpo.epsilon": {"choice": "abc"}}, "grpo.epsilon: choice wants a list"),
        ({"grpo.epsilon": {"uniform": [1]}}, "grpo.epsilon: uniform wants two numbers"),
        ({"grpo.epsilon": {"uniform": [2, 1]}}, "the lower end first, got .2, 1."),
        ({"grpo.epsilon": {"uniform": ["1e-3", 1]}}, "YAML reads 1e-3 as text"),
        ({"grpo.epsilon": {"loguniform": [0, 1]}}, "wants ends above 0"),
        ({"grpo.max_steps": {"randint": [1, 2.5]}}, "wants two whole numbers"),
        ({"grpo.max_steps": 3}, "every key has one value"),
        ({"check.seeds": {"grid": [1, 2]}}, "trials are compared by it"),
        ({"evaluate.fallback": {"grid": ["fixed"]}}, "trials are compared by it"),
        ({"ray.num_cpus": {"grid": [1, 2]}}, "where it works, not how it learns"),
    ],
)
def test_what_does_not_fit_is_one_sentence_that_names_the_key(tree, expected):
    with pytest.raises(UserError, match=expected) as caught:
        points(tree)
    assert str(caught.value).startswith("space.yaml: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [1", "is not valid YAML"),
        ("- 1", "expected keys with what to try, like .*, got list"),
        ("", "expected keys with what to try"),
    ],
)
def test_a_file_that_is_no_space_is_said_to_be_none(tmp_path, content, expected):
    file = tmp_path / "space.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=expected):
        read_space(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml cannot be read"):
        read_space(tmp_path / "nowhere.yaml")
