"""Where worlds come from: generated cities, installed RESCO maps, the user's own SUMO files.

A scenario is named by a string: `generated:<seed>`, `grid:<seed>`, `resco:<map>`, a `.sumocfg`, or
`a.net.xml,b.rou.xml` (one network, then one or more route files). `%150` behind any of them has
half as many vehicles again, `@15` behind that lets its junctions choose every 15 s. What a user
hands us is checked before a simulation sees it; every complaint is one `UserError`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from envs.demand import departure_window, listed, parse_seconds
from envs.errors import UserError
from envs.generator import KINDS, generate
from envs.scenario_check import check_scenario
from envs.types import NUM_RNGS, Scenario, SignalTiming

Options = tuple[tuple[str, str], ...]
"""SUMO's, by name."""

MAX_SEED = 2**31 - 1
MAX_RANGE = 10_000

RESCO_WINDOWS_S: dict[str, tuple[float, float]] = {
    "arterial4x4": (0.0, 3600.0),
    "cologne1": (25200.0, 28800.0),
    "cologne3": (25200.0, 28800.0),
    "cologne8": (25200.0, 28800.0),
    "grid4x4": (0.0, 3600.0),
    "ingolstadt1": (57600.0, 61200.0),
    "ingolstadt7": (57600.0, 61200.0),
    "ingolstadt21": (57600.0, 61200.0),
}
"""The hour that RESCO simulates of each map. The copies of ingolstadt7 and ingolstadt21 in sumo-rl
lack one green phase of the originals."""

RESCO_TIMINGS = {
    # A switch there leaves 3 s of the 5 s interval green.
    "arterial4x4": SignalTiming(decision_interval_s=5, yellow_s=2, min_green_s=3),
}

MOVING_SECTIONS = ("processing", "routing")
"""Sections of a `.sumocfg` that decide how vehicles move: `scale`, `lateral-resolution` and so on.
What `envs.sumo` sets itself (steps, files, teleporting, the seed) is not taken from there."""
NOT_TAKEN = re.compile(r"\.output$|threads$|^time-to-teleport|^max-depart-delay$")
"""Options that would write files, start threads in a process that is forked, or take vehicles off
the road: whoever waits too long is what a delay is made of."""

_RANGE = re.compile(rf"({'|'.join(KINDS)}):(\d+)-(\d+)((?:%\d+)?(?:@\d+)?)")
_REPEATED = re.compile(r"(.+)\*([1-9]\d{0,3})")
_NAME = re.compile(r"(.*?)(?:%([1-9]\d{1,2}))?(?:@(\d{1,4}))?", re.DOTALL)


def default_cache_dir() -> Path:
    """Where generated scenarios are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "rl-ft" / "scenarios"


def load_scenario(name: str, *, cache_dir: Path | None = None) -> Scenario:
    """The scenario of a name; generated ones are built into `cache_dir` when first asked for.

    Files of the user are validated here, so what is returned can be simulated.
    """
    base, percent, interval_s = _parts(name)
    kind, separator, rest = base.partition(":")
    if separator and kind in KINDS:
        scenario = generate(_seed(name, rest), cache_dir or default_cache_dir(), kind)
    elif separator and kind == "resco":
        scenario = _resco(base, rest)
    else:
        scenario = _user_scenario(base)
        validate_scenario(scenario)
    return replace(
        scenario,
        name=name,
        options=_scaled(scenario.options, percent),
        timing=_paced(name, scenario.timing, interval_s),
    )


def _parts(name: str) -> tuple[str, int, int | None]:
    """A name without what may stand behind it, the percentage (100) and the interval (None)."""
    base, percent, interval_s = _NAME.fullmatch(name).groups()
    if (percent or interval_s) and any(_NAME.fullmatch(base).groups()[1:]):
        raise UserError(
            f"Behind a scenario stand at most one %150 and then one @10, but {name} was asked for."
        )
    return base, int(percent or 100), int(interval_s) if interval_s else None


def traffic(name: str) -> str:
    """What two names have in common that are the same traffic: no pace, and files by full path."""
    base, percent, _ = _parts(name)
    kind, _, rest = base.partition(":")
    if kind in KINDS:
        base = f"{kind}:{rest.lstrip('0') or '0'}"
    elif kind != "resco":
        base = ",".join(str(Path(part.strip()).resolve()) for part in base.split(","))
    return base if percent == 100 else f"{base}%{percent}"


def _scaled(options: Options, percent: int) -> Options:
    """The options with SUMO's `scale` multiplied: more vehicles on the same ways, or fewer."""
    if percent == 100:
        return options
    settings = dict(options)
    scale = float(settings.get("scale", 1)) * percent / 100
    return tuple((settings | {"scale": f"{scale:g}"}).items())


