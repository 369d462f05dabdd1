"""A traffic world in its own process: start it, ask it, branch it; its death is an error by name.

Every call has a deadline. A child that is late or dead raises `WorldError` and is gone; make a
new World to go on. Not thread-safe: one caller at a time.

Example:
    with World() as world:
        world.reset(load_scenario("resco:cologne1"), seed=1)
        decision = world.decisions()[0]
        tls_id = decision.junction.tls_id
        costs = world.branch([{tls_id: Action(phase=i)} for i in decision.legal])
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from envs.errors import UserError, WorldError
from envs.types import Decision, JointAction, JunctionSpec, Outcome, Scenario, TripStats
from envs.world_process import SINGLE_THREADED

EXIT_S = 5.0
"""How long a world that is told to end may take; one that is busy then is killed."""


class World:
    """Client of one world process; `pid` names it for tests and monitors."""

    def __init__(self, *, timeout_s: float = 120.0) -> None:
        self.timeout_s = timeout_s
        ours, theirs = socket.socketpair()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        # A killed child cannot remove its files: they lie where close() removes them.
        self._files = tempfile.TemporaryDirectory(prefix="rl-ft-world-")
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "envs.world_process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={
                **os.environ,
                **SINGLE_THREADED,
                "PYTHONPATH": path,
                # The code of this process, whatever lies in the directory where it stands.
                "PYTHONSAFEPATH": "1",
                "TMPDIR": self._files.name,
            },
            stdin=subprocess.DEVNULL,
            stderr=self._stderr,
            start_new_session=True,
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self.pid = self._process.pid

    def reset(
        self, scenario: Scenario, seed: int, *, program: str | None = None
    ) -> tuple[JunctionSpec, ...]:
        """Start a scenario from its beginning; `program` is None, `fixed` or `actuated`."""
        return self._call("reset", scenario, seed, program)

    def time(self) -> tuple[float, bool]:
        """Simulated time in seconds, and whether the scenario's window is over."""
        return self._call("time")

    def decisions(self) -> tuple[Decision, ...]:
        """Every controlled junction with what it sees and may do now."""
        return self._call("decisions")

    def branch(
        self,
        candidates: Sequence[JointAction],
        horizon_s: float = 60.0,
        follow: str = "max_wave",
        *,
        parallel: int = 1,
    ) -> tuple[Outcome, ...]:
        """What each candidate would cost from this very instant; the world is not touched.

        Junctions that a candidate does not name, and all of them after the first decision
        interval, follow the base controller.
        """
        return self._call("branch", tuple(candidates), horizon_s, follow, parallel)

    def play(self, action: JointAction, horizon_s: float, follow: str) -> Outcome:
        """Execute in the live world what `branch` tries in a fork; returns what it measured."""
        return self._call("play", action, horizon_s, follow)

    def step(self, actions: JointAction) -> str:
        """One decision interval; returns the digest of the world after it."""
        return self._call("step", actions)

    def drive(self, controller: str, until_s: float, *, horizon_s: float = 60.0) -> None:
        """Follow a classical controller until a simulated time."""
        self._call("drive", controller, until_s, horizon_s)

    def trips(self) -> TripStats:
        """End the simulation and count its trips."""
        return self._call("trips")

    def close(self) -> None:
        """End the process and its branches; safe to call twice."""
        self._end(EXIT_S)

    def _end(self, grace_s: float) -> None:
        """Hang up, so that the process ends by itself, and kill what has not in time."""
        if self._connection.closed:
            return
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._stderr.close()
        self._files.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, name: str, *arguments: object) -> Any:
        if self._connection.closed:
            raise WorldError("closed", f"{name} was called on a world that has ended")
        try:
            self._connection.send((name, arguments))
            if not self._connection.poll(self.timeout_s):
                self._end(0.0)
                raise WorldError("timeout", f"{name} took longer than {self.timeout_s:g} s")
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            raise self._died(name) from None
        if kind == "user":
            raise UserError(value)
        if kind == "world":
            raise WorldError(*value)
        return value

    def _died(self, name: str) -> WorldError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2)
        status = self._process.poll()
        self._stderr.seek(0)
        last = self._stderr.read()[-300:].decode(errors="replace").strip().replace("\n", " | ")
        self.close()
        return WorldError("died", f"the world process ended ({status}) during {name}: {last}")
