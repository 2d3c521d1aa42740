"""From a problem to the exact text and token ids the model is fed.

A template is the tokenizer's chat template, nothing, a named text, or a file whose placeholders are replaced literally:
`{question}`, and every column of the problem's row, such as `{nums}` and `{target}`. Data is put in once and never read
again as a template, so braces in a problem survive and nothing in it is executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradvar.errors import GradvarError
from gradvar.rollouts.problems import Problem
from gradvar.rollouts.schemas import countdown_question
from gradvar.runs.records import Prompt

TEMPLATE_NAMES = ("auto", "chat", "none", "countdown", "orz")
"""Templates known by name; anything else is the path of a template file."""

_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}|\{([A-Za-z_]\w*)\}")

_COUNTDOWN_HEAD = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer.\nUser: "
)
_COUNTDOWN_TAIL = "\nAssistant: Let me solve this step by step.\n<think>"

_ORZ_HEAD = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant "
    "first thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning "
    "process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: You must put your answer "
    "inside <answer> </answer> tags, i.e., <answer> answer here </answer>. And your final answer will be extracted "
    "automatically by the \\boxed{} tag.\nThis is the problem:\n"
)
_ORZ_TAIL = "\nAssistant: <think>"


@dataclass(frozen=True, kw_only=True)
class Template:
    """A way from problem to text."""

    name: str
    """For people and provenance: a name of `TEMPLATE_NAMES` or the file's path; never "auto" where it means "chat"."""
    render: Callable[[Problem], str]
    """The text for one problem."""
    add_special_tokens: bool = True
    """Whether the tokenizer adds its own tokens (BOS) to that text; a chat template has written them already."""


