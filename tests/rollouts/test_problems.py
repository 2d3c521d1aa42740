import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from gradvar.errors import GradvarError
from gradvar.rollouts.problems import read_problems, select_problems

VERL = [
    {
        "data_source": "lighteval/MATH",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"split": "train", "index": 0},
    },
    {
        "data_source": "lighteval/MATH",
        "prompt": [{"role": "user", "content": "2+2?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"split": "train", "index": 1},
    },
]
ORZ = [
    [{"from": "human", "value": "1+1?"}, {"from": "assistant", "ground_truth": {"value": "2"}}],
    [{"value": "2+2?"}, {"ground_truth": {"value": "4"}}],
]
GSM8K = [{"question": "Tom has 1000 eggs and 3 more?", "answer": "1000+3 = <<1000+3=1003>>1003\n#### 1,003"}]
MATH = [{"problem": "$1+1$?", "solution": "...", "answer": "2", "subject": "Algebra", "level": 1, "unique_id": "a/1"}]
COUNTDOWN = [{"nums": [19, 36, 55, 7], "target": 65}, {"nums": [1, 2], "target": 3}]


def write(folder, rows, suffix, name="problems"):
    path = folder / f"{name}{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    return path


def refused(path, match, **options):
    with pytest.raises(GradvarError, match=match) as caught:
        read_problems(path, **options)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_verl_with_message_lists(tmp_path, suffix):
    read = read_problems(write(tmp_path, VERL, suffix))
    assert read.schema == "verl"
    first, second = read.problems
    assert first.question == VERL[0]["prompt"], "message lists come out of parquet as plain lists of dicts"
    assert (second.row, second.ground_truth, second.data_source) == (1, "4", "lighteval/MATH")
    assert second.extra == {"split": "train", "index": 1}


def test_verl_with_plain_prompt_and_a_dict_as_truth(tmp_path):
    rows = [
        {
            "data_source": "countdown",
            "prompt": "Using the numbers ...",
            "reward_model": {"style": "rule", "ground_truth": {"target": 65, "numbers": [19, 36, 55, 7]}},
        }
    ]
    (problem,) = read_problems(write(tmp_path, rows, ".parquet")).problems
    assert problem.question == "Using the numbers ..."
    assert problem.ground_truth == {"target": 65, "numbers": [19, 36, 55, 7]}
    assert problem.fields["nums"] == [19, 36, 55, 7]
    assert problem.extra is None


def test_numpy_arrays_in_parquet_become_lists(tmp_path):
    path = tmp_path / "p.parquet"
    pd.DataFrame({"nums": [np.array([3, 4])], "target": np.array([7])}).to_parquet(path)
    (problem,) = read_problems(path).problems
    json.dumps([problem.ground_truth, problem.fields])
    assert problem.ground_truth == {"target": 7, "numbers": [3, 4]}


def test_open_reasoner_zero(tmp_path):
    read = read_problems(write(tmp_path, ORZ, ".json"))
    assert read.schema == "Open-Reasoner-Zero"
    assert [(p.question, p.ground_truth) for p in read.problems] == [("1+1?", "2"), ("2+2?", "4")]
    assert read.problems[0].data_source == "Open-Reasoner-Zero"


def test_open_reasoner_zero_evaluation_file(tmp_path):
    rows = [{"prompt": [{"from": "user", "value": "1+1?"}], "final_answer": "2", "file_name": "math500"}]
    (problem,) = read_problems(write(tmp_path, rows, ".json")).problems
    assert (problem.question, problem.ground_truth) == ("1+1?", "2")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".csv"])
def test_countdown(tmp_path, suffix):
    read = read_problems(write(tmp_path, COUNTDOWN, suffix))
    assert read.schema == "CountDown"
    first = read.problems[0]
    assert first.ground_truth == {"target": 65, "numbers": [19, 36, 55, 7]}
    assert first.data_source == "countdown"
    assert first.question.startswith("Using the numbers [19, 36, 55, 7], create an equation that equals 65. You can")
    assert (first.fields["nums"], first.fields["target"]) == ([19, 36, 55, 7], 65)


@pytest.mark.parametrize("text", ["19 36 55 7", "[19 36 55 7]", "19, 36, 55, 7"])
def test_countdown_numbers_as_text(tmp_path, text):
    (problem,) = read_problems(write(tmp_path, [{"numbers": text, "target": "65"}], ".csv")).problems
    assert problem.ground_truth == {"target": 65, "numbers": [19, 36, 55, 7]}


def test_gsm8k(tmp_path):
    read = read_problems(write(tmp_path, GSM8K, ".jsonl"))
    assert read.schema == "GSM8K"
    (problem,) = read.problems
    assert (problem.ground_truth, problem.data_source) == ("1003", "openai/gsm8k")
    assert problem.extra == GSM8K[0]
    refused(
        write(tmp_path, [*GSM8K, {"question": "?", "answer": "seven"}], ".jsonl"),
        r"row 1 .*no final number after ####",
    )


