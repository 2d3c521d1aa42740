"""Commands that show what a run holds: figures, report, info."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as o


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(figures)
    app.command()(report)
    app.command()(info)


def figures(
    run: o.RunPath,
    atlas: Annotated[
        bool, typer.Option("--atlas", help="Draw the layer atlas: exponent and variance by layer and projection.")
    ] = False,
    as_json: o.Json = False,
) -> None:
    """Draw everything the run has numbers for, as png and pdf in RUN/figures; say what makes the rest."""
    from gradvar.runs import open_run
    from gradvar.stages import draw_figures

    from . import console, views

    target = open_run(run)
    with target.locked():
        paths = draw_figures(target, console.Terminal(), atlas=atlas)
    views.show_paths(paths, as_json=as_json, then=f"gradvar report {run}")


def report(run: o.RunPath, as_json: o.Json = False) -> None:
    """Write RUN/report.html: the answer in words, every figure with its numbers, the rollouts, one file."""
    from gradvar.runs import open_run
    from gradvar.stages import report as stage

    from . import console, views

    target = open_run(run)
    with target.locked():
        path = stage(target, console.Terminal())
    views.show_paths([path], as_json=as_json, then=f"open {path} in a browser")


def info(run: o.RunPath, as_json: o.Json = False) -> None:
    """Show what a run holds: model, settings, prompts, lengths, rewards, and the first prompt as the model sees it."""
    from gradvar.runs import open_run

    from . import views

    views.show_info(open_run(run), as_json=as_json)
