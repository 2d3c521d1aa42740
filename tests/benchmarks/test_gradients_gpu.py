"""The GPU benchmark's logic, on the CPU with a tiny shape."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import gradients_gpu as gpu
from gradvar.gradients import measure_scores
from gradvar.gradients import passes as engine


def test_a_tiny_run_on_the_cpu(tmp_path, capsys):
    backward = engine._backward
    assert gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "page.md")]) == 0
    assert engine._backward is backward
    page = (tmp_path / "page.md").read_text()
    assert page in capsys.readouterr().out
    seconds = {part: float(re.search(rf"\| {part} \| ([\d.]+) \|", page)[1]) for part in gpu.PARTS}
    assert sum(seconds.values()) == pytest.approx(float(re.search(r"\| seconds \| ([\d.]+)", page)[1]), abs=0.1)
    assert re.search(r"share of it \| \d+%", page)


def test_mixed_lengths_are_packed(tmp_path):
    assert gpu.main(["--device", "cpu", "--tiny", "--mixed", "--out", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "responses of up to 20 tokens" in page
    assert "attention gradvar_varlen" in page
    shape = replace(gpu.TINY, mixed=True)
    assert max(shape.lengths()) == 20 > min(shape.lengths())
    model = gpu.build(shape, torch.device("cpu"), torch.float32)
    packed = gpu.measure(model, shape, gpu.Stopwatch(torch.device("cpu")), 1, None)
    model.set_attn_implementation("eager")
    rng = np.random.default_rng(0)
    vocabulary = shape.model["vocab_size"]
    prompt = rng.integers(0, vocabulary, shape.prompt).tolist()
    responses = [rng.integers(0, vocabulary, length).tolist() for length in shape.lengths()]
    padded = measure_scores(model, prompt, responses, list(shape.targets))
    for key, gram in padded.grams.items():
        size = np.abs(gram.gram()).max()
        np.testing.assert_allclose(packed.grams[key].gram(), gram.gram(), atol=1e-4 * size)


def test_every_part_takes_time_and_the_grams_are_those_of_a_plain_call():
    device = torch.device("cpu")
    model = gpu.build(gpu.TINY, device, torch.float32)
    watch = gpu.Stopwatch(device)
    found = gpu.measure(model, gpu.TINY, watch, 1, None)
    assert all(value > 0 for value in watch.totals().values())
    assert len(found.grams) == 3 + 6
    again = measure_scores(model, [1, 2], [[3, 4, 5], [6]], list(gpu.TINY.targets))
    assert again.grams.keys() == found.grams.keys()


def test_the_arithmetic_of_the_large_shape_is_the_known_one():
    with torch.device("meta"):
        from transformers import Qwen2Config, Qwen2ForCausalLM

        model = Qwen2ForCausalLM(Qwen2Config(**gpu.QWEN_7B))
    work = gpu.flop(model, gpu.SHAPES[0], 14, 240_000_000) / 1e15
    assert 5.9 < work < 7  # 3.7 forward, 2.1 backward, 0.12 for the Grams; a little more for the prompt and the head


def test_without_a_gpu_one_line_and_exit_code_2(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == (
        "error: no CUDA device here: run this on a machine with one, or try --device cpu --tiny\n"
    )


def test_a_device_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--device", "abacus"])
    assert stop.value.code == 2
    assert "received 'abacus'" in capsys.readouterr().err


@pytest.mark.parametrize(("memory", "index"), [(140e9, 0), (80e9, 0), (24e9, 1), (8e9, 2)])
def test_a_small_card_gets_a_small_shape(memory, index, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory, 192e9))
    assert gpu.choose_shape(torch.device("cuda"), tiny=False, most=192) is gpu.SHAPES[index]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (192e9, 192e9))
    assert gpu.choose_shape(torch.device("cuda"), tiny=False, most=memory / 1e9) is gpu.SHAPES[index]
