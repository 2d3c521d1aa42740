"""The last layer's MLP on the predicting tokens alone: the same results, and whole where it would not be."""

import pytest
import torch

from gradvar.gradients import measure_scores, passes, resolve_targets, tokenwise, witness
from tests.gradients import references
from tests.gradients.models import CONFIGS, make_model, make_prompt_and_responses, state
from tests.gradients.test_witness import Around

LENGTHS = (1, 2, 17, 9, 30, 4)
PROMPT, RESPONSES = make_prompt_and_responses(LENGTHS, prompt=20)
NARROWED = ("qwen2", "llama", "gpt2", "gpt_neox", "phi3")


@pytest.fixture
def narrowed(monkeypatch):
    """How many tokens of how many the module ran on, batch by batch."""
    seen = []
    own = tokenwise.Narrowed._widen

    def counted(self, module, args, output):
        if self._inside:
            seen.append((output.shape[1], self._shape[0] * self._shape[1]))
        return own(self, module, args, output)

    monkeypatch.setattr(tokenwise.Narrowed, "_widen", counted)
    return seen


def check(model, specs, request=(PROMPT, RESPONSES), **options):
    """The measurement, its Grams those of the literal definition."""
    measured = measure_scores(model, *request, specs, **options)
    targets = resolve_targets(model, specs)
    expected = references.flat_scores(model, targets, *request)
    for target in targets:
        gap = references.error(measured.grams[target.key].gram(), references.gram_of(expected[target.key]))
        assert gap < 1e-10, f"{target.key} is off by {gap:.1e}"
    return measured


@pytest.mark.parametrize("name", [name for name in NARROWED if name in CONFIGS])
@pytest.mark.parametrize("specs", ["last:attn", "0:attn"])
def test_tokens_that_predict_nothing_are_left_out(name, specs, narrowed):
    model = make_model(name)
    before = state(model)
    measured = check(model, specs, token_budget=90)
    assert measured.plan.token_budget == 90, "each was measured alone"
    assert state(model) == before
    assert sum(part for part, _ in narrowed) == sum(LENGTHS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_side": "left"},
        {"probes": 2, "seed": 0, "prefixes": 3},
        {"checkpointing": "non_reentrant"},
        {"checkpointing": "reentrant"},
        {"token_budget": 1},
    ],
)
def test_leaving_them_out_changes_nothing(options, narrowed, monkeypatch):
    model = make_model("qwen2")
    options = {"token_budget": 90, **options}
    fewer = measure_scores(model, PROMPT, RESPONSES, ["0:qkv", "lm_head"], **options)
    assert bool(narrowed) == ("checkpointing" not in options), "a part that is run again is left whole"
    monkeypatch.setattr(witness, "LEAST_SAVING", 2.0)
    count = len(narrowed)
    whole = measure_scores(model, PROMPT, RESPONSES, ["0:qkv", "lm_head"], **options)
    assert len(narrowed) == count
    for key, gram in whole.grams.items():
        assert references.error(fewer.grams[key].gram(), gram.gram()) < 1e-12
        if "probes" in options:
            torch.testing.assert_close(fewer.taus[key].value, whole.taus[key].value, rtol=1e-10, atol=0)


@pytest.mark.parametrize("specs", ["last:mlp", ["0:qkv", "last:down"]])
def test_a_measured_mlp_sees_all_tokens(specs, narrowed):
    check(make_model("qwen2"), specs, token_budget=90)
    assert not narrowed


def before_it(mlp, x):
    y = mlp(x)
    return y + 0.3 * torch.nn.functional.pad(y, (0, 0, 1, 0))[:, :-1]


def mean_of_the_row(mlp, x):
    y = mlp(x)
    return y * (1 + 0.1 * torch.arange(x.shape[1])[None, :, None])


@pytest.mark.parametrize("act", [before_it, mean_of_the_row])
def test_what_looks_at_other_tokens_sees_all(act, narrowed):
    model = make_model("llama")
    model.model.layers[-1].mlp = Around(model.model.layers[-1].mlp, act)
    measured = check(model, "last:qkv", token_budget=90)
    assert not narrowed
    assert measured.plan.token_budget == 90


