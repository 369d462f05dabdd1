"""The container files: what they promise by their text, and what a built image keeps of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILES = sorted((ROOT / "cluster").glob("Dockerfile*"))
SCRIPTS = [
    ROOT / "scripts" / name
    for name in (
        "build_image.sh",
        "make_base_image.sh",
        "run_integration_test.sh",
        "run_cluster_test.sh",
    )
]
IMAGE = "rl-ft:test"
dockerfiles = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


def instructions(dockerfile: Path) -> list[list[str]]:
    """Keyword and value of every instruction, continued lines joined, comments left out."""
    lines = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE)
    joined = re.sub(r"\\\n\s*", "", lines)
    return [line.split(maxsplit=1) for line in joined.splitlines() if line]


def ran(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


@dockerfiles
def test_every_stage_stands_on_an_image_that_the_builder_names(dockerfile):
    first, *rest = instructions(dockerfile)
    assert first[0] == "ARG"
    assert first[1].startswith("BASE_IMAGE=")
    assert [value for word, value in rest if word == "FROM"] == [
        "${BASE_IMAGE} AS base",
        "base AS dependencies",
        "base",
    ]


@dockerfiles
def test_an_image_ends_as_a_numeric_user_other_than_root(dockerfile):
    users = [value for word, value in instructions(dockerfile) if word == "USER"]
    defaults = [value for word, value in instructions(dockerfile) if word == "ARG"]
    assert users == ["${UID}:0"]
    assert any(re.fullmatch(r"UID=[1-9]\d*", default) for default in defaults)


@dockerfiles
def test_a_change_of_the_source_leaves_the_dependencies_cached(dockerfile):
    copied = [value for word, value in instructions(dockerfile) if word == "COPY"]
    before = copied[: copied.index("--from=dependencies /opt/venv /opt/venv")]
    assert before == ["pyproject.toml constraints.txt .site* ./"]


@dockerfiles
def test_the_health_of_a_container_is_its_cluster_or_its_simulator(dockerfile):
    (check,) = [value for word, value in instructions(dockerfile) if word == "HEALTHCHECK"]
    assert "then ray health-check; else sumo --version" in check


@dockerfiles
def test_the_whole_package_and_its_tests_are_copied(dockerfile):
    copied = {value.split()[0] for word, value in instructions(dockerfile) if word == "COPY"}
    assert {"envs", "rl_ft", "tests", "scripts"} <= copied


def test_both_images_are_made_the_same_way_but_for_base_and_build():
    cpu, gpu = (
        [value for word, value in instructions(dockerfile) if word in ("COPY", "USER", "CMD")]
        for dockerfile in DOCKERFILES
    )
    assert cpu == gpu


@scripts
def test_help_names_every_option_and_variable_of_the_script(script):
    done = ran("bash", script, "--help")
    assert done.returncode == 0, done.stderr
    text = script.read_text().split("set -euo pipefail")[1]
    options = set(re.findall(r"^ *(--[a-z]+)\)", text, re.MULTILINE))
    variables = set(re.findall(r"\$\{([A-Z_]+):-", text))
    assert options
    assert variables
    assert {word for word in options | variables if word not in done.stdout} == set()


@scripts
def test_an_unknown_option_is_refused_before_anything_is_done(script):
    done = ran("bash", script, "--no-such-option")
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr
    assert "--help" in done.stderr


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--format", "prose"], "phase, phase_duration or extend, got 'prose'"),
        (["--skip-prepare"], "expects base and testdata"),
        ([], "--skip-prepare, or remove it"),
    ],
)
def test_the_integration_test_says_what_it_cannot_start_with(tmp_path, options, complaint):
    script = tmp_path / "scripts" / "run_integration_test.sh"
    script.parent.mkdir()
    shutil.copy(ROOT / "scripts" / script.name, script)
    (tmp_path / "integration" / "mine").mkdir(parents=True)
    done = ran("bash", script, "--local", *options)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert (tmp_path / "integration" / "mine").is_dir()


def test_a_step_of_the_integration_test_that_fails_shows_its_log_and_leaves_nothing(tmp_path):
    script = tmp_path / "scripts" / "run_integration_test.sh"
    script.parent.mkdir()
    shutil.copy(ROOT / "scripts" / script.name, script)
    (tmp_path / "scripts" / "setup.sh").write_text("seq 1 70; exit 3\n")
    (tmp_path / "scripts" / "setup.sh").chmod(0o755)
    done = ran("bash", script, "--local")
    assert done.returncode == 1
    assert done.stdout.splitlines()[:4] == [
        "[1/7] environment",
        "--- the last 50 lines of its log",
        "21",
        "22",
    ]
    assert "FAILED  environment" in done.stdout
    assert not (tmp_path / "integration").exists()


def test_nothing_that_a_run_or_a_build_leaves_is_sent_to_the_builder():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "integration", "**/__pycache__"} <= set(ignored)


@pytest.fixture(scope="module")
def image() -> str:
    if shutil.which("docker") is None or ran("docker", "info").returncode:
        pytest.skip("no container engine answers")
    label = '{{index .Config.Labels "org.opencontainers.image.revision"}}'
    found = ran("docker", "image", "inspect", "--format", label, IMAGE)
    if found.stdout.strip() != ran("git", "-C", ROOT, "rev-parse", "HEAD").stdout.strip():
        pytest.skip(
            f"no image {IMAGE} of this commit: EXTRAS=cpu,resco,dev scripts/build_image.sh {IMAGE}"
        )
    return IMAGE


def test_a_container_of_the_image_is_not_root_and_simulates_without_a_network(image):
    check = (
        "id -u; touch runs/writable; python -c 'import envs; print(envs.__file__)'; sumo --version"
    )
    done = ran("docker", "run", "--rm", "--network", "none", image, "bash", "-ec", check)
    assert done.returncode == 0, done.stderr
    uid, package, simulator = done.stdout.splitlines()[:3]
    assert int(uid) > 0
    assert package == "/app/envs/__init__.py"
    assert re.search(r"SUMO.* 1\.28", simulator)
