"""Figure 10: as figure 4, for the next two prompts."""

from __future__ import annotations

import pandas as pd

from analyses.figure_04 import draw, last_attention
from analyses.length_panels import length_data
from analyses.script import main, mixed_prompts
from gradvar import Run


def compute(run: Run) -> pd.DataFrame:
    """Return the second and third prompt with more than one reward."""
    return length_data(run, mixed_prompts(run, 2, skip=1), last_attention(run))


if __name__ == "__main__":
    main(__file__, __doc__, compute, draw)
