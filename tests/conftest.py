"""What every test stands on: a quiet environment, one Ray cluster, the smallest real run."""

from __future__ import annotations

import os
import signal

# Before anything is imported: threads, network and authentication are settled at import time.
os.environ |= {
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "COLUMNS": "120",
}

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rl_ft.config import Config
from rl_ft.recipe import load_config
from rl_ft.run_folder import RunFolder
from rl_ft.states import DecisionState, collect_states

# A test run that was started in the background would hand an ignored SIGINT down to the commands
# that it interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


ON_ONE_START = ("direct", "faults", "loop", "serving")
"""Files of tests/e2e that share a prepared start and a generator, which are made once a process."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file is the work of one process, and so are the files that share what is slow to make."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            shared = {f"tests/e2e/test_{name}.py" for name in ON_ONE_START}
            return "tests/e2e" if file in shared else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def smoke_config() -> Config:
    """The smallest configuration in which every stage is real."""
    return load_config("smoke")


@pytest.fixture(scope="session")
def data_config(smoke_config: Config) -> Config:
    """A handful of decision states for two teachers."""
    small = {
        "num_states": 6,
        "num_eval_states": 2,
        "states_per_episode": 10,
        "tellings": 3,
        "teachers": ("max_pressure", "lookahead"),
    }
    return smoke_config.model_copy(
        update={
            "prepare": smoke_config.prepare.model_copy(update=small),
            "reward": smoke_config.reward.model_copy(update={"horizon_s": 20.0}),
        }
    )


@pytest.fixture(scope="session")
def states(data_config: Config) -> list[DecisionState]:
    """Measured once, for every test that only reads them."""
    return collect_states(data_config)


@pytest.fixture
def run_folder(tmp_path: Path, smoke_config: Config) -> Iterator[RunFolder]:
    """A started run of the smoke recipe with no stage done."""
    folder = RunFolder.create(tmp_path / "run", smoke_config, resume=False)
    yield folder
    folder.finish("finished")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One private cluster for all tests marked `ray`: starting one takes ten seconds."""
    from rl_ft.cluster import ray_session

    with ray_session(load_config("smoke")):
        yield


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of the size that the module names."""
    from rl_ft.tiny import build_tiny

    return str(build_tiny(tmp_path_factory.mktemp("tiny"), config=request.module.SIZE, seed=1))


@pytest.fixture(scope="module")
def changed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The weights of another one of that size."""
    from rl_ft.tiny import build_tiny
    from rl_ft.weights import read_folder

    place = tmp_path_factory.mktemp("changed")
    return read_folder(build_tiny(place, config=request.module.SIZE, seed=2))


@pytest.fixture(scope="module")
def pool(config: Config) -> Iterator[Any]:
    """Two worlds under the module's own `config`."""
    from rollout_case import NUM_WORLDS

    from rl_ft.worlds import WorldPool

    pool = WorldPool(config, ("generated:1",), seed=2, num_worlds=NUM_WORLDS)
    yield pool
    pool.close()


@pytest.fixture
def worlds(pool: Any) -> Any:
    """The module's worlds as `rollout_case.Pool`, which has seen nothing yet."""
    from rollout_case import Pool

    return Pool(pool)
