"""Commands that show what a run holds: figures, info."""

from __future__ import annotations

import typer

from . import options as o


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(figures)
    app.command()(info)


def figures(run: o.RunPath, as_json: o.Json = False) -> None:
    """Draw deviation against length and the CV of the aggregators, as png and pdf in RUN/figures."""
    from gradvar.runs import open_run
    from gradvar.stages import draw_figures

    from . import console, views

    target = open_run(run)
    with target.locked():
        paths = draw_figures(target, console.Terminal())
    views.show_paths(paths, as_json=as_json)


def info(run: o.RunPath, as_json: o.Json = False) -> None:
    """Show what a run holds: model, settings, prompts, lengths, rewards, and the first prompt as the model sees it."""
    from gradvar.runs import open_run

    from . import views

    views.show_info(open_run(run), as_json=as_json)