def test_what_counts_tokens_beyond_the_witness_is_measured_whole(narrowed):
    """The witness is of 20 + 31 tokens at most; a room of 40 is passed within it, one of 45 by the longest alone."""
    for room in (40, 45):

        def act(mlp, x, room=room):
            return mlp(x) * (torch.arange(x.shape[1]) < room)[None, :, None]

        model = make_model("llama")
        model.model.layers[-1].mlp = Around(model.model.layers[-1].mlp, act)
        check(model, "last:qkv", token_budget=90)


def test_a_wrong_choice_is_seen_in_the_pass(narrowed, monkeypatch):
    """What comes before attention takes each token by itself too, but all that it makes is read."""
    monkeypatch.setattr(tokenwise.PartsWatch, "tokenwise", lambda self, start: model.model.layers[-1].input_layernorm)
    model = make_model("llama")
    measured = check(model, "0:qkv", token_budget=90)
    assert narrowed
    assert measured.plan.token_budget == 90
    assert not measured.changed_in_batches, "no batch changes anything"


@pytest.mark.parametrize("act", [before_it, mean_of_the_row])
@pytest.mark.parametrize("lengths", [(30, 5, 4, 3), (30, 25, 14, 3)])
def test_behind_a_prompt_of_one_token_all_that_is_left_out_is_padding(act, lengths, narrowed):
    """Then nothing of the first row is, and a row's first token must not see the row before."""
    model = make_model("llama")
    model.model.layers[-1].mlp = Around(model.model.layers[-1].mlp, act)
    measured = check(model, "last:qkv", token_budget=200, request=make_prompt_and_responses(lengths, prompt=1))
    assert not narrowed
    assert measured.plan.token_budget == 200


class Mixing(torch.nn.Module):
    """A norm that adds a product of the token before."""

    def __init__(self, norm, width):
        super().__init__()
        self.norm = norm
        self.mix_proj = torch.nn.Linear(width, width, bias=False, dtype=torch.float64)
        torch.nn.init.zeros_(self.mix_proj.weight)

    def forward(self, x):
        return self.norm(x + torch.nn.functional.pad(self.mix_proj(x), (0, 0, 1, 0))[:, :-1])


def test_a_matrix_behind_it_sees_all_tokens_even_while_it_is_zero(narrowed):
    """As an adapter before training: what it reads changes no state, and is its gradient."""
    model = make_model("llama")
    model.model.norm = Mixing(model.model.norm, model.config.hidden_size)
    check(model, "*mix_proj", token_budget=90)
    assert not narrowed


def test_where_it_turns_out_that_others_are_read_all_run_once_more(narrowed, monkeypatch):
    """The same for the next request, without trying; the stretch of the pass given up is looked at again."""
    fed = []
    own = passes.check_stretch
    monkeypatch.setattr(passes, "check_stretch", lambda *args: fed.append(own(*args)) or fed[-1])
    monkeypatch.setattr(passes, "STRETCH_SHARE", 0.5)
    monkeypatch.setattr(witness, "_LONGEST", 16)
    model = make_model("llama")
    model.model.norm = Mixing(model.model.norm, model.config.hidden_size)
    torch.nn.init.normal_(model.model.norm.mix_proj.weight, std=0.1)
    for times in range(2):
        measured = check(model, "last:qkv", token_budget=90)
        assert bool(narrowed) == (times == 0)
        assert measured.plan.token_budget == 90
        assert not measured.changed_in_batches
        narrowed.clear()
    assert [stretch.fed for stretch in fed[:2]] == [49, 49]


@pytest.mark.parametrize("path", ["mlp", "mlp.act_fn"])
def test_an_mlp_with_hooks_of_the_users_sees_all_tokens(narrowed, path):
    """A hook that records, and one that mixes tokens, as they are without the engine."""
    model = make_model("llama")
    module = model.model.layers[-1].get_submodule(path)
    seen = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output.shape[:2].numel()))
    check(model, "last:qkv", token_budget=90)
    assert not narrowed
    assert max(seen) > 60
    handle.remove()
    check(model, "last:qkv", token_budget=90)
    assert narrowed
