"""How a model was taught to be asked, kept in its folder: no other question would it understand."""

from __future__ import annotations

import json
from pathlib import Path

from envs.answers import FORMATS
from envs.errors import UserError
from rl_ft.config import Config

QUESTION_FILE = "question.json"


def write_question(model_dir: Path, config: Config) -> None:
    """Keep the decision format and whether instructions go before."""
    content = {
        "decision_format": config.decision_format,
        "instructions": config.model.instructions,
    }
    (model_dir / QUESTION_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")


def asked_as_taught(model_dir: Path, config: Config) -> Config:
    """The configuration with the question of a model; as it is, for a model that says nothing."""
    file = model_dir / QUESTION_FILE
    if not file.is_file():
        return config
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        name, instructions = content["decision_format"], content["instructions"]
        if name not in FORMATS:
            raise ValueError(f"no format is called {name!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} does not say how the model is asked ({type(error).__name__}: {error}): "
            'expected {"decision_format": "phase", "instructions": false} or alike'
        ) from error
    model = config.model.model_copy(update={"instructions": bool(instructions)})
    return config.model_copy(update={"decision_format": name, "model": model})


def require_model(model_dir: Path, option: str) -> None:
    """Raises UserError if there is no model in what an option names."""
    if not (model_dir / "config.json").is_file():
        raise UserError(
            f"{option} {model_dir}: expected a model folder, with config.json, weights and "
            "tokenizer, such as grpo/max_pressure/model of a run; "
            + ("there is no such folder" if not model_dir.is_dir() else "it has no config.json")
        )
