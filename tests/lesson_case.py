"""Lessons of a task that needs no simulation, in a folder as `prepare` leaves it."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from rl_ft.dataset import MANIFEST_FILE, SCHEMA_VERSION

PHASES = ("A", "B", "C", "D")
ARMS = ("north", "east", "south", "west")


def answer(phase: str) -> str:
    return json.dumps({"phase": phase})


def junction_row(rng: random.Random, number: int) -> dict[str, Any]:
    """A junction in the dialect's words; the teacher serves the longest queue."""
    queues = [rng.randint(0, 9) for _ in PHASES]
    lines = [
        f"{phase} {queue} {queue + 2}: {arm} through+right {queue} 1 0 1 15, {arm} left yield empty"
        for phase, arm, queue in zip(PHASES, ARMS, queues, strict=True)
    ]
    lines += ["green A 12", "choose A B C D"]
    teacher = answer(PHASES[queues.index(max(queues))])
    return {
        "id": f"row/{number}",
        "messages": [
            {"role": "user", "content": "\n".join(lines)},
            {"role": "assistant", "content": teacher},
        ],
        "legal_answers": [answer(phase) for phase in PHASES],
        "cost_veh_s": {answer(p): -float(q) for p, q in zip(PHASES, queues, strict=True)},
    }


def write_rows(file: Path, *, num: int, seed: int = 0) -> Path:
    """A file of such rows that the manifest beside it vouches for."""
    rng = random.Random(seed)
    rows = [json.dumps(junction_row(rng, number)) + "\n" for number in range(num)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(rows))
    vouch(file)
    return file


def vouch(file: Path) -> None:
    """Make the manifest, which there may not be yet, say that a file is as it is now."""
    place = file.with_name(MANIFEST_FILE)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "seed": 1,
        "rl_ft": "0",
        "sumo": "none",
        "settings": {
            "decision_format": "phase",
            "instructions": False,
            "horizon_s": 30.0,
            "follow": "max_wave",
            "time_loss": 1.0,
            "junction_time_loss": 0.0,
            "halting": 0.0,
            "lookahead_temperature_veh_s": 6.0,
        },
        "scenarios": {},
        "files": {},
    }
    if place.is_file():
        manifest = json.loads(place.read_text())
    content = file.read_bytes()
    manifest["files"][file.name] = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "rows": len(content.splitlines()),
    }
    place.write_text(json.dumps(manifest))
