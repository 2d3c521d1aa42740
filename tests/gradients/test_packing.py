"""Which rows may be packed: blocks counted from a row's beginning, by name and by what the run's longest row shows."""

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from gradvar import attention
from gradvar.errors import GradvarError
from gradvar.gradients import measure_scores, packing
from tests.gradients import references
from tests.gradients.models import grams, largest_gap, make_model, make_prompt_and_responses


def test_blocks_longer_than_every_row_do_not_keep_from_packing():
    """As a context's length called block_size (nanoGPT)."""
    model = make_model("llama")
    model.config.block_size = 64
    request = (model, *make_prompt_and_responses(), ["last:q"])
    padded = grams(*request, token_budget=64)
    assert largest_gap(grams(*request, token_budget=64, packing=True), padded) < 1e-10
    with pytest.raises(GradvarError, match=r"counts blocks of tokens .*block_size=64"):
        grams(*request, token_budget=65, packing=True)


@pytest.fixture
def blocks_of_40():
    """A model whose attention sees no further back than blocks of 40 tokens of the row, under no name."""
    own = attention.varlen_attention

    def blocked(module, query, key, value, mask, **others):
        starts = others.pop("cu_seq_lens_q", None)
        length = query.shape[2]
        bounds = [0, length] if starts is None else starts.tolist()
        cuts = sorted({*bounds, *range(0, length, 40)})
        others["cu_seq_lens_q"], others["max_length_q"] = torch.tensor(cuts, dtype=torch.int32), 40
        singles = zip(*(x.split(1) for x in (query, key, value)), strict=True)
        return torch.cat([own(module, *one, mask, **others)[0] for one in singles]), None

    AttentionInterface.register("blocked_varlen", blocked)
    model = make_model("qwen2", max_position_embeddings=512)
    model.set_attn_implementation("blocked_varlen")
    return model


def test_blocks_counted_under_no_known_name_show_in_the_run_s_longest_row(blocks_of_40, monkeypatch):
    """The witness does not see it: the last response begins where a block does."""
    model = blocks_of_40
    prompt, responses = make_prompt_and_responses((61, 57, 30), prompt=2)
    options = {"targets": "last:q", "token_budget": 151}
    with pytest.raises(GradvarError, match=r"Qwen2ForCausalLM with blocked_varlen .*other states in a long packed row"):
        measure_scores(model, prompt, responses, packing=True, **options)
    expected = measure_scores(model, prompt, responses, packing=False, **options).grams
    # where packing was not asked for (on CUDA), it is measured padded
    monkeypatch.setattr("gradvar.gradients.prepare.packs", lambda *args, **options: args[3] is not False)
    found = measure_scores(model, prompt, responses, **options)
    assert found.plan.token_budget > 1
    for key, gram in expected.items():
        assert references.error(found.grams[key].gram(), gram.gram()) < 1e-10
    # rows that end before the first block does are packed
    assert measure_scores(model, prompt, [r[:10] for r in responses], packing=True, **options).plan.token_budget == 151


class Own(nn.Linear):
    """A module of somebody else's."""


@pytest.mark.parametrize("change", ["none", "module", "setting"])
def test_a_model_s_longest_row_is_looked_at_once_where_it_may_hide_something(change, monkeypatch):
    model, seen = make_model("qwen2", max_position_embeddings=512), []
    if change == "module":
        model.model.layers[0].mlp.up_proj.__class__ = Own
    elif change == "setting":
        model.config.key_compress_ratio = 4
    own = packing.same_in_batch
    monkeypatch.setattr(packing, "same_in_batch", lambda *args: seen.append(len(args[0])) or own(*args))
    prompt, responses = make_prompt_and_responses((160, 50, 30), prompt=2)
    for times in (1, 1, 2):
        measure_scores(model, prompt, responses * times, "last:q", token_budget=300 * times, packing=True)
    if change == "none":
        assert not seen
        return
    assert sorted(seen[:4]) == [31, 33, 51, 128]
    assert len(seen) == 4 + 8, "again for a longer row alone"
