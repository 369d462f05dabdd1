"""An rl-ft command as a Ray job: send the source, follow the log, end as the command ended.

The job begins in `rl_ft.job`. The id of a job is chosen here, so that a request that had to be
repeated starts one job, not two. No wait is without an end or without a look at the other side.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from envs.errors import UserError
from rl_ft.environment import STORAGE, VERSIONS, installed_versions
from rl_ft.recipe import nearest
from rl_ft.run_folder import git_commit
from rl_ft.source import pack, requirements

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

Answer = TypeVar("Answer")

START_S = 60.0
"""How long a cluster may take from its first answer until it takes jobs."""
GRACE_S = 120
"""How long a job may take that was told to stop (simulations end their episode); then Ray kills
it."""
STOP_S = GRACE_S + 30.0
"""How long to wait for the news of it."""
SILENCE_S = 10.0
"""How long a log may say nothing before the server is asked whether it still lives."""
RECONNECTS = 6
"""How often in a row the connection may be lost while a log is followed."""
REQUEST_S = (10.0, 120.0)
"""Limits of one request: to connect, and to answer (an archive may be on its way)."""


GO_ON = "rl-ft submit -- run --out THE_SAME --resume"


class JobError(Exception):
    """The job has no exit status of its own: it was stopped, its driver died, or it is lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is to run, where its paths lead, and in which environment."""

    arguments: tuple[str, ...]
    """Of `rl-ft`, which is not among them."""
    storage: str
    """Absolute path on the cluster."""
    python: str | None = None
    """None: the submitter's own where the cluster has it too, else `python`."""
    pip: str | None = None
    """`cpu` or `gpu`: install what that build needs before the job; None: use what is there."""
    any_versions: bool = False

    def entrypoint(self) -> str:
        """The shell command of the job."""
        arguments = shlex.join(("-P", "-m", "rl_ft.job", *self.arguments))
        if self.python or self.pip:
            return f"exec {shlex.quote(self.python or 'python')} {arguments}"
        own = shlex.quote(sys.executable)
        return f'python={own}; [ -x "$python" ] || python=python; exec "$python" {arguments}'

    def runtime_env(self, archive: Path) -> dict[str, Any]:
        """Ray's runtime environment with the packed source; none of it is secret."""
        variables = {
            STORAGE: self.storage,
            # A stopped job ends as with Ctrl-C: it says how to go on, and notes how it ended.
            "RAY_JOB_STOP_SIGNAL": "SIGINT",
            "RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S),
        }
        if (commit := git_commit()) is not None:
            variables["RLFT_GIT_COMMIT"] = commit
        if not self.any_versions:
            variables[VERSIONS] = json.dumps(installed_versions())
        env: dict[str, Any] = {
            "working_dir": str(archive),
            "env_vars": variables,
            "worker_process_setup_hook": "rl_ft.environment.enter_storage",
        }
        if self.pip:
            env["pip"] = requirements(self.pip)
        return env

    def metadata(self) -> dict[str, str]:
        """What Ray and its dashboard keep with the job."""
        found = {"command": shlex.join(("rl-ft", *self.arguments)), "storage": self.storage}
        if (commit := git_commit()) is not None:
            found["git_commit"] = commit
        return found


