"""The drawn law goes through the drawn points, also where prompts differ in length."""

import numpy as np
import pandas as pd

from gradvar.estimators import law_table
from gradvar.figures import panels
from gradvar.runs import PromptScores
from gradvar.stages.law_drawings import length_panel


def prompt(name: str, mean_length: float, rng) -> PromptScores:
    lengths = np.maximum(1, rng.lognormal(np.log(mean_length), 0.3, 128).round())
    gradients = rng.normal(size=(128, 400)) * np.sqrt(lengths / 400)[:, None]  # v(L) = L
    return PromptScores(
        prompt_id=name,
        target="t",
        gram=gradients @ gradients.T,
        rewards=np.ones(128),
        lengths=lengths,
        truncated=np.zeros(128, dtype=bool),
        max_length=2000,
    )


def test_points_lie_on_the_curve_for_short_and_long_prompts_alike():
    rng = np.random.default_rng(0)
    groups = [prompt(str(i), mean, rng) for i, mean in enumerate((70, 70, 650, 650))]
    law = law_table(groups, advantages_studied=["score"], seed=0)
    chosen = law[law["prompt_id"].isna() & (law["estimand"] == "these prompts") & (law["scope"] == "all responses")]
    axes = panels(1).axes[0]
    draw, _ = length_panel("t", groups, "score", chosen.set_index("quantity"))
    draw(axes)
    points = np.vstack(
        [c.get_offsets() for c in axes.collections if c.get_offsets().shape[1] == 2 and c.get_label()[0] != "_"]
    )
    curve = pd.Series(axes.lines[0].get_ydata(), index=axes.lines[0].get_xdata())
    fitted = np.exp(np.interp(np.log(points[:, 0]), np.log(curve.index), np.log(curve)))
    for short in (True, False):
        chosen_points = (points[:, 0] < 250) == short
        ratio = (points[chosen_points, 1] / fitted[chosen_points]).mean()
        assert abs(ratio - 1) < 0.05, (
            f"points of {'short' if short else 'long'} prompts lie {ratio:.2f} times the curve"
        )
