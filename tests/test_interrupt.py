"""Ctrl-C is neither lost nor does it leave anything taken."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from rl_ft.interrupt import late_interrupt


def said_by(program: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_ctrl_c_counts_once_what_must_not_be_disturbed_is_done():
    done = []

    def work():
        with late_interrupt():
            signal.raise_signal(signal.SIGINT)
            done.append("the rest")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["the rest"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_during_forks_is_not_lost_and_logging_goes_on():
    program = """
import logging, os, signal, subprocess, threading
from rl_ft.interrupt import late_interrupt

signal.signal(signal.SIGINT, signal.default_int_handler)
stop = threading.Event()
def interrupt():
    while not stop.wait(0.0002):
        os.kill(os.getpid(), signal.SIGINT)
try:
    with late_interrupt():
        interrupts = threading.Thread(target=interrupt)
        interrupts.start()
        for _ in range(200):
            # What is done before the child begins makes Python run its hooks, as at Ray's start.
            subprocess.Popen(["true"], preexec_fn=lambda: None).wait()
        stop.set()
        interrupts.join()
    print("lost")
except KeyboardInterrupt:
    print("came")
asked = threading.Thread(target=lambda: logging.getLogger("x").info("y"), daemon=True)
asked.start()
asked.join(10)
print("held" if asked.is_alive() else "free")
"""
    assert said_by(program) == ["came", "free"]


def test_where_no_signal_arrives_nothing_is_changed():
    handlers = []

    def work():
        with late_interrupt():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


def test_ctrl_c_while_work_is_handed_out_leaves_no_lock_taken():
    """In turns: work is handed out, Ctrl-C comes at any moment of it, and the pool still ends."""
    program = """
import os, random, signal, threading, time
from concurrent.futures import ThreadPoolExecutor
from rl_ft.interrupt import handed_out

signal.signal(signal.SIGINT, signal.default_int_handler)
came = 0
for turn in range(60):
    wait_s = random.Random(turn).uniform(0, 0.02)
    timer = threading.Timer(wait_s, os.kill, (os.getpid(), signal.SIGINT))
    try:
        with ThreadPoolExecutor(2) as pool:
            timer.start()
            for _ in range(200):
                list(handed_out(pool, abs, range(20)))
            time.sleep(1)
    except KeyboardInterrupt:
        came += 1
    timer.join()
print(came)
"""
    assert said_by(program) == ["60"]


@pytest.mark.parametrize(("kept", "said"), [(False, "lost"), (True, "came")])
def test_ctrl_c_in_a_finalizer_comes_again(kept, said):
    program = f"""
import gc, os, signal, sys, time
from rl_ft.interrupt import keep_interrupts

signal.signal(signal.SIGINT, signal.default_int_handler)
if {kept}:
    keep_interrupts()

class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

last = Last()
last.itself = last
try:
    del last
    gc.collect()
    time.sleep(0.5)
    print("lost")
except KeyboardInterrupt:
    print("came")
"""
    assert said_by(program) == [said]
