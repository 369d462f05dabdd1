"""The source tree as it travels to a cluster: which files, in one archive, and what they need.

The tree is the checkout that holds this package; without one (an installed package) it is the two
packages alone.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from envs.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("envs", "rl_ft")
LEFT_OUT = (
    ".*",
    "__pycache__",
    "*.pyc",
    "*.egg-info",
    "build",
    "dist",
    "runs",
    "integration",
    "testdata",
)
"""Names that stay here. Hidden files are history, environments, caches, and secrets at worst."""
UNPACKED = "${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"
"""What Ray calls the unpacked tree while it installs requirements."""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MAX_BYTES = 512 * 2**20
"""What Ray takes as the working directory of a job."""


def source_files(root: Path = ROOT) -> Iterator[Path]:
    """The files that travel, in order; no run folder, no environment, nothing that was built."""
    tops = [root] if is_checkout(root) else [root / name for name in PACKAGES]
    for top in tops:
        for place, folders, files in os.walk(top):
            folder = Path(place)
            folders[:] = sorted(name for name in folders if not _stays(folder / name))
            chosen = (folder / name for name in sorted(files) if not _left_out(name))
            yield from (file for file in chosen if file.is_file())


def is_checkout(root: Path = ROOT) -> bool:
    """A source tree, not a place where packages are installed."""
    return (root / "pyproject.toml").is_file()


def pack(archive: Path, root: Path = ROOT, *, max_bytes: int = MAX_BYTES) -> Path:
    """Write the files that travel to a zip file; the same files give the same archive.

    Raises:
        UserError: they are more than Ray takes.
    """
    sizes = {file: file.stat().st_size for file in source_files(root)}
    total = sum(sizes.values())
    if total > max_bytes:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
        named = ", ".join(f"{f.relative_to(root)} ({_mib(sizes[f])} MiB)" for f in largest)
        raise UserError(
            f"the source tree {root} has {_mib(total)} MiB of files, and a job may carry "
            f"{_mib(max_bytes)} MiB; the largest are {named}: move them out of the tree"
        )
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as out:
        for file in sizes:
            out.write(file, file.relative_to(root))
    return archive


def requirements(extra: str, root: Path = ROOT) -> list[str]:
    """Lines of a pip requirements file: what the tree needs with the extra `cpu` or `gpu`; every
    version, also of what these need in turn, is that of constraints.txt.

    Raises:
        UserError: there is no such extra, or no checkout.
    """
    import tomllib

    if not is_checkout(root):
        raise UserError(f"--pip takes versions from a checkout, and {root} is none; leave it out")
    if extra not in ("cpu", "gpu"):
        raise UserError(f"--pip {extra}: expected cpu or gpu, the builds of vLLM and torch")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["train"], *extras[extra], *extras["resco"]]
    own = project["name"]
    where = [f"--extra-index-url {CPU_INDEX}"] if extra == "cpu" else []
    return [
        f"--constraint {UNPACKED}/constraints.txt",
        *where,
        *(line for line in wanted if not line.startswith(f"{own}[")),
    ]


def _stays(folder: Path) -> bool:
    run = (folder / "manifest.json").is_file() and (folder / "config.yaml").is_file()
    return _left_out(folder.name) or run or (folder / "pyvenv.cfg").is_file()


def _left_out(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in LEFT_OUT)


def _mib(size: int) -> int:
    return -(-size // 2**20)
