"""The bundled CountDown problems and policy, and how they are made. Loads neither torch nor transformers."""

from gradvar.demo.countdown import (
    CountdownProblem,
    check_answer,
    evaluate_expression,
    extract_answer,
    generate_problems,
    tinyzero_problems,
)

__all__ = [
    # CountDown
    "CountdownProblem",
    "check_answer",
    "evaluate_expression",
    "extract_answer",
    "generate_problems",
    "tinyzero_problems",
]
