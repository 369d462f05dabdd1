"""Decision states and lessons on disk: JSONL and JSON files with a manifest that vouches for them.

A folder holds `grpo.jsonl` (a row per decision state: prompt, every legal answer with its measured
outcome, and the way back to the instant), `sft_<teacher>.jsonl` (chats that end with the teacher's
answer), `eval_<teacher>.jsonl` (the same of states that nobody trains on), `junctions.json` and
`manifest.json`. Each JSONL file but the last has a twin that is one JSON array. A folder appears
whole or not at all, and whoever reads it hears of the first file and row that is not as written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from envs import dialect
from envs.answers import act, answer_text
from envs.controllers import max_pressure
from envs.errors import UserError
from envs.scenario import content_hash, load_scenario
from envs.types import (
    Action,
    Decision,
    DecisionFormat,
    JunctionSpec,
    Observation,
    Outcome,
    SignalTiming,
)
from rl_ft.config import Config
from rl_ft.lessons import lessons
from rl_ft.states import DecisionState, Leg

SCHEMA_VERSION = 1
GRPO_FILE = "grpo.jsonl"
JUNCTIONS_FILE = "junctions.json"
MANIFEST_FILE = "manifest.json"


class _Record(BaseModel):
    """Strict about names; a number that is none is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


_Row = TypeVar("_Row", bound=_Record)


class Candidate(_Record):
    """A legal answer and what it leads to."""

    answer: str
    action: Action
    outcome: Outcome


class GrpoRow(_Record):
    """One decision state as a row.

    `prompt` and `candidates` tell it with its phases in the order of the junction; `way` and `seed`
    lead back to it. What the junction is like stands in `junctions.json`.
    """

    id: str
    scenario: str
    seed: int
    time_s: float
    junction: str
    way: tuple[Leg, ...]
    prompt: tuple[dict[str, str], ...]
    candidates: tuple[Candidate, ...]
    max_pressure: str
    """What max-pressure answers."""
    observation: Observation


class SftRow(_Record):
    """A chat that ends with a teacher's answer; TRL's conversational format.

    Example:
        SftRow(id="generated:3/100004/320/J0",
               messages=({"role": "user", "content": "..."},
                         {"role": "assistant", "content": '{"phase": "D"}'}),
               legal_answers=('{"phase": "B"}', '{"phase": "D"}'),
               cost_veh_s={'{"phase": "B"}': 611.0, '{"phase": "D"}': 572.5})
    """

    id: str
    messages: tuple[dict[str, str], ...] = Field(min_length=2)
    legal_answers: tuple[str, ...]
    cost_veh_s: dict[str, float]

    @property
    def prompt(self) -> tuple[dict[str, str], ...]:
        """The chat up to the answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """What the teacher says."""
        return self.messages[-1]["content"]

    def answered(self, answer: str) -> SftRow:
        """The same chat with another answer."""
        last = {**self.messages[-1], "content": answer}
        return self.model_copy(update={"messages": (*self.prompt, last)})


class Place(_Record):
    """What the decision states of a scenario share."""

    timing: SignalTiming
    junctions: dict[str, JunctionSpec]


class FileEntry(_Record):
    """What a file must be."""

    sha256: str
    rows: int


class Manifest(_Record):
    """Where a dataset comes from and what it consists of."""

    schema_version: int
    decision_format: DecisionFormat
    seed: int
    rl_ft: str
    sumo: str
    """Version that measured: another one may drive differently."""
    horizon_s: float
    follow: str
    scenarios: dict[str, str]
    """Hash of each scenario's files (`envs.scenario.content_hash`)."""
    files: dict[str, FileEntry]


