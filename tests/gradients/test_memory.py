"""Memory as the operating system sees it stays within the budget; no tensor of tokens x vocabulary is ever whole."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradvar.gradients import measure_scores
from tests.conftest import ROOT
from tests.gradients.models import make_model, make_prompt_and_responses

MEASURE = """
import sys, torch
from transformers import AutoModelForCausalLM, Qwen2Config
from gradvar.gradients import measure_scores

def status(name):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(name))

torch.set_num_threads(1)
count, budget = int(sys.argv[1]), int(sys.argv[2])
config = Qwen2Config(
    vocab_size=5000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, max_position_embeddings=512,
)
model = AutoModelForCausalLM.from_config(config)
words = torch.Generator().manual_seed(0)
responses = [torch.randint(5000, (60 + 5 * (i % 20),), generator=words).tolist() for i in range(count)]
measure_scores(model, [5, 6, 7], [[8, 9], [10]], "last:q")  # what loads late is loaded
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
before = status("VmRSS:")
plan = measure_scores(model, [5, 6, 7], responses, "all:qkv,mlp", memory_budget=budget).plan
print(status("VmHWM:") - before, len(plan.passes))
"""
BUDGET = 300 << 20
PLAIN = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""Every tensor a mapping of its own: glibc otherwise keeps freed blocks in its heap, 120 MiB of them here."""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_stays_within_the_budget():
    """4 layers of 2.6 M parameters: the gradients of 32 responses take 1.3 GB."""
    count = 32
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(count), str(BUDGET)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **PLAIN},
    )
    peak, passes = map(int, done.stdout.split())
    assert count * 4 * 2_600_000 * 4 > 4 * BUDGET
    assert passes > 1
    assert peak <= BUDGET, f"{peak / 2**20:.0f} MiB"


class Widest(TorchDispatchMode):
    """Notes the most rows of any tensor as wide as the vocabulary, the weight itself left out."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, torch.Tensor) and value.ndim and self.vocabulary in (value.shape[-1], value.numel()):
                self.rows = max(self.rows, value.numel() // self.vocabulary)
        return output


@pytest.mark.parametrize(("name", "targets"), [("qwen2", ["lm_head", "last:q"]), ("gemma2", "last:q")])
def test_no_logits_of_a_whole_sequence(monkeypatch, name, targets):
    """The linear head in chunks, and the model's own head too, forward and backward."""
    model = make_model(name, vocab_size=1009, max_position_embeddings=512)
    prompt, responses = make_prompt_and_responses((150, 90, 120))
    monkeypatch.setattr("gradvar.gradients.logprobs._CHUNK_BYTES", {"cpu": 1009 * 8 * 20})
    monkeypatch.setattr("gradvar.gradients.gram.PIECE", 1009 * 20)  # the head's own gradient: rows of it at a time
    with Widest(1009) as widest:
        measure_scores(model, prompt, responses, targets)
    assert 8 < widest.rows <= 20
