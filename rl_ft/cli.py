"""The command line: read what was asked, then import what does it.

`rl-ft --help` imports no heavy library. Errors that have a name of ours end in one sentence on
standard error and a status (2: what you gave cannot be used; 1: the run stopped for a reason;
130: Ctrl-C); anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from envs.errors import UserError
from rl_ft.cluster_cli import cluster

if TYPE_CHECKING:
    from rich.console import Console

    from rl_ft.config import Config
    from rl_ft.run_folder import RunFolder

log = logging.getLogger(__name__)

QUIET = {
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Libraries' own bars and notices, in this process and what it starts; ours say enough."""

app = typer.Typer(
    name="rl-ft",
    help="Train a language model to control traffic signals: GRPO with rewards measured in SUMO.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

data = typer.Typer(help="Look after datasets.", no_args_is_help=True)
app.add_typer(data, name="data")
app.add_typer(cluster)

Recipe = Annotated[
    str | None,
    typer.Option(help="Shipped recipe or YAML file; default: the folder's own, else tiny-cpu."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY.PATH=VALUE",
        help="Override one key; may be repeated. `rl-ft recipes smoke --all` lists the keys.",
    ),
]
Out = Annotated[Path | None, typer.Option(help="Run folder; default: runs/RECIPE.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what was started.")]
Seed = Annotated[int | None, typer.Option(help="Seed of data, model and training.")]


def main() -> None:
    """Entry point of the `rl-ft` command."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from rl_ft.ending import InterruptedRun, named_cause
    from rl_ft.interrupt import keep_interrupts

    keep_interrupts()
    try:
        app(prog_name="rl-ft")
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except Exception as error:
        named = named_cause(error)
        if named is None:
            raise
        status = {UserError: 2, InterruptedRun: 130}
        code = next((c for kind, c in status.items() if isinstance(named, kind)), 1)
        _end(str(named), code)


@app.command()
def run(
    recipe: Recipe = None,
    overrides: Set = None,
    out: Out = None,
    resume: Resume = False,
    seed: Seed = None,
) -> None:
    """The main job: prepare, sft, grpo, evaluate, report; --resume skips stages that are done."""
    with _run_folder(recipe, overrides, out, seed, resume=resume, command="run") as folder:
        from rl_ft.pipeline import run_all

        run_all(folder.config, folder)
        log.info("the report: %s", folder.path("report.html"))


@app.command()
def prepare(
    recipe: Recipe = None,
    overrides: Set = None,
    out: Out = None,
    resume: Resume = False,
    seed: Seed = None,
) -> None:
    """Collect decision states and the teachers' answers; build or fetch the model."""
    with _run_folder(recipe, overrides, out, seed, resume=resume, command="prepare") as folder:
        _stage("prepare", folder)


@app.command()
def sft(
    recipe: Recipe = None,
    overrides: Set = None,
    out: Out = None,
    resume: Resume = False,
    seed: Seed = None,
) -> None:
    """Supervised warm start on the prepared rows; goes on in the folder of `prepare`."""
    with _run_folder(recipe, overrides, out, seed, resume=True, command="sft") as folder:
        _stage("sft", folder)


@app.command()
def grpo(
    recipe: Recipe = None,
    overrides: Set = None,
    out: Out = None,
    resume: Resume = False,
    seed: Seed = None,
) -> None:
    """Reinforce the warm-started model by branched simulations; goes on from its checkpoint."""
    with _run_folder(recipe, overrides, out, seed, resume=True, command="grpo") as folder:
        _stage("grpo", folder)


@app.command()
def evaluate(
    controller: Annotated[
        list[str] | None,
        typer.Option(
            help="fixed, actuated, max_pressure, max_wave, max_wave_extended, random or lookahead; "
            "may be repeated."
        ),
    ] = None,
    model: Annotated[list[Path] | None, typer.Option(help="Model folder; may be repeated.")] = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(
            help="May be repeated, see rl-ft scenarios; default: the recipe's scenarios.held_out."
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Simulation seeds 1..N, the same for every policy; default: evaluate.seeds."
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Policy that differences are taken to; default: max_pressure, else the first."
        ),
    ] = None,
    recipe: Recipe = None,
    overrides: Set = None,
    out: Out = None,
    resume: Resume = False,
    seed: Seed = None,
) -> None:
    """Closed-loop results: of controllers and models you name, or of a run's own (--out alone)."""
    if controller or model:
        _evaluate_named(
            controller or [],
            model or [],
            scenario or [],
            seeds=seeds,
            baseline=baseline,
            out=out,
            config=_config(recipe, overrides, seed, base=None),
            resume=resume,
        )
        return
    if scenario or seeds or baseline:
        raise UserError(
            "--scenario, --seeds and --baseline go with --controller or --model; what a run "
            "itself is judged on is set by scenarios.held_out and evaluate.* when it starts"
        )
    with _run_folder(recipe, overrides, out, seed, resume=True, command="evaluate") as folder:
        _stage("evaluate", folder)


