"""The commands for clusters and for more than one run; `rl_ft.cli` adds them to its own."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from envs.errors import UserError

if TYPE_CHECKING:
    from rl_ft.submit import Cluster

log = logging.getLogger(__name__)

cluster = typer.Typer()

LOCAL_DASHBOARD = "http://127.0.0.1:8265"


@cluster.command(context_settings={"allow_interspersed_args": False})
def submit(
    context: typer.Context,
    command: Annotated[
        list[str] | None, typer.Argument(metavar="-- COMMAND", help="Any command of rl-ft.")
    ] = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Dashboard of the cluster.")
    ] = LOCAL_DASHBOARD,
    storage: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the cluster, shared by its nodes, that relative paths of the "
            "command lead from; default: the path of the current directory."
        ),
    ] = None,
    pip: Annotated[
        str | None,
        typer.Option(metavar="cpu|gpu", help="Install the pinned packages on the nodes first."),
    ] = None,
    python: Annotated[str | None, typer.Option(help="Interpreter on the cluster.")] = None,
    any_versions: Annotated[
        bool, typer.Option("--any-versions", help="Run whatever versions the cluster has.")
    ] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Print the id of the job and end.")
    ] = False,
    stop_on_interrupt: Annotated[
        bool, typer.Option("--stop-on-interrupt", help="Ctrl-C stops the job too.")
    ] = False,
    follow: Annotated[
        str | None, typer.Option(metavar="JOB_ID", help="Follow a job that was submitted before.")
    ] = None,
) -> None:
    """Run an rl-ft command as a Ray job; its log comes here, and its exit status."""
    from rl_ft.submit import Job, connect, rl_ft_arguments

    if follow and command:
        raise UserError("--follow looks at a job that is there; leave the command out")
    if not follow:
        known = context.parent.command.list_commands(context.parent)
        job = Job(
            arguments=rl_ft_arguments(command or [], known),
            storage=str((storage or Path()).absolute()),
            python=python,
            pip=pip,
            any_versions=any_versions,
        )
    ray = connect(address)
    job_id = follow or ray.submit(job)
    _say(f"job {job_id}: {ray.page(job_id)}")
    if no_wait:
        print(job_id)
        return
    raise typer.Exit(_follow(ray, job_id, stop_on_interrupt=stop_on_interrupt))


@cluster.command()
def sweep(
    space: Annotated[
        Path | None, typer.Option(help="YAML file: what to try, by dotted configuration key.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="What each trial is but for the space; default: small-scale.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Draws, each at every point of the grid; default: 8.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="For all trials; may be repeated."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Sweep folder.")] = Path("runs/sweep"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a sweep.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of the draws and of every trial.")] = None,
    concurrent: Annotated[
        int | None, typer.Option(min=1, help="Trials at once; default: what the cluster takes.")
    ] = None,
    to_the_end: Annotated[
        bool, typer.Option("--to-the-end", help="Stop no trial that is behind the others.")
    ] = False,
    promote: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Then run this with the best settings.")
    ] = None,
) -> None:
    """Ray Tune over short runs; the closed loop says which settings are best.

    A finished sweep with --resume --promote RECIPE starts the full run alone.
    """
    from rl_ft.sweep import promote as run_promoted
    from rl_ft.sweep import promoted_config, run_sweep, sweeping
    from rl_ft.sweep_folder import SweepFolder

    if resume:
        given = {"--space": space, "--recipe": recipe, "--samples": samples, "--set": overrides}
        given |= {"--seed": seed, "--to-the-end": to_the_end}
        if named := [name for name, value in given.items() if value]:
            raise UserError(
                f"--resume goes on with what {out} was started with; leave {', '.join(named)} out"
            )
        folder = SweepFolder.open(out)
    else:
        if space is None:
            raise UserError("expected --space FILE with what to try; see `rl-ft sweep --help`")
        folder = SweepFolder.plan(
            out,
            space_file=space,
            recipe=recipe or "small-scale",
            overrides=overrides or (),
            num_samples=samples or 8,
            seed=seed,
            early_stop=not to_the_end,
        )
    # Whatever is best may be promoted: an error there must not wait until the trials are done.
    for trial in folder.trials if promote else ():
        promoted_config(promote, trial.settings)
    then = "" if promote is None else f" --promote {promote}"
    with sweeping(folder, again=f"rl-ft sweep --out {out} --resume{then}"):
        ranked = run_sweep(folder, concurrent=concurrent, retry=promote is None)
        if promote is not None:
            place = run_promoted(folder, ranked[0], promote)
            log.info("the report of the full run: %s", place / "report.html")


@cluster.command()
def serve(
    model: Annotated[Path, typer.Option(help="Model folder, of a run or exported.")],
    host: Annotated[
        str, typer.Option(help="Where to listen; any but loopback wants a secret in RLFT_TOKEN.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Engines that answer.")] = 1,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override one key, as ray.address."),
    ] = None,
) -> None:
    """Answer over HTTP what a junction should show next, until Ctrl-C."""
    from rl_ft.recipe import load_config
    from rl_ft.serving import serve_model

    serve_model(
        model,
        host=host,
        port=port,
        replicas=replicas,
        config=load_config(None, overrides or ()),
        on_ready=lambda url: _say(f"{model} answers on {url}/decide; {url}/docs says how"),
    )


@cluster.command()
def pull(
    url: Annotated[str, typer.Argument(help="What monitor.mirror was when the run was started.")],
    out: Annotated[Path, typer.Option(help="New run folder.")],
) -> None:
    """Bring back the newest copy of a run, to go on with it by --resume."""
    from rl_ft.mirror import Mirror

    Mirror(url).pull(out)
    _say(f"{out} is there; go on with it: rl-ft run --out {out} --resume")


def _follow(ray: Cluster, job_id: str, *, stop_on_interrupt: bool) -> int:
    try:
        return ray.follow(job_id, _show)
    except KeyboardInterrupt:
        if stop_on_interrupt:
            _say(f"stopping {job_id}")
            ray.stop(job_id)
            _say(f"{job_id} is stopped")
        else:
            _say(f"{job_id} goes on; {ray.instructions(job_id)}")
        return 130


def _show(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read the log is gone; how the job ends still counts.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until this process ends


def _say(sentence: str) -> None:
    print(f"rl-ft: {sentence}", file=sys.stderr, flush=True)
