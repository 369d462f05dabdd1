"""The lean child process of `envs.world`: serves one simulation over an inherited socket.

Run as `python -m envs.world_process FD`. It imports libsumo and little else, keeps to a single
thread (asserted before every fork), and ends when its parent closes the socket.
"""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection
from typing import Any

from envs.errors import UserError, WorldError

SINGLE_THREADED = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "LIBSUMO_AS_TRACI": "quiet",
}
"""numpy, which libsumo imports, would otherwise start a thread pool."""


class Service:
    """The calls that `envs.world.World` makes, by name."""

    def __init__(self) -> None:
        self._simulation: Any = None

    def reset(self, scenario: Any, seed: int, program: str | None) -> Any:
        from envs.sumo import Simulation

        self.close()
        self._simulation = None
        self._simulation = Simulation(scenario, seed, program=program)
        return self._simulation.junctions

    def time(self) -> tuple[float, bool]:
        return self._simulation.time_s, self._simulation.done

    def decisions(self) -> Any:
        return self._simulation.decisions()

    def branch(self, candidates: Any, horizon_s: float, follow: str, parallel: int) -> Any:
        return self._simulation.branch(candidates, horizon_s, follow, parallel=parallel)

    def step(self, actions: Any) -> str:
        from envs.ledger import world_digest

        self._simulation.sample_queue()
        self._simulation.step(actions)
        return world_digest()

    def play(self, action: Any, horizon_s: float, follow: str) -> Any:
        return self._simulation.play(action, horizon_s, follow)

    def drive(self, controller: str, until_s: float, horizon_s: float) -> None:
        self._simulation.drive(controller, until_s, horizon_s=horizon_s)

    def trips(self) -> Any:
        return self._simulation.trips()

    def close(self) -> None:
        if self._simulation is not None:
            self._simulation.close()


def serve(connection: Connection) -> None:
    """Answer calls until the parent closes its end."""
    service = Service()
    while True:
        try:
            name, arguments = connection.recv()
        except (EOFError, ConnectionError):
            return service.close()
        try:
            answer = ("ok", getattr(service, name)(*arguments))
        except UserError as error:
            answer = ("user", str(error))
        except WorldError as error:
            answer = ("world", (error.cause, error.detail))
        except Exception as error:
            answer = ("world", ("simulator", f"{type(error).__name__}: {error}"))
        try:
            connection.send(answer)
        except ConnectionError:
            return service.close()


def main() -> None:
    """Entry point: the socket's descriptor is the only argument.

    libsumo prints to stdout on import; that must not reach the parent's terminal.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
