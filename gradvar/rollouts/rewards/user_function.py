"""The user's own reward function, `file.py:name`, in verl's form."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gradvar.errors import GradvarError
from gradvar.runs.records import Prompt, Rollout

DEFAULT_NAME = "compute_score"
"""The function taken where only the file is named, as in verl."""

_FORM = "(data_source, solution_str, ground_truth, extra_info=None)"
_loaded: dict[tuple[Path, str], ModuleType] = {}


@dataclass(frozen=True)
class UserFunction:
    """A function loaded from a file."""

    spec: str
    """`file.py:name`, as the user gave it."""
    call: Callable[..., Any]
    digest: str
    """SHA-256 of the file."""

    def score(self, prompt: Prompt, rollout: Rollout) -> float:
        """Return the reward of one response.

        Raises:
            GradvarError: If the function raises, or returns nothing, NaN, an infinity or anything that is no number.
        """
        try:
            result = self.call(
                data_source=prompt.data_source,
                solution_str=rollout.text,
                ground_truth=prompt.ground_truth,
                extra_info=prompt.extra,
            )
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # math-verify's TimeoutException and SystemExit are no Exceptions
            raise self._error(prompt, rollout, f"raised {_said(error)}") from error
        if isinstance(result, dict):
            if "score" not in result:
                raise self._error(prompt, rollout, f"returned a dict without 'score' (its keys: {list(result)!r:.80})")
            result = result["score"]
        if result is None:
            raise self._error(prompt, rollout, "returned nothing")
        try:
            if isinstance(result, str | bytes | bytearray):
                raise TypeError
            value = float(result)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise self._error(prompt, rollout, f"returned {result!r:.60} ({type(result).__name__})") from error
        if not math.isfinite(value):
            raise self._error(prompt, rollout, f"returned {value}")
        return value

    def _error(self, prompt: Prompt, rollout: Rollout, what: str) -> GradvarError:
        what = " ".join(what.split())
        return GradvarError(
            f"reward function {self.spec}, prompt {prompt.prompt_id}, rollout {rollout.rollout_id}: expected a finite "
            f"number, a bool or a dict with 'score', but it {what}; mend the function and score again"
        )


def load_user_function(spec: str) -> UserFunction:
    """Load `file.py:name` (`file.py` alone means its `compute_score`).

    The file is run once for each of its contents, under a name of its own; its folder is not added to the path.

    Raises:
        GradvarError: If the file is missing or does not run, or has no such function, or the function is
            asynchronous or does not take verl's four arguments by name.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or name.endswith(".py"):
        file, name = spec, DEFAULT_NAME
    path = Path(file).expanduser()
    try:
        source = path.read_bytes()
    except OSError as error:
        raise GradvarError(
            f"reward function {spec}: expected a Python file, received {file!r} ({error.strerror}); "
            "give --reward as file.py:function"
        ) from error
    digest = hashlib.sha256(source).hexdigest()
    module = _module(spec, path.resolve(), digest)
    function = getattr(module, name, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise GradvarError(
            f"reward function {spec}: expected a function {name!r} in {file}, which has {', '.join(public) or 'none'}"
        )
    _check_form(spec, function)
    return UserFunction(spec, function, digest)


def _module(spec: str, path: Path, digest: str) -> ModuleType:
    if (path, digest) in _loaded:
        return _loaded[path, digest]
    name = f"gradvar_user_reward_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    location = importlib.util.spec_from_file_location(name, path)
    if location is None or location.loader is None:
        raise GradvarError(f"reward function {spec}: expected a file that ends in .py, received {path.name!r}")
    module = importlib.util.module_from_spec(location)
    sys.modules[name] = module  # dataclasses and the like look their module up
    try:
        location.loader.exec_module(module)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        del sys.modules[name]
        raise GradvarError(
            f"reward function {spec}: expected a file that can be imported, but running it raised {_said(error)}"
        ) from error
    _loaded[path, digest] = module
    return module


def _check_form(spec: str, function: Callable[..., Any]) -> None:
    if inspect.iscoroutinefunction(function):
        raise GradvarError(f"reward function {spec}: expected a plain function, received an async one")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # something built in: the first call will tell
    try:
        signature.bind(data_source="", solution_str="", ground_truth=None, extra_info=None)
    except TypeError as error:
        raise GradvarError(
            f"reward function {spec}: expected the arguments {_FORM}, received {signature} ({error})"
        ) from error


def _said(error: BaseException) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]}" if message else type(error).__name__
