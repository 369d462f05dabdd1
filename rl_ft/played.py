"""The episodes of an evaluation, a line each as soon as it ends: one that was stopped goes on.

More seeds, scenarios or policies may be asked for when it does; what was played is not played again
as long as the same weights and settings would play it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from envs.errors import UserError
from rl_ft.closed_loop import Job
from rl_ft.config import Config
from rl_ft.run_folder import git_commit

Row = dict[str, Any]

DECIDE_NOTHING = {"recipe", "ray", "monitor", "scenarios", "prepare", "sft", "rollout", "grpo"}
"""Sections of the configuration that no played episode depends on."""


class Played:
    """Rows by (policy, scenario, seed); without a file only as long as this process lives.

    Example:
        played = Played(Path("runs/maps/episodes.jsonl"))
        played.begin("max_pressure", signature(config, None))
        for job in played.missing("max_pressure", jobs): played.add(row)
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._signatures: dict[str, str] = {}
        self.rows: list[Row] = []
        if file is not None and file.is_file():
            self._read(file)

    def begin(self, policy: str, signature: str) -> None:
        """Raises UserError if what was played by the policy was played otherwise."""
        if self._signatures.setdefault(policy, signature) != signature:
            raise UserError(
                f"{self._file} holds episodes of {policy} with other weights, settings or code; "
                "give another --out"
            )

    def missing(self, policy: str, jobs: Iterable[Job]) -> list[Job]:
        """Those of the jobs that the policy has not played."""
        there = {(row["scenario"], row["seed"]) for row in self.rows if row["policy"] == policy}
        return [job for job in jobs if (job.scenario, job.seed) not in there]

    def chosen(self, policies: Sequence[str], jobs: Iterable[Job]) -> list[Row]:
        """The rows of these policies and jobs, in the order of their names."""
        wanted = {(job.scenario, job.seed) for job in jobs}
        rows = [
            row
            for row in self.rows
            if row["policy"] in policies and (row["scenario"], row["seed"]) in wanted
        ]
        return sorted(rows, key=lambda row: (row["policy"], row["scenario"], row["seed"]))

    def add(self, row: Row) -> None:
        """Keep an episode of a policy that has begun."""
        self.rows.append(row)
        if self._file is not None:
            line = json.dumps({"signature": self._signatures[row["policy"]], "row": row})
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")

    def _read(self, file: Path) -> None:
        whole, _, cut = file.read_text(encoding="utf-8").rpartition("\n")
        if cut:
            # Killed while it wrote: that episode is played again.
            file.write_text(whole + "\n" if whole else "", encoding="utf-8")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                content = json.loads(line)
                self.begin(content["row"]["policy"], content["signature"])
                self.rows.append(content["row"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{file}, line {number} is no episode ({type(error).__name__}: {error}): "
                    "restore it, or give another --out"
                ) from error


def signature(config: Config, model: Path | None) -> str:
    """What decides how a policy plays: code, settings and, of a model, its files."""
    total = hashlib.sha256()
    settings = config.model_dump(mode="json", exclude=DECIDE_NOTHING)
    for name in ("seeds", "controllers", "baseline", "num_worlds"):
        del settings["evaluate"][name]
    total.update(json.dumps([git_commit(), settings], sort_keys=True).encode())
    files = () if model is None else sorted(file for file in model.iterdir() if file.is_file())
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]
