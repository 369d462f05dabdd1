"""What a run says about itself: metrics per step, the machine's load, the log.

JSON lines are the record; TensorBoard is a view of the same numbers. Nothing here decides anything.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from rl_ft.progress import console as terminal
from rl_ft.run_folder import write_atomically
from rl_ft.sinks import Sinks, TensorBoardSink

GIB = 2**30
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_OURS = ("rl_ft", "envs")


class MetricLog:
    """One line per step in `metrics.jsonl`, on disk when `log` returns, and in `tensorboard/`.

    Other sinks are told the same.

    Example of a line:
        {"stage": "grpo", "step": 12, "time_s": 41.2, "values": {"reward/mean": 0.31}}
    """

    def __init__(self, root: Path, sinks: Sinks | None = None) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._file = root / "metrics.jsonl"
        _drop_torn_line(self._file)
        self._lines = self._file.open("a", encoding="utf-8")
        self._start = time.monotonic()
        self._board = TensorBoardSink(root / "tensorboard")
        self._sinks = sinks or Sinks()

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Record what one step of a stage measured; not-a-number is written as null."""
        numbers = {key: float(value) for key, value in values.items()}
        line = {
            "stage": stage,
            "step": step,
            "time_s": round(time.monotonic() - self._start, 3),
            "values": {key: value if _is_finite(value) else None for key, value in numbers.items()},
        }
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        self._board.log(stage, step, numbers)
        self._sinks.log(stage, step, numbers)

    def rewind(self, stage: str, step: int) -> None:
        """Forget the stage's steps after `step`: a resumed run makes them again.

        TensorBoard and other sinks are not rewound; they show both.
        """
        kept = [
            line
            for line in self._file.read_text(encoding="utf-8").splitlines(keepends=True)
            if not _is_after(json.loads(line), stage, step)
        ]
        self._lines.close()
        write_atomically(self._file, "".join(kept))
        self._lines = self._file.open("a", encoding="utf-8")

    def close(self) -> None:
        """End both files; nothing may be logged afterwards. Other sinks are their owner's."""
        self._lines.close()
        self._board.close()


def read_metrics(root: Path, stage: str) -> list[dict[str, Any]]:
    """The stage's steps in order, each as `step`, `time_s` and `values`."""
    return [line for line in read_record(root) if line["stage"] == stage]


def read_record(root: Path) -> list[dict[str, Any]]:
    """The steps of all stages, as they were written.

    A line that is just being written, or never was to its end, is left out.
    """
    file = root / "metrics.jsonl"
    if not file.is_file():
        return []
    written = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in written if line.endswith("\n")]


class Relay:
    """Tells sinks what another process writes into the record of some stages."""

    def __init__(self, root: Path, stages: Sequence[str], sinks: Sinks) -> None:
        self._root, self._sinks = root, sinks
        self._told = dict.fromkeys(stages, 0)

    def __call__(self) -> dict[str, list[dict[str, Any]]]:
        """Tell what is new since the last call; returns the whole record of each stage."""
        record = {stage: read_metrics(self._root, stage) for stage in self._told}
        for stage, lines in record.items():
            told = self._told[stage]
            # A stage that begins anew has fewer.
            for line in lines[min(told, len(lines)) :]:
                values = {k: v for k, v in line["values"].items() if v is not None}
                self._sinks.log(stage, line["step"], values)
            self._told[stage] = len(lines)
        return record


def write_summary(root: Path, section: str, values: Mapping[str, Any]) -> None:
    """Set one section of `metrics.json`, the run's final figures; the others stay."""
    file = root / "metrics.json"
    summary = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    summary[section] = dict(values)
    write_atomically(file, json.dumps(summary, indent=2) + "\n")


class LoadSampler:
    """How busy this machine and this process tree were since the last sample."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        psutil.cpu_percent()
        self._time_s = time.monotonic()
        self._core_s, _ = self._tree()

    def sample(self) -> dict[str, float]:
        """Since the last call the share of the cores that were busy (1 = every one) and the
        core-seconds of this process tree, also as cores on average; and memory now."""
        memory = psutil.virtual_memory()
        before, before_s = self._core_s, self._time_s
        self._core_s, resident = self._tree()
        self._time_s = time.monotonic()
        core_s = self._core_s - before
        return {
            "system/cpu_share": psutil.cpu_percent() / 100,
            "system/processes_core_s": core_s,
            "system/processes_cores": core_s / max(self._time_s - before_s, 1e-3),
            "system/memory_used_gib": (memory.total - memory.available) / GIB,
            "system/processes_memory_gib": resident / GIB,
        }

    def _tree(self) -> tuple[float, int]:
        """Core-seconds so far and resident memory of this process and all below it: of those that
        ended, what their parent waited for; of shared pages, each time they are mapped."""
        core_s, resident = 0.0, 0
        for process in (self._process, *self._process.children(recursive=True)):
            try:
                times, memory = process.cpu_times(), process.memory_info()
            except psutil.Error:
                continue  # it ended while we counted
            core_s += times.user + times.system + times.children_user + times.children_system
            resident += memory.rss
        return core_s, resident


@contextmanager
def run_log(file: Path | None, *, console: bool = True) -> Iterator[None]:
    """Everything logged goes to `file`, if any; what this project says also to the terminal."""
    handlers: list[tuple[logging.Logger, logging.Handler]] = []
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(file, encoding="utf-8")
        to_file.setFormatter(logging.Formatter(_LOG_FORMAT))
        handlers.append((logging.getLogger(), to_file))
    if console:
        from rich.logging import RichHandler

        to_console = RichHandler(console=terminal(), show_path=False)
        handlers += [(logging.getLogger(name), to_console) for name in _OURS]
    levels = {name: logging.getLogger(name).level for name in _OURS}
    try:
        for logger, handler in handlers:
            logger.addHandler(handler)
        for name in _OURS:
            logging.getLogger(name).setLevel(logging.INFO)
        yield
    finally:
        for logger, handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _is_finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _drop_torn_line(file: Path) -> None:
    """A process that was killed may have left half a line at the end."""
    if file.is_file():
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            file.write_bytes(whole)


def _is_after(line: Mapping[str, Any], stage: str, step: int) -> bool:
    return line["stage"] == stage and line["step"] > step