def write_dataset(
    directory: Path, states: Sequence[DecisionState], num_held_back: int, config: Config
) -> None:
    """Write the folder; the last `num_held_back` states become evaluation rows alone."""
    num = len(states) - num_held_back
    train, held_back = states[:num], states[num:]
    aside = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    files = {GRPO_FILE: _write(aside / GRPO_FILE, (_grpo_line(s, config) for s in train))}
    for teacher in config.prepare.teachers:
        name = f"sft_{teacher}.jsonl"
        rows = (lessons(s, teacher, config, num=config.prepare.tellings) for s in train)
        files[name] = _write(aside / name, (json.dumps(row) for part in rows for row in part))
        held = (lessons(s, teacher, config, num=1, soften=False) for s in held_back)
        name = f"eval_{teacher}.jsonl"
        files[name] = _write(aside / name, (json.dumps(row) for part in held for row in part))
    for name in [name for name in files if not name.startswith("eval_")]:
        lines = (aside / name).read_text(encoding="utf-8").splitlines()
        twin = aside / name.replace(".jsonl", ".json")
        twin.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
        files[twin.name] = FileEntry(sha256=_sha256(twin), rows=len(lines))
    (aside / JUNCTIONS_FILE).write_text(_places(states), encoding="utf-8")
    files[JUNCTIONS_FILE] = FileEntry(sha256=_sha256(aside / JUNCTIONS_FILE), rows=1)
    names = sorted({state.decision.scenario for state in states})
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        decision_format=config.decision_format,
        seed=config.seed,
        rl_ft=version("rl-ft"),
        sumo=version("eclipse-sumo"),
        horizon_s=config.reward.horizon_s,
        follow=config.reward.follow,
        scenarios={name: content_hash(load_scenario(name)) for name in names},
        files=files,
    )
    (aside / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    aside.rename(directory)


def adopt_dataset(source: Path, directory: Path, config: Config) -> Manifest:
    """Copy a dataset, once every row of it has been read.

    Raises:
        UserError: it is not as it was written, or lacks what the configuration asks for.
    """
    manifest = read_manifest(source)
    read_states(source)
    for teacher in config.prepare.teachers:
        for file in (source / f"sft_{teacher}.jsonl", source / f"eval_{teacher}.jsonl"):
            read_lessons(file)
    for key, found, wanted in (
        ("reward.horizon_s", manifest.horizon_s, config.reward.horizon_s),
        ("reward.follow", manifest.follow, config.reward.follow),
        ("decision_format", manifest.decision_format, config.decision_format),
    ):
        if found != wanted:
            raise UserError(
                f"the dataset in {source} was measured with {key} {found}, wanted is {wanted}: "
                f"--set {key}={found}"
            )
    aside = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside)
    shutil.rmtree(directory, ignore_errors=True)
    aside.rename(directory)
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a dataset of this version.

    Raises:
        UserError: there is none, it is not readable, or it is of another version.
    """
    file = directory / MANIFEST_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = content["schema_version"]
        if found != SCHEMA_VERSION:
            raise UserError(
                f"{file} is of schema version {found}, this rl-ft reads version {SCHEMA_VERSION}: "
                "write the dataset anew with `rl-ft prepare`"
            )
        return Manifest.model_validate(content)
    except FileNotFoundError:
        raise UserError(
            f"{directory} holds no dataset: expected {MANIFEST_FILE} in it, as `rl-ft prepare` "
            "writes it to the folder data of a run"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a dataset's manifest: {_sentence(error)}") from error


def read_states(directory: Path) -> list[DecisionState]:
    """The decision states of a dataset, in the order of its rows.

    Raises:
        UserError: the first thing that is not as it was written, by file and row.
    """
    manifest = read_manifest(directory)
    rows = _read(directory / GRPO_FILE, GrpoRow, manifest)
    file = directory / JUNCTIONS_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        places = {name: Place.model_validate(place) for name, place in content.items()}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not readable: {_sentence(error)}") from error
    check_file(file, manifest, num_rows=1)
    if not rows:
        raise UserError(f"{directory / GRPO_FILE} holds no rows; raise prepare.num_states")
    return [_state(row, places[row.scenario], manifest.decision_format) for row in rows]


def read_lessons(file: Path) -> list[SftRow]:
    """The rows of an `sft_` or `eval_` file, which lies beside its manifest; none may be there.

    Raises:
        UserError: the first thing that is not as it was written, by file and row.
    """
    return _read(file, SftRow, read_manifest(file.parent))


def check_file(file: Path, manifest: Manifest, *, num_rows: int | None = None) -> None:
    """Raise a `UserError` unless the file is, byte for byte, what the manifest says."""
    entry = manifest.files.get(file.name)
    if entry is None:
        raise UserError(f"{file} is not in the manifest beside it, which lists {_names(manifest)}")
    if num_rows is not None and num_rows != entry.rows:
        raise UserError(f"{file} ends after row {num_rows}, its manifest says {entry.rows} rows")
    if not file.is_file() or _sha256(file) != entry.sha256:
        raise UserError(
            f"{file} is not what was written: its SHA-256 differs from the one in {MANIFEST_FILE}"
        )


def _grpo_line(state: DecisionState, config: Config) -> str:
    decision = state.decision
    row = GrpoRow(
        id=state.id,
        scenario=decision.scenario,
        seed=decision.seed,
        time_s=decision.observation.time_s,
        junction=decision.junction.tls_id,
        way=state.way,
        prompt=tuple(dialect.messages(decision, instructions=config.model.instructions)),
        candidates=tuple(
            Candidate(answer=answer_text(decision, action), action=action, outcome=outcome)
            for action, outcome in state.outcomes.items()
        ),
        max_pressure=answer_text(decision, act(decision, max_pressure(decision).phase)),
        observation=decision.observation,
    )
    return row.model_dump_json()


def _state(row: GrpoRow, place: Place, asked_as: DecisionFormat) -> DecisionState:
    decision = Decision(
        scenario=row.scenario,
        seed=row.seed,
        junction=place.junctions[row.junction],
        observation=row.observation,
        legal=tuple(sorted({candidate.action.phase for candidate in row.candidates})),
        timing=place.timing,
        format=asked_as,
    )
    outcomes = {candidate.action: candidate.outcome for candidate in row.candidates}
    return DecisionState(decision=decision, outcomes=outcomes, way=row.way)


def _places(states: Iterable[DecisionState]) -> str:
    found: dict[str, Place] = {}
    for decision in (state.decision for state in states):
        place = found.setdefault(decision.scenario, Place(timing=decision.timing, junctions={}))
        place.junctions[decision.junction.tls_id] = decision.junction
    content: Mapping[str, Any] = {name: place.model_dump() for name, place in found.items()}
    return json.dumps(content) + "\n"


def _write(file: Path, lines: Iterable[str]) -> FileEntry:
    num = 0
    with file.open("w", encoding="utf-8") as out:
        for line in lines:
            out.write(line + "\n")
            num += 1
    return FileEntry(sha256=_sha256(file), rows=num)


def _read(file: Path, kind: type[_Row], manifest: Manifest) -> list[_Row]:
    rows = []
    for number, line in enumerate(_lines(file), start=1):
        try:
            rows.append(kind.model_validate_json(line))
        except ValidationError as error:
            raise UserError(f"{file}, row {number}: {_sentence(error)}") from error
    check_file(file, manifest, num_rows=len(rows))
    return rows


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{file} is not readable: {_sentence(error)}") from error


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _names(manifest: Manifest) -> str:
    return ", ".join(sorted(manifest.files))


def _sentence(error: Exception) -> str:
    """The first complaint, with where in the row it is."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {first['msg']}" if where else first["msg"]
    return str(error)
