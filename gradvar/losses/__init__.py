"""The aggregators as torch losses."""

from gradvar.losses.aggregate import aggregate_loss

__all__ = ["aggregate_loss"]
