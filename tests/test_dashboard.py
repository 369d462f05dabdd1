"""Prometheus and Grafana: the files load as they are, and every query names what is exported."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rl_ft.series import SERIES, exported_names

CLUSTER = Path(__file__).resolve().parent.parent / "cluster"
GRAFANA = CLUSTER / "grafana"
BOARD = json.loads((GRAFANA / "dashboards" / "rl-ft.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES = [variable["query"]["query"] for variable in BOARD["templating"]["list"]]
QUERY_WORDS = {"by", "le", "Component", "count", "histogram_quantile", "max", "rate", "sum"}
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not there")


def compose() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "compose.watch.yaml").read_text())


def settings(file: str) -> dict[str, Any]:
    [entry] = next(
        value
        for value in yaml.safe_load((GRAFANA / "provisioning" / file).read_text()).values()
        if isinstance(value, list)
    )
    return entry


def named(query: str) -> set[str]:
    """The metrics of a query: what is left without labels, times and PromQL's words."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", query)
    return set(re.findall(r"[A-Za-z_]\w*", bare)) - QUERY_WORDS


def of_ray() -> set[str]:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    return {f"ray_{name}" for name in METRICS_GAUGES}


def test_every_query_names_what_is_exported():
    known = exported_names() | of_ray() | {"up"}
    assert {name for query in QUERIES for name in named(query)} <= known


def test_no_declared_series_is_missing_from_the_board():
    shown = {name for query in QUERIES for name in named(query)}
    hidden = {"ray_rlft_groups_total", "ray_rlft_branches_total", "ray_rlft_grad_norm"}
    for series in SERIES:
        if series.exported not in hidden:
            assert any(name.startswith(series.exported) for name in shown), series.exported


@pytest.mark.parametrize("query", sorted({q for q in QUERIES + VARIABLES if "ray_rlft_" in q}))
def test_a_query_of_ours_selects_by_labels_that_its_series_has(query):
    every = {label for series in SERIES for label in series.labels} | {"le"}
    for name, braces in re.findall(r"(ray_rlft_\w+)\{([^}]*)\}", query):
        of = [series for series in SERIES if name.startswith(series.exported)]
        assert of, name
        for label, value in re.findall(r'(\w+)=~?"([^"]*)"', braces):
            assert label in every & set(of[0].labels)
            if label == of[0].label:
                assert set(value.split("|")) <= set(of[0].of.values())


@needs_promtool
def test_prometheus_can_read_every_query(tmp_path):
    filled = [
        query.replace("$run", ".*").replace("$start", ".*").replace("$__rate_interval", "1m")
        for query in QUERIES
    ]
    rules = [{"record": f"query_{i}", "expr": query} for i, query in enumerate(filled)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(QUERIES)} rules found" in done.stdout


@needs_promtool
def test_prometheus_takes_its_configuration():
    file = CLUSTER / "prometheus" / "prometheus.yml"
    # The token's file is there where compose starts it.
    check = ["promtool", "check", "config", "--syntax-only", file]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_prometheus_has_the_token_that_the_cluster_wants_of_it():
    settings = yaml.safe_load((CLUSTER / "prometheus" / "prometheus.yml").read_text())
    [asked] = settings["scrape_configs"][0]["http_sd_configs"]
    [secret] = compose()["services"]["prometheus"]["secrets"]
    assert asked["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert compose()["secrets"][secret] == {"environment": "RAY_AUTH_TOKEN"}


def test_every_panel_asks_the_data_source_that_is_provisioned():
    source = settings("datasources/prometheus.yaml")
    asked = [panel["datasource"] for panel in PANELS]
    asked += [target["datasource"] for panel in PANELS for target in panel["targets"]]
    asked += [variable["datasource"] for variable in BOARD["templating"]["list"]]
    assert all(a == {"type": source["type"], "uid": source["uid"]} for a in asked)


def test_panels_have_titles_of_their_own_and_do_not_overlap():
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in BOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) < 24


def test_grafana_reads_board_and_data_source_from_where_compose_puts_them():
    service = compose()["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in service["volumes"])
    by_place = {place: CLUSTER / source for source, place in mounts.items() if source[0] == "."}
    assert by_place["/etc/grafana/provisioning"] == GRAFANA / "provisioning"
    path = settings("dashboards/rl-ft.yaml")["options"]["path"]
    assert (by_place[path] / "rl-ft.json").is_file()
    home = Path(service["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (by_place[str(home.parent)] / home.name).is_file()
    url = settings("datasources/prometheus.yaml")["url"]
    assert url == "${PROMETHEUS_URL}"
    assert service["environment"]["PROMETHEUS_URL"] == "http://prometheus:9090"


def test_nobody_gets_in_from_elsewhere_or_without_a_password():
    services = compose()["services"]
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    environment = services["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    # Compose refuses to start without it.
    assert environment["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_ADMIN_PASSWORD:?")
