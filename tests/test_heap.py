"""What is copied in bulk in a fork is what was there, and the parent's stays its own."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own: of one thread, with a heap that it alone has filled.
FORKS = """
from envs import heap
from envs.fork import fork_map

blocks = [bytearray([number % 251]) * 1000 for number in range(20_000)]
content = b"".join(blocks)

def write_all_over(_):
    for block in blocks:
        block[0] = 255
    return heap.busy()

def copied(stretches):
    heap.copy(stretches)
    same = b"".join(blocks) == content
    write_all_over(None)
    return same, all(block[0] == 255 for block in blocks)

(idle,) = fork_map(lambda _: heap.busy(), [None])
(busy,) = fork_map(write_all_over, [None])
assert not idle, idle
assert sum(end - start for start, end in busy) >= 14 << 20, busy
assert all(end - start >= heap.HUGE_BYTES for start, end in busy), busy
assert fork_map(copied, [busy, [(0, heap.HUGE_BYTES)]]) == [(True, True), (True, True)]
assert b"".join(blocks) == content
heap.PAGEMAP = "/nowhere"
assert fork_map(write_all_over, [None]) == [[]]
"""


def test_forks_copy_what_they_write_all_over_and_nothing_changes():
    ended = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
