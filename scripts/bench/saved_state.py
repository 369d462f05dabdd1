"""The usual way to try a phase: a new SUMO process that goes on from a saved state, over TraCI.

The simulation is `envs.sumo`, line for line, with TraCI in the place of libsumo: import this module
before anything imports libsumo, in a process that needs no other. World processes of its own keep
the real one. A new process is asked every 2 ms whether it listens (`traci.start` itself waits a
whole second after its first attempt).
"""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

# With it set, `import traci` gives libsumo.
os.environ.pop("LIBSUMO_AS_TRACI", None)

import sumo  # noqa: F401 - tells the SUMO processes where their data is
import traci

from envs.generator import sumo_tool

POLL_S = 0.002


def _start(options: Sequence[str]) -> None:
    """`libsumo.start` in a new process; it is the one spoken to from then on."""
    port = traci.main.getFreeSocketPort()
    command = [sumo_tool("sumo"), *options[1:], "--remote-port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    label = f"port {port}"
    # TraCI prints every attempt to connect.
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        traci.connect(port, numRetries=10_000, proc=process, waitBetweenRetries=POLL_S, label=label)
    traci.switch(label)


_over_traci = ModuleType("libsumo")
_over_traci.__dict__.update(vars(traci) | {"start": _start})
sys.modules["libsumo"] = _over_traci
from envs.sumo import Simulation  # noqa: E402


class TraciSimulation(Simulation):
    """The simulation of `envs.sumo` in a SUMO process of its own, reached by TraCI.

    It has a generator of random numbers for every lane too, or its vehicles would be others: its
    saved states are larger for it, and open in 70 ms instead of 64 (cologne1).

    Of several, each call speaks to the one that `switch_to` names; a new one is named.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._label = traci.getLabel()

    def switch_to(self) -> None:
        """Speak to this one from now on."""
        traci.switch(self._label)

    def _options(self, *arguments: Any) -> list[str]:
        extra = {
            "--save-state.rng": "true",
            "--save-state.precision": "12",
            "--xml-validation": "never",
            "--xml-validation.net": "never",
        }
        return [*super()._options(*arguments), *(text for pair in extra.items() for text in pair)]

    def save(self, file: Path) -> SavedState:
        """Write the state of SUMO; what the signals show is not in it, but kept beside it."""
        traci.simulation.saveState(str(file))
        return SavedState(file=file, time_s=self.time_s, simulation=_twin(self))


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """An instant of a simulation that new SUMO processes can go on from."""

    file: Path
    time_s: float
    simulation: TraciSimulation
    """What the simulation knew then; its process has gone on."""

    @contextlib.contextmanager
    def opened(self) -> Iterator[TraciSimulation]:
        """A new SUMO process at this instant, ended on the way out; who spoke before goes on."""
        before = traci.getLabel() if traci.isLoaded() else None
        twin = _twin(self.simulation)
        options = twin._options()
        named = dict(zip(options[1::2], options[2::2], strict=True))
        named |= {"--load-state": str(self.file), "--begin": str(self.time_s)}
        for trips in ("--tripinfo-output", "--tripinfo-output.write-unfinished"):
            del named[trips]
        _start([options[0], *(text for pair in named.items() for text in pair)])
        try:
            for spec in twin.junctions:
                twin._show(spec, twin._state(spec))
            yield twin
        finally:
            traci.close()
            if before is not None:
                traci.switch(before)


def _twin(simulation: TraciSimulation) -> TraciSimulation:
    """The same knowledge, to change on its own."""
    twin = copy.copy(simulation)
    for name in ("_current", "_green_since", "_held_until_s", "_seen"):
        setattr(twin, name, dict(getattr(simulation, name)))
    return twin
