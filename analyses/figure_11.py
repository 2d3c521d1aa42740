"""Figure 11: deviation against length of one prompt's responses, QKV and MLP of the middle layer."""

from __future__ import annotations

import pandas as pd

from analyses.figure_04 import draw
from analyses.length_panels import length_data
from analyses.script import is_attention, layers, main, mixed_prompts
from gradvar import GradvarError, Run


def middle_layer(run: Run) -> list[str]:
    """Return attention and MLP targets of the measured layer below the last whose MLP was measured too."""
    found = layers(run)
    below = [keys for layer, keys in found.items() if layer < max(found)]
    whole = [keys for keys in below if any(map(is_attention, keys)) and not all(map(is_attention, keys))]
    if not whole:
        raise GradvarError(
            f"{run.path} holds no layer below the last with attention and MLP: "
            f"run `gradvar measure {run.path} --targets middle:qkv,mlp`"
        )
    return whole[len(whole) // 2]


def compute(run: Run) -> pd.DataFrame:
    """Return the first prompt with more than one reward."""
    return length_data(run, mixed_prompts(run, 1), middle_layer(run))


if __name__ == "__main__":
    main(__file__, __doc__, compute, draw)
