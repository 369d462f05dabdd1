"""README: what it shows runs as it is printed there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from envs.scenario import load_scenario

README = Path(__file__).resolve().parent.parent / "README.md"
HEAVY = ("ray", "torch", "vllm", "transformers", "trl", "rl_ft")


@pytest.fixture(scope="module")
def example() -> str:
    """The first Python block: `envs` alone."""
    found = re.search(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


def test_envs_alone_takes_a_dozen_lines(example):
    assert len([line for line in example.splitlines() if line.strip()]) <= 12


def test_envs_alone_runs_on_a_users_network_without_any_heavy_library(example, tmp_path):
    city = load_scenario("generated:1")
    shutil.copy(city.net_file, tmp_path / "my.net.xml")
    shutil.copy(city.route_files[0], tmp_path / "my.rou.xml")
    (tmp_path / "my.sumocfg").write_text(
        "<configuration><input><net-file value='my.net.xml'/>"
        "<route-files value='my.rou.xml'/></input></configuration>"
    )
    check = f"\nimport sys\nassert not set({HEAVY}) & set(sys.modules), sorted(sys.modules)\n"
    program = tmp_path / "example.py"
    program.write_text(example + check)
    done = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    costs = re.findall(r"^([A-Z]) .*?(\d+\.?\d*)", done.stdout, re.MULTILINE)
    assert len(costs) > 1
    assert all(float(cost) > 0 for _, cost in costs)
