"""How many positions a model has, and what depends on the length of the whole sequence.

With "longrope" a sequence longer than the original positions turns by other angles altogether; with "dynamic" the
angles are those of the longest sequence seen so far. In a batch the longest row decides for all. Attention to a chosen
number of keys (DeepSeek V3.2's indexer) takes one or another of equal ones, as the row is long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from gradvar.errors import GradvarError

_CHANGING = ("dynamic", "longrope")
_CHOSEN = ("index_topk", "keep_window_size")
"""Settings of attention that chooses so many keys: with fewer it takes all."""


def position_limit(model: nn.Module) -> int | None:
    """Return how many tokens the model has positions for, None where it sets no limit."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    # what is scaled is the original number; some configurations state the product as the limit already
    scaled = [
        (one.get("original_max_position_embeddings") or limit) * (one.get("factor") or 1) for one in _rotary(config)
    ]
    return int(max([limit, *scaled]))


def row_limit(model: nn.Module) -> int | None:
    """Return how many tokens a row may have, packed ones too, None where there is no limit.

    GPT-Neo keeps its causal mask in a buffer of as many positions as it has.
    """
    limit = position_limit(model)
    return limit if any(tuple(buffer.shape[-2:]) == (limit, limit) for buffer in model.buffers()) else None


def turns_with_length(model: nn.Module) -> bool:
    """Return whether positions turn by angles that depend on the whole sequence's length."""
    return any(_changes(one) for one in _rotary(getattr(model, "config", None)))


def must_go_alone(model: nn.Module, longest: int) -> bool:
    """Return whether sequences of up to `longest` tokens change each other's angles or chosen keys in a batch.

    Raises:
        GradvarError: They do even one after another.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    for one in filter(_changes, _rotary(config)):
        own = getattr(config, "max_position_embeddings", 0)
        if "dynamic" in str(one):
            if longest > own:
                raise GradvarError(
                    f"a response with its prompt feeds {longest} tokens: beyond {own} this model's rotary angles "
                    '("dynamic") depend on what it saw before; leave longer responses out'
                )
        elif longest > (one.get("original_max_position_embeddings") or 0):
            return True
    return longest > chosen_keys(model)


def chosen_keys(model: nn.Module) -> float:
    """Return how many keys the model's attention chooses, infinity where it sees all."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    found = [getattr(config, name, None) for name in _CHOSEN]
    return min((keys for keys in found if isinstance(keys, int) and keys > 0), default=math.inf)


def _changes(scaling: Mapping[str, Any]) -> bool:
    return any(kind in str(scaling.get(name)) for kind in _CHANGING for name in ("rope_type", "type"))


def _rotary(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the settings of rotary embeddings, those of each kind of layer where they differ."""
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(config, name, None)
        if isinstance(found, Mapping):
            yield found
            yield from (one for one in found.values() if isinstance(one, Mapping))
