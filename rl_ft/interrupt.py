"""Ctrl-C where Python would lose it, or leave something taken for ever."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")

AGAIN_S = 0.05


@contextmanager
def late_interrupt() -> Iterator[None]:
    """Ctrl-C counts once what is inside is done, for what forks as Ray's start does.

    Python handles a signal that comes during a fork in a hook of the fork, where it loses the
    interrupt and, with it, the lock of logging: the process would go on, and stop at its next line.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def handed_out(
    pool: Executor, function: Callable[..., Result], *items: Iterable[Any]
) -> Iterator[Result]:
    """`pool.map`, but Ctrl-C counts once all is handed out.

    In between it could leave a lock of the pool taken, for which the pool's own threads would wait
    for ever.
    """
    with late_interrupt():
        return pool.map(function, *items)


def keep_interrupts() -> None:
    """Let Ctrl-C come again where it could not be raised, as in a `__del__` that the garbage
    collector calls; Python only prints what is raised there, and goes on."""
    printed = sys.unraisablehook

    def hook(raised: sys.UnraisableHookArgs) -> None:
        if raised.exc_type is KeyboardInterrupt:
            # Not from here: it would be in the same place.
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        else:
            printed(raised)

    signal.signal(signal.SIGALRM, signal.default_int_handler)
    sys.unraisablehook = hook
