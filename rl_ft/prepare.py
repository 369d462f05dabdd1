"""The first stage: the model that is to learn, and the decision states that it starts from."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from envs.errors import UserError
from rl_ft.config import Config
from rl_ft.dataset import GRPO_FILE, adopt_dataset, write_dataset
from rl_ft.question import asked_as_taught
from rl_ft.recipe import differences
from rl_ft.run_folder import RunFolder
from rl_ft.states import collect_states
from rl_ft.tiny import build_tiny

log = logging.getLogger(__name__)


def prepare(config: Config, folder: RunFolder) -> None:
    """Write the base model to `model/` and the dataset to `data/`."""
    if config.prepare.dataset is not None:
        # What a user hands over is looked at before anything takes long.
        manifest = adopt_dataset(Path(config.prepare.dataset), folder.path("data"), config)
        log.info("dataset of %d rows", manifest.files[GRPO_FILE].rows)
        prepare_model(config, folder.path("model"))
        return
    prepare_model(config, folder.path("model"))
    states = collect_states(config)
    write_dataset(folder.path("data"), states, config.prepare.num_eval_states, config)
    log.info(
        "prepared %d training and %d evaluation states",
        config.prepare.num_states,
        config.prepare.num_eval_states,
    )


def prepare_model(config: Config, directory: Path) -> Path:
    """The policy's starting point as a Hugging Face folder: built, or copied from where it is.

    Raises:
        UserError: `model.name_or_path` is not `tiny` and not a model folder, or of a model that is
            to go on as it is and was taught another question.
    """
    require_model(config)
    name = config.model.name_or_path
    if name == "tiny":
        return build_tiny(directory, config=config.model.tiny, seed=config.seed)
    shutil.copytree(Path(name), directory, dirs_exist_ok=True)
    return directory


def require_model(config: Config) -> None:
    """See `prepare_model`; without doing anything yet."""
    name = config.model.name_or_path
    if name != "tiny" and not (Path(name) / "config.json").is_file():
        raise UserError(
            f"model.name_or_path is {name!r}: expected 'tiny' or a folder with config.json, "
            "weights and tokenizer; download a Hugging Face model to a folder first"
        )
    if "given" in config.prepare.teachers:
        taught = asked_as_taught(Path(name), config)
        if other := differences(config, taught):
            listed = ", ".join(f"--set {key}={value}" for key, (_, value) in other.items())
            raise UserError(f"{name} was taught to be asked otherwise: {listed}")