def test_math500(tmp_path):
    read = read_problems(write(tmp_path, MATH, ".jsonl"))
    assert read.schema == "MATH-500"
    (problem,) = read.problems
    assert (problem.question, problem.ground_truth) == ("$1+1$?", "2")
    assert problem.data_source == "HuggingFaceH4/MATH-500"
    assert problem.extra["unique_id"] == "a/1"


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".csv"])
def test_plain_prompts(tmp_path, suffix):
    rows = [{"prompt": 'Say "a,b"\nand stop', "answer": "[1, 2]"}]
    read = read_problems(write(tmp_path, rows, suffix))
    assert read.schema == "plain prompts"
    (problem,) = read.problems
    assert (problem.question, problem.ground_truth) == ('Say "a,b"\nand stop', "[1, 2]")
    assert problem.data_source == "unknown"


def test_plain_prompts_need_no_answer_and_keep_their_source(tmp_path):
    (problem,) = read_problems(write(tmp_path, [{"prompt": "Hi", "data_source": "mine"}], ".jsonl")).problems
    assert (problem.ground_truth, problem.data_source) == (None, "mine")
    read = read_problems(write(tmp_path, [{"question": "Hi", "answer": 3}], ".jsonl"))
    assert (read.schema, read.problems[0].ground_truth) == ("plain prompts", 3)


def test_named_columns(tmp_path):
    path = write(tmp_path, [{"ask": "1+1?", "gold": "2", "other": "x"}], ".csv")
    read = read_problems(path, prompt_column="ask", answer_column="gold")
    assert read.schema == "own columns (prompt from 'ask', answer from 'gold')"
    assert (read.problems[0].question, read.problems[0].ground_truth) == ("1+1?", "2")
    assert read_problems(path, prompt_column="ask").problems[0].ground_truth is None
    refused(
        path, "--prompt-column 'asks' is not a column; the file has the columns ask, gold, other", prompt_column="asks"
    )
    refused(path, "--answer-column 'x' is not a column", prompt_column="ask", answer_column="x")


def test_named_prompt_column_keeps_the_known_answer(tmp_path):
    path = write(tmp_path, [{**MATH[0], "harder": "$2+2$?"}], ".jsonl")
    (problem,) = read_problems(path, prompt_column="harder").problems
    assert (problem.question, problem.ground_truth) == ("$2+2$?", "2")


def test_a_json_file_of_lines_is_read_as_lines(tmp_path):
    path = tmp_path / "lines.json"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert [problem.question for problem in read_problems(path).problems] == ["a", "b"]
    path.write_text('{"prompt": "only"}')
    assert [problem.question for problem in read_problems(path).problems] == ["only"]


def test_byte_order_mark_blank_lines_and_line_separators(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '\n{"prompt": "a\u2028b"}\r\n\n'.encode())
    assert read_problems(path).problems[0].question == "a\u2028b"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_empty_files(tmp_path, suffix):
    path = tmp_path / f"p{suffix}"
    if suffix == ".parquet":
        pd.DataFrame({"prompt": []}).to_parquet(path)
    else:
        path.write_text("prompt\n" if suffix == ".csv" else "\n")
    refused(path, "the file is empty")


def test_files_that_are_none(tmp_path):
    refused(tmp_path / "no.jsonl", "no such file; expected a file ending in .jsonl, .json, .parquet or .csv")
    refused(tmp_path, "this is a folder")
    (tmp_path / "p.txt").write_text("x")
    refused(tmp_path / "p.txt", "the suffix '.txt' is not known")
    (tmp_path / "p.parquet").write_text("x")
    refused(tmp_path / "p.parquet", "expected a parquet file")