@app.command()
def export(
    run: Annotated[Path, typer.Option(help="Run folder.")],
    form: Annotated[
        str, typer.Option("--format", metavar="merged|adapter|gguf", help="Whole model or adapter.")
    ] = "merged",
    start: Annotated[str | None, typer.Option(help="Needed where the run has several.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder; default: export/START-FORMAT in the run.")
    ] = None,
    scenario: Annotated[
        list[str] | None, typer.Option(help="Where to compare; default: the first held out.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=0, help="Seeds to compare on; 0: do not drive.")] = 2,
) -> None:
    """A trained model as a folder for others, driven beside the run's own."""
    from rl_ft.export import export_run
    from rl_ft.monitor import run_log

    with run_log(None):
        export_run(run, form=form, start=start, out=out, scenarios=scenario or (), seeds=seeds)


@app.command()
def report(
    recipe: Recipe = None,
    overrides: Set = None,
    out: Out = None,
    resume: Resume = False,
    seed: Seed = None,
) -> None:
    """Write report.html from what the run folder holds, anew each time."""
    with _run_folder(recipe, overrides, out, seed, resume=True, command="report") as folder:
        from rl_ft.pipeline import run_stage

        run_stage("report", folder.config, folder)


@app.command()
def doctor(recipe: Recipe = None, overrides: Set = None, seed: Seed = None) -> None:
    """Check this machine: versions, SUMO, exact branching, parity, Ray, GPU."""
    config = _config(recipe, overrides, seed, base=None)
    from rl_ft.doctor import examine

    if not examine(_console(), config):
        raise typer.Exit(1)


@data.command("check")
def data_check(
    directory: Annotated[Path, typer.Argument(help="A dataset, such as the folder data of a run.")],
    rows: Annotated[int, typer.Option(min=1, help="How many decision states to go back to.")] = 20,
    seed: Annotated[int, typer.Option(help="Draws which.")] = 1,
) -> None:
    """Read every row, go back to some of the states, and compare what is measured there."""
    from rl_ft.listing import show_replayed
    from rl_ft.replay import check_dataset

    if not show_replayed(_console(), check_dataset(directory, num_rows=rows, seed=seed)):
        raise typer.Exit(1)


@app.command()
def scenarios(
    name: Annotated[str | None, typer.Argument(help="Show this one, like resco:cologne1.")] = None,
) -> None:
    """List the kinds of scenario, or show one: junctions, phases, lanes, demand."""
    from rl_ft.listing import list_scenarios, show_scenario

    if name is None:
        list_scenarios(_console())
    else:
        show_scenario(_console(), name)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show what this one changes.")] = None,
    every_key: Annotated[
        bool, typer.Option("--all", help="Every key that --set knows, not only those.")
    ] = False,
) -> None:
    """List the shipped recipes, or show what one changes from the defaults."""
    from rl_ft.listing import list_recipes, show_recipe

    if name is None:
        list_recipes(_console())
    else:
        show_recipe(_console(), name, every_key=every_key)


def _stage(stage: str, folder: RunFolder) -> None:
    from rl_ft.pipeline import run_stage

    if folder.stage_done(stage):
        log.info("%s: done already", stage)
    else:
        run_stage(stage, folder.config, folder)


def _config(
    recipe: str | None, overrides: list[str] | None, seed: int | None, *, base: Path | None
) -> Config:
    """What was asked for; without a recipe, on top of the started run in `base` if there is one."""
    from rl_ft.recipe import DEFAULT_RECIPE, load_config

    if recipe is None and base is not None and (base / "config.yaml").is_file():
        recipe = str(base / "config.yaml")
    return load_config(recipe or DEFAULT_RECIPE, overrides or (), seed=seed)


@contextmanager
def _run_folder(
    recipe: str | None,
    overrides: list[str] | None,
    out: Path | None,
    seed: int | None,
    *,
    resume: bool,
    command: str,
) -> Iterator[RunFolder]:
    """The run folder, locked, with its log; however the work ends is noted there."""
    from envs.scenario import expand, require_scenarios
    from rl_ft.ending import noted_ending
    from rl_ft.recipe import DEFAULT_RECIPE
    from rl_ft.run_folder import RunFolder

    place = out or Path("runs") / Path(recipe or DEFAULT_RECIPE).stem
    config = _config(recipe, overrides, seed, base=place if resume else None)
    if not resume:
        # Now, not after half an hour of training; who only wants a report needs none of them.
        asked = (config.scenarios.train, config.scenarios.held_out, config.check.scenarios)
        require_scenarios(name for names in asked for name in expand(names))
    folder = RunFolder.create(place, config, resume=resume)
    with noted_ending(folder, again=f"rl-ft {command} --out {place} --resume"):
        yield folder


def _evaluate_named(
    controllers: list[str],
    models: list[Path],
    scenarios: list[str],
    *,
    seeds: int | None,
    baseline: str | None,
    out: Path | None,
    config: Config,
    resume: bool,
) -> None:
    from typing import get_args

    from rl_ft.recipe import nearest
    from rl_ft.sections import Controller

    known = get_args(Controller)
    for name in controllers:
        if name not in known:
            raise UserError(
                f"--controller {name}: expected one of {', '.join(known)}{nearest(name, known)}"
            )
    place = out or Path("runs") / "evaluate"
    if place.exists() and not place.is_dir():
        raise UserError(f"--out {place} is a file; expected a folder or a new name")
    if (place / "config.yaml").exists():
        raise UserError(f"--out {place} is the folder of a run; give another --out")
    from rl_ft.evaluate import evaluate_cli

    evaluate_cli(
        controllers=controllers,
        models=models,
        scenarios=scenarios or list(config.scenarios.held_out),
        seeds=seeds or config.evaluate.seeds,
        out=place,
        baseline=baseline,
        config=config,
        resume=resume,
    )


def _console() -> Console:
    from rich.console import Console

    return Console()


def _end(sentence: str, status: int) -> None:
    print(f"rl-ft: {sentence}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
