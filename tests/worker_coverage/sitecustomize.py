"""Ray kills its workers, and what coverage.py measured dies with them: there, save as it goes.

On the path of scripts/test.sh only. Not for world processes, which must stay single-threaded.
"""

from __future__ import annotations

import os
import sys
import threading
import time

SAVE_INTERVAL_S = 10.0


def _save_for_ever() -> None:
    import coverage

    while True:
        time.sleep(SAVE_INTERVAL_S)
        measurement = coverage.Coverage.current()
        if measurement is not None:
            measurement.save()


if "COVERAGE_PROCESS_CONFIG" in os.environ and any("default_worker" in a for a in sys.orig_argv):
    threading.Thread(target=_save_for_ever, name="save coverage", daemon=True).start()
