"""How many cores this process may use: of a container that is what it was given, not what its host
has."""

from __future__ import annotations

import math
import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Of control groups (v2): microseconds of CPU in a period, or `max`, and the period."""


def usable_cores(quota: Path = QUOTA) -> int:
    """At least one."""
    cores = len(os.sched_getaffinity(0))
    try:
        given, period = quota.read_text(encoding="ascii").split()
        return max(1, min(cores, math.ceil(int(given) / int(period))))
    except (OSError, ValueError):
        return cores
