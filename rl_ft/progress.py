"""How far long work is: a live line at the bottom of a terminal, log lines elsewhere.

What is logged to the terminal goes through the same `console`, so that log lines stay whole above
the live ones. Nothing here is a record; that is `rl_ft.monitor`'s.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

Item = TypeVar("Item")

LOG_INTERVAL_S = 20.0
POLL_INTERVAL_S = 0.5
BAR_WIDTH = 16

log = logging.getLogger(__name__)


@cache
def console() -> Console:
    """Standard error, shared by the log and the live lines."""
    from rich.console import Console

    return Console(stderr=True)


class Progress:
    """A piece of work while it is done: how much of it, its latest figures, its speed, time left.

    A context; any thread may report. On a terminal its line follows; elsewhere a log line comes
    whenever none came for `LOG_INTERVAL_S`, also while nothing is reported.

    Example:
        with Progress("grpo/lookahead", total=300, unit="steps") as progress:
            progress.update(12, reward="0.31", check="14.2 s at step 10")
    """

    def __init__(
        self,
        what: str,
        *,
        total: float | None = None,
        unit: str = "",
        poll: Callable[[Progress], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without a total it only tells the time, and only while nothing else is shown.

        `poll` is called now and then to `update` from what another process writes.
        """
        self.what, self.total, self.done = what, total, 0.0
        self._unit, self._poll, self._clock = unit, poll, clock
        self._figures: dict[str, str] = {}
        self._started = self._said = self._updated = clock()
        self._first: tuple[float, float] | None = None
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name=what, daemon=True)

    def __enter__(self) -> Progress:
        self._started = self._said = self._clock()
        _screen.show(self)
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._watcher.join()
        _screen.hide(self)

    def update(self, done: float, **figures: str) -> None:
        """So much is done now; figures that are not named stay as they were."""
        with self._lock:
            goes_back = done < self.done
            self.done, self._updated = done, self._clock()
            if self._first is None or goes_back:
                self._first = (self._updated, done)
            self._figures |= figures

    def add(self, amount: float) -> None:
        """So much more is done."""
        with self._lock:
            self.update(self.done + amount)

    def say(self) -> None:
        """A log line now, on a terminal too."""
        self._said = self._clock()
        log.info("%s: %s", self.what, self.status())

    def status(self) -> str:
        """Example: `12 of 300 steps, 19:12 left, 0.25 steps/s, reward 0.31`."""
        with self._lock:
            parts = []
            if self.total is not None:
                parts.append(f"{_amount(self.done)} of {_amount(self.total)} {self._unit}")
            speed = self._speed()
            if speed is None or self.total is None:
                parts.append(f"{_duration(self._clock() - self._started)} so far")
            else:
                left_s = (self.total - self.done) / speed - (self._clock() - self._updated)
                parts += [f"{_duration(max(0.0, left_s))} left", f"{speed:.2g} {self._unit}/s"]
            # Last: a narrow terminal cuts the end off.
            parts += [f"{name.replace('_', ' ')} {text}" for name, text in self._figures.items()]
            return ", ".join(parts)

    def _speed(self) -> float | None:
        """Units per second since the first report: what came before was starting up."""
        if self._first is None or self.done <= self._first[1] or self._updated <= self._first[0]:
            return None
        return (self.done - self._first[1]) / (self._updated - self._first[0])

    def _watch(self) -> None:
        while not self._ended.wait(POLL_INTERVAL_S):
            if self._poll is not None:
                self._poll(self)
            if console().is_interactive:
                continue
            if not _screen.shows(self):
                self._said = self._clock()
            elif self._clock() - self._said > LOG_INTERVAL_S:
                self.say()


def track(items: Iterable[Item], what: str, *, total: int, unit: str) -> Iterator[Item]:
    """Yield the items and show how many came."""
    with Progress(what, total=total, unit=unit) as progress:
        for item in items:
            progress.add(1)
            yield item


class _Screen:
    """The live lines of this process, one under the other: a terminal has one bottom."""

    def __init__(self) -> None:
        self._lines: list[Progress] = []
        self._live: Live | None = None
        self._lock = threading.Lock()

    def show(self, line: Progress) -> None:
        from rich.live import Live

        with self._lock:
            self._lines = [*self._lines, line]
            if self._live is None and console().is_interactive:
                self._live = Live(
                    console=console(),
                    get_renderable=self._table,
                    refresh_per_second=4,
                    # What is piped elsewhere must not turn up on the terminal.
                    redirect_stdout=sys.stdout.isatty(),
                    transient=True,
                )
                self._live.start()

    def hide(self, line: Progress) -> None:
        with self._lock:
            self._lines = [other for other in self._lines if other is not line]
            if self._live is not None and not self._lines:
                self._live.stop()
                self._live = None

    def shows(self, line: Progress) -> bool:
        return line in self._shown()

    def _shown(self) -> list[Progress]:
        lines = self._lines
        return [line for line in lines if line.total is not None] or lines

    def _table(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        for line in self._shown():
            table.add_row(
                Text(line.what, style="bold", no_wrap=True),
                ProgressBar(total=line.total, completed=line.done, width=BAR_WIDTH),
                Text(line.status(), no_wrap=True, overflow="ellipsis"),
            )
        return table


_screen = _Screen()


def _amount(value: float) -> str:
    nearest = round(value)
    return str(nearest) if abs(value - nearest) < 1e-6 else f"{value:.1f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
