"""Build the SUMO files of a generated city: network, fixed plan, demand.

The same seed gives the same bytes, whoever builds it and where. A finished city appears in its
folder at once (built aside, then renamed), so concurrent callers are safe. What the cities look
like is drawn in `envs.city`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from envs.city import City, Stream, draw_city, draw_grid, streams
from envs.crossing import HOUR_S, SLICE_S, Crossing
from envs.errors import UserError
from envs.program import SATURATION_VPH, add_own_greens, plan_signals, write_actuated
from envs.types import Scenario

DELAY_BOUNDS_S = (12.0, 42.0)
"""Mean delay that a generated city may have when its signals are actuated."""
GRID_DELAY_BOUNDS_S = (25.0, 90.0)
"""The same of a grid, whose vehicles pass several signals."""
MAX_TRIES = 4
SHORT_EXIT_M = 90.0
"""A way out shorter than this goes on with a second edge, if the approach beside it has one."""
SIDE_ROAD_M, SIDE_ROAD_MPS = 80.0, 8.33
MIN_PROBABILITY = 2e-5
"""Flows of fewer vehicles a second are left out."""
TOOL_TIMEOUT_S = 120.0

KINDS = {"generated": draw_city, "grid": draw_grid}
"""What is drawn from a seed: one junction or two in a row; a grid of three to nine."""

NET_NAME = "city.net.xml"
ROUTES_NAME = "city.rou.xml"


def generate(seed: int, directory: Path, kind: str = "generated") -> Scenario:
    """The scenario of a kind (of `KINDS`) and a seed, built into `directory` unless it is there."""
    shelf = directory / fingerprint()
    home = shelf / f"{kind}-{seed}"
    if not home.is_dir():
        shelf.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{kind}-{seed}-", dir=shelf))
        try:
            _build(KINDS[kind](seed), aside)
            _publish(aside, home)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return _scenario(f"{kind}:{seed}", home)


@functools.cache
def fingerprint() -> str:
    """Name of this way to generate: another one (code or SUMO) never finds the files of this."""
    digest = hashlib.sha256(importlib.metadata.version("eclipse-sumo").encode())
    for name in (
        "city.py",
        "crossing.py",
        "lane_use.py",
        "program.py",
        "signals.py",
        "generator.py",
    ):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:8]


def _publish(aside: Path, home: Path) -> None:
    """Rename the finished folder; whoever comes second keeps the first one's identical files."""
    os.chmod(aside, 0o755)
    try:
        aside.rename(home)
    except OSError:
        if not home.is_dir():
            raise


def _scenario(name: str, home: Path) -> Scenario:
    return Scenario(
        name=name,
        kind="generated",
        net_file=str(home / NET_NAME),
        route_files=(str(home / ROUTES_NAME),),
        begin_s=0.0,
        end_s=float(HOUR_S),
    )


def sumo_tool(name: str) -> str:
    """Path of a program of the eclipse-sumo package, such as `netconvert`."""
    spec = importlib.util.find_spec("sumo")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "bin" / name
        if path.is_file():
            return str(path)
    raise UserError(
        f"SUMO's program {name} comes with the Python package eclipse-sumo, which is missing or "
        "incomplete here: pip install eclipse-sumo"
    )


