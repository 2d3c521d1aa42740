"""Entry point: the app, and the one table from exception to message and exit code."""

from __future__ import annotations

import os
import re
import sys
from typing import Annotated

import typer

from . import estimates, inspecting, judging, looking, making, whole

MISTAKE = 2
INTERRUPTED = 130
_INTERRUPTED = "interrupted: what was finished is kept, the same command goes on"

app = typer.Typer(
    name="gradvar",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Measure the variance of policy gradients against response length, and what every loss aggregator "
        "(GRPO, DAPO, Dr. GRPO, VL Norm) costs in noise on *your* model and prompts.\n\n"
        "Try `gradvar demo` first: the whole job on a small bundled policy, no network, no GPU. "
        "Then `gradvar run RUN --model M --prompts P`. Every stage can be run again; it does what is missing."
    ),
)
whole.register(app)
inspecting.register(app)
making.register(app)
estimates.register(app)
judging.register(app)
looking.register(app)


@app.callback()
def gradvar(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a mistake.")] = False,
) -> None:
    """Hold the options that come before the command; `main` reads --debug itself."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code.

    0: done. 2: a mistake in the input, told in one line. 130: interrupted; the same command goes on.
    """
    # Before torch loads: spinning OpenMP threads made a loop of small products 30 times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(args=arguments, prog_name="gradvar", standalone_mode=False)
    except KeyboardInterrupt:
        _leave(_INTERRUPTED, INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        message = _message(error, arguments)
        if message is None:
            raise
        _leave(message, MISTAKE)
    else:
        if code == INTERRUPTED:  # Typer turns Ctrl-C into this
            _leave(_INTERRUPTED, INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


def _message(error: Exception, arguments: list[str]) -> str | None:
    from gradvar.errors import GradvarError

    if isinstance(error, GradvarError):
        return " ".join(str(error).split())
    if hasattr(error, "format_message"):  # Typer's usage errors (its click is private)
        text = " ".join(error.format_message().split())
        return f"{text}{_received(text, arguments)}" or None
    if type(error).__name__ == "Abort":
        return "stopped"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not loaded here
        return (
            "the GPU's memory ran out: expected room for the model and the memory budget beside it; lower "
            "--memory-budget (or --token-budget), or let other processes on the GPU end"
        )
    return None


def _received(text: str, arguments: list[str]) -> str:
    """Return what was given to the option that a usage error names; Typer leaves it out."""
    named = re.search(r"Invalid value for '(--[a-z-]+)", text)
    if named is None or named[1] not in arguments[:-1]:
        return ""
    return f", received {arguments[arguments.index(named[1]) + 1]!r}"


def _leave(message: str, code: int) -> None:
    print(f"gradvar: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
