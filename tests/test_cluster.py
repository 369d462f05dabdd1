"""How GPUs are shared among what works at the same time."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from rl_ft.cluster import gpu_share, late_interrupt


@pytest.mark.parametrize(
    ("gpus", "num_holders", "share"),
    [
        (0.0, 1, 0.0),
        (0.0, 2, 0.0),
        (1.0, 1, 1.0),
        (1.0, 2, 0.5),
        (2.0, 2, 1.0),
        (2.0, 3, 0.5),
        (3.0, 4, 0.5),
        (8.0, 2, 1.0),
    ],
)
def test_each_has_a_whole_gpu_where_there_are_enough_else_an_equal_part(
    monkeypatch, gpus, num_holders, share
):
    resources = {"CPU": 4.0} | ({"GPU": gpus} if gpus else {})
    monkeypatch.setattr("ray.cluster_resources", lambda: resources)
    assert gpu_share(num_holders) == share


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
from rl_ft.cluster import late_interrupt

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
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["came", "free"], done.stderr


def test_where_no_signal_arrives_nothing_is_changed():
    handlers = []

    def work():
        with late_interrupt():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]