def _run_tool(name: str, *arguments: str) -> None:
    done = subprocess.run(
        [sumo_tool(name), *arguments],
        capture_output=True,
        text=True,
        timeout=TOOL_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed with status {done.returncode}: {done.stderr.strip()}")


def _build(city: City, folder: Path) -> None:
    """Network, fixed plan and demand whose load is in bounds."""
    net, routes = folder / NET_NAME, folder / ROUTES_NAME
    _build_network(city, net)
    critical_vph = plan_signals(city, net)
    _build_demand(city, net, routes, city.load * SATURATION_VPH / critical_vph)
    if city.own_greens != "none":
        add_own_greens(city, net)


# Network


def _build_network(city: City, net: Path) -> None:
    nodes, edges, connections = ET.Element("nodes"), ET.Element("edges"), ET.Element("connections")
    for c, crossing in enumerate(city.crossings):
        _add_node(nodes, f"c{c}", crossing.x_m, crossing.y_m, type="traffic_light", tl=f"c{c}")
        nodes[-1].set("tlLayout", city.layout)
        for a in range(len(crossing.arms)):
            if not city.leads_to(c, a):
                _add_arm(nodes, edges, c, a, crossing)
        _add_connections(city, connections, c, crossing)
    _add_links(city, edges)
    with tempfile.TemporaryDirectory() as scratch:
        options = []
        for option, root in (("node", nodes), ("edge", edges), ("connection", connections)):
            path = Path(scratch) / f"{option}.xml"
            ET.ElementTree(root).write(path)
            options += [f"--{option}-files", str(path)]
        built = Path(scratch) / "built.net.xml"
        _run_tool(
            "netconvert",
            *options,
            f"--output-file={built}",
            "--xml-validation=never",
            "--no-turnarounds",
            f"--tls.left-green.time={city.left_green_s}",
            f"--tls.minor-left.max-speed={city.permissive_left_mps}",
            f"--tls.yellow.time={city.yellow_s}",
        )
        # Parsing drops the comments, in which netconvert notes the time and the paths.
        ET.parse(built).write(net, encoding="UTF-8", xml_declaration=True)


def _add_node(nodes: ET.Element, name: str, x_m: float, y_m: float, **attributes: str) -> None:
    ET.SubElement(nodes, "node", id=name, x=f"{x_m:.2f}", y=f"{y_m:.2f}", **attributes)


def _add_edge(
    edges: ET.Element, name: str, ends: tuple[str, str], lanes: int, speed_mps: float, rank: int
) -> None:
    ET.SubElement(
        edges,
        "edge",
        {
            "id": name,
            "from": ends[0],
            "to": ends[1],
            "numLanes": str(lanes),
            "speed": f"{speed_mps:.2f}",
            "priority": str(rank),
        },
    )


def _add_arm(nodes: ET.Element, edges: ET.Element, c: int, a: int, crossing: Crossing) -> None:
    """The approach, piece by piece outwards, and beside it the way out."""
    arm = crossing.arms[a]
    x_m, y_m, inner = crossing.x_m, crossing.y_m, f"c{c}"
    for s, (length_m, lanes) in enumerate(zip(arm.segments_m, arm.segment_lanes, strict=True)):
        bearing = math.radians(arm.bearing_deg + (arm.bend_deg if s else 0.0))
        x_m, y_m = x_m + length_m * math.sin(bearing), y_m + length_m * math.cos(bearing)
        outer = f"n{c}_{a}_{s}"
        _add_node(nodes, outer, x_m, y_m, type="priority")
        _add_edge(edges, f"in{c}_{a}_{s}", (outer, inner), lanes, arm.speed_mps, arm.priority)
        inner = outer
    for side in range(len(arm.turn_offs_vph)):
        _add_side_road(nodes, edges, c, a, crossing, side)
    for s, name in enumerate(_exit_edges(crossing, c, a)):
        ends = (f"n{c}_{a}_{s - 1}" if s else f"c{c}", f"n{c}_{a}_{s}")
        _add_edge(edges, name, ends, arm.lanes_out, arm.speed_mps, arm.priority)


def _add_side_road(
    nodes: ET.Element, edges: ET.Element, c: int, a: int, crossing: Crossing, side: int
) -> None:
    """A road to the right (0) or to the left (1), where the first piece of an approach begins."""
    arm = crossing.arms[a]
    x_m, y_m = crossing.x_m, crossing.y_m
    for length_m, bearing_deg in (
        (arm.segments_m[0], arm.bearing_deg),
        (SIDE_ROAD_M, arm.bearing_deg - 90.0 + 180.0 * side),
    ):
        bearing = math.radians(bearing_deg)
        x_m, y_m = x_m + length_m * math.sin(bearing), y_m + length_m * math.cos(bearing)
    name = f"side{c}_{a}_{side}"
    _add_node(nodes, name, x_m, y_m, type="priority")
    _add_edge(edges, name, (f"n{c}_{a}_0", name), 1, SIDE_ROAD_MPS, arm.priority - 2)


def _add_links(city: City, edges: ET.Element) -> None:
    """The roads between crossings, each direction one edge."""
    for c, crossing in enumerate(city.crossings):
        for a, arm in enumerate(crossing.arms):
            if arm.leads_to:
                ends = (f"c{arm.leads_to[0]}", f"c{c}")
                _add_edge(edges, f"in{c}_{a}_0", ends, arm.lanes_in, arm.speed_mps, arm.priority)


def _exit_edges(crossing: Crossing, c: int, a: int) -> list[str]:
    """The way out by an arm: one edge, or two where the first piece of several is short."""
    segments_m = crossing.arms[a].segments_m
    pieces = 1 if segments_m[0] >= SHORT_EXIT_M else min(2, len(segments_m))
    return [f"out{c}_{a}_{s}" for s in range(pieces)]


def _add_connections(city: City, connections: ET.Element, c: int, crossing: Crossing) -> None:
    for a, arm in enumerate(crossing.arms):
        for movement in arm.movements:
            target = city.exit_edge(c, movement.to_arm)
            for from_lane, to_lane in movement.lanes:
                ends = {"from": f"in{c}_{a}_0", "to": target}
                lanes = {"fromLane": str(from_lane), "toLane": str(to_lane)}
                ET.SubElement(connections, "connection", ends | lanes)


# Demand


def _build_demand(city: City, net: Path, routes: Path, scale: float) -> None:
    """Write the drawn demand, scaled where the delay of an actuated plan is out of bounds.

    Of at most `MAX_TRIES` the one nearest to the bounds stays.
    """
    low_s, high_s = DELAY_BOUNDS_S if len(city.crossings) <= 2 else GRID_DELAY_BOUNDS_S
    low, high = 0.0, math.inf
    tried: list[tuple[float, float]] = []
    while len(tried) < MAX_TRIES:
        _write_demand(city, routes, scale)
        delay_s = _measure_delay(net, routes)
        tried.append((max(low_s / delay_s, delay_s / high_s), scale))
        if low_s <= delay_s <= high_s:
            return
        if delay_s < low_s:
            low, scale = scale, min(scale * 1.4, (scale + high) / 2.0)
        else:
            step = max(0.7, (high_s / delay_s) ** 0.3 - 0.1)
            high, scale = scale, max(scale * step, (low + scale) / 2.0)
    _write_demand(city, routes, min(tried)[1])


def _write_demand(city: City, routes: Path, scale: float) -> None:
    root = ET.Element("routes")
    mix = ET.SubElement(root, "vTypeDistribution", id="mix")
    trucks = city.truck_share
    ET.SubElement(mix, "vType", id="car", vClass="passenger", probability=f"{1 - trucks:.3f}")
    if trucks > 0:
        ET.SubElement(mix, "vType", id="truck", vClass="truck", probability=f"{trucks:.3f}")
    entering = {} if city.late_lanes else {"departLane": "best", "departSpeed": "max"}
    flows = []
    for number, stream in enumerate(streams(city)):
        ET.SubElement(root, "route", id=f"r{number}", edges=" ".join(_edges(city, stream)))
        for i, factor in enumerate(stream.profile):
            probability = min(0.9, stream.rate_vph * factor * scale / HOUR_S)
            flows.append((i * SLICE_S, number, probability))
    for begin_s, number, probability in sorted(flows):
        if probability >= MIN_PROBABILITY:
            ET.SubElement(
                root,
                "flow",
                {
                    "id": f"f{number}_{begin_s}",
                    "type": "mix",
                    "route": f"r{number}",
                    "begin": str(begin_s),
                    "end": str(begin_s + SLICE_S),
                    "probability": f"{probability:.5f}",
                }
                | entering,
            )
    ET.indent(root)
    ET.ElementTree(root).write(routes, encoding="UTF-8", xml_declaration=True)


def _edges(city: City, stream: Stream) -> list[str]:
    c, a = stream.entry
    pieces = range(len(city.crossings[c].arms[a].segments_m))
    edges = [f"in{c}_{a}_{s}" for s in reversed(pieces)]
    if not stream.path:
        return [*edges[:-1], f"side{c}_{a}_{stream.side}"]
    for crossing, to_arm in stream.path:
        if city.leads_to(crossing, to_arm):
            edges.append(city.exit_edge(crossing, to_arm))
        else:
            edges += _exit_edges(city.crossings[crossing], crossing, to_arm)
    return edges


def _measure_delay(net: Path, routes: Path) -> float:
    """Mean seconds lost per vehicle in one hour of an actuated plan, waiting to enter included."""
    with tempfile.TemporaryDirectory() as scratch:
        trips, actuated = Path(scratch) / "trips.xml", Path(scratch) / "actuated.add.xml"
        write_actuated(net, actuated)
        _run_tool(
            "sumo",
            f"--net-file={net}",
            f"--route-files={routes}",
            f"--additional-files={actuated}",
            f"--end={HOUR_S}",
            "--seed=1",
            "--time-to-teleport=-1",
            "--no-step-log",
            "--no-warnings",
            "--xml-validation=never",
            f"--tripinfo-output={trips}",
            "--tripinfo-output.write-unfinished=true",
            "--tripinfo-output.write-undeparted=true",
        )
        lost = []
        for _, trip in ET.iterparse(trips):
            if trip.tag == "tripinfo":
                lost.append(float(trip.get("timeLoss", "0")) + float(trip.get("departDelay", "0")))
    return sum(lost) / len(lost)
