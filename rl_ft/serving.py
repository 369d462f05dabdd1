"""A model behind HTTP: a junction sends what its detectors see and is told what to show next.

`POST /decide` takes a `Decision` as JSON and gives a `Choice`; `/docs` describes both. The model is
asked in the words that it was taught and again where it is not sure, junctions that ask at the same
time are answered in one batch, and where an answer is invalid max-pressure decides, as in the
closed loop. Ray Serve runs
it: `rl-ft serve` on this machine, `serve run rl_ft.serving:app model=DIR` or a RayService in a
cluster. Importing this module imports Ray Serve.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from ray import serve

from envs import dialect
from envs.answers import Parsed, act, offered, parse
from envs.controllers import max_pressure
from envs.errors import UserError
from envs.types import Action, Decision
from rl_ft.choice import Choice, chosen, problem
from rl_ft.cluster import engine_gpus, ray_session
from rl_ft.config import Config
from rl_ft.question import asked_as_taught, require_model
from rl_ft.render import PromptTooLongError, Renderer
from rl_ft.types import Completion
from rl_ft.vote import doubts, elected

log = logging.getLogger(__name__)

TOKEN_VARIABLE = "RLFT_TOKEN"
"""What whoever asks must know, as `Authorization: Bearer ...`."""
NAME = "rl-ft"
MAX_BATCH, BATCH_WAIT_S = 64, 0.005
WATCH_S = 5.0
ANSWER_S = 30.0
"""A junction waits no longer: max-pressure decides then, and the replica is replaced."""
UNHEALTHY_S = 600.0
"""A service that has had no engine for so long will not get one; to start one takes a minute."""

api = FastAPI(title="rl-ft", description="What a signalled junction should show next.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def _hash(token: str) -> str:
    """Above the class: Ray Serve takes from this module what is there when it sees the class."""
    return hashlib.sha256(token.encode()).hexdigest()


@serve.deployment(name="policy")
@serve.ingress(api)
class Policy:
    """One replica: a vLLM engine with one model."""

    def __init__(self, model: str, token_hash: str | None, config: Config) -> None:
        self._model = model
        # Ray keeps what a replica was made with: not the secret.
        self._token_hash = token_hash
        self._failed = ""
        self._config = config = asked_as_taught(Path(model), config)
        self._renderer = Renderer(model, max_prompt_length=config.model.max_prompt_length)
        # The engine lives in a thread of its own: while it samples, others are listened to.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._generator = self._thread.submit(self._engine).result()

    def _engine(self) -> object:
        from rl_ft.generation import Generator

        return Generator(self._model, config=self._config, seed=self._config.seed)

    @api.get("/")
    async def about(self, credentials: Credentials) -> dict[str, str]:
        """Which model answers, and to which question."""
        self._check_token(credentials)
        return {"model": self._model, "decision_format": self._config.decision_format}

    @api.post("/decide")
    async def decide(self, decision: Decision, credentials: Credentials) -> Choice:
        """What a junction should show next, from what its detectors see now."""
        self._check_token(credentials)
        if wrong := problem(decision):
            raise HTTPException(422, wrong)
        decision = offered(decision, self._config.decision_format)
        if len(decision.legal) == 1:
            return chosen(decision, Action(phase=decision.legal[0]), "only_one", "")
        try:
            answer = (await asyncio.wait_for(self._elected(decision), ANSWER_S)).text
        except PromptTooLongError as error:
            raise HTTPException(422, str(error)) from error
        except Exception as error:  # of whatever engine: a junction needs a phase all the same
            self._failed = f"{type(error).__name__}: {error}"
            log.warning("max-pressure decides, the engine does not: %s", self._failed)
            answer = ""
        parsed = parse(decision, answer)
        if isinstance(parsed, Parsed):
            return chosen(decision, parsed.action, "model", answer)
        fallback = act(decision, max_pressure(decision).phase)
        return chosen(decision, fallback, "max_pressure", answer)

    async def _elected(self, decision: Decision) -> Completion:
        answer = await self._answer(self._prompt(decision))
        num = self._config.evaluate.num_tellings
        told = doubts(decision, answer, num_tellings=num)
        others = (self._answer(self._prompt(telling.decision)) for telling in told)
        return elected(decision, answer, told, await asyncio.gather(*others))

    def _prompt(self, decision: Decision) -> tuple[int, ...]:
        messages = dialect.messages(decision, instructions=self._config.model.instructions)
        return self._renderer.prompt_ids(messages)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _answer(self, prompts: list[Sequence[int]]) -> list[Completion]:
        def ask() -> list[Completion]:
            answers = self._generator.generate(
                prompts,
                num_samples=1,
                temperature=0.0,
                max_tokens=self._config.grpo.max_completion_length,
            )
            return [completion for [completion] in answers]

        return await asyncio.get_running_loop().run_in_executor(self._thread, ask)

    def check_health(self) -> None:
        """Ray Serve replaces a replica that raises here."""
        if self._failed:
            raise RuntimeError(f"the engine failed: {self._failed}")

    def _check_token(self, credentials: HTTPAuthorizationCredentials | None) -> None:
        if self._token_hash is None:
            return
        given = credentials.credentials if credentials else ""
        if not hmac.compare_digest(_hash(given), self._token_hash):
            got = "a wrong one" if given else "none"
            raise HTTPException(
                401,
                f"expected the token of this service as Authorization: Bearer ..., got {got}",
                headers={"WWW-Authenticate": "Bearer"},
            )


def app(arguments: dict[str, str]) -> serve.Application:
    """What `serve run` and a RayService build, before there is a cluster: `model` is the folder,
    `replicas` how many engines, `gpus` what each of them holds; by default one on the CPU.

    Raises:
        UserError: an argument is wrong, or no token is set: where it listens is not known here.
    """
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise UserError(f"expected a secret in {TOKEN_VARIABLE}, got none: anybody could ask")
    if unknown := set(arguments) - {"model", "replicas", "gpus"}:
        raise UserError(
            f"expected the arguments model, replicas and gpus, got {', '.join(sorted(unknown))}"
        )
    model = Path(arguments.get("model", ""))
    require_model(model, "model")
    try:
        replicas, gpus = int(arguments.get("replicas", 1)), float(arguments.get("gpus", 0))
    except ValueError as error:
        raise UserError(f"replicas and gpus: expected numbers: {error}") from error
    return _application(model, token, Config(), replicas=replicas, num_gpus=gpus)


def serve_model(
    model: Path,
    *,
    host: str,
    port: int,
    replicas: int,
    config: Config,
    on_ready: Callable[[str], None],
) -> None:
    """Serve until Ctrl-C; `on_ready` is told the address once it answers.

    Raises:
        UserError: there is no such model, others may ask and no token is set, a private cluster has
            no room for as many replicas, or one that is joined serves already.
        RuntimeError: it does not come up, or does not stay up.
    """
    require_model(model, "--model")
    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is None and not _is_loopback(host):
        raise UserError(
            f"--host {host} lets others ask: expected a secret in {TOKEN_VARIABLE}, got none"
        )
    _require_free(host, port)
    _require_room(replicas, config)
    with ray_session(config):
        _require_no_other()
        serve.start(http_options={"host": host, "port": port})
        try:
            num_gpus = engine_gpus(replicas, config.generation.tensor_parallel_size)
            application = _application(model, token, config, replicas=replicas, num_gpus=num_gpus)
            serve.run(application, name=NAME)
            on_ready(f"http://{host}:{port}")
            # A replica that dies is replaced; that is no end.
            ran_s = time.monotonic()
            while time.monotonic() < ran_s + UNHEALTHY_S:
                now = serve.status().applications[NAME]
                if now.status == "RUNNING":
                    ran_s = time.monotonic()
                time.sleep(WATCH_S)
            raise RuntimeError(f"the service has failed: {now.status}: {now.message}")
        finally:
            serve.shutdown()


def _application(
    model: Path, token: str | None, config: Config, *, replicas: int, num_gpus: float
) -> serve.Application:
    options = {"num_cpus": config.cpus_per_engine, "num_gpus": num_gpus}
    policy = Policy.options(
        num_replicas=replicas, ray_actor_options=options, max_ongoing_requests=4 * MAX_BATCH
    )
    return policy.bind(str(model.absolute()), None if token is None else _hash(token), config)


def _require_room(replicas: int, config: Config) -> None:
    """For a replica that finds none Ray Serve waits for ever."""
    wanted = replicas * config.cpus_per_engine
    if not config.joins_a_cluster and wanted > config.ray.num_cpus:
        raise UserError(
            f"--replicas {replicas} want {wanted:g} CPUs, but ray.num_cpus of the private cluster "
            f"is {config.ray.num_cpus}: --set ray.num_cpus={math.ceil(wanted)}, or fewer replicas"
        )


def _require_no_other() -> None:
    """A cluster serves at one address only, whatever a second one asks for, and who ends it ends
    what others serve."""
    running = serve.status()
    if running.proxies or running.applications:
        raise UserError(
            "this cluster serves already: expected one that does not. Add a service to it with "
            "`serve run rl_ft.serving:app model=DIR --name NAME --route-prefix /NAME`"
        )


def _require_free(host: str, port: int) -> None:
    """Ray Serve shares a port with whoever shares it too: now one would answer, now the other."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: expected a free port, got {error.strerror}"
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
