"""Figure 4: deviation against length of one prompt's responses, attention's Q, K, V of the last measured layer."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analyses.length_panels import draw_lengths, length_data
from analyses.script import is_attention, layers, main, mixed_prompts
from gradvar import GradvarError, Run


def last_attention(run: Run) -> list[str]:
    """Return the attention targets of the last measured layer."""
    found = layers(run)
    chosen = [key for key in found[max(found)] if is_attention(key)] if found else []
    if not chosen:
        raise GradvarError(
            f"{run.path} holds no attention of its last layer: run `gradvar measure {run.path} --targets last:qkv`"
        )
    return chosen


def compute(run: Run) -> pd.DataFrame:
    """Return the first prompt with more than one reward."""
    return length_data(run, mixed_prompts(run, 1), last_attention(run))


def draw(data: pd.DataFrame) -> Figure:
    """Draw a row for the score, a row for the advantage-weighted gradient."""
    return draw_lengths(data, columns=data["target"].nunique())


if __name__ == "__main__":
    main(__file__, __doc__, compute, draw)
