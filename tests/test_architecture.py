"""The layout of the design as data: who may import what, and how large anything may get."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for package in ("envs", "rl_ft")
    for file in sorted((ROOT / package).rglob("*.py"))
}

OWNERS = {
    "libsumo": {"envs.sumo", "envs.layout", "envs.ledger", "envs.detectors"},
    "numpy": {"envs.metrics", "rl_ft.weights", "rl_ft.learner"},
    "pydantic": {
        "rl_ft.config",
        "rl_ft.sections",
        "rl_ft.recipe",
        "rl_ft.rows",
        "rl_ft.dataset",
        "rl_ft.memory",
    },
    "yaml": {"rl_ft.recipe", "rl_ft.run_folder", "rl_ft.space", "rl_ft.sweep_folder"},
    "typer": {"rl_ft.cli", "rl_ft.cluster_cli"},
    "psutil": {"rl_ft.monitor", "rl_ft.run_folder"},
    "tensorboard": {"rl_ft.sinks"},
    "mlflow": {"rl_ft.sinks"},
    "wandb": {"rl_ft.sinks"},
    "matplotlib": {"rl_ft.plots"},
    "jinja2": {"rl_ft.report"},
    "tokenizers": {"rl_ft.tiny"},
    "transformers": {
        "rl_ft.tiny",
        "rl_ft.render",
        "rl_ft.sft",
        "rl_ft.learner",
        "rl_ft.trainer",
        "rl_ft.packing",
        "rl_ft.parity",
        "rl_ft.optimizer",
    },
    "trl": {"rl_ft.sft", "rl_ft.learner", "rl_ft.trainer"},
    "peft": {"rl_ft.adapter", "rl_ft.merging", "rl_ft.trainer"},
    "datasets": {"rl_ft.sft", "rl_ft.trainer"},
    "vllm": {"rl_ft.generation", "rl_ft.transfer", "rl_ft.receiving"},
    "torch": {
        "rl_ft.adapter",
        "rl_ft.merging",
        "rl_ft.tiny",
        "rl_ft.batch",
        "rl_ft.packing",
        "rl_ft.sft",
        "rl_ft.learner",
        "rl_ft.trainer",
        "rl_ft.weights",
        "rl_ft.generation",
        "rl_ft.optimizer",
        "rl_ft.sharding",
        "rl_ft.step_sums",
        "rl_ft.target",
        "rl_ft.parity",
        "rl_ft.doctor",
        "rl_ft.transfer",
        "rl_ft.receiving",
    },
    "ray": {
        "rl_ft.cluster",
        "rl_ft.link",
        "rl_ft.actors",
        "rl_ft.crew",
        "rl_ft.learner",
        "rl_ft.run",
        "rl_ft.sft",
        "rl_ft.evaluate",
        "rl_ft.doctor",
        "rl_ft.sweep",
        "rl_ft.sinks",
        "rl_ft.submit",
        "rl_ft.serving",
    },
    "fastapi": {"rl_ft.serving"},
    "fsspec": {"rl_ft.mirror"},
    "aiohttp": {"rl_ft.submit"},
    # Of a branch, from the process that was forked for it; never a file.
    "pickle": {"envs.fork"},
}
"""A heavy, shaping or dangerous library, and the modules that may import it."""

NEVER_IN_ENVS = {"rl_ft", "ray", "torch", "transformers", "vllm", "trl", "peft", "pyarrow"}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "manager"}
MAX_FILE_LINES = 420
MAX_FUNCTION_LINES = 60


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker sees."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(child):
            yield from running_nodes(child)


@cache
def imports(module: str) -> frozenset[str]:
    """Dotted names that a module imports, inside functions too; of our own, the modules."""
    found = set()
    for node in running_nodes(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            source = node.module or ""
            members = {f"{source}.{alias.name}" for alias in node.names}
            found |= (members & MODULES.keys()) or {source}
    return frozenset(found)


@cache
def functions(module: str) -> tuple[ast.FunctionDef | ast.AsyncFunctionDef, ...]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return tuple(node for node in ast.walk(tree(module)) if isinstance(node, kinds))


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_a_library_is_imported_by_its_owners_alone(library):
    importers = {m for m in MODULES if library in {name.split(".")[0] for name in imports(m)}}
    assert importers <= OWNERS[library]


def test_envs_stands_alone():
    tops = {
        (module, name.split(".")[0])
        for module in MODULES
        if module.startswith("envs")
        for name in imports(module)
    }
    assert not {(module, top) for module, top in tops if top in NEVER_IN_ENVS}


def test_the_module_graph_has_no_cycle():
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in finished:
            for other in sorted(imports(module) & MODULES.keys()):
                visit(other, (*path, module))
            finished.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_short_and_named_for_one_thing(module):
    assert MODULES[module].stem not in FORBIDDEN_NAMES
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) < MAX_FILE_LINES


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module):
    for function in functions(module):
        lines = (function.end_lineno or 0) - function.lineno + 1
        first = function.body[0]
        if ast.get_docstring(function) is not None:
            lines -= (first.end_lineno or 0) - first.lineno + 1
        assert lines <= MAX_FUNCTION_LINES, f"{module}.{function.name} has {lines} lines"


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_is_documented(module):
    assert ast.get_docstring(tree(module)) or not tree(module).body, f"{module} says nothing"
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    public = [n for n in tree(module).body if isinstance(n, kinds) and n.name[0] != "_"]
    assert not [node.name for node in public if not ast.get_docstring(node)]


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_annotated(module):
    bare = []
    for function in functions(module):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        named = [a for a in named if a.arg not in ("self", "cls")]
        if function.returns is None or any(a.annotation is None for a in named):
            bare.append(function.name)
    assert not bare


def test_the_tree_holds_no_module_with_a_catch_all_name():
    names = {file.stem for folder in ("tests", "scripts") for file in (ROOT / folder).rglob("*.py")}
    assert not names & FORBIDDEN_NAMES


def test_pinned_versions_lie_within_the_ranges_of_the_package():
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [extras[name] for name in ("train", "cpu", "mlflow", "wandb", "bench", "dev")]
    wanted = [*project["dependencies"], *(text for extra in named for text in extra)]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for requirement in map(Requirement, wanted):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_continuous_integration_runs_the_test_command_of_the_readme():
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command == "exec ./scripts/test.sh"
