"""Numbers to matplotlib axes."""

from gradvar.figures.aggregators import plot_aggregator_cv, plot_alpha_curve, rule_label
from gradvar.figures.length_law import plot_length_law
from gradvar.figures.style import panels, save, style

__all__ = ["panels", "plot_aggregator_cv", "plot_alpha_curve", "plot_length_law", "rule_label", "save", "style"]
