"""The bundled CountDown problems and policy, and how they are made. Loads neither torch nor transformers."""

from pathlib import Path

from gradvar.demo.countdown import (
    CountdownProblem,
    check_answer,
    evaluate_expression,
    extract_answer,
    generate_problems,
    tinyzero_problems,
)


def policy_path() -> Path:
    """Returns the folder of the bundled policy: config, weights, tokenizer and card."""
    return Path(__file__).parent / "policy"


def problems_path() -> Path:
    """Returns the JSON lines file of held-out problems: `nums` and `target`."""
    return Path(__file__).parent / "problems.jsonl"


def template_path() -> Path:
    """Returns the prompt template, with {nums} (joined by one space) and {target}."""
    return Path(__file__).parent / "template.txt"


__all__ = [
    # CountDown
    "CountdownProblem",
    "check_answer",
    "evaluate_expression",
    "extract_answer",
    "generate_problems",
    "tinyzero_problems",
    # Bundled files
    "policy_path",
    "problems_path",
    "template_path",
]
