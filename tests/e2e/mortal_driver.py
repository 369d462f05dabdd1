"""A training whose driver kills itself at a moment that is named: run as a program.

python mortal_driver.py RUN_FOLDER [MOMENT STEP] -- OVERRIDES...
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from loop_case import loop_config

from rl_ft.crew import Samplers
from rl_ft.run import GrpoLoop, train_grpo
from rl_ft.run_folder import RunFolder

BUSY_S = 0.2
"""So long after the collection of groups began, simulations and sampler are at work."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str, step: int) -> None:
    """`idle`: while the learner trains; `busy`: while groups are collected; `sync`: while weights
    are loaded; `checkpoint`: before the checkpoint of the step is written."""
    collect, next_weights = GrpoLoop._collect, GrpoLoop._next_weights
    load, remember = Samplers.load, GrpoLoop._remember
    collected = 0

    async def mortal_collect(self, at, *rest):
        nonlocal collected
        collected = at + 1
        if (moment, step) == ("busy", at):
            asyncio.get_running_loop().call_later(BUSY_S, die)
        await collect(self, at, *rest)

    async def mortal_wait(self, after, learner):
        if (moment, step) == ("idle", collected):
            asyncio.get_running_loop().call_later(BUSY_S, die)
        return await next_weights(self, after, learner)

    async def mortal_load(self, ref):
        if (moment, step) == ("sync", ref.version):
            asyncio.get_running_loop().call_soon(die)
        await load(self, ref)

    async def mortal_remember(self, version):
        await remember(self, version)
        if (moment, step) == ("checkpoint", version):
            die()

    GrpoLoop._collect, GrpoLoop._next_weights = mortal_collect, mortal_wait
    Samplers.load, GrpoLoop._remember = mortal_load, mortal_remember


def main() -> None:
    cut = sys.argv.index("--")
    root, *moment = sys.argv[1:cut]
    if moment:
        die_at(moment[0], int(moment[1]))
    config = loop_config(*sys.argv[cut + 1 :])
    train_grpo(config, RunFolder(root=Path(root), config=config))


if __name__ == "__main__":
    main()
