"""A model behind HTTP decides as it does in the closed loop; who asks wrongly is told how."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from loop_case import START, loop_config, wait_for
from port_case import free_port
from pydantic import TypeAdapter
from ray import serve

from envs.answers import Parsed, offered, parse
from envs.controllers import max_pressure
from envs.errors import UserError
from envs.scenario import load_scenario
from envs.types import Action, Decision
from envs.world import World
from rl_ft.actors import RemoteAsk
from rl_ft.cluster import ray_session
from rl_ft.config import Config
from rl_ft.crew import Samplers
from rl_ft.render import Renderer
from rl_ft.serving import Policy, app, serve_model
from rl_ft.vote import voting

pytestmark = pytest.mark.e2e

README = Path(__file__).resolve().parents[2] / "README.md"
TOKEN = "a-token-of-the-tests"
DECISION = TypeAdapter(Decision)
LIMIT_S = 240.0
REPLICA = "ray::ServeReplica:rl-ft:policy"
NUM_INSTANTS = 12


def command(model: Path, *options: object) -> list[str]:
    return [sys.executable, "-m", "rl_ft.cli", "serve", "--model", *map(str, (model, *options))]


@pytest.fixture(scope="module")
def service(prepared):
    """`rl-ft serve`, until Ctrl-C; its address."""
    port = free_port()
    process = subprocess.Popen(
        command(prepared / "sft" / START, "--port", port),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RLFT_TOKEN": TOKEN},
    )
    line = process.stderr.readline()
    while line and "answers on" not in line:
        line = process.stderr.readline()
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=LIMIT_S) == 130


def post(service: str, body: bytes, token: str | None = TOKEN) -> tuple[int, dict]:
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(f"{service}/decide", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refused:
        said = refused.read().decode()
        return refused.code, json.loads(said) if said.startswith("{") else {"detail": said}


@pytest.fixture(scope="module")
def instants():
    """What the junctions of a city have to decide while max-pressure drives."""
    with World() as world:
        scenario = load_scenario("generated:1001")
        world.reset(scenario, seed=1)
        found = []
        for i in range(NUM_INSTANTS):
            world.drive("max_pressure", until_s=scenario.begin_s + 60 * (i + 1))
            found += world.decisions()
    assert any(len(decision.legal) > 1 for decision in found)
    return found


def test_a_service_decides_as_the_model_does_in_the_closed_loop(
    service, prepared, generator, instants
):
    config, model = loop_config(), str(prepared / "sft" / START)
    samplers = Samplers([lambda _: generator], max_failures=0, call_timeout_s=LIMIT_S)
    asyncio.run(samplers.load_folder(model))
    render = Renderer(model, max_prompt_length=config.model.max_prompt_length)
    num = Config().evaluate.num_tellings
    ask = voting(RemoteAsk(samplers, render, config), num_tellings=num)
    asked = [offered(d, config.decision_format) for d in instants if len(d.legal) > 1]
    answers = [parse(d, completion.text) for d, completion in zip(asked, ask(asked), strict=True)]
    with ThreadPoolExecutor(8) as pool:
        served = list(pool.map(lambda d: post(service, DECISION.dump_json(d)), asked))
    assert {status for status, _ in served} == {200}
    by_model = 0
    for decision, expected, (_, choice) in zip(asked, answers, served, strict=True):
        if isinstance(expected, Parsed):
            by_model += 1
            assert choice["decided_by"] == "model"
            assert Action(phase=choice["phase"], hold_s=choice["hold_s"]) == expected.action
        else:
            assert choice["decided_by"] == "max_pressure"
        assert choice["phase"] in decision.legal
        phase = decision.junction.phases[choice["phase"]]
        assert (choice["name"], choice["state"]) == (phase.name, phase.state)
    assert by_model > len(asked) / 2


def test_an_evaluation_lets_the_answers_vote_too(prepared, tmp_path):
    """Asked once and asked eight times where it is not sure, a model drives differently."""
    delays = set()
    for num in (1, 8):
        out = tmp_path / str(num)
        evaluate = [
            sys.executable,
            "-m",
            "rl_ft.cli",
            "evaluate",
            "--seeds",
            "1",
            "--out",
            str(out),
        ]
        asked = ["--model", str(prepared / "sft" / START), "--scenario", "generated:1001@30"]
        done = subprocess.run(
            [*evaluate, *asked, "--set", f"evaluate.num_tellings={num}"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        [row] = json.loads((out / "results.json").read_text())["rows"]
        assert row["decisions"] > row["invalid_answers"]
        delays.add(row["delay_s"])
    assert len(delays) == 2


def test_the_example_of_the_readme_is_answered(service, instants, capsys):
    blocks = re.findall(r"```python\n(.+?)```", README.read_text(), re.DOTALL)
    [example] = [block for block in blocks if "/decide" in block]
    example = example.replace("http://127.0.0.1:8000", service)
    example = example.replace("headers = {", f'headers = {{"Authorization": "Bearer {TOKEN}", ')
    exec(compile(example, "README.md", "exec"), {"decision": instants[0]})
    assert "'decided_by': 'model'" in capsys.readouterr().out


def test_where_one_phase_is_legal_nobody_is_asked(service, instants):
    decision = replace(instants[0], legal=instants[0].legal[:1])
    status, choice = post(service, DECISION.dump_json(decision))
    assert (status, choice["decided_by"], choice["answer"]) == (200, "only_one", "")
    assert choice["phase"] == decision.legal[0]


@pytest.mark.parametrize(("token", "got"), [(None, "got none"), ("another", "got a wrong one")])
def test_who_has_not_the_token_is_turned_away(service, instants, token, got):
    status, said = post(service, DECISION.dump_json(instants[0]), token)
    assert status == 401
    assert got in said["detail"]


def test_a_decision_that_does_not_fit_itself_is_named(service, instants):
    content = json.loads(DECISION.dump_json(instants[0]))
    content["observation"]["lanes"].pop()
    status, said = post(service, json.dumps(content).encode())
    assert status == 422
    assert said["detail"].startswith("observation.lanes: expected ")


def test_a_decision_without_a_field_is_named(service):
    status, said = post(service, b'{"scenario": "mine"}')
    assert status == 422
    assert ["body", "junction"] in [wrong["loc"] for wrong in said["detail"]]


def test_an_engine_that_is_killed_is_replaced(service, instants):
    def replicas():
        processes = psutil.process_iter(["cmdline"])
        return [p for p in processes if (p.info["cmdline"] or [""])[0].startswith(REPLICA)]

    [victim] = replicas()
    victim.kill()
    victim.wait(timeout=LIMIT_S)
    body = DECISION.dump_json(next(d for d in instants if len(d.legal) > 1))
    wait_for(lambda: post(service, body)[0] == 200, timeout_s=LIMIT_S)
    assert victim not in replicas()


@pytest.fixture(scope="module")
def policy(prepared):
    """What a replica is, in this process: Ray Serve's own part is wrapped around it."""
    own = next(kind for kind in Policy.func_or_class.__mro__ if "decide" in vars(kind))
    return own(str(prepared / "sft" / START), None, loop_config())


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_a_junction_gets_a_phase_from_an_engine_that_fails_which_is_replaced(
    fault, policy, instants, monkeypatch
):
    async def answer(_):
        if fault == "hangs":
            await asyncio.Event().wait()
        raise RuntimeError("out of memory")

    decision = next(d for d in instants if len(d.legal) > 1)
    policy.check_health()
    monkeypatch.setitem(policy.decide.__globals__, "ANSWER_S", 1.0)
    monkeypatch.setattr(policy, "_answer", answer)
    monkeypatch.setattr(policy, "_failed", "")
    choice = asyncio.run(policy.decide(decision, None))
    assert (choice.decided_by, choice.phase) == ("max_pressure", max_pressure(decision).phase)
    with pytest.raises(RuntimeError, match="out of memory" if fault == "raises" else "Timeout"):
        policy.check_health()


