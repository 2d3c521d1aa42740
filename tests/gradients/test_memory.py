"""Memory as the operating system sees it stays within the budget; no tensor of tokens x vocabulary is ever whole."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradvar.gradients import measure_scores
from gradvar.gradients.resident import Resident
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
BUDGET = 200 << 20


def grown(count):
    """(bytes that the process grew by, at most, and passes) for so many responses under the budget."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(count), str(BUDGET)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    peak, passes = map(int, done.stdout.split())
    return peak, passes


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_stays_within_the_budget_and_does_not_grow():
    """4 layers of 2.6 M parameters: the gradients of 16 responses take 670 MB, those of 32 twice that.

    With the allocator as users have it; glibc alone would hold about 100 MiB of freed blocks.
    """
    few, few_passes = grown(16)
    many, many_passes = grown(32)
    assert 3 * BUDGET < 16 * 4 * 2_600_000 * 4
    assert many_passes > few_passes > 1
    assert few <= BUDGET, f"{few / 2**20:.0f} MiB for 16 responses"
    assert many <= BUDGET, f"{many / 2**20:.0f} MiB for 32 responses"


def test_freed_blocks_are_given_back_only_where_room_is_short(monkeypatch):
    given = []
    monkeypatch.setattr("gradvar.gradients.resident._trim", lambda: given.append)
    monkeypatch.setattr("gradvar.gradients.resident.resident_bytes", lambda: 1000)
    Resident(900, 300).make_room(200)
    Resident(None, 300).make_room(10_000)
    assert given == []
    Resident(900, 300).make_room(201)
    assert given == [0]


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
