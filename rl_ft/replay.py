"""Go back to decision states of a dataset and measure again: are its rows what SUMO does?"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from envs.answers import label, offered
from envs.errors import UserError
from envs.scenario import load_scenario
from envs.world import World
from rl_ft.cores import usable_cores
from rl_ft.dataset import read_everything, read_manifest, require_unchanged
from rl_ft.interrupt import handed_out
from rl_ft.progress import track
from rl_ft.rows import Manifest
from rl_ft.states import DecisionState

TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """A row that was measured again; `difference` says what is not as it was, None if all is."""

    id: str
    difference: str | None


def check_dataset(directory: Path, *, num_rows: int, seed: int) -> list[Replayed]:
    """Measure a sample of the rows again, in their order in the dataset.

    Raises:
        UserError: a file or a row is not as written, another SUMO measured, or the scenario of a
            sampled row has changed.
    """
    manifest = read_manifest(directory)
    states = read_everything(directory, manifest)
    _require_sumo(directory, manifest)
    chosen = sorted(random.Random(seed).sample(range(len(states)), min(num_rows, len(states))))
    names = dict.fromkeys(states[i].decision.scenario for i in chosen)
    require_unchanged(names, states, manifest, directory)
    with ThreadPoolExecutor(usable_cores()) as pool:
        replayed = handed_out(pool, lambda i: replay(states[i], manifest), chosen)
        return list(track(replayed, "data check", total=len(chosen), unit="rows"))


def replay(state: DecisionState, manifest: Manifest) -> Replayed:
    """Drive the way to the instant anew, and try every legal answer there."""
    decision = state.decision
    with World(timeout_s=TIMEOUT_S) as world:
        world.reset(load_scenario(decision.scenario), decision.seed)
        for leg in state.way:
            world.drive(leg.driver, leg.until_s)
        tls_id = decision.junction.tls_id
        now = [
            offered(d, decision.format) for d in world.decisions() if d.junction.tls_id == tls_id
        ]
        if now != [decision]:
            return Replayed(id=state.id, difference="the junction sees something else there now")
        outcomes = world.branch(
            [{tls_id: action} for action in state.outcomes],
            manifest.settings.horizon_s,
            manifest.settings.follow,
        )
    names = [label(decision, action) for action in state.outcomes]
    changed = [
        name
        for name, was, now in zip(names, state.outcomes.values(), outcomes, strict=True)
        if was != now
    ]
    difference = f"another outcome of {', '.join(changed)}" if changed else None
    return Replayed(id=state.id, difference=difference)


def _require_sumo(directory: Path, manifest: Manifest) -> None:
    here = version("eclipse-sumo")
    if manifest.sumo != here:
        raise UserError(
            f"{directory} was measured by SUMO {manifest.sumo}, installed is {here}: "
            f"pip install eclipse-sumo=={manifest.sumo} libsumo=={manifest.sumo}, or prepare anew"
        )
