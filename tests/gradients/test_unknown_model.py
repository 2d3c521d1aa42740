"""A model that no library knows, with names of its own: its layers and matrices are found in the model itself."""

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from gradvar.gradients import measure_scores, resolve_targets
from tests.gradients import references
from tests.gradients.models import make_prompt_and_responses


class Config(PreTrainedConfig):
    model_type = "nobody_s"

    def __init__(self, vocab_size=37, width=16, heads=4, depth=3, **others):
        super().__init__(**others)
        self.vocab_size, self.width, self.heads, self.depth = vocab_size, width, heads, depth


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(config.width, config.width, bias=False) for _ in range(4))

    def forward(self, x):
        rows, length, width = x.shape
        q, k, v = (w(x).view(rows, length, self.heads, -1).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(seen.transpose(1, 2).reshape(rows, length, width))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wide, self.narrow = nn.Linear(config.width, 24), nn.Linear(24, config.width)

    def forward(self, x):
        return self.narrow(torch.tanh(self.wide(x)))


class Storey(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention, self.feed_forward = SelfAttention(config), FeedForward(config)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.feed_forward(x)


class Tower(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.storeys = nn.ModuleList([Storey(config) for _ in range(config.depth)])

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, use_cache=None):
        x = self.words(input_ids)
        for storey in self.storeys:
            x = storey(x)
        return BaseModelOutput(last_hidden_state=x)


class Speaker(PreTrainedModel):
    config_class = Config
    base_model_prefix = "tower"

    def __init__(self, config):
        super().__init__(config)
        self.tower = Tower(config)
        self.tongue = nn.Linear(config.width, config.vocab_size)
        self.tongue.weight.data *= 3

    def get_input_embeddings(self):
        return self.tower.words

    def get_output_embeddings(self):
        return self.tongue

    def forward(self, input_ids, use_cache=None):
        return CausalLMOutput(logits=self.tongue(self.tower(input_ids).last_hidden_state))


def test_a_model_with_names_of_its_own():
    torch.manual_seed(0)
    model = Speaker(Config()).double()
    names = {
        kind: [t.key.removeprefix("tower.storeys.") for t in resolve_targets(model, f"last:{kind}")]
        for kind in ("qkv", "attn", "mlp")
    }
    attention = ["2.attention.wq", "2.attention.wk", "2.attention.wv", "2.attention.wo"]
    assert names == {"qkv": attention[:3], "attn": attention, "mlp": ["2.feed_forward.wide", "2.feed_forward.narrow"]}
    prompt, responses = make_prompt_and_responses()
    specs = ["0-2:all", "tongue"]
    targets = resolve_targets(model, specs)
    assert len(targets) == 3 * 6 + 1
    measured = measure_scores(model, prompt, responses, specs, token_budget=60)
    expected = references.flat_scores(model, targets, prompt, responses)
    for key, gram in measured.grams.items():
        assert references.error(gram.gram(), references.gram_of(expected[key])) < 1e-10
