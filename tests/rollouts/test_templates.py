import numpy as np
import pytest
from tokenizers import processors

from gradvar.errors import GradvarError
from gradvar.rollouts.problems import Problem
from gradvar.rollouts.schemas import countdown_question
from gradvar.rollouts.templates import build_prompts, resolve_template
from tests.rollouts.tiny import make_tokenizer

CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASCII = [chr(code) for code in range(32, 127)] + ["\n"]


def ascii_tokenizer(chat_template=None, bos=False, end_after=False):
    tokenizer = make_tokenizer(["<end>", "<bos>", *ASCII], bos_token="<bos>")
    tokenizer.chat_template = chat_template
    if bos:
        single = "<bos> $A <end>" if end_after else "<bos> $A"
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<bos>", 1), ("<end>", 0)]
        )
    return tokenizer


def problem(question="1+1?", row=3, **fields):
    return Problem(row=row, question=question, data_source="x", ground_truth="2", fields=fields)


def countdown_problem():
    return problem(countdown_question([19, 36, 55, 7], 65), nums=[19, 36, 55, 7], target=65)


def render(name, one=None, tokenizer=None):
    return resolve_template(str(name), tokenizer or ascii_tokenizer()).render(one or problem())


def test_chat_template_with_generation_prompt():
    tokenizer = ascii_tokenizer(CHAT)
    assert render("chat", tokenizer=tokenizer) == "<user>1+1?<assistant>"
    conversation = problem([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    assert render("chat", conversation, tokenizer) == "<system>S<user>U<assistant>"
    assert resolve_template("auto", tokenizer).name == "chat"


def test_chat_template_that_is_missing_or_refuses():
    with pytest.raises(GradvarError, match="this tokenizer has no chat template"):
        resolve_template("chat", ascii_tokenizer())
    with pytest.raises(GradvarError, match="prompt 3: the tokenizer's chat template refused it: no system"):
        render("chat", tokenizer=ascii_tokenizer("{{ raise_exception('no system') }}"))


def test_countdown_is_tinyzeros_base_template():
    text = render("countdown", countdown_problem())
    assert text.startswith(
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it."
    )
    assert "\nUser: Using the numbers [19, 36, 55, 7], create an equation that equals 65." in text
    assert text.endswith(
        "for example <answer> (1 + 2) / 3 </answer>.\nAssistant: Let me solve this step by step.\n<think>"
    )
    with pytest.raises(GradvarError, match="prompt 3: the countdown template needs the columns nums and target"):
        render("countdown")


def test_orz_template():
    text = render("orz", problem("What is {x}?"))
    assert text.startswith("A conversation between User and Assistant. The User asks")
    assert text.endswith("by the \\boxed{} tag.\nThis is the problem:\nWhat is {x}?\nAssistant: <think>")


def test_auto_without_chat_template():
    assert render("auto") == "1+1?"
    assert render("auto", countdown_problem()) == render("countdown", countdown_problem())
    worded_already = problem("Using the numbers ... <think>", nums=[1, 2], target=3)
    assert render("auto", worded_already) == "Using the numbers ... <think>"


def test_none_takes_one_message_and_refuses_conversations():
    assert render("none", problem([{"role": "user", "content": "U"}])) == "U"
    with pytest.raises(GradvarError, match="conversation of 2 messages"):
        render("none", problem([{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]))


def test_template_file(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("{nums} -> {target}: \\boxed{} {{nums}} { x } {question}\nGo\n")
    text = render(path, problem("a {target} b", nums=[19, 36], target=65))
    assert text == "19 36 -> 65: \\boxed{} {nums} { x } a {target} b\nGo\n", "data is never read as a template"
    assert resolve_template(str(path), None).name == str(path)


def test_template_files_never_reach_attributes(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("{question} {question.__class__} {0} {question!r}")
    assert render(path, problem("q")) == "q {question.__class__} {0} {question!r}"


def test_template_files_that_cannot_be_used(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("{question} {numbers}")
    with pytest.raises(GradvarError, match=r"\{numbers\} is not known for prompt 3; known are \{question\}, \{nums\}"):
        render(path, problem(nums=[1]))
    path.write_text("{{question}}")
    with pytest.raises(GradvarError, match="no placeholder found"):
        render(path)
    path.write_bytes(b"{question} \xff")
    with pytest.raises(GradvarError, match="expected UTF-8"):
        render(path)
    with pytest.raises(GradvarError, match="neither a file nor one of auto, chat, none, countdown, orz"):
        render("countdwon")
    with pytest.raises(GradvarError, match="cannot be read"):
        render(tmp_path)


def build(template, tokenizer, problems=None, max_positions=100, max_tokens=10):
    problems = [problem()] if problems is None else problems
    return build_prompts(
        problems, resolve_template(template, tokenizer), tokenizer, max_positions=max_positions, max_tokens=max_tokens
    )


def test_prompts_carry_everything():
    (prompt,) = build("none", ascii_tokenizer())
    assert (prompt.prompt_id, prompt.text, prompt.ground_truth) == ("3", "1+1?", "2")
    assert prompt.token_ids == tuple(2 + ord(c) - 32 for c in "1+1?")


def test_bos_is_there_exactly_once():
    with_bos = ascii_tokenizer(bos=True)
    assert build("none", with_bos)[0].token_ids[0] == 1
    assert build("none", ascii_tokenizer())[0].token_ids[0] != 1
    chat = ascii_tokenizer("<bos>" + CHAT, bos=True)
    assert build("chat", chat)[0].token_ids.count(1) == 1
    written = build("none", with_bos, [problem("<bos>1+1?")])[0]
    assert written.token_ids.count(1) == 1


def test_no_end_token_after_the_prompt():
    token_ids = build("none", ascii_tokenizer(bos=True, end_after=True))[0].token_ids
    assert token_ids[0] == 1
    assert 0 not in token_ids


def test_prompts_that_do_not_fit():
    tokenizer = ascii_tokenizer()
    problems = [problem("a" * 5, row=0), problem("a" * 20, row=8)]
    assert len(build("none", tokenizer, problems, max_positions=30, max_tokens=10)) == 2
    with pytest.raises(GradvarError, match="prompt 8 has 20 tokens and the model's context 20"):
        build("none", tokenizer, problems, max_positions=20)
    with pytest.raises(GradvarError, match=r"--max-tokens 11 does not fit: prompt 8 .*at most --max-tokens 10"):
        build("none", tokenizer, problems, max_positions=30, max_tokens=11)
    assert len(build("none", tokenizer, problems, max_positions=None, max_tokens=10**9)) == 2
    with pytest.raises(GradvarError, match=r"prompt 3: .* makes no tokens"):
        build("none", tokenizer, [problem("")])


def test_real_bpe_chat_prompt_is_what_transformers_makes():
    tokenizer = ascii_tokenizer(CHAT, bos=True)
    messages = [{"role": "user", "content": "1+1?"}]
    exact = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    np.testing.assert_array_equal(build("chat", tokenizer)[0].token_ids, exact)
