"""Read a user's network and demand just far enough to say in one sentence what is wrong with them.

Files are streamed, gzip included, and reading stops once enough has been seen. What only SUMO
itself can find (a route whose edges do not connect, say) is left to SUMO.
"""

from __future__ import annotations

import gzip
import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from envs.errors import UserError
from envs.signals import green_states
from envs.types import Scenario

NUM_CHECKED = 500
"""So many vehicles, trips, flows and routes of each file are compared with the network."""

DEMAND_TAGS = ("vehicle", "trip", "flow")


def check_scenario(scenario: Scenario) -> None:
    """The files exist and parse, the network has signals, the demand is on it and in the window."""
    for role, path in _named_files(scenario):
        if not Path(path).is_file():
            raise UserError(
                f"The {role} {path} of scenario {scenario.name} does not exist: check the path."
            )
    edges = _check_net(scenario.net_file)
    departs = [_check_routes(scenario, path, edges) for path in scenario.route_files]
    if not any(departs):
        raise UserError(
            f"No vehicle of {_listed(scenario.route_files)} departs between "
            f"{scenario.begin_s:g} s and {scenario.end_s:g} s: check the demand and the window."
        )
    for path in scenario.additional_files:
        for _ in _elements("additional file", path):
            pass


def departure_window(name: str, routes: Sequence[str]) -> tuple[float, float]:
    """First and last second at which the route files let a vehicle depart."""
    times = []
    for path in routes:
        if not Path(path).is_file():
            raise UserError(
                f"The route file {path} of scenario {name} does not exist: check the path."
            )
        for element in _elements("route file", path):
            times += _departures(element)
    if not times:
        raise UserError(
            f"{_listed(routes)} must hold a vehicle, trip or flow with a departure time, but there "
            "is none."
        )
    if math.isinf(max(times)):
        raise UserError(
            f"A flow of {_listed(routes)} has no end, so {name} has none: give the flow an end, or "
            "name the files in a .sumocfg with <begin> and <end>."
        )
    return min(times), max(times)


def parse_seconds(text: str) -> float | None:
    """Seconds of a SUMO time (`90`, `0:01:30`, `1:00:00:00`), or None if it is none."""
    try:
        parts = [float(part) for part in text.strip().split(":")]
    except ValueError:
        return None
    if len(parts) not in (1, 3, 4):
        return None
    units = (1.0, 60.0, 3600.0, 86400.0)
    return sum(part * unit for part, unit in zip(reversed(parts), units, strict=False))


def _named_files(scenario: Scenario) -> Iterator[tuple[str, str]]:
    yield "network", scenario.net_file
    for path in scenario.route_files:
        yield "route file", path
    for path in scenario.additional_files:
        yield "additional file", path


def _listed(paths: Sequence[str]) -> str:
    return " and ".join(paths)


def _open(path: str) -> IO[bytes]:
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def _elements(role: str, path: str) -> Iterator[ET.Element]:
    """Every element of the file as it is closed, and then forgotten."""
    try:
        with _open(path) as file:
            stack: list[ET.Element] = []
            for event, element in ET.iterparse(file, events=("start", "end")):
                if event == "start":
                    stack.append(element)
                    continue
                stack.pop()
                yield element
                # Children are still needed while their vehicle or signal is open.
                if len(stack) <= 1:
                    element.clear()
                    if stack:
                        stack[-1].clear()
    except (ET.ParseError, EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise UserError(f"The {role} {path} is not readable XML: {error}.") from error


def _check_net(path: str) -> set[str]:
    """Edges of the network, which must have a signal with a choice."""
    edges: set[str] = set()
    greens: dict[str, int] = {}
    for element in _elements("network", path):
        if element.tag == "edge":
            edges.add(element.get("id", ""))
        elif element.tag == "tlLogic":
            states = [phase.get("state", "") for phase in element.iter("phase")]
            name = element.get("id", "")
            greens[name] = max(len(green_states(states)), greens.get(name, 0))
    if not edges:
        raise UserError(
            f"The network {path} must be one that netconvert writes, but it has no edge."
        )
    if not greens:
        raise UserError(
            f"The network {path} has no traffic light to control: build it with netconvert's "
            "--tls.guess or --tls.set."
        )
    if max(greens.values()) < 2:
        raise UserError(
            f"No traffic light of the network {path} has two green phases to choose from: rebuild "
            "its programs with netconvert's --tls.rebuild."
        )
    return edges


def _check_routes(scenario: Scenario, path: str, edges: set[str]) -> bool:
    """Whether a vehicle of the file departs in the window; all edges it names must exist."""
    departs, checked = False, 0
    for element in _elements("route file", path):
        if checked < NUM_CHECKED:
            named = _edges(element)
            checked += bool(named)
            for edge in named:
                if edge not in edges:
                    owner = f"{element.tag} {element.get('id', '')}".strip()
                    raise UserError(
                        f"A {owner} of {path} uses edge {edge!r}, which is not in the network "
                        f"{scenario.net_file}: these files do not belong together."
                    )
        times = _departures(element)
        if times and times[0] < scenario.end_s and times[-1] >= scenario.begin_s:
            departs = True
        if departs and checked >= NUM_CHECKED:
            break
    return departs


def _edges(element: ET.Element) -> list[str]:
    """Edges that a route, trip or flow names itself."""
    if element.tag == "route":
        return element.get("edges", "").split()
    if element.tag in ("trip", "flow"):
        ends = [element.get("from", ""), *element.get("via", "").split(), element.get("to", "")]
        return [edge for edge in ends if edge]
    return []


def _departures(element: ET.Element) -> list[float]:
    """First and last departure of a vehicle, trip or flow; empty if it has no fixed time."""
    if element.tag not in DEMAND_TAGS:
        return []
    if element.tag == "flow":
        # SUMO's defaults: from the beginning on, and without an end.
        begin_s = parse_seconds(element.get("begin", "0"))
        end_s = parse_seconds(element.get("end", ""))
        return [] if begin_s is None else [begin_s, math.inf if end_s is None else end_s]
    depart_s = parse_seconds(element.get("depart", ""))
    return [] if depart_s is None else [depart_s]
