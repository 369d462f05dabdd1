"""Checkpoints of the learner on disk: whole or not there, sealed with their hashes, a few kept.

A checkpoint is written aside and renamed, so one that was being written when the machine failed
has another name. One that was altered since is found out by its seal and passed over for the one
before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

log = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
SEAL_FILE = "seal.json"


def admit(incomplete: Path, checkpoint: Path, *, keep: int) -> None:
    """Seal what was written aside and let it appear under its name; forget all but the `keep`
    newest."""
    seal = {file.name: _hash(file) for file in _files(incomplete)}
    (incomplete / SEAL_FILE).write_text(json.dumps(seal, indent=1), encoding="utf-8")
    shutil.rmtree(checkpoint, ignore_errors=True)
    os.replace(incomplete, checkpoint)
    for step in checkpoint_steps(checkpoint.parent)[:-keep]:
        shutil.rmtree(checkpoint.parent / f"checkpoint-{step}")


def checkpoint_steps(output_dir: str | Path) -> list[int]:
    """Steps of which there are checkpoints, in order, whether or not they are as written."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for p in folder.iterdir() if (m := CHECKPOINT.fullmatch(p.name)))


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest that is as it was written; others are named in a warning. None without any."""
    for step in reversed(checkpoint_steps(output_dir)):
        checkpoint = Path(output_dir, f"checkpoint-{step}")
        broken = _broken(checkpoint)
        if broken is None:
            return checkpoint
        log.warning("%s is passed over for the one before: %s", checkpoint, broken)
    return None


def _broken(checkpoint: Path) -> str | None:
    """What is not as it was written; None: nothing."""
    try:
        seal = json.loads((checkpoint / SEAL_FILE).read_bytes())
    except (OSError, ValueError) as error:
        return f"its {SEAL_FILE} cannot be read ({error})"
    for name, written in seal.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if _hash(file) != written:
            return f"{name} is not as it was written"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file())


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()
