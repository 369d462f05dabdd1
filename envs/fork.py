"""Runs a function in forks of this process: how one running simulation is tried several ways.

Exact only for a single-threaded process. A fork cuts itself off from the files its parent writes,
so it can run on without leaving a trace.
"""

from __future__ import annotations

import os
import pickle
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from envs.errors import WorldError

Item = TypeVar("Item")
Result = TypeVar("Result")


def fork_map(
    function: Callable[[Item], Result], items: Sequence[Item], *, parallel: int = 1
) -> list[Result]:
    """The function's result for every item, each computed in its own fork of this instant.

    Raises:
        WorldError: a fork died or raised; the cause is `branch_died` or `branch_failed`.
    """
    _assert_single_threaded()
    results: list[Result] = []
    for start in range(0, len(items), max(1, parallel)):
        running = [_fork(function, item) for item in items[start : start + max(1, parallel)]]
        # All of them before the first is judged: nothing runs on behind an error.
        ended = [_join(pid, reader) for pid, reader in running]
        results.extend(_result(data, status) for data, status in ended)
    return results


def _assert_single_threaded() -> None:
    threads = num_threads(os.getpid())
    if threads != 1:
        raise WorldError("threads", f"a process with {threads} threads cannot be forked exactly")


def _fork(function: Callable[[Item], Result], item: Item) -> tuple[int, int]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    status = 1
    try:
        os.close(reader)
        _detach_files(keep=writer)
        try:
            payload = (True, function(item))
        except Exception as error:
            payload = (False, f"{type(error).__name__}: {error}")
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(payload, pipe)
        status = 0
    finally:
        os._exit(status)


def _detach_files(*, keep: int) -> None:
    """Point every regular file and socket that is open for writing at /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd in (keep, null) or fd < 3:
            continue
        try:
            mode = os.fstat(fd).st_mode
        except OSError:
            continue
        if stat.S_ISREG(mode) or stat.S_ISSOCK(mode):
            os.dup2(null, fd)


def _join(pid: int, reader: int) -> tuple[bytes, int]:
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    return data, os.waitpid(pid, 0)[1]


def _result(data: bytes, status: int) -> Any:
    if not data or status:
        raise WorldError("branch_died", f"a branch ended with status {status}")
    succeeded, value = pickle.loads(data)
    if not succeeded:
        raise WorldError("branch_failed", value)
    return value


def num_threads(pid: int) -> int:
    """Threads of a process."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))
