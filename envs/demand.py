"""What a scenario's route files say of its vehicles: how many there are, and when they depart.

Files are streamed, gzip included.
"""

from __future__ import annotations

import gzip
import math
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from envs.errors import UserError
from envs.types import Scenario

TAGS = ("vehicle", "trip", "flow")


def departure_window(name: str, routes: Sequence[str], begin_s: float = 0.0) -> tuple[float, float]:
    """First and last second at which the route files let a vehicle depart; infinite where a flow
    has no end. `begin_s` is when the simulation begins."""
    times = []
    for path in routes:
        if not Path(path).is_file():
            raise UserError(
                f"The route file {path} of scenario {name} does not exist: check the path."
            )
        for element in elements("route file", path):
            times += departures(element, begin_s)
    if not times:
        raise UserError(
            f"{listed(routes)} must hold a vehicle, trip or flow with a departure time, but there "
            "is none."
        )
    return min(times), max(times)


def num_departures(scenario: Scenario) -> float:
    """Vehicles that the route files let depart within the window; of random flows, the mean."""
    return float(dict(scenario.options).get("scale", 1)) * sum(
        _num_within(element, scenario)
        for file in scenario.route_files
        for element in elements("route file", file)
    )


def departures(element: ET.Element, begin_s: float) -> list[float]:
    """First and last departure of a vehicle, trip or flow; empty if it has no fixed time.

    As in SUMO, a flow begins with the simulation and has no end where it does not say so; one that
    tells its rate and its number of vehicles ends with the last of them.
    """
    if element.tag not in TAGS:
        return []
    if element.tag != "flow":
        depart_s = parse_seconds(element.get("depart", ""))
        return [] if depart_s is None else [depart_s]
    first_s = parse_seconds(element.get("begin", str(begin_s)))
    if first_s is None:
        return []
    last_s = parse_seconds(element.get("end", ""))
    if last_s is None:
        rate, number = _rate(element), element.get("number")
        last_s = first_s + float(number) / rate if rate and number else math.inf
    return [first_s, last_s]


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
    except (ET.ParseError, EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"The {role} {path} is not readable XML: {error}.") from error


def listed(paths: Sequence[str]) -> str:
    """Paths as a sentence names them."""
    return " and ".join(paths)


def _num_within(element: ET.Element, scenario: Scenario) -> float:
    """Vehicles of a vehicle, trip or flow that depart within the window."""
    times = departures(element, scenario.begin_s)
    if element.tag != "flow" or not times:
        return float(bool(times) and scenario.begin_s <= times[0] < scenario.end_s)
    first_s, last_s = times
    last_s = scenario.end_s if math.isinf(last_s) else last_s
    inside_s = max(0.0, min(last_s, scenario.end_s) - max(first_s, scenario.begin_s))
    rate = _rate(element)
    if rate is None:
        rate = float(element.get("number", 0)) / (last_s - first_s) if last_s > first_s else 0.0
    return rate * inside_s


def _rate(flow: ET.Element) -> float | None:
    """Vehicles a second, in the mean; None where a flow has only a number of them.

    Raises:
        UserError: what it says is no rate.
    """
    kinds = [kind for kind in ("vehsPerHour", "probability", "period") if flow.get(kind)]
    if not kinds:
        return None
    text = flow.get(kinds[0], "")
    try:
        if kinds[0] != "period":
            return float(text) / (3600 if kinds[0] == "vehsPerHour" else 1)
        if text.startswith("exp("):
            return float(text[4:-1])
        return 1 / (parse_seconds(text) or 0.0)
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"The flow {flow.get('id', '')} has {kinds[0]}={text!r}, which is no rate."
        ) from None


def _open(path: str) -> IO[bytes]:
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")
