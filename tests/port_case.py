"""A port for what is started a moment later.

Not one that the kernel hands out: while other tests start clusters, those change hands too often.
"""

from __future__ import annotations

import contextlib
import random
import socket

PORTS = range(20_000, 32_000)
"""Above those that `ray start` gives its workers, below those of the kernel."""


def free_port() -> int:
    """One on the loopback interface that nobody listens at."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