def rl_ft_arguments(command: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The arguments of `rl-ft` in what came after `--`; a leading `rl-ft` is dropped.

    Raises:
        UserError: there are none, or they are for none of the `known` commands.
    """
    arguments = tuple(command[1:] if command[:1] == ["rl-ft"] else command)
    if not arguments:
        raise UserError(
            "expected a command of rl-ft after --, such as: "
            "rl-ft submit -- run --recipe smoke --out runs/job"
        )
    if not arguments[0].startswith("-") and arguments[0] not in known:
        hint = nearest(arguments[0], known)
        raise UserError(f"expected a command of rl-ft after --, got {arguments[0]}{hint}")
    return arguments


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """The job server of a Ray cluster; made by `connect`."""

    address: str
    """Of its dashboard, without a slash at the end."""
    client: JobSubmissionClient

    def submit(self, job: Job) -> str:
        """Start a job; returns its id once the cluster has taken it."""
        job_id = f"rl-ft-{secrets.token_hex(6)}"
        with tempfile.TemporaryDirectory() as folder:
            env = job.runtime_env(pack(Path(folder) / "source.zip"))

            def send() -> str:
                return self.client.submit_job(
                    entrypoint=job.entrypoint(),
                    runtime_env=env,
                    metadata=job.metadata(),
                    submission_id=job_id,
                )

            # Where only the answer got lost, the job is there although the request failed.
            with named_causes(self.address):
                try:
                    return patiently(send, unless=lambda: job_id if self._knows(job_id) else None)
                except (RuntimeError, OSError):
                    if self._knows(job_id):
                        return job_id
                    raise

    def follow(self, job_id: str, show: Callable[[str], object]) -> int:
        """Show the log of a job until it ends; returns the exit status of its command.

        Raises:
            UserError: there is no such job.
            JobError: the job was stopped, its driver died, or the server is gone.
        """
        with named_causes(self.address):
            if not self._knows(job_id):
                raise UserError(
                    f"the cluster at {self.address} has no job {job_id}; "
                    f"it lists them with: ray job list --address {self.address}"
                )
            return exit_status(job_id, asyncio.run(self._follow(job_id, show)))

    def stop(self, job_id: str) -> None:
        """Stop a job, and wait until it has ended.

        Raises:
            JobError: it has not in time.
        """
        with named_causes(self.address):
            self.client.stop_job(job_id)
            deadline = time.monotonic() + STOP_S
            while not (info := self.client.get_job_info(job_id)).status.is_terminal():
                if time.monotonic() > deadline:
                    raise JobError(
                        f"{job_id} was told to stop and is still {info.status} after {STOP_S:g} s"
                    )
                time.sleep(1)

    def page(self, job_id: str) -> str:
        """Where the dashboard shows a job."""
        return f"{self.address}/#/jobs/{job_id}"

    def instructions(self, job_id: str) -> str:
        """How to look at a job again, and how to end it."""
        return (
            f"look at it again: rl-ft submit --address {self.address} --follow {job_id}; "
            f"stop it: ray job stop --address {self.address} {job_id}"
        )

    async def _follow(self, job_id: str, show: Callable[[str], object]) -> JobDetails:
        shown = lost = 0
        while True:
            seen = 0
            try:
                async for text in self._log(job_id):
                    # A new connection begins at the beginning of the log.
                    fresh = text[max(0, shown - seen) :]
                    seen += len(text)
                    if fresh:
                        show(fresh)
                        shown, lost = seen, 0
                info = await asyncio.to_thread(self.client.get_job_info, job_id)
                if info.status.is_terminal():
                    return info
                why = "its log ended before it did"
            except _lost_connections() as error:
                why = _first_line(error)
            lost += 1
            if lost > RECONNECTS:
                raise JobError(
                    f"lost {job_id}: {self.address} did not answer {lost} times ({why}); "
                    f"if the cluster lives, {self.instructions(job_id)}; if it does not, start "
                    f"one and go on with: {GO_ON}"
                )
            await asyncio.sleep(lost)

    async def _log(self, job_id: str) -> AsyncIterator[str]:
        """Pieces of the log as they come; ends with it, raises when the server is gone."""
        pieces = self.client.tail_job_logs(job_id)
        has_ended = False
        while True:
            piece = asyncio.ensure_future(anext(pieces, None))
            try:
                while not (await asyncio.wait({piece}, timeout=SILENCE_S))[0]:
                    if has_ended:
                        return
                    info = await asyncio.to_thread(self.client.get_job_info, job_id)
                    has_ended = info.status.is_terminal()
                text = piece.result()
            finally:
                piece.cancel()
            if text is None:
                return
            yield text

    def _knows(self, job_id: str) -> bool:
        try:
            self.client.get_job_info(job_id)
        except RuntimeError as error:
            if "status code 404" in str(error):
                return False
            raise
        return True


def connect(address: str) -> Cluster:
    """The cluster whose dashboard is at an address.

    Raises:
        UserError: nobody is there, or it wants another token.
        JobError: what is there does not answer as a dashboard of Ray.
    """
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"--address {address}: expected the dashboard of a Ray cluster, such as "
            "http://127.0.0.1:8265"
        )
    address = address.rstrip("/")
    # Ray would rather go where RAY_ADDRESS says.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    with named_causes(address):
        return Cluster(address=address, client=patiently(lambda: _client(address)))


def patiently(
    ask: Callable[[], Answer],
    *,
    unless: Callable[[], Answer | None] = lambda: None,
    pause_s: float = 2.0,
) -> Answer:
    """The answer of a server that may have started a moment ago, and then says 500 for a while;
    before it is asked again, what `unless` finds counts instead."""
    deadline = time.monotonic() + START_S
    is_repeated = False
    while True:
        try:
            if is_repeated and (found := unless()) is not None:
                return found
            return ask()
        except (RuntimeError, OSError) as error:
            if not _is_starting(error) or time.monotonic() > deadline:
                raise
        is_repeated = True
        time.sleep(pause_s)


@contextmanager
def named_causes(address: str) -> Iterator[None]:
    """What Ray's client raises about a server, as errors of ours."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        token = "a wrong one" if "Authentication failed" in str(error) else "none"
        raise UserError(
            f"the cluster at {address} asks for a token and got {token}: set RAY_AUTH_MODE=token, "
            "and RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or the file ~/.ray/auth_token to what "
            "`ray get-auth-token` prints on its head"
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"nobody answers at {address}: start a cluster there with `ray start --head`, or give "
            "--address the dashboard of one"
        ) from error
    except (RuntimeError, OSError, ValueError) as error:
        raise JobError(f"the cluster at {address} failed: {_first_line(error)}") from error


def exit_status(job_id: str, info: JobDetails) -> int:
    """The exit status of the command of a job that has ended.

    Raises:
        JobError: it has none, with the cause.
    """
    status, code = str(info.status), info.driver_exit_code
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        raise JobError(f"{job_id} was stopped before it was done")
    if code is None:
        cause = " ".join((info.message or "no message").split())
        raise JobError(
            f"{job_id} died, {info.error_type}: {cause[:600]}; a run goes on from where it was "
            f"with: {GO_ON}"
        )
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        raise JobError(f"{job_id} died: its driver was killed by {name}{hint}")
    return code


def _client(address: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)

    class Client(JobSubmissionClient):
        """Ray's own waits for an answer for ever."""

        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            return super()._do_request(*args, timeout=REQUEST_S, **kwargs)

    return Client(address)


def _lost_connections() -> tuple[type[Exception], ...]:
    """What is raised when a log breaks off; RuntimeError is what Ray's client makes of it."""
    from aiohttp import ClientError

    return (RuntimeError, OSError, ClientError)


def _is_starting(error: Exception) -> bool:
    answer = getattr(error, "response", None)
    return "status code 50" in str(error) or (answer is not None and answer.status_code >= 500)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
