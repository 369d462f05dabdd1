"""One prepared start and one generator for every loop: each costs half a minute to make."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with data and a supervised start that answers in format, not all alike."""
    from loop_case import loop_config

    from rl_ft.prepare import prepare
    from rl_ft.run_folder import RunFolder
    from rl_ft.sft import fit_teacher, teacher_jobs

    config = loop_config()
    folder = RunFolder(root=tmp_path_factory.mktemp("prepared"), config=config)
    prepare(config, folder)
    (job,) = teacher_jobs(config, folder)
    fit_teacher(config, job, on_metrics=lambda step, values: None)
    return folder.root


@pytest.fixture(scope="session")
def generator(prepared: Path, ray_cluster: None) -> Iterator[Any]:
    """The vLLM actor, on the supervised start; every loop begins by restoring that."""
    import loop_case
    import ray

    # Workers do not have this folder on their path.
    ray.cloudpickle.register_pickle_by_value(loop_case)
    config = loop_case.loop_config()
    actor = (
        ray.remote(loop_case.WatchedGenerator)
        .options(num_cpus=config.ray.cpus_per_generator)
        .remote(str(prepared / "sft" / loop_case.START), config, config.seed)
    )
    yield actor
    ray.kill(actor)
