"""One function a stage: read the run, call one room, write that stage's files."""

from gradvar.stages.agreement import disagreement, sampler_agreements
from gradvar.stages.audit import audit
from gradvar.stages.check import check
from gradvar.stages.compare import Comparison, compare
from gradvar.stages.estimate import advice, alpha, cv, fit
from gradvar.stages.figures import draw_figures
from gradvar.stages.listener import Listener, Silent
from gradvar.stages.measure import measure
from gradvar.stages.plan import MeasurementPlan, PlannedPrompt, plan_measure
from gradvar.stages.report import report
from gradvar.stages.reward import reward
from gradvar.stages.sample import Preparation, import_rollouts, prepare, sample
from gradvar.stages.targets import targets
from gradvar.stages.whole import demo, run_all

__all__ = [
    "Comparison",
    "Listener",
    "MeasurementPlan",
    "PlannedPrompt",
    "Preparation",
    "Silent",
    "advice",
    "alpha",
    "audit",
    "check",
    "compare",
    "cv",
    "demo",
    "disagreement",
    "draw_figures",
    "fit",
    "import_rollouts",
    "measure",
    "plan_measure",
    "prepare",
    "report",
    "reward",
    "run_all",
    "sample",
    "sampler_agreements",
    "targets",
]
