"""Gradients that the device has no room for go to the host's memory: the same Grams, fewer passes, bytes as planned."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from gradvar.errors import GradvarError
from gradvar.gradients import fit, measure_scores, plan_measurement
from gradvar.gradients.gram import FactorStore, MatrixStore
from gradvar.gradients.plan import device_bytes, least_bytes, split_work
from gradvar.gradients.spill import HostFactorStore, HostMatrixStore, HostMemory
from gradvar.gradients.targets import Target
from gradvar.gradients.usage import LiveBytes
from tests.gradients import references
from tests.gradients.models import least_budget, make_model, make_prompt_and_responses
from tests.gradients.test_plan import LENGTHS, make_targets, recount

SHORT, LONG = (9, 5, 12, 7, 3, 11), (150, 90, 120, 60, 30, 140)
AMPLE = 1 << 30


@pytest.fixture(scope="module")
def models():
    size = {"num_hidden_layers": 3, "max_position_embeddings": 512}
    return {
        "narrow": make_model("qwen2", **size),
        "wide": make_model("qwen2", hidden_size=64, intermediate_size=192, **size),
    }


def homes(plan):
    return {block.home for blocks in plan.passes for block in blocks}


@pytest.mark.parametrize(
    ("name", "lengths", "times", "keep"),
    [
        ("narrow", SHORT * 4, 1.5, "matrices"),
        ("narrow", LONG, 1.1, "matrices"),
        ("wide", SHORT * 4, 1.8, "factors"),
    ],
)
@pytest.mark.parametrize("share", [0.6, 0.8, 1.0])
def test_what_is_spilled_gives_the_same_grams(models, name, lengths, times, keep, share, monkeypatch):
    """Little for the device, so almost all (1.0) or a part is on the host; the CPU plays both."""
    prompt, responses = make_prompt_and_responses(lengths)
    asked = (models[name], prompt, responses, "all:qkv,mlp")
    options = {"memory_budget": int(times * least_budget(*asked, checkpointing="off")), "checkpointing": "off"}
    none = plan_measurement(*asked, **options)
    assert homes(none) == {"device"}
    assert len(none.passes) > 1
    whole = plan_measurement(*asked, **options, host_memory_budget=AMPLE)
    assert len(whole.passes) == 1, "the host comes before more passes"
    options["host_memory_budget"] = AMPLE if share == 1.0 else int(share * whole.cost.host_bytes)
    plan = plan_measurement(*asked, **options)
    assert homes(plan) == {"device", "host"}
    assert keep in {block.keep for blocks in plan.passes for block in blocks if block.home == "host"}
    assert len(plan.passes) < len(none.passes)
    assert plan.cost.peak_bytes <= options["memory_budget"]
    assert 0 < plan.cost.host_bytes <= options["host_memory_budget"]
    assert plan.cost.transfer_bytes >= 1.5 * plan.cost.host_bytes
    spilled = []
    own = HostMemory.empty

    def counted(self, shape, dtype):
        value = own(self, shape, dtype)
        spilled.append(value.nbytes)
        return value

    expected = measure_scores(*asked)
    with monkeypatch.context() as patch:
        patch.setattr(HostMemory, "empty", counted)
        with LiveBytes() as live:
            found = measure_scores(*asked, **options)
    assert live.peak <= options["memory_budget"] + plan.cost.host_bytes
    one = max(map(len, responses)) / sum(map(len, responses))  # before each pass, and let go of: the stretch's
    assert 0 < sum(spilled) <= (1 + one) * len(plan.passes) * plan.cost.host_bytes
    for key, gram in expected.grams.items():
        assert references.error(found.grams[key].gram(), gram.gram()) < 1e-12


@pytest.mark.parametrize("name", ["gpt2", "qwen2_tied", "mixtral"])
def test_other_models_with_probes_and_sketches(name):
    """Fused matrices, a head that stays on the device, modules that tokens skip."""
    from gradvar.gradients.sketch import SketchPlan

    model = make_model(name)
    prompt, responses = make_prompt_and_responses(SHORT * 4)
    specs = ["lm_head", "all:attn"] if name == "qwen2_tied" else "all:attn"
    sketch = SketchPlan(dimension=256)
    options = {"probes": 2, "prefixes": 2}
    least = least_budget(model, prompt, responses, specs, **options, sketch=sketch)
    expected = measure_scores(model, prompt, responses, specs, seed=0, sketch=sketch, **options)
    found = measure_scores(
        model, prompt, responses, specs, seed=0, sketch=sketch, memory_budget=int(1.2 * least),
        host_memory_budget=AMPLE, **options,
    )  # fmt: skip
    assert "host" in homes(found.plan)
    for key, gram in expected.grams.items():
        assert references.error(found.grams[key].gram(), gram.gram()) < 1e-12
        np.testing.assert_allclose(found.taus[key].value, expected.taus[key].value, rtol=1e-10)
        np.testing.assert_allclose(found.prefixes[key].value, expected.prefixes[key].value, rtol=1e-9, atol=1e-18)
        np.testing.assert_allclose(found.sketches[key].matrix, expected.sketches[key].matrix, rtol=1e-5, atol=1e-5)


def test_the_cpu_spills_nothing_unless_told(models):
    model = models["narrow"]
    prompt, responses = make_prompt_and_responses(SHORT)
    least = least_budget(model, prompt, responses, "all:mlp")
    plan = plan_measurement(model, prompt, responses, "all:mlp", memory_budget=least)
    assert plan.host_memory_budget == plan.cost.host_bytes == plan.cost.transfer_bytes == 0
    with pytest.raises(GradvarError, match="host memory budget: expected 0 or more bytes, received -1"):
        plan_measurement(model, prompt, responses, "all:mlp", host_memory_budget=-1)


def test_what_the_host_s_memory_costs_decides_for_smaller_batches(monkeypatch):
    """Without a cost the host is taken; by a GPU's, batches small enough for all gradients on the device."""
    model = make_model("qwen2", hidden_size=64, intermediate_size=192, max_position_embeddings=512)
    prompt, responses = make_prompt_and_responses([100] * 16)
    asked = (model, prompt, responses, "last:qkv,mlp")
    options = {"memory_budget": 12_000_000, "host_memory_budget": AMPLE, "checkpointing": "off"}
    free = plan_measurement(*asked, **options)
    assert homes(free) == {"device", "host"}
    monkeypatch.setattr(fit, "_work", fit._seconds_on_cuda)
    monkeypatch.setattr(fit, "_A_BATCH", 0.0)  # of so small a model it would be all that counts
    plan = plan_measurement(*asked, **options)
    assert homes(plan) == {"device"}
    assert len(plan.passes) == 1
    assert plan.token_budget < free.token_budget
    assert plan.cost.peak_bytes <= options["memory_budget"]


