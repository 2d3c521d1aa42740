"""Stage figures: the run's numbers drawn, as png and pdf."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gradvar.errors import GradvarError
from gradvar.figures import Drawing, NotDrawn, compose, save, style
from gradvar.runs import Run
from gradvar.stages import law_drawings, response_drawings, table_drawings
from gradvar.stages.held import Held
from gradvar.stages.listener import Listener, Silent

Drawer = Callable[[Held], list[Drawing | NotDrawn]]

DRAWERS: dict[str, Drawer] = {
    "length_law": law_drawings.length_laws,
    "length_law_by_prompt": law_drawings.length_laws_by_prompt,
    "exponents": law_drawings.exponents,
    "aggregators": table_drawings.aggregators,
    "forms": table_drawings.cv_forms,
    "bias": table_drawings.bias_noise,
    "efficiency": table_drawings.efficiency,
    "alpha": table_drawings.alpha_curves,
    "group_size": table_drawings.group_sizes,
    "audit": table_drawings.audit,
    "token_covariance": table_drawings.token_covariance,
    "prefixes": response_drawings.prefixes,
    "pressure": table_drawings.pressure,
    "responses": response_drawings.responses,
    "sampler": response_drawings.sampler_against_policy,
}
"""Every figure of a run but the atlas, in the order of the report."""


def draw_figures(run: Run, listener: Listener | None = None, *, atlas: bool = False) -> list[Path]:
    """Draw every figure the run has data for, as png and pdf, and say what the others lack.

    Args:
        run: A run with Grams.
        listener: Who is told.
        atlas: Draw the layer atlas alone.

    Returns:
        Paths of the files.

    Raises:
        GradvarError: Nothing was measured yet, or the atlas' data are missing.
    """
    listener = listener or Silent()
    held = Held(run)
    drawers = {"atlas": law_drawings.atlas} if atlas else DRAWERS
    paths: list[Path] = []
    missing: list[NotDrawn] = []
    with listener.task("figures", len(drawers)) as advance:
        for drawer in drawers.values():
            for drawing in drawer(held):
                if isinstance(drawing, NotDrawn):
                    missing.append(drawing)
                    continue
                with style():
                    paths += save(compose(drawing.panels), run.path / "figures", drawing.stem)
            advance(1)
    if atlas and missing:
        raise GradvarError(f"no atlas: {missing[0].why}")
    for one in missing:
        listener.say(f"no figure {one.stem}: {one.why}")
    return paths
