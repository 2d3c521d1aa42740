"""Arrays to numbers: everything that follows from a score Gram, rewards and lengths. Never imports torch."""

from gradvar.estimators.advantages import ADVANTAGES, advantages
from gradvar.estimators.advice import recommendation
from gradvar.estimators.aggregation import RULES, Rule, aggregation_weights, find_rule, register_rule
from gradvar.estimators.alpha_tables import alpha_table
from gradvar.estimators.audit import audit_table
from gradvar.estimators.comparison import compare_table
from gradvar.estimators.cv import aggregator_cv, aggregator_rho, cv_from_rho
from gradvar.estimators.cv_tables import cv_table
from gradvar.estimators.extras import extras_table
from gradvar.estimators.forms import conditional_cv, form_table, total_cv_form, total_form
from gradvar.estimators.identity import IdentityCheck, score_identity
from gradvar.estimators.identity_tables import identity_table
from gradvar.estimators.law import VarianceLaw, fit_variance_law
from gradvar.estimators.law_estimates import FamilyFit
from gradvar.estimators.law_tables import law_table
from gradvar.estimators.noise_scale import noise_scale_table
from gradvar.estimators.planning import parse_variant, planning_table
from gradvar.estimators.prefixes import PrefixGrowth, prefix_growth, prefix_table
from gradvar.estimators.proxies import proxy_table
from gradvar.estimators.ratios import cv_ratio
from gradvar.estimators.shares import variance_share_table
from gradvar.estimators.spread import deviations, within_length_variance
from gradvar.estimators.token_covariance import TokenShare, token_covariance
from gradvar.estimators.transforms import authors_vl_norm, overlong_penalty, soft_overlong

__all__ = [
    # per response
    "ADVANTAGES",
    "advantages",
    "deviations",
    "within_length_variance",
    # aggregation
    "RULES",
    "Rule",
    "aggregation_weights",
    "find_rule",
    "register_rule",
    # the variance law
    "FamilyFit",
    "VarianceLaw",
    "fit_variance_law",
    # coefficient of variation
    "aggregator_cv",
    "aggregator_rho",
    "cv_from_rho",
    "cv_ratio",
    "conditional_cv",
    # DAPO's extras, the VL Norm authors' form
    "authors_vl_norm",
    "overlong_penalty",
    "soft_overlong",
    # assumptions
    "IdentityCheck",
    "score_identity",
    "TokenShare",
    "token_covariance",
    "PrefixGrowth",
    "prefix_growth",
    # tables
    "alpha_table",
    "audit_table",
    "compare_table",
    "cv_table",
    "extras_table",
    "form_table",
    "identity_table",
    "law_table",
    "noise_scale_table",
    "parse_variant",
    "planning_table",
    "prefix_table",
    "proxy_table",
    "recommendation",
    "total_cv_form",
    "total_form",
    "variance_share_table",
]