@pytest.mark.parametrize("host_share", [0.0, 0.6, 1.3])
def test_blocks_of_rows_begin_at_aligned_addresses(host_share):
    """None of a few rows either, that room was just left for: each is filled response by response."""
    targets = [
        Target(
            key=kind, module=kind, rows=None, in_features=columns, out_features=rows, has_bias=False, kind=kind, layer=0
        )
        for kind, rows, columns in (("gate", 1800, 300), ("up", 1800, 300), ("down", 300, 1800))
    ]
    room = 203 * len(LENGTHS) * (300 * 4 + 8) + 1000
    passes = split_work(targets, LENGTHS, torch.float32, room, int(host_share * room))
    blocks = [block for each in passes for block in each]
    assert len(blocks) > 5
    assert sum(block.stop - block.start for block in blocks) == 3900
    assert all(block.start % 8 == 0 for block in blocks)
    for each in passes:
        for home in ("device", "host"):
            own = [block for block in each if block.home == home]
            assert all(block.stop - block.start >= 64 or block.stop == block.target.out_features for block in own[1:])
            assert len({block.target.key for block in own}) == len(own)


@pytest.mark.parametrize("times", [1, 1.5, 4])
@pytest.mark.parametrize("host_times", [0.5, 3, 20, 1000])
def test_both_rooms_are_kept(times, host_times):
    targets = make_targets(3)
    least = least_bytes(targets, LENGTHS, torch.float32)
    room, host_room = int(times * least), int(host_times * least)
    passes = split_work(targets, LENGTHS, torch.float32, room, host_room)
    for blocks in passes:
        there = [block for block in blocks if block.home == "host"]
        here = [block for block in blocks if block.home == "device"]
        assert recount(there, LENGTHS, host=True) == sum(block.bytes for block in there) <= host_room
        assert device_bytes(blocks, len(LENGTHS)) <= room
        assert recount(here, LENGTHS) == device_bytes(here, len(LENGTHS))
    assert sum(block.stop - block.start for blocks in passes for block in blocks) == sum(
        t.out_features for t in targets
    )
    assert len(passes) <= len(split_work(targets, LENGTHS, torch.float32, room))


