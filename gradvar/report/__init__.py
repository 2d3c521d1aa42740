"""Numbers and figures to one self-contained HTML file."""

from gradvar.report.records import Cell, Finding, Material, PromptSample, Response, Section, Table
from gradvar.report.render import render_report

__all__ = ["Cell", "Finding", "Material", "PromptSample", "Response", "Section", "Table", "render_report"]