def test_unknown_columns_are_listed_with_the_known(tmp_path):
    path = write(tmp_path, [{"foo": 1, "bar": 2}], ".jsonl")
    refused(path, r"the columns foo, bar; known are prompt, reward_model \(verl\).*nums, target.*--prompt-column")


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"prompt": "a"}, {"prompt": None}], r"row 1 \(the first is 0\): the prompt is null or empty"),
        ([{"prompt": "a"}, {"prompt": ""}], "row 1 .*the prompt is null"),
        ([{"prompt": "a"}, {"other": "b"}], "row 1 .*the prompt is null"),
        ([{"prompt": []}], "row 0 .*the prompt is null or empty"),
        ([{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": None}], "row 1 .*the answer is null"),
        ([MATH[0], {**MATH[0], "answer": None}], "row 1 .*the answer is null"),
        ([GSM8K[0], {**GSM8K[0], "answer": None}], "row 1 .*the answer is null"),
        ([COUNTDOWN[0], {"nums": [1], "target": None}], r"row 1 .*the answer \(target\) is null"),
        ([COUNTDOWN[0], {"nums": None, "target": 1}], r"row 1 .*the prompt \(nums\) is null"),
        ([{"nums": [1.5], "target": 1}], "row 0 .*nums: expected a whole number, received 1.5"),
        ([{"nums": [], "target": 1}], "row 0 .*nums: expected a list of whole numbers"),
        ([{**VERL[0], "reward_model": {"style": "rule", "ground_truth": None}}], "row 0 .*the answer is null"),
        ([{**VERL[0], "reward_model": None}], "row 0 .*the answer is null"),
        ([{"prompt": [{"role": "user"}]}], "row 0 .*no role or no content"),
        ([{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}], "row 0 .*content is not text"),
        ([{"prompt": 7}], "row 0 .*neither text nor a list of messages"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, rows, match):
    refused(write(tmp_path, rows, ".jsonl"), match)


def test_null_answers_in_parquet_and_csv(tmp_path):
    rows = [{"prompt": "a", "answer": 1.0}, {"prompt": "b", "answer": float("nan")}]
    for suffix in (".parquet", ".csv"):
        refused(write(tmp_path, rows, suffix), "row 1 .*the answer is null")


def test_named_answer_column_with_null(tmp_path):
    path = write(tmp_path, [{"ask": "a", "gold": None}], ".jsonl")
    refused(path, r"row 0 .*the answer \(column 'gold'\) is null", prompt_column="ask", answer_column="gold")


def test_not_utf8(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9t\xe9"}\n')
    refused(path, "line 2: expected UTF-8, received the byte 0xe9")


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: broken JSON"),
        ("p.jsonl", '{"prompt": "a"}\n[1]\n', "line 2: expected a JSON object, received a list"),
        ("p.jsonl", "[" * 100_000, "line 1: broken JSON: nested too deeply"),
        ("p.json", '[{"prompt": "a"},\n{"prompt" "b"}]', "line 2: broken JSON"),
        ("p.json", '{"prompt": "a"}\n{"prompt": \n', "line 2: broken JSON"),
        ("p.json", '"text"', "expected a JSON list of rows, received text"),
        ("p.json", "[1, 2]", "row 0: expected an object with named columns"),
        ("p.json", '[[{"value": "a"}]]', "row 0 .*ground_truth"),
        ("p.csv", "prompt,answer\na,1\nb\n", "line 3: expected 2 cells, received fewer"),
        ("p.csv", "prompt,answer\na,1,2\n", "line 2: expected 2 cells, received more"),
        ("p.csv", 'prompt,answer\n"a"b,1\n', "line 2: broken csv"),
        ("p.csv", "prompt,answer,prompt\na,1,b\n", "different names of columns, received 'prompt' twice"),
        ("p.csv", "prompt,answer\na\0b,1\n", "line 2: expected text, received a NUL byte"),
    ],
)
def test_broken_files_name_the_line(tmp_path, name, text, match):
    path = tmp_path / name
    path.write_text(text)
    refused(path, match)


def test_data_is_not_executed_and_not_formatted(tmp_path):
    (problem,) = read_problems(write(tmp_path, [{"prompt": "{0.__class__} __import__('os')"}], ".jsonl")).problems
    assert problem.question == "{0.__class__} __import__('os')"


def test_choice_grows_and_keeps(tmp_path):
    problems = read_problems(write(tmp_path, [{"prompt": str(i)} for i in range(30)], ".jsonl")).problems

    def choose(count, seed=1):
        return [p.row for p in select_problems(problems, n_prompts=count, rng=np.random.default_rng(seed))]

    assert choose(12)[:5] == choose(5)
    assert len(set(choose(30))) == 30
    assert choose(5) != choose(5, seed=2)
    assert [p.row for p in select_problems(problems, rng=np.random.default_rng(0))] == list(range(30))
    named = select_problems(problems, prompt_ids=["7", "3"], rng=np.random.default_rng(0))
    assert [p.row for p in named] == [7, 3]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_prompts": 4}, "the file has 3 problems; give a number from 1 to 3"),
        ({"n_prompts": 0}, "a number from 1 to 3"),
        ({"prompt_ids": ["1", "9"]}, "prompt id '9' is not in the file: expected row numbers from 0 to 2"),
        ({"prompt_ids": ["1", "1"]}, "given twice"),
        ({"prompt_ids": ["1"], "n_prompts": 1}, "give one of them"),
    ],
)
def test_choices_that_cannot_be_made(tmp_path, options, match):
    problems = read_problems(write(tmp_path, [{"prompt": str(i)} for i in range(3)], ".jsonl")).problems
    with pytest.raises(GradvarError, match=match):
        select_problems(problems, rng=np.random.default_rng(0), **options)


def test_reading_problems_loads_no_torch():
    code = (
        "import sys, gradvar.rollouts.problems, gradvar.rollouts.schemas, gradvar.rollouts.templates, "
        "gradvar.rollouts.imports, gradvar.rollouts.engines; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'vllm')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
