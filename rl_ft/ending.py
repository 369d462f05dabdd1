"""How work on a run ends: noted in its folder, and one sentence for whoever asked for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rl_ft.run_folder import RunFolder


class InterruptedRun(Exception):  # noqa: N818 - the user's wish, not an error
    """Ctrl-C during a run; the message says how to go on."""


@contextmanager
def noted_ending(folder: RunFolder, *, again: str, console: bool = True) -> Iterator[None]:
    """With the folder's log; in the end its manifest says how it went, and its lock is gone.

    Raises:
        InterruptedRun: Ctrl-C; `again` is the command that goes on.
    """
    from rl_ft.monitor import run_log

    ending = "failed"
    try:
        with run_log(folder.path("run.log"), console=console):
            try:
                yield
                ending = "finished"
            except KeyboardInterrupt as interrupt:
                ending = "interrupted"
                raise InterruptedRun(f"interrupted; to go on: {again}") from interrupt
            except SystemExit:
                # Whoever told this process to end has said why.
                ending = folder.ending or "stopped"
                raise
            except Exception as error:
                named = named_cause(error)
                ending = in_a_sentence(error)
                # To the file only: the terminal is told by whoever asked for the work.
                logging.getLogger("run").error(ending, exc_info=named is None)
                raise
    finally:
        folder.finish(ending)


def in_a_sentence(error: BaseException) -> str:
    """The kind of the cause and the first line of what it says."""
    cause = named_cause(error) or error
    return f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}"


def named_cause(error: BaseException) -> Exception | None:
    """The error of ours behind an exception, if there is one, however Ray has wrapped it."""
    pending, seen = [error], set[int]()
    while pending:
        candidate = pending.pop(0)
        if id(candidate) in seen:
            continue
        seen.add(id(candidate))
        if isinstance(candidate, Exception) and _is_ours(type(candidate)):
            return candidate
        inner = [getattr(candidate, name, None) for name in ("cause", "_base_exc", "__cause__")]
        inner += [getattr(candidate, "controller_failure", None)]
        inner += getattr(candidate, "worker_failures", {}).values()
        pending += [other for other in inner if isinstance(other, BaseException)]
    return None


def _is_ours(kind: type) -> bool:
    """Defined in this project; Ray's own mixture of two classes is not."""
    return kind.__module__.split(".")[0] in ("envs", "rl_ft")
