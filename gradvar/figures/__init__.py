"""Numbers to matplotlib axes."""

from gradvar.figures.aggregators import (
    FORMS,
    plot_aggregator_cv,
    plot_alpha_curve,
    plot_bias_noise,
    plot_cv_forms,
    plot_efficiency,
    plot_pressure,
    rule_label,
)
from gradvar.figures.assumptions import ASSUMPTIONS, plot_audit, plot_prefix_curves, plot_token_covariance
from gradvar.figures.atlas import layer_and_projection, plot_atlas
from gradvar.figures.estimates import plot_estimates
from gradvar.figures.exponents import plot_exponents
from gradvar.figures.length_law import plot_length_law
from gradvar.figures.planning import plot_group_size
from gradvar.figures.responses import plot_lengths, plot_log_probs, plot_prompts, plot_rewards
from gradvar.figures.sheets import Drawing, NotDrawn, Panel, compose, tall
from gradvar.figures.style import panels, save, style

__all__ = [
    # look, sheets, files
    "Drawing",
    "NotDrawn",
    "Panel",
    "compose",
    "panels",
    "save",
    "style",
    "tall",
    # variance and length
    "layer_and_projection",
    "plot_atlas",
    "plot_exponents",
    "plot_length_law",
    # aggregators
    "FORMS",
    "plot_aggregator_cv",
    "plot_alpha_curve",
    "plot_bias_noise",
    "plot_cv_forms",
    "plot_efficiency",
    "plot_group_size",
    "plot_pressure",
    "rule_label",
    # assumptions
    "ASSUMPTIONS",
    "plot_audit",
    "plot_prefix_curves",
    "plot_token_covariance",
    # responses
    "plot_lengths",
    "plot_log_probs",
    "plot_prompts",
    "plot_rewards",
    # any estimates
    "plot_estimates",
]
