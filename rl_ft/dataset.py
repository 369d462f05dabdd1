"""Decision states and lessons on disk: JSONL and JSON files with a manifest that vouches for them.

A folder holds `grpo.jsonl` (a row per decision state: prompt, every legal answer with its measured
outcome, and the way back to the instant), `sft_<teacher>.jsonl` (chats that end with the teacher's
answer), `eval_<teacher>.jsonl` (the same of states that nobody trains on), `junctions.json` and
`manifest.json`. The first two have twins that are one JSON array each. A folder appears whole or
not at all, and whoever reads it hears of the first file and row that is not as written.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from envs import dialect
from envs.answers import act, answer_texts, options
from envs.controllers import max_pressure
from envs.errors import UserError
from envs.scenario import content_hash, expand, is_generated, load_scenario, traffic
from envs.types import Decision, DecisionFormat
from rl_ft.config import Config
from rl_ft.lessons import lessons
from rl_ft.rows import Candidate, FileEntry, GrpoRow, Manifest, Place, Record, Settings, SftRow
from rl_ft.run_folder import appearing
from rl_ft.states import DecisionState

SCHEMA_VERSION = 1
GRPO_FILE = "grpo.jsonl"
JUNCTIONS_FILE = "junctions.json"
MANIFEST_FILE = "manifest.json"


KEYS = {
    "decision_format": "decision_format",
    "instructions": "model.instructions",
    "lookahead_temperature_veh_s": "prepare.lookahead_temperature_veh_s",
}
"""Where a setting stands in a configuration; the others in its section `reward`."""

Row = TypeVar("Row", bound=Record)


def write_dataset(
    directory: Path, states: Sequence[DecisionState], num_held_back: int, config: Config
) -> None:
    """Write the folder; the last `num_held_back` states become evaluation rows alone.

    Raises:
        UserError: a state has an outcome that is no number; what was in the folder stays.
    """
    _require_numbers(states)
    num = len(states) - num_held_back
    train, held_back = states[:num], states[num:]
    with appearing(directory) as aside:
        files = {GRPO_FILE: _write(aside / GRPO_FILE, (_grpo_line(s, config) for s in train))}
        for teacher in config.prepare.teachers:
            name = f"sft_{teacher}.jsonl"
            taught = train[: config.prepare.num_lesson_states]
            rows = (lessons(s, teacher, config, num=config.prepare.tellings) for s in taught)
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
            seed=config.seed,
            rl_ft=version("rl-ft"),
            sumo=version("eclipse-sumo"),
            settings=_settings(config),
            scenarios={name: content_hash(load_scenario(name)) for name in names},
            files=files,
        )
        (aside / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n")


def _require_numbers(states: Sequence[DecisionState]) -> None:
    """Before anything is written: pydantic takes finished dataclasses as they are."""
    for number, state in enumerate(states, start=1):
        for action, outcome in state.outcomes.items():
            values = (value for value in astuple(outcome) if isinstance(value, float))
            if not all(map(math.isfinite, values)):
                raise UserError(
                    f"row {number} for {GRPO_FILE}, {state.id}: the simulation measured no number "
                    f"for {answer_texts(state.decision)[action]}: {outcome}"
                )


def adopt_dataset(source: Path, directory: Path, config: Config) -> Manifest:
    """Copy a dataset, once every row of it has been read.

    Raises:
        UserError: it is not as it was written, or not what the configuration asks for.
    """
    manifest = read_manifest(source)
    wanted = _settings(config)
    for name, found in manifest.settings:
        if found != getattr(wanted, name):
            key = KEYS.get(name, f"reward.{name}")
            raise UserError(
                f"the dataset in {source} was made with {key} {found}, wanted is "
                f"{getattr(wanted, name)}: --set {key}={found}"
            )
    for teacher in config.prepare.teachers:
        entry = manifest.files.get(f"sft_{teacher}.jsonl")
        if entry is None or not entry.rows:
            raise UserError(
                f"the dataset in {source} has no lessons of {teacher}, it has "
                f"{_names(manifest)}: --set prepare.teachers=[...]"
            )
    judges = expand((*config.scenarios.held_out, *config.check.scenarios))
    if shared := sorted(set(map(traffic, manifest.scenarios)) & set(map(traffic, judges))):
        raise UserError(
            f"the dataset in {source} has rows of {', '.join(shared)}, on which models are chosen "
            "or judged: set scenarios.held_out or check.scenarios to others"
        )
    states = read_everything(source, manifest)
    # A generated city is what its seed says; `rl-ft data check` looks at those too.
    given = [name for name in manifest.scenarios if not is_generated(name)]
    require_unchanged(given, states, manifest, source)
    with appearing(directory) as aside:
        for name in (*manifest.files, MANIFEST_FILE):
            shutil.copyfile(source / name, aside / name)
    return manifest


def read_everything(directory: Path, manifest: Manifest) -> list[DecisionState]:
    """The decision states, once every file of the dataset has been read and is as it was written.

    Raises:
        UserError: the first thing that is not, by file and row.
    """
    states = _read_states(directory, manifest)
    for name in manifest.files:
        if name in (GRPO_FILE, JUNCTIONS_FILE):
            continue
        if name.endswith(".jsonl"):
            _read(directory / name, SftRow, manifest)
        else:
            check_file(directory / name, manifest)
    return states


def require_unchanged(
    names: Iterable[str], states: Sequence[DecisionState], manifest: Manifest, directory: Path
) -> None:
    """Raise `UserError` for a scenario that is not what the rows were measured on."""
    for name in names:
        if content_hash(load_scenario(name)) != manifest.scenarios.get(name):
            rows = [i for i, s in enumerate(states, start=1) if s.decision.scenario == name]
            listed = ", ".join(map(str, rows[:5]))
            raise UserError(
                f"the scenario {name} has changed since its rows in {directory / GRPO_FILE} were "
                f"measured (row {listed}): bring its files back, or prepare anew"
            )


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
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{directory} holds no dataset: expected {MANIFEST_FILE} in it, as `rl-ft prepare` "
            "writes it to the folder data of a run"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not a dataset's manifest: {_sentence(error)}; a dataset is the folder data "
            "of a run"
        ) from error


def read_states(directory: Path) -> list[DecisionState]:
    """The decision states of a dataset, in the order of its rows.

    Raises:
        UserError: the first thing that is not as it was written, by file and row.
    """
    return _read_states(directory, read_manifest(directory))


def _read_states(directory: Path, manifest: Manifest) -> list[DecisionState]:
    file = directory / GRPO_FILE
    rows = _read(file, GrpoRow, manifest)
    if not rows:
        raise UserError(f"{file} holds no rows; raise prepare.num_states")
    places = _read_places(directory / JUNCTIONS_FILE, manifest)
    states = []
    for number, row in enumerate(rows, start=1):
        place = places.get(row.scenario)
        if place is None or row.junction not in place.junctions:
            raise UserError(
                f"{file}, row {number}: {JUNCTIONS_FILE} knows no junction {row.junction} of "
                f"{row.scenario}"
            )
        state = _state(row, place, manifest.settings.decision_format)
        told, asked = len(row.observation.lanes), len(state.decision.junction.lanes)
        if told != asked or tuple(state.outcomes) != options(state.decision):
            raise UserError(
                f"{file}, row {number}: expected {asked} lanes and an outcome for each of "
                f"{len(options(state.decision))} legal answers, found {told} and "
                f"{len(state.outcomes)}; write the dataset anew with `rl-ft prepare`"
            )
        states.append(state)
    return states


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


def _read_places(file: Path, manifest: Manifest) -> dict[str, Place]:
    check_file(file, manifest)
    try:
        return TypeAdapter(dict[str, Place]).validate_json(file.read_bytes())
    except ValidationError as error:
        raise UserError(f"{file} does not hold junctions: {_sentence(error)}") from error


def _settings(config: Config) -> Settings:
    reward = config.reward
    return Settings(
        decision_format=config.decision_format,
        instructions=config.model.instructions,
        horizon_s=reward.horizon_s,
        follow=reward.follow,
        time_loss=reward.time_loss,
        junction_time_loss=reward.junction_time_loss,
        halting=reward.halting,
        lookahead_temperature_veh_s=config.prepare.lookahead_temperature_veh_s,
    )


def _grpo_line(state: DecisionState, config: Config) -> str:
    decision = state.decision
    texts = answer_texts(decision)
    row = GrpoRow(
        id=state.id,
        scenario=decision.scenario,
        seed=decision.seed,
        time_s=decision.observation.time_s,
        junction=decision.junction.tls_id,
        way=state.way,
        prompt=tuple(dialect.messages(decision, instructions=config.model.instructions)),
        legal=decision.legal,
        candidates=tuple(
            Candidate(answer=texts[action], action=action, outcome=outcome)
            for action, outcome in state.outcomes.items()
        ),
        max_pressure=texts[act(decision, max_pressure(decision).phase)],
        observation=decision.observation,
    )
    return row.model_dump_json()


def _state(row: GrpoRow, place: Place, asked_as: DecisionFormat) -> DecisionState:
    decision = Decision(
        scenario=row.scenario,
        seed=row.seed,
        junction=place.junctions[row.junction],
        observation=row.observation,
        legal=row.legal,
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


def _read(file: Path, kind: type[Row], manifest: Manifest) -> list[Row]:
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
    except (OSError, UnicodeDecodeError) as error:
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