def _paced(name: str, timing: SignalTiming, interval_s: int | None) -> SignalTiming:
    """The timing, with the interval that a name asks for if it does."""
    if interval_s is None:
        return timing
    shortest_s, longest_s = timing.yellow_s + timing.all_red_s + 1, timing.max_green_s
    if not shortest_s <= interval_s <= longest_s:
        raise UserError(
            f"Junctions of {_parts(name)[0]} can choose every {shortest_s} to {longest_s} s, more "
            f"than their yellow and up to their maximum green, but {name} was asked for."
        )
    return replace(timing, decision_interval_s=interval_s)


def is_generated(name: str) -> bool:
    """Whether the scenario is drawn from the seed in its name."""
    return name.partition(":")[0] in KINDS


def require_scenarios(names: Iterable[str]) -> None:
    """Raise a `UserError` for the first name that is none; builds no generated scenario."""
    for name in dict.fromkeys(names):
        base, _, interval_s = _parts(name)
        kind, separator, rest = base.partition(":")
        if separator and kind in KINDS:
            _seed(name, rest)
            _paced(name, SignalTiming(), interval_s)
        else:
            load_scenario(name)


def validate_scenario(scenario: Scenario) -> None:
    """Raise a `UserError` that names the first thing that would keep this from being simulated."""
    if scenario.end_s <= scenario.begin_s:
        raise UserError(
            f"Scenario {scenario.name} ends at {scenario.end_s:g} s, which is not after its begin "
            f"at {scenario.begin_s:g} s: set <begin> and <end> of its .sumocfg."
        )
    check_scenario(scenario)


def content_hash(scenario: Scenario) -> str:
    """Hash of all that decides what a simulation of it does: its files, window and timing."""
    settings = (
        scenario.begin_s,
        scenario.end_s,
        scenario.step_length_s,
        scenario.timing,
        NUM_RNGS,
        *scenario.options,
    )
    digest = hashlib.sha256(repr(settings).encode())
    for file in (scenario.net_file, *scenario.route_files, *scenario.additional_files):
        digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
    return digest.hexdigest()


def expand(names: Sequence[str]) -> tuple[str, ...]:
    """The names with every range `generated:1-48` or `grid:1-9` replaced by its members, in order.

    `resco:cologne1*12` is the same one twelve times, played as often as twelve others.
    """
    expanded: list[str] = []
    for name in names:
        if (repeated := _REPEATED.fullmatch(name)) is not None:
            expanded += expand([repeated[1]]) * int(repeated[2])
            continue
        match = _RANGE.fullmatch(name)
        if match is None:
            expanded.append(name)
            continue
        kind, first, last, behind = match[1], int(match[2]), int(match[3]), match[4]
        if not first <= last < first + MAX_RANGE:
            raise UserError(
                f"A range of scenarios runs upwards over at most {MAX_RANGE} seeds, such as "
                f"{kind}:1-48, but {name} was asked for."
            )
        expanded += [f"{kind}:{seed}{behind}" for seed in range(first, last + 1)]
    return tuple(expanded)


def scenario_names() -> tuple[str, ...]:
    """What can be asked for here: patterns of generated scenarios, then the installed maps."""
    root = _resco_root()
    maps = [m for m in RESCO_WINDOWS_S if root is not None and (root / m).is_dir()]
    return (*(f"{kind}:<seed>" for kind in KINDS), *(f"resco:{m}" for m in sorted(maps)))


def _seed(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,10}", text) or int(text) > MAX_SEED:
        raise UserError(
            f"A generated scenario is named by one seed from 0 to {MAX_SEED}, such as "
            f"{name.partition(':')[0]}:17, but {name} was asked for."
        )
    return int(text)


def _resco_root() -> Path | None:
    """Folder of sumo-rl's maps, found without importing the package (that needs SUMO_HOME)."""
    spec = importlib.util.find_spec("sumo_rl")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "nets" / "RESCO"