def resolve_template(name_or_path: str, tokenizer: Any) -> Template:
    """Returns the template of that name, or the one in that file.

    `chat` is the tokenizer's chat template with the generation prompt; `none` the question alone; `countdown` the base
    template of TinyZero, which writes the numbers as `[19, 36, 55, 7]`; `orz` the template of Open-Reasoner-Zero.
    `auto` is `chat` where the tokenizer has a chat template, else `countdown` for CountDown problems that come as
    numbers and target, else `none`. In a file, `{question}` and `{column}` are replaced literally; lists of numbers are
    joined by single spaces (`19 36 55 7`); `{{name}}` stands for a literal `{name}`; every other brace is itself.
    A newline at the file's end is part of the prompt like any other.

    Args:
        name_or_path: A name of `TEMPLATE_NAMES`, or a path.
        tokenizer: The model's tokenizer.

    Returns:
        The template.

    Raises:
        GradvarError: Neither a known name nor a file, a tokenizer without chat template, or a file without placeholder.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if name_or_path == "chat" or (name_or_path == "auto" and has_chat):
        if not has_chat:
            raise GradvarError(
                "--template chat: this tokenizer has no chat template; use none, countdown, orz or a template file"
            )
        return Template(name="chat", render=_chat_renderer(tokenizer), add_special_tokens=False)
    if name_or_path == "auto":
        return Template(name="none, or countdown where the problems are numbers and target", render=_render_bare)
    if name_or_path == "none":
        return Template(name="none", render=_single_text)
    if name_or_path == "countdown":
        return Template(name="countdown", render=_render_countdown)
    if name_or_path == "orz":
        return Template(name="orz", render=lambda problem: _ORZ_HEAD + _single_text(problem) + _ORZ_TAIL)
    return Template(name=name_or_path, render=_file_renderer(Path(name_or_path)))


def build_prompts(
    problems: Sequence[Problem], template: Template, tokenizer: Any, *, max_positions: int | None, max_tokens: int
) -> list[Prompt]:
    """Returns each problem's prompt: its text and the token ids that the tokenizer makes of it.

    Args:
        problems: Chosen problems.
        template: What `resolve_template` returned.
        tokenizer: The model's tokenizer.
        max_positions: The model's context length [tokens]; None where it has none.
        max_tokens: Longest response that will be asked for [tokens].

    Returns:
        One prompt a problem, in order; prompt_id is the row number as text.

    Raises:
        GradvarError: A prompt is empty or longer than the context (which one), or `max_tokens` more do not fit.
    """
    prompts = [_build_prompt(problem, template, tokenizer) for problem in problems]
    if max_positions is None or not prompts:
        return prompts
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    size = len(longest.token_ids)
    if size >= max_positions:
        raise GradvarError(
            f"prompt {longest.prompt_id} has {size} tokens and the model's context {max_positions}, which leaves no "
            "room for a response; leave that prompt out"
        )
    if size + max_tokens > max_positions:
        raise GradvarError(
            f"--max-tokens {max_tokens} does not fit: prompt {longest.prompt_id} has {size} tokens and the model's "
            f"context {max_positions}; give at most --max-tokens {max_positions - size}"
        )
    return prompts


def encode(text: str, tokenizer: Any, *, add_special_tokens: bool) -> list[int]:
    """Returns the token ids of a prompt's text.

    With special tokens it is what the tokenizer makes of the text, with two repairs: a BOS that the text already begins
    with is not doubled, and nothing (an EOS) is put after the text, since the response goes there.
    """
    bare = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    bos = getattr(tokenizer, "bos_token", None)
    if not add_special_tokens or (bos and text.startswith(bos)):
        return bare
    full = list(tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[: start + len(bare)]
    return full


def _build_prompt(problem: Problem, template: Template, tokenizer: Any) -> Prompt:
    text = template.render(problem)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise GradvarError(
            f"prompt {problem.row}: its text is not valid Unicode (lone surrogate at character {error.start}); mend it"
        ) from error
    token_ids = encode(text, tokenizer, add_special_tokens=template.add_special_tokens)
    if not token_ids:
        raise GradvarError(f"prompt {problem.row}: the template {template.name!r} makes no tokens of it; it is empty")
    return Prompt(
        prompt_id=str(problem.row),
        text=text,
        token_ids=tuple(token_ids),
        data_source=problem.data_source,
        ground_truth=problem.ground_truth,
        extra=problem.extra,
    )


def _chat_renderer(tokenizer: Any) -> Callable[[Problem], str]:
    def render(problem: Problem) -> str:
        question = problem.question
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever the template's own jinja code raises
            reason = str(error).split("\n")[0]
            raise GradvarError(f"prompt {problem.row}: the tokenizer's chat template refused it: {reason}") from error
        return str(text)

    return render


def _single_text(problem: Problem) -> str:
    if isinstance(problem.question, str):
        return problem.question
    if len(problem.question) == 1:
        return problem.question[0]["content"]
    raise GradvarError(
        f"prompt {problem.row} is a conversation of {len(problem.question)} messages, which only a chat template "
        "can write; give --template chat and a model whose tokenizer has one"
    )


def _countdown_numbers(problem: Problem) -> tuple[list[int], int] | None:
    nums, target = problem.fields.get("nums"), problem.fields.get("target")
    return (nums, target) if isinstance(nums, list) and isinstance(target, int) else None


def _render_countdown(problem: Problem) -> str:
    numbers = _countdown_numbers(problem)
    if numbers is None:
        raise GradvarError(
            f"prompt {problem.row}: the countdown template needs the columns nums and target; "
            f"received {', '.join(problem.fields) or 'none'}"
        )
    return _COUNTDOWN_HEAD + countdown_question(*numbers) + _COUNTDOWN_TAIL


def _render_bare(problem: Problem) -> str:
    numbers = _countdown_numbers(problem)
    # A verl file of CountDown problems has its wording in the prompt already; a plain one has what we worded.
    if numbers is not None and problem.question == countdown_question(*numbers):
        return _render_countdown(problem)
    return _single_text(problem)


def _file_renderer(path: Path) -> Callable[[Problem], str]:
    try:
        template = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except FileNotFoundError as error:
        raise GradvarError(
            f"--template {str(path)!r} is neither a file nor one of {', '.join(TEMPLATE_NAMES)}"
        ) from error
    except OSError as error:
        raise GradvarError(f"--template {path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise GradvarError(f"--template {path}: expected UTF-8; save the file as UTF-8") from error
    if not any(match.group(2) for match in _PLACEHOLDER.finditer(template)):
        raise GradvarError(f"--template {path}: no placeholder found; put {{question}} where the problem belongs")

    def render(problem: Problem) -> str:
        def value(match: re.Match[str]) -> str:
            literal, name = match.groups()
            if literal is not None:
                return f"{{{literal}}}"
            if name == "question":
                return _single_text(problem)
            if name not in problem.fields:
                known = ", ".join(f"{{{field}}}" for field in dict.fromkeys(["question", *problem.fields]))
                raise GradvarError(
                    f"--template {path}: {{{name}}} is not known for prompt {problem.row}; known are {known}; "
                    f"a literal {{{name}}} is written {{{{{name}}}}}"
                )
            field = problem.fields[name]
            return " ".join(str(item) for item in field) if isinstance(field, list) else str(field)

        return _PLACEHOLDER.sub(value, template)

    return render
