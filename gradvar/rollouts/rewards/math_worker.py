"""The program of one worker process: math-verify, one JSON line in, one JSON line out.

`worker_pool` runs this file as a script. It stands alone (the standard library and math-verify; nothing of gradvar, no
torch), so it starts in half a second and a caller's `__main__` is never imported again.

In: `{"gold": [text, ...], "response": text or null, "limit": seconds}`; a null response asks whether the gold can be
read. Out: `{"score": 0 or 1}` or `{"unverified": reason}`; first of all `{"ready": true}` or `{"failed": reason}`.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from typing import Any, TextIO

GRACE = 5.0
"""How long after its limit an abandoned check ends itself [seconds]."""


def decide(gold: list[str], response: str | None) -> dict[str, Any]:
    """Return the verdict on one response, or on the gold alone where the response is None."""
    try:
        accepted = [expression for text in gold for expression in _parse_gold(text)]
    except ImportError:
        raise
    except Exception as error:
        return {"unverified": f"math-verify cannot read the ground truth: {_said(error)}"}
    if not accepted:
        return {"unverified": "math-verify finds no expression in the ground truth"}
    if response is None:
        return {"score": 1}
    try:
        answers = _parse_response(response)
    except Exception as error:
        return {"unverified": f"math-verify raised while it read the response: {_said(error)}"}
    return _compare(accepted, answers)


def _parse_gold(text: str) -> list[Any]:
    # As verl does (reward_score/math_verify.py): math-verify reads LaTeX only inside a LaTeX environment.
    from math_verify import LatexExtractionConfig, parse

    if re.fullmatch(r"[A-Za-z]{4,}(?: [A-Za-z]+)*", text.strip()):
        text = "\\text{" + text.strip() + "}"  # else "east" is the product e a s t, and so equals "seat"
    boxed = text if "\\boxed" in text else "\\boxed{" + text + "}"
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    return list(parse(boxed, config, parsing_timeout=None, raise_on_error=True))


def _parse_response(text: str) -> list[Any]:
    """Return what the response answers: in its last `<answer>` if it has one; a box before all else, the last first.

    The rest is math-verify's way: boxes close together make a set, without a box the last formula or number counts.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        text = text[start + len("<answer>") : end]
    config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return list(parse(text, config, parsing_timeout=None, raise_on_error=True))


def _compare(accepted: list[Any], answers: list[Any]) -> dict[str, Any]:
    """Return 1 if any answer equals any accepted expression; texts first, since that costs nothing."""
    from math_verify import verify

    pairs = [(gold, answer) for gold in accepted for answer in answers]
    pairs.sort(key=lambda pair: not (isinstance(pair[0], str) and isinstance(pair[1], str)))
    raised = None
    for gold, answer in pairs:
        try:
            if verify(gold, answer, timeout_seconds=None, raise_on_error=True):
                return {"score": 1}
        except Exception as error:
            raised = raised or _said(error)
    if raised:
        return {"unverified": f"math-verify raised while it compared: {raised}"}
    return {"score": 0}


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _send(channel: TextIO, message: dict[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def main() -> None:
    """Answer tasks until standard input ends."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # ANTLR prints to standard output
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the parent may have ignored or blocked it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    try:
        decide(["1"], r"$\frac{1}{2}$, \boxed{1}")  # imports and compiles what no deadline should pay for
    except Exception as error:
        _send(channel, {"failed": _said(error)})
        return
    _send(channel, {"ready": True})
    for line in sys.stdin:
        task = json.loads(line)
        # The parent kills at the limit. Should it be gone, the alarm's default action ends even C code that never
        # returns to the interpreter. (math-verify's own timeouts, Python handlers of this signal, are off.)
        signal.setitimer(signal.ITIMER_REAL, task["limit"] + GRACE)
        verdict = decide(task["gold"], task["response"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(channel, verdict)


if __name__ == "__main__":
    main()