@pytest.mark.parametrize("slab", [0, 1 << 12, 1 << 20])
@pytest.mark.parametrize(("kind", "plain"), [(HostFactorStore, FactorStore), (HostMatrixStore, MatrixStore)])
def test_a_store_on_the_host_is_the_store_on_the_device(kind, plain, slab, monkeypatch):
    """Modules called twice, a response without a gradient, pieces of a few rows, tiles of every height."""
    monkeypatch.setattr("gradvar.gradients.gram.PIECE", 5 * 24)
    generator = torch.Generator().manual_seed(0)
    host, size = HostMemory(slab, pinned=False), (4, 17, 24, torch.float64, torch.device("cpu"))
    here, there = plain(*size), kind(*size, host)
    for response in (0, 2, 3, 2):
        a, delta = (torch.randn(7 + response, width, generator=generator, dtype=torch.float64) for width in (24, 17))
        here.add(response, a, delta)
        there.add(response, a, delta)
        host.forget()
    assert there.finite(range(4)) == [True] * 4
    expected = here.gram(True, 1 << 20).numpy()
    for tile in (1, 4 * 24 * 8 * 3, 1 << 20):
        assert references.error(there.gram(True, tile).numpy(), expected) < 1e-13
    there.add(1, torch.full((2, 24), torch.inf, dtype=torch.float64), torch.zeros(2, 17, dtype=torch.float64))
    assert there.finite(range(4)) == here_finite(here)


def here_finite(store):
    store.add(1, torch.full((2, 24), torch.inf, dtype=torch.float64), torch.zeros(2, 17, dtype=torch.float64))
    return store.finite(range(4))


def test_slabs_hold_many_tensors_and_never_two_in_one_place():
    host = HostMemory(1 << 10, pinned=False)
    values = [torch.full((count,), float(count)) for count in (3, 50, 17, 64, 1, 60, 60, 60, 500)]
    copies = [host.copy(value) for value in values]
    assert all(torch.equal(value, copy) for value, copy in zip(values, copies, strict=True))
    slabs = {copy.untyped_storage().data_ptr(): copy.untyped_storage().nbytes() for copy in copies}
    assert len(slabs) < len(copies) - 1
    assert all(size & (size - 1) == 0 for size in slabs.values())
    spans = sorted((copy.data_ptr(), copy.data_ptr() + copy.nbytes) for copy in copies)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    assert host.copy_once(values[0]) is host.copy_once(values[0])
    assert host.copy_once(values[1]) is not host.copy_once(values[0])
    values[1].zero_()
    assert torch.equal(host.copy_once(values[1]), values[1]), "written to since"
