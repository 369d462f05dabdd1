"""Progress bars for long work: Rich on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

LOG_INTERVAL_S = 20.0

log = logging.getLogger(__name__)


def track(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Yield the items and show how far they are."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as rich_track

        yield from rich_track(items, what, total, console=Console(stderr=True))
        return
    last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last > LOG_INTERVAL_S:
            last = time.monotonic()
            log.info("%s: %d of %d", what, done, total)
