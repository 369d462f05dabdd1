"""What a scenario's route files say of its vehicles: how many there are, and when they depart.

Files are streamed, gzip included.
"""

from __future__ import annotations

import gzip
import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from envs.errors import UserError
from envs.types import Scenario

TAGS = ("vehicle", "trip", "flow")


def departure_window(name: str, routes: Sequence[str]) -> tuple[float, float]:
    """First and last second at which the route files let a vehicle depart."""
    times = []
    for path in routes:
        if not Path(path).is_file():
            raise UserError(
                f"The route file {path} of scenario {name} does not exist: check the path."
            )
        for element in elements("route file", path):
            times += departures(element)
    if not times:
        raise UserError(
            f"{listed(routes)} must hold a vehicle, trip or flow with a departure time, but there "
            "is none."
        )
    if math.isinf(max(times)):
        raise UserError(
            f"A flow of {listed(routes)} has no end, so {name} has none: give the flow an end, or "
            "name the files in a .sumocfg with <begin> and <end>."
        )
    return min(times), max(times)


def num_departures(scenario: Scenario) -> float:
    """Vehicles that the route files let depart within the window; of random flows, the mean."""
    return float(dict(scenario.options).get("scale", 1)) * sum(
        _num_within(element, scenario)
        for file in scenario.route_files
        for element in elements("route file", file)
    )


def departures(element: ET.Element) -> list[float]:
    """First and last departure of a vehicle, trip or flow; empty if it has no fixed time."""
    if element.tag not in TAGS:
        return []
    if element.tag == "flow":
        # SUMO's defaults: from the beginning on, and without an end.
        begin_s = parse_seconds(element.get("begin", "0"))
        end_s = parse_seconds(element.get("end", ""))
        return [] if begin_s is None else [begin_s, math.inf if end_s is None else end_s]
    depart_s = parse_seconds(element.get("depart", ""))
    return [] if depart_s is None else [depart_s]


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


def elements(role: str, path: str) -> Iterator[ET.Element]:
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


def listed(paths: Sequence[str]) -> str:
    """Paths as a sentence names them."""
    return " and ".join(paths)


def _num_within(element: ET.Element, scenario: Scenario) -> float:
    """Vehicles of a vehicle, trip or flow that depart within the window."""
    times = departures(element)
    if element.tag != "flow" or not times:
        return float(bool(times) and scenario.begin_s <= times[0] < scenario.end_s)
    first_s, last_s = times
    end_s = min(last_s, scenario.end_s)
    inside_s = max(0.0, end_s - max(first_s, scenario.begin_s))
    if element.get("number") is not None:
        length_s = (scenario.end_s if math.isinf(last_s) else last_s) - first_s
        return float(element.get("number", 0)) * inside_s / length_s if length_s > 0 else 0.0
    if element.get("vehsPerHour") is not None:
        return float(element.get("vehsPerHour", 0)) * inside_s / 3600
    if element.get("probability") is not None:
        return float(element.get("probability", 0)) * inside_s
    period = element.get("period", "")
    rate = float(period[4:-1]) if period.startswith("exp(") else 1 / float(period or "inf")
    return rate * inside_s


def _open(path: str) -> IO[bytes]:
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")
