"""What `rl-ft scenarios` and `rl-ft recipes` show: worlds and recipes as a person reads them.

Shows what others define; decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from envs.demand import num_departures
from envs.scenario import load_scenario, scenario_names
from envs.types import Decision, JunctionSpec, Phase
from envs.world import World
from rl_ft.config import Config
from rl_ft.recipe import (
    DEFAULT_RECIPE,
    differences,
    flatten,
    load_config,
    purpose,
    recipe_names,
)
from rl_ft.replay import Replayed

_KINDS = (
    ("generated:<seed>", "a city drawn from its seed; generated:1-48 stands for 48 of them"),
    (
        "grid:<seed>",
        "three to nine junctions in a row or a grid, drawn from its seed; grid:1-9 too",
    ),
    ("resco:<map>", "a map of the RESCO benchmark, shipped with the package sumo-rl"),
    ("<path>.sumocfg", "your own configuration"),
    ("<net>.net.xml,<routes>.rou.xml", "your own network and demand"),
    ("<any of these>%150", "the same, with half as many vehicles again"),
    ("<any of these>@15", "the same, with a decision every 15 s; may follow the percentage"),
)

_EXAMPLE_S = 300.0
"""An instant with some traffic, to show what a model reads."""


def list_scenarios(console: Console) -> None:
    """The kinds of scenario there are, and the maps that are installed."""
    table = Table("name", "what it is", title="scenarios")
    for name, what in _KINDS:
        table.add_row(name, what)
    console.print(table)
    maps = [name for name in scenario_names() if name.startswith("resco:")]
    console.print("installed maps: " + (", ".join(maps) or "none; pip install 'rl-ft[resco]'"))


def show_scenario(console: Console, name: str) -> None:
    """One scenario: its window and demand, and what each signalled junction may do."""
    scenario = load_scenario(name)
    with World() as world:
        world.reset(scenario, seed=1)
        world.drive("max_wave", scenario.begin_s + _EXAMPLE_S)
        decisions = world.decisions()
    junctions = [decision.junction for decision in decisions]
    hours = (scenario.end_s - scenario.begin_s) / 3600
    demand = num_departures(scenario)
    console.print(f"{scenario.name}: {scenario.kind}, {scenario.net_file}")
    console.print(
        f"from {scenario.begin_s:g} to {scenario.end_s:g} s, {demand:.0f} vehicles "
        f"({demand / hours:.0f} per hour), {len(junctions)} signalled "
        f"{'junction' if len(junctions) == 1 else 'junctions'}, "
        f"a decision every {scenario.timing.decision_interval_s} s"
    )
    for junction in junctions:
        console.print(_phase_table(junction))
    if decisions:
        _print_example(console, decisions[0])


def list_recipes(console: Console) -> None:
    """The recipes that ship with the package, and what each is for."""
    table = Table("recipe", "what it is for", "changes", title="recipes", show_lines=True)
    for name in recipe_names():
        changed = differences(Config(), load_config(name))
        table.add_row(name, purpose(name), f"{len(changed)} keys")
    console.print(table)
    console.print(
        f"The default is {DEFAULT_RECIPE}; `rl-ft recipes NAME` shows what a recipe changes"
    )


def show_recipe(console: Console, name: str, *, every_key: bool = False) -> None:
    """What a recipe changes from the defaults, or every key."""
    table = Table("key", "default", "recipe", title=f"recipe {name}")
    defaults = Config()
    changed = differences(defaults, load_config(name))
    same = flatten(defaults.model_dump(mode="json")) if every_key else {}
    shown = {key: (value, "") for key, value in same.items()} | changed
    for key, (default, value) in shown.items():
        table.add_row(key, str(default), str(value))
    console.print(table)


def show_replayed(console: Console, replayed: Sequence[Replayed]) -> bool:
    """The rows that are not as they were, and how many are; whether all are."""
    changed = [row for row in replayed if row.difference]
    if changed:
        table = Table("row", "measured again", title="not as it was")
        for row in changed:
            table.add_row(row.id, row.difference)
        console.print(table)
    same = len(replayed) - len(changed)
    console.print(f"{same} of {len(replayed)} decision states are what SUMO does here, exactly")
    return not changed


def _phase_table(junction: JunctionSpec) -> Table:
    title = f"junction {junction.tls_id}: {len(junction.lanes)} lanes"
    table = Table("phase", "opens", "signals", title=title)
    for phase in junction.phases:
        table.add_row(phase.name, _opened(junction, phase), phase.state)
    return table


def _opened(junction: JunctionSpec, phase: Phase) -> str:
    return ", ".join(
        f"{junction.lanes[lane].approach} {'+'.join(turns)}{'' if protected else ' (yields)'}"
        for lane, turns, protected in zip(phase.lanes, phase.turns, phase.protected, strict=True)
    )


def _print_example(console: Console, decision: Decision) -> None:
    from envs.dialect import observation_text

    console.print(f"what a model reads at {decision.observation.time_s:g} s:")
    console.print(observation_text(decision), markup=False, highlight=False, soft_wrap=True)