def _resco(name: str, city: str) -> Scenario:
    if city not in RESCO_WINDOWS_S:
        known = ", ".join(sorted(RESCO_WINDOWS_S))
        raise UserError(f"RESCO has the maps {known}, but {name} was asked for.")
    root = _resco_root()
    if root is None:
        raise UserError(
            f"The map {name} comes with the Python package sumo-rl, which is not installed here: "
            "pip install 'rl-ft[resco]'"
        )
    net = root / city / f"{city}.net.xml"
    routes = sorted((root / city).glob("*.rou.xml"))
    if not net.is_file() or not routes:
        raise UserError(
            f"The installed package sumo-rl has no complete map {city} in {root}: "
            "pip install --force-reinstall 'rl-ft[resco]'"
        )
    begin_s, end_s = RESCO_WINDOWS_S[city]
    return Scenario(
        name=name,
        kind="resco",
        net_file=str(net),
        route_files=tuple(str(r) for r in routes),
        begin_s=begin_s,
        end_s=end_s,
        timing=RESCO_TIMINGS.get(city, SignalTiming()),
    )


def _user_scenario(name: str) -> Scenario:
    if name.endswith(".sumocfg"):
        return _from_sumocfg(name)
    if "," in name:
        net, *routes = [part.strip() for part in name.split(",")]
        return _with_window(name, net, tuple(routes), (), {})
    raise UserError(
        f"A scenario is generated:<seed>, grid:<seed>, resco:<map>, the path of a .sumocfg, or "
        f"net.xml,routes.rou.xml, and may end with %150 or @10, but {name!r} was asked for."
    )


def _from_sumocfg(name: str) -> Scenario:
    path = Path(name)
    if not path.is_file():
        raise UserError(f"The SUMO configuration {name} does not exist: check the path.")
    try:
        root = ET.parse(path).getroot()
    except ET.ParseError as error:
        raise UserError(f"The SUMO configuration {name} is not readable XML: {error}.") from error
    options = _values(root.iter())
    nets = _files(path.parent, options, ("net-file", "net", "n"))
    routes = _files(path.parent, options, ("route-files", "routes", "r"))
    extra = _files(path.parent, options, ("additional-files", "additional", "a"))
    if len(nets) != 1 or not routes:
        raise UserError(
            f"The SUMO configuration {name} must name one net-file and at least one of "
            f"route-files in its <input>, but it names {len(nets)} and {len(routes)}."
        )
    scenario = _with_window(name, nets[0], routes, extra, options)
    moving = {
        key: value
        for section in root
        if section.tag in MOVING_SECTIONS
        for key, value in _values(section).items()
        if not NOT_TAKEN.search(key)
    }
    _require_number(name, "scale", moving.get("scale", "1"))
    return replace(scenario, options=tuple(moving.items()))


def _require_number(name: str, key: str, text: str) -> None:
    try:
        float(text)
    except ValueError:
        raise UserError(
            f"The SUMO configuration {name} must give {key} as a number, but it says {text!r}."
        ) from None


def _values(elements: Iterable[ET.Element]) -> dict[str, str]:
    return {e.tag: e.get("value", e.get("v", "")) for e in elements}


def _files(folder: Path, options: dict[str, str], keys: Sequence[str]) -> tuple[str, ...]:
    """Paths of an option, which SUMO reads relative to the configuration's folder."""
    value = next((options[key] for key in keys if key in options), "")
    return tuple(str(folder / part) for part in map(str.strip, value.split(",")) if part)


def _with_window(
    name: str,
    net: str,
    routes: tuple[str, ...],
    extra: tuple[str, ...],
    options: dict[str, str],
) -> Scenario:
    """The scenario with its times; without a begin or end it runs as long as vehicles depart."""
    begin_s = _time(name, options, ("begin", "b"))
    end_s = _time(name, options, ("end", "e"))
    step_s = _time(name, options, ("step-length",))
    endless = end_s is None or end_s < 0
    if begin_s is None or endless:
        first_s, last_s = departure_window(name, routes, begin_s or 0.0)
        begin_s = math.floor(first_s) if begin_s is None else begin_s
        if endless and math.isinf(last_s):
            raise UserError(
                f"A flow of {listed(routes)} has no end, so {name} has none: give the flow an end, "
                "or name the files in a .sumocfg with <begin> and <end>."
            )
        end_s = math.floor(last_s) + 1 if endless else end_s
    return Scenario(
        name=name,
        kind="user",
        net_file=net,
        route_files=routes,
        additional_files=extra,
        begin_s=float(begin_s),
        end_s=float(end_s),
        step_length_s=1.0 if step_s is None else step_s,
    )


def _time(name: str, options: dict[str, str], keys: Sequence[str]) -> float | None:
    text = next((options[key] for key in keys if key in options), None)
    if text is None:
        return None
    seconds = parse_seconds(text)
    if seconds is None:
        raise UserError(
            f"The SUMO configuration {name} must give {keys[0]} in seconds or as hh:mm:ss, "
            f"but it says {text!r}."
        )
    return seconds
