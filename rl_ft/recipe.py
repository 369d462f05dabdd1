"""From a recipe's name or file and `--set` overrides to one checked `Config`.

A recipe is a small YAML file with only what differs from the defaults. Whatever does not fit is a
`UserError` that names where it was said and the nearest key that exists. Runs nothing.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from envs.errors import UserError
from rl_ft.config import Config

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

DEFAULT_RECIPE = "tiny-cpu"

_EXPECTED = {
    "model_type": "a section of keys with values",
    "tuple_type": "a list",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
}
"""What pydantic's error types mean to somebody who writes YAML."""

Tree = dict[str, Any]


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that ship with the package, in order."""
    folder = resources.files("rl_ft") / "recipes"
    return tuple(sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml")))


def purpose(name: str) -> str:
    """What a shipped recipe is for: the first sentence of the comment that it begins with."""
    said = itertools.takewhile(lambda line: line.startswith("#"), _text(name).splitlines())
    return " ".join(line.removeprefix("# ") for line in said).partition(". ")[0].rstrip(".") + "."


def load_config(
    recipe: str | None, overrides: Sequence[str] = (), *, seed: int | None = None
) -> Config:
    """The defaults, then the recipe, then the overrides in order, then the seed.

    `recipe` is a shipped name or a YAML file; None means the bare defaults. An override is
    `key.path=value` with the value in YAML.

    Example:
        load_config("tiny-cpu", ["grpo.max_steps=40", "model.lora={r: 8}"], seed=7)
    """
    sources: list[tuple[str, Tree]] = []
    if recipe is not None:
        name, tree = _read(recipe)
        sources.append((f"recipe {recipe}", {"recipe": name} | tree))
    sources += [(f"--set {text}", _override(text)) for text in overrides]
    if seed is not None:
        sources.append((f"--seed {seed}", {"seed": seed}))
    # Over the dumped defaults, not the classes': one section may differ from another of its class.
    tree = Config().model_dump(mode="json")
    said: dict[str, str] = {}
    for source, changes in sources:
        _check_keys(source, changes)
        _merge(tree, changes)
        said |= dict.fromkeys(flatten(changes), source)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error.errors()[0], said)) from error


def read_config(file: Path) -> Config:
    """The configuration that a run folder or a user keeps in `file`."""
    return load_config(str(file))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key; an empty mapping is a leaf."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def differences(ours: Config, theirs: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two configurations differ, with both values."""
    left, right = (flatten(config.model_dump(mode="json")) for config in (ours, theirs))
    keys = [key for key in left | right if left.get(key) != right.get(key)]
    return {key: (left.get(key), right.get(key)) for key in keys}


def _read(recipe: str) -> tuple[str, Tree]:
    names = recipe_names()
    if recipe in names:
        return recipe, _parse(_text(recipe), f"recipe {recipe}")
    file = Path(recipe)
    if file.is_file():
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"recipe {recipe} cannot be read as text: {error}") from error
        return file.stem, _parse(text, f"recipe {recipe}")
    raise UserError(
        f"recipe {recipe} is neither a file nor one of {', '.join(names)}" + nearest(recipe, names)
    )


def _text(name: str) -> str:
    return (resources.files("rl_ft") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def _parse(text: str, source: str) -> Tree:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise UserError(f"{source}: expected keys with values, got {type(tree).__name__}")
    return tree


def _override(text: str) -> Tree:
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {text}: expected key.path=value, like grpo.max_steps=40")
    try:
        tree = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(
            f"--set {text}: the value is not valid YAML: {' '.join(str(error).split())}"
        ) from error
    for key in reversed(keys):
        tree = {key: tree}
    return tree


def _merge(tree: Tree, changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = dict(value) if isinstance(value, Mapping) else value


def _check_keys(source: str, changes: Tree) -> None:
    """Unknown keys are found here, before merging, so that the message names their source."""
    for path in _paths(changes):
        model: type[BaseModel] | None = Config
        for depth, key in enumerate(path):
            if model is None:
                break  # a value where a section was expected: left to the type check
            if key not in model.model_fields:
                raise UserError(_unknown(source, path[: depth + 1], model))
            model = _section(model, key)


def _paths(tree: Mapping[Any, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        path = (*prefix, str(key))
        if isinstance(value, Mapping) and value:
            yield from _paths(value, path)
        else:
            yield path


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The model behind a field, also where it may be None; no model for a plain value."""
    annotation = model.model_fields[key].annotation
    options = (annotation, *getattr(annotation, "__args__", ()))
    sections = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
    return sections[0] if sections else None


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for key in model.model_fields:
        section = _section(model, key)
        yield f"{prefix}{key}"
        if section is not None:
            yield from _all_keys(section, f"{prefix}{key}.")


def _unknown(source: str, path: Sequence[str], model: type[BaseModel]) -> str:
    key = path[-1]
    parent = "".join(f"{p}." for p in path[:-1])
    every = list(_all_keys(Config))
    near = difflib.get_close_matches(key, list(model.model_fields), n=1, cutoff=0.6)
    elsewhere = [k for k in every if k.rsplit(".", 1)[-1] == key]
    nearest = [f"{parent}{near[0]}"] if near else elsewhere
    nearest = nearest or difflib.get_close_matches(".".join(path), every, n=1, cutoff=0.75)
    hint = (
        f"; did you mean {' or '.join(nearest)}?"
        if nearest
        else f"; {parent.rstrip('.') or 'the top level'} knows {', '.join(model.model_fields)}"
    )
    return f"{source}: there is no key {'.'.join(path)}{hint}"


def nearest(word: str, words: Sequence[str]) -> str:
    """A hint at the known word that was probably meant, or nothing."""
    near = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _explain(error: ErrorDetails, said: Mapping[str, str]) -> str:
    """One sentence: where it was said, the key, what was expected and what came."""
    path = [str(part) for part in error["loc"]]
    if not path:
        return (
            f"the configuration does not fit together: {error['msg'].removeprefix('Value error, ')}"
        )
    # Members of unions and tuples add parts to the location that are no keys.
    every = set(_all_keys(Config))
    while len(path) > 1 and ".".join(path) not in every:
        path.pop()
    key = ".".join(path)
    came = error["input"]
    source = next((said[k] for k in reversed(said) if k == key or k.startswith(f"{key}.")), None)
    source = source or next((said[k] for k in reversed(said) if key.startswith(f"{k}.")), "")
    where = f"{source}: " if source else ""
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    expected = _EXPECTED.get(error["type"], f"{message[0].lower()}{message[1:]}")
    return f"{where}{key} should be {expected}, got {came!r}"
