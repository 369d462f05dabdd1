"""The cluster files: what Ray, KubeRay and compose make of them, and what they promise.

No container is started here; scripts/run_cluster_test.sh does that.
"""

from __future__ import annotations

import ast
import copy
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "cluster"
CRDS = Path(os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay"))
"""KubeRay's helm-chart/kuberay-operator/crds; third-party, so not in this repository."""
TOKEN_ENV = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def patched(document: dict[str, Any], kustomization: dict[str, Any]) -> dict[str, Any]:
    """The document after the JSON patches of a kustomization for its kind."""
    document = copy.deepcopy(document)
    for patch in kustomization["patches"]:
        assert patch["target"]["kind"] == document["kind"]
        assert patch["target"]["name"] == document["metadata"]["name"]
        for operation in yaml.safe_load(patch["patch"]):
            assert operation["op"] == "replace"
            *parents, last = operation["path"].strip("/").split("/")
            place: Any = document
            for key in parents:
                place = place[int(key)] if isinstance(place, list) else place[key]
            assert last in place
            place[last] = operation["value"]
    return document


MANIFESTS = {
    "cpu": read("kuberay/raycluster.yaml"),
    "gpu": patched(read("kuberay/raycluster.yaml"), read("kuberay-gpu/kustomization.yaml")),
    "job": read("kuberay/rayjob.yaml"),
    "service": read("kuberay/rayservice.yaml"),
}
COMPOSE = {
    "cpu": read("compose.yaml")["services"],
    "gpu": read("compose.gpu.yaml")["services"],
}
LAUNCHER = read("ray-cluster.yaml")
manifests = pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)
clusters = pytest.mark.parametrize("flavour", ["cpu", "gpu"])
services = pytest.mark.parametrize("service", COMPOSE["cpu"].values(), ids=COMPOSE["cpu"])


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod specs of a cluster (head first) or of a RayJob's submitter."""
    spec = manifest["spec"].get("rayClusterConfig", manifest["spec"])
    if manifest["kind"] == "RayJob":
        return [spec["submitterPodTemplate"]["spec"]]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def containers(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [c for pod in pods(manifest) for c in pod["containers"] + pod.get("initContainers", [])]


def ran(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in TOKEN_ENV}
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=kept | env
    )


def built_images() -> set[str]:
    script = (ROOT / "scripts" / "build_image.sh").read_text()
    assert "name=${name:-rl-ft:$flavour}" in script
    return {f"rl-ft:{flavour}" for flavour in re.findall(r"\bflavour=(\w+)", script)}


def ray_start_commands() -> Iterator[str]:
    for service in COMPOSE["cpu"].values():
        yield service["command"]
    for kind in ("head", "worker"):
        yield LAUNCHER[f"{kind}_start_ray_commands"][-1]


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema that refuses what it does not list; Kubernetes would drop it without a word."""
    closed = dict(schema)
    if "properties" in schema:
        closed["properties"] = {name: strict(s) for name, s in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            closed[key] = strict(schema[key])
    return closed


@pytest.fixture(scope="module")
def crd_errors() -> Any:
    """What KubeRay's own schemas have against a manifest."""
    if not CRDS.is_dir():
        pytest.skip(f"no custom resource definitions of KubeRay in {CRDS}; name them: KUBERAY_CRDS")
    from jsonschema import Draft202012Validator

    validators = {}

    def errors(manifest: dict[str, Any]) -> list[str]:
        kind, (_, version) = manifest["kind"], manifest["apiVersion"].split("/")
        if kind not in validators:
            file = CRDS / f"ray.io_{kind.lower()}s.yaml"
            definition = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", None))
            (served,) = [v for v in definition["spec"]["versions"] if v["name"] == version]
            schema = strict(served["schema"]["openAPIV3Schema"])
            validators[kind] = Draft202012Validator(schema)
        return [f"{e.json_path}: {e.message}" for e in validators[kind].iter_errors(manifest)]

    return errors


