"""Commands that look at a model and at what measuring it is worth: targets, check."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as o


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(targets)
    app.command()(check)


def targets(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or hub id.", show_default=False)],
    spec: Annotated[
        list[str] | None,
        typer.Option("--spec", help="Only what this names, as --targets of `measure` would; several times."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every key by itself, not alike layers together.")] = False,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = None,
    as_json: o.Json = False,
) -> None:
    """List what can be measured in a model: the weight matrices, what each preset picks, and what cannot be measured.

    Reads the model's configuration alone, no weights. A key, or a glob over keys, is what `--targets` takes; so is
    LAYERS:KINDS such as `last:qkv`, `middle:mlp`, `0-3:attn`.
    """
    from gradvar.stages import targets as stage

    from . import catalogue

    listing = stage(model, spec or (), revision=revision, trust_remote_code=bool(trust_remote_code))
    catalogue.show_targets(listing, every=every, as_json=as_json)


def check(
    run: o.RunPath,
    responses: Annotated[
        int, typer.Option("--responses", help="Responses of a prompt to measure again, from shortest to longest.")
    ] = 4,
    prompts: Annotated[int, typer.Option("--prompts", help="Prompts that they are taken from.")] = 1,
    attention: Annotated[
        str | None,
        typer.Option("--attention", help="Check with another one, as in `measure`.", show_default="the run's"),
    ] = None,
    level: o.Level = None,
    seed: o.Seed = None,
    config: o.ConfigFile = None,
    as_json: o.Json = False,
) -> None:
    """Check the measurement: rounding of the gradients, sampler against policy, and that the score has mean zero.

    Measures some responses again, alone and together, as the run does and in float32 with eager attention (a second
    copy of the model beside the first), and says by how much g and D differ. Shows the tokens on which sampler and
    policy differ most. "precise" means within 5%.
    """
    settings = o.given(config, level=level, seed=seed)

    from gradvar.runs import open_run
    from gradvar.stages import check as stage

    from . import checks, console

    target = open_run(run)
    with target.locked():
        stage(target, settings, console.Terminal(), responses=responses, prompts=prompts, attention=attention)
    checks.show_check(target, as_json=as_json)