def same_names(phases: list[dict]) -> list[dict]:
    return [phase | {"name": "A"} for phase in phases]


def no_lanes(phases: list[dict]) -> list[dict]:
    return [phases[0] | {"lanes": [], "turns": [], "protected": []}, *phases[1:]]


@pytest.mark.parametrize(
    ("change", "said"), [(same_names, "names that differ"), (no_lanes, "at least one")]
)
def test_a_junction_that_does_not_fit_itself_is_named(service, instants, change, said):
    content = json.loads(DECISION.dump_json(instants[0]))
    content["junction"]["phases"] = change(content["junction"]["phases"])
    status, answer = post(service, json.dumps(content).encode())
    assert (status, said in answer["detail"]) == (422, True)


def test_what_can_be_asked_is_described(service):
    with urllib.request.urlopen(f"{service}/openapi.json", timeout=LIMIT_S) as answer:
        described = json.load(answer)
    assert "/decide" in described["paths"]
    assert {"Decision", "Choice"} <= described["components"]["schemas"].keys()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--host", "0.0.0.0"), "lets others ask: expected a secret in RLFT_TOKEN"),
        (("--set", "ray.addres=auto"), "ray.addres"),
        (("--port", "{taken}"), "expected a free port, got Address already in use"),
        (("--replicas", "5"), "--set ray.num_cpus=5, or fewer replicas"),
    ],
)
def test_a_service_that_cannot_be_is_named(prepared, service, options, said):
    taken = service.rpartition(":")[2]
    env = {name: value for name, value in os.environ.items() if name != "RLFT_TOKEN"}
    done = subprocess.run(
        command(prepared / "sft" / START, *(option.format(taken=taken) for option in options)),
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 2
    assert said in done.stderr


def test_a_cluster_that_serves_already_is_left_as_it_is(prepared):
    with ray_session(Config()):
        serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
        try:
            asked = {"host": "127.0.0.1", "port": free_port(), "replicas": 1, "config": Config()}
            with pytest.raises(UserError, match="serves already"):
                serve_model(prepared / "sft" / START, **asked, on_ready=print)
            assert serve.status().proxies
        finally:
            serve.shutdown()


def test_a_model_that_is_none_is_named(tmp_path):
    done = subprocess.run(command(tmp_path / "none"), capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no such folder" in done.stderr


def test_an_application_is_built_before_there_is_a_cluster(prepared):
    """`serve run` builds first and starts Ray then."""
    code = "import sys; from rl_ft.serving import app; app({'model': sys.argv[1]})"
    built = subprocess.run(
        [sys.executable, "-c", code, str(prepared / "sft" / START)],
        capture_output=True,
        text=True,
        env=os.environ | {"RLFT_TOKEN": TOKEN},
    )
    assert built.returncode == 0, built.stderr


def test_a_cluster_serves_nothing_without_a_token(monkeypatch):
    monkeypatch.delenv("RLFT_TOKEN", raising=False)
    with pytest.raises(UserError, match="RLFT_TOKEN"):
        app({"model": "anything"})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"modell": "mine"}, "got modell"),
        ({"model": "none"}, "there is no such folder"),
        ({"replicas": "two"}, "expected numbers"),
    ],
)
def test_an_argument_of_an_application_that_is_wrong_is_named(
    arguments, said, prepared, monkeypatch
):
    monkeypatch.setenv("RLFT_TOKEN", TOKEN)
    with pytest.raises(UserError, match=said):
        app({"model": str(prepared / "sft" / START)} | arguments)
