"""Progress: what it says, when it says it, and that a terminal's log lines stay whole."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
import threading

import pytest

from rl_ft import progress
from rl_ft.progress import Progress, track


class Clock:
    """A clock that the test sets."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def steps(clock, total=300) -> Progress:
    return Progress("grpo/lookahead", total=total, unit="steps", clock=clock)


def test_before_the_first_report_it_tells_how_long_it_has_been(clock):
    shown = steps(clock)
    clock.now_s += 75
    assert shown.status() == "0 of 300 steps, 1:15 so far"


def test_speed_and_time_left_count_from_the_first_report(clock):
    shown = steps(clock)
    clock.now_s += 60
    shown.update(100)
    clock.now_s += 40
    shown.update(120)
    assert shown.status() == "120 of 300 steps, 6:00 left, 0.5 steps/s"


def test_the_time_left_runs_down_between_two_reports(clock):
    shown = steps(clock, total=10)
    shown.update(0)
    clock.now_s += 10
    shown.update(5)
    clock.now_s += 4
    assert shown.status().endswith("steps, 0:06 left, 0.5 steps/s")


def test_hours_are_told_as_hours(clock):
    shown = steps(clock, total=1000)
    shown.update(0)
    clock.now_s += 10
    shown.update(1)
    assert shown.status().endswith("steps, 2:46:30 left, 0.1 steps/s")


def test_figures_stay_until_they_are_replaced(clock):
    shown = steps(clock)
    shown.update(1, reward="0.31", check="14.2 s")
    shown.update(2, reward="0.40")
    assert shown.status().endswith(", reward 0.40, check 14.2 s")


def test_work_that_goes_back_is_timed_anew(clock):
    shown = steps(clock)
    for done in (0, 10, 4):
        shown.update(done)
        clock.now_s += 10
    assert "steps/s" not in shown.status()
    shown.update(14)
    assert "1 steps/s" in shown.status()


def test_shares_of_episodes_add_up_to_episodes(clock):
    shown = Progress("evaluate", total=2, unit="episodes", clock=clock)
    for _ in range(12):
        shown.add(1 / 60)
    assert shown.status().startswith("0.2 of 2 episodes")
    for _ in range(48):
        shown.add(1 / 60)
    assert shown.status().startswith("1 of 2 episodes")


def test_reports_from_many_threads_are_all_counted():
    shown = Progress("evaluate", total=8000, unit="episodes")
    threads = [
        threading.Thread(target=lambda: [shown.add(1) for _ in range(1000)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shown.done == 8000


@pytest.fixture
def impatient(monkeypatch, caplog):
    """A log line as soon as one is due."""
    monkeypatch.setattr(progress, "POLL_INTERVAL_S", 0.01)
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.03)
    caplog.set_level(logging.INFO, logger="rl_ft.progress")
    return caplog


def wait_for_a_line(caplog) -> str:
    waiting = threading.Event()
    for _ in range(500):
        if caplog.messages:
            return caplog.messages[0]
        waiting.wait(0.01)
    raise TimeoutError("nothing was logged")


def test_without_a_terminal_silence_is_broken_by_a_log_line(impatient):
    with Progress("sft", total=60, unit="steps"):
        assert wait_for_a_line(impatient).startswith("sft: 0 of 60 steps, 0:00 so far")


def test_what_another_process_writes_is_polled(impatient):
    with Progress("sft", total=60, unit="steps", poll=lambda p: p.update(7)):
        assert wait_for_a_line(impatient).startswith("sft: 7 of 60 steps")


def test_a_stage_keeps_quiet_while_a_part_of_it_speaks(impatient):
    with Progress("grpo"), Progress("grpo/lookahead", total=300, unit="steps"):
        wait_for_a_line(impatient)
    assert not [line for line in impatient.messages if line.startswith("grpo:")]


def test_a_line_is_said_no_more_once_its_work_has_ended(impatient):
    with Progress("sft", total=60, unit="steps"):
        wait_for_a_line(impatient)
    num = len(impatient.messages)
    threading.Event().wait(0.1)
    assert len(impatient.messages) == num


def test_tracked_items_come_through_unchanged():
    assert list(track(iter("abc"), "letters", total=3, unit="letters")) == ["a", "b", "c"]


ON_A_TERMINAL = """
import logging, sys, time
from pathlib import Path
from rl_ft.monitor import run_log
from rl_ft.progress import Progress
with run_log(Path(sys.argv[1])):
    with Progress("grpo/lookahead", total=9, unit="steps") as steps:
        for step in range(1, 4):
            steps.update(step, reward=f"0.{step}")
            logging.getLogger("rl_ft").info("a fact of step %d", step)
            with Progress("check", total=4, unit="episodes") as check:
                check.add(2)
                time.sleep(0.4)
        print("a result")
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> tuple[list[str], str]:
    """What a terminal of 120 columns received, split where its cursor moves; what was printed."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, str(tmp_path_factory.mktemp("run") / "run.log")],
        stdout=subprocess.PIPE,
        text=True,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    received = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:
            break
        if not part:
            break
        received += part
    printed, _ = process.communicate()
    assert process.returncode == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\x00", received.decode())
    lines = re.split(r"[\r\n]+", plain.replace("\x00", ""))
    return [line.strip() for line in lines], printed


@pytest.fixture
def screen(shown) -> list[str]:
    return shown[0]


def test_standard_output_goes_where_it_was_sent(shown):
    assert shown[1] == "a result\n"


def test_on_a_terminal_every_log_line_is_whole(screen):
    for step in (1, 2, 3):
        assert sum(line.endswith(f"a fact of step {step}") for line in screen) == 1


def test_on_a_terminal_the_lines_of_all_work_follow(screen):
    assert any(
        "grpo/lookahead" in line and "3 of 9 steps" in line and "reward 0.3" in line
        for line in screen
    )
    assert any(line.startswith("check") and "2 of 4 episodes" in line for line in screen)


def test_on_a_terminal_nothing_is_logged_about_progress(screen):
    assert not [line for line in screen if "INFO" in line and "of 9 steps" in line]
