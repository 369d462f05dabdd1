"""Runs a function in forks of this process: how one running simulation is tried several ways.

Exact only for a single-threaded process. A fork cuts itself off from the files its parent writes,
so it can run on without leaving a trace.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import stat
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from envs.errors import WorldError

Item = TypeVar("Item")
Result = TypeVar("Result")

_answered: list[int] = []
"""Forks that have answered and are not known to be gone."""


def fork_map(
    function: Callable[[Item], Result], items: Sequence[Item], *, parallel: int = 1
) -> list[Result]:
    """The function's result for every item, each computed in its own fork of this instant.

    Raises:
        WorldError: a fork died or raised; the cause is `branch_died` or `branch_failed`.
    """
    _assert_single_threaded()
    files = _written_files()
    results: list[Result] = []
    for start in range(0, len(items), max(1, parallel)):
        # One that still goes while the next is made costs both 3 ms: they want the same locks.
        reap()
        batch = items[start : start + max(1, parallel)]
        running = [_fork(function, item, files) for item in batch]
        # All of them before the first is judged: nothing runs on behind an error.
        for answer in [_join(pid, reader) for pid, reader in running]:
            if isinstance(answer, WorldError):
                reap()
                raise answer
            results.append(answer)
    return results


def reap() -> None:
    """Wait for forks that have answered to be gone."""
    while _answered:
        os.waitpid(_answered.pop(), 0)


def _assert_single_threaded() -> None:
    threads = num_threads(os.getpid())
    if threads != 1:
        raise WorldError("threads", f"a process with {threads} threads cannot be forked exactly")


def _written_files() -> list[int]:
    """Regular files and sockets, which a fork must not write to: pipes are between it and us."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        # The descriptor of the listing itself is gone by now.
        with contextlib.suppress(OSError):
            mode = os.fstat(int(name)).st_mode
            if int(name) >= 3 and (stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
                found.append(int(name))
    return found


def _fork(function: Callable[[Item], Result], item: Item, files: Sequence[int]) -> tuple[int, int]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    status = 1
    try:
        os.close(reader)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in files:
            os.dup2(null, fd)
        try:
            payload = (True, function(item))
        except Exception as error:
            payload = (False, f"{type(error).__name__}: {error}")
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(payload, pipe)
        status = 0
    finally:
        os._exit(status)


def _join(pid: int, reader: int) -> Any:
    """What a fork found, or the error to raise.

    It does not wait for one that has answered to be gone, which takes milliseconds: the kernel
    takes its memory apart before it closes the pipe. Whoever asked goes on meanwhile.
    """
    with os.fdopen(reader, "rb") as pipe:
        try:
            succeeded, value = pickle.load(pipe)
        except (EOFError, pickle.UnpicklingError):
            status = os.waitpid(pid, 0)[1]
            return WorldError("branch_died", f"a branch ended with status {status}")
    _answered.append(pid)
    return value if succeeded else WorldError("branch_failed", value)


def num_threads(pid: int) -> int:
    """Threads of a process."""
    return len(os.listdir(f"/proc/{pid}/task"))