@manifests
def test_kuberay_knows_every_key_of_a_manifest(crd_errors, manifest):
    assert crd_errors(manifest) == []


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("", "specs"),
        ("spec", "rayVersions"),
        ("spec.headGroupSpec.template.spec", "securityContexts"),
        ("spec.workerGroupSpecs.0", "replica"),
        ("spec.workerGroupSpecs.0.template.spec.containers.0", "livenesProbe"),
        (
            "spec.headGroupSpec.template.spec.containers.0.env.1.valueFrom",
            "secretKeyReference",
        ),
    ],
)
def test_a_misspelt_key_is_found_wherever_it_stands(crd_errors, path, key):
    manifest = copy.deepcopy(MANIFESTS["cpu"])
    place: Any = manifest
    for part in filter(None, path.split(".")):
        place = place[int(part)] if isinstance(place, list) else place[part]
    place[key] = {}
    # What stands behind an anchor is found at each of its places.
    errors = crd_errors(manifest)
    assert errors
    assert all(f"'{key}' was unexpected" in error for error in errors)


def test_a_value_of_the_wrong_type_is_found(crd_errors):
    manifest = copy.deepcopy(MANIFESTS["cpu"])
    manifest["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    (error,) = crd_errors(manifest)
    assert "0 is not of type 'string'" in error


@clusters
def test_kustomize_renders_the_cluster_that_is_tested_here(flavour):
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl")
    folder = CLUSTER / {"cpu": "kuberay", "gpu": "kuberay-gpu"}[flavour]
    done = ran("kubectl", "kustomize", folder)
    assert done.returncode == 0, done.stderr
    claim, cluster = yaml.safe_load_all(done.stdout)
    assert claim == read("kuberay/runs.yaml")
    assert cluster == MANIFESTS[flavour]


@clusters
def test_a_cluster_says_the_ray_version_that_the_image_has(flavour):
    import ray

    assert MANIFESTS[flavour]["spec"]["rayVersion"] == ray.__version__
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={ray.__version__}" in pins


@manifests
def test_every_container_asks_for_what_it_needs_and_is_held_to_a_limit(manifest):
    for container in containers(manifest):
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= container["resources"][kind].keys()


@manifests
def test_the_token_comes_from_the_secret_that_the_operator_reads(manifest):
    secret = {
        "name": MANIFESTS["cpu"]["spec"]["authOptions"]["secretName"],
        "key": "auth_token",
    }
    for container in containers(manifest):
        env = {entry["name"]: entry for entry in container["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert env["RAY_AUTH_TOKEN"] == {
            "name": "RAY_AUTH_TOKEN",
            "valueFrom": {"secretKeyRef": secret},
        }


@clusters
def test_a_ray_container_is_watched_from_its_start_to_its_end(flavour):
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    head, *workers = containers(MANIFESTS[flavour])
    raylet = {"path": "/api/local_raylet_healthz", "port": DEFAULT_DASHBOARD_AGENT_LISTEN_PORT}
    assert raylet["path"] in PUBLIC_EXACT_PATHS
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert head[kind]["httpGet"] == {"path": "/api/gcs_healthz", "port": 8265}
        assert [worker[kind]["httpGet"] for worker in workers] == [raylet]


@manifests
def test_no_container_runs_as_root_or_may_become_it(manifest):
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    uid = int(re.search(r"^ARG UID=(\d+)$", dockerfile, re.MULTILINE)[1])
    for pod in pods(manifest):
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert (context["runAsUser"], context["runAsGroup"]) == (uid, 0)
        assert pod["automountServiceAccountToken"] is False
    for container in containers(manifest):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }


@clusters
def test_every_node_sees_the_runs(flavour):
    claim = read("kuberay/runs.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(MANIFESTS[flavour]):
        (volume,) = pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (container,) = pod["containers"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/app/runs"}]


def test_gpu_nodes_differ_in_image_and_resources_alone():
    def rest(manifest: dict[str, Any]) -> dict[str, Any]:
        stripped = copy.deepcopy(manifest)
        for container in containers(stripped):
            del container["image"], container["resources"]
        return stripped

    assert rest(MANIFESTS["gpu"]) == rest(MANIFESTS["cpu"])
    _, *workers = containers(MANIFESTS["gpu"])
    for worker in workers:
        gpus = {kind: values["nvidia.com/gpu"] for kind, values in worker["resources"].items()}
        assert gpus == {"requests": "1", "limits": "1"}


def test_the_job_runs_on_the_cluster_of_the_manifest():
    selected = MANIFESTS["job"]["spec"]["clusterSelector"]
    assert selected == {"ray.io/cluster": MANIFESTS["cpu"]["metadata"]["name"]}


def test_the_command_of_the_job_is_one_that_rl_ft_takes():
    from typer.main import get_command

    from rl_ft.cli import app

    program, name, *arguments = shlex.split(MANIFESTS["job"]["spec"]["entrypoint"])
    assert program == "rl-ft"
    asked = get_command(app).commands[name].make_context(name, arguments).params
    from rl_ft.recipe import load_config

    assert load_config(asked["recipe"], asked["overrides"]).ray.address == "auto"
    assert Path("/app", asked["out"]).is_relative_to("/app/runs")


@pytest.mark.parametrize("flavour", ["cpu", "gpu"])
def test_images_are_those_that_the_build_script_makes(flavour):
    image = f"rl-ft:{flavour}"
    assert image in built_images()
    assert {container["image"] for container in containers(MANIFESTS[flavour])} == {image}
    defaults = {s.get("image", "") for s in COMPOSE[flavour].values()}
    assert defaults == {f"${{RLFT_IMAGE:-{image}}}"}


def test_launcher_job_and_service_take_an_image_that_the_build_script_makes():
    assert LAUNCHER["docker"]["image"] in built_images()
    for container in (*containers(MANIFESTS["job"]), *containers(MANIFESTS["service"])):
        assert container["image"] in built_images()


def test_the_service_is_the_cluster_but_for_what_it_takes_to_serve():
    def rest(manifest: dict[str, Any]) -> list[dict[str, Any]]:
        stripped = copy.deepcopy(pods(manifest))
        for pod in stripped:
            (container,) = pod["containers"]
            container.pop("ports", None)
            del container["resources"], container["readinessProbe"]
            container["env"] = [e for e in container["env"] if e["name"] != "RLFT_TOKEN"]
        return stripped

    service, cluster = MANIFESTS["service"], MANIFESTS["cpu"]
    assert rest(service) == rest(cluster)
    for key in ("rayVersion", "authOptions"):
        assert service["spec"]["rayClusterConfig"][key] == cluster["spec"][key]


def test_what_the_service_serves_is_what_can_be_served():
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(MANIFESTS["service"]["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(config).applications
    module, function = application.import_path.split(":")
    source = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    assert function in {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
    assert Path(application.args["model"]).is_relative_to("/app/runs")
    port = config["http_options"]["port"]
    for container in containers(MANIFESTS["service"]):
        assert {"name": "serve", "containerPort": port} in container["ports"]
    (_, worker) = containers(MANIFESTS["service"])
    assert worker["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": port}


def test_a_service_asks_for_a_token_of_its_own():
    for container in containers(MANIFESTS["service"]):
        env = {entry["name"]: entry.get("valueFrom") for entry in container["env"]}
        secrets = [env[name]["secretKeyRef"]["name"] for name in ("RLFT_TOKEN", "RAY_AUTH_TOKEN")]
        assert len(set(secrets)) == 2


@services
def test_compose_starts_nothing_without_a_token(service):
    assert service["environment"]["RAY_AUTH_MODE"] == "token"
    assert re.fullmatch(r"\$\{RAY_AUTH_TOKEN:\?.+\}", service["environment"]["RAY_AUTH_TOKEN"])


def test_compose_publishes_the_dashboard_on_loopback_and_nothing_else():
    published = [p for service in COMPOSE["cpu"].values() for p in service.get("ports", ())]
    assert published == ["127.0.0.1:${RLFT_DASHBOARD_PORT:-8265}:8265"]
    for service in [*COMPOSE["cpu"].values(), *COMPOSE["gpu"].values()]:
        assert "network_mode" not in service


@services
def test_a_compose_service_is_bounded_watched_and_not_root(service):
    assert re.fullmatch(r"\$\{RLFT_UID:-[1-9]\d*\}:0", service["user"])
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True
    assert service["shm_size"]
    assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}
    assert service["healthcheck"]["test"][0] == "CMD"
    assert service["volumes"] == ["${RLFT_RUNS:-runs}:/app/runs"]


@services
def test_the_health_check_of_a_service_is_a_program_that_python_reads(service):
    *words, program = service["healthcheck"]["test"]
    assert words == ["CMD", "python", "-c"]
    compile(program, "healthcheck", "exec")


def test_two_workers_wait_for_a_head_that_answers():
    worker = COMPOSE["cpu"]["worker"]
    assert worker["deploy"]["replicas"] == 2
    assert worker["depends_on"] == {"head": {"condition": "service_healthy"}}


def test_a_gpu_has_one_holder_on_one_machine():
    deploy = COMPOSE["gpu"]["worker"]["deploy"]
    (device,) = deploy["resources"]["reservations"]["devices"]
    assert (deploy["replicas"], device["count"]) == (1, "all")


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "compose.gpu.yaml")])
def test_compose_itself_reads_the_files_and_refuses_them_without_a_token(files):
    if ran("docker", "compose", "version").returncode if shutil.which("docker") else True:
        pytest.skip("no docker compose")
    command = ["docker", "compose"]
    for name in files:
        command += ["--file", CLUSTER / name]
    without = ran(*command, "config")
    assert without.returncode != 0
    assert "RAY_AUTH_TOKEN" in without.stderr
    done = ran(*command, "config", RAY_AUTH_TOKEN="a-secret-of-this-test")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["services"].keys() == {"head", "worker"}


def test_ray_accepts_the_launcher_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(LAUNCHER))


def test_a_misspelt_key_of_the_launcher_file_is_found():
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    typo = copy.deepcopy(LAUNCHER)
    typo["docker"]["run_option"] = []
    with pytest.raises(ValidationError, match="run_option"):
        validate_config(prepare_config(typo))


def test_the_launcher_brings_the_token_to_where_ray_reads_it():
    options = LAUNCHER["docker"]["run_options"]
    env = dict(o.removeprefix("--env=").split("=") for o in options if o.startswith("--env="))
    assert env["RAY_AUTH_MODE"] == "token"
    (mounted,) = LAUNCHER["file_mounts"]
    assert Path(env["RAY_AUTH_TOKEN_PATH"]).parent == Path(mounted)


@pytest.mark.parametrize("command", ray_start_commands())
def test_ray_start_knows_the_options_that_it_is_given(command):
    from ray.scripts.scripts import start

    words = shlex.split(command)
    assert words[:2] == ["ray", "start"]
    asked = start.make_context("ray start", words[2:]).params
    assert asked["head"] != bool(asked["address"])


def test_without_compose_nodes_are_started_by_the_same_commands():
    script = (ROOT / "scripts" / "run_cluster_test.sh").read_text()
    joined = " ".join(re.sub(r"\\\n", " ", script).split())
    for service in COMPOSE["cpu"].values():
        assert service["command"] in joined


def test_no_cluster_file_holds_a_secret():
    secret = re.compile(r"(?i)(?:token|password|secret|key)\w*['\"]?\s*[:=]\s*['\"]?[\w+/-]{16,}")
    files = [f for f in CLUSTER.rglob("*") if f.is_file()]
    assert len(files) > 8
    assert {f.name: secret.findall(f.read_text()) for f in files} == {f.name: [] for f in files}
