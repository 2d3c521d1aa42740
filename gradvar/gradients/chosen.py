"""Attention that chooses so many keys may choose others once more tokens follow: each response against its beginning.

Which of equal ones it takes depends on the row's length; some choose among later ones too. Short probes, in which all
are taken, do not show it. Such responses go alone; each is run twice, its beginning without a graph first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradvar.errors import GradvarError
from gradvar.gradients.batches import Batch, last_hidden
from gradvar.gradients.job import Job
from gradvar.gradients.positions import chosen_keys
from gradvar.gradients.request import is_half, other_start, same_states

_SHARE = 0.9
"""Where a response is cut, of what is beyond so many keys: of single cuts this one showed most."""

_COLUMNS = 64
"""Of a token's state about so many numbers are kept: what other keys change, they change all over."""


class ChosenKeys:
    """Holds the last hidden states of a pass's responses against those of their beginnings alone.

    Args:
        job: The measurement; where its model's attention sees all keys, nothing is done.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._keys = chosen_keys(job.model)
        self._reach: Tensor | None = None

    def beginning(self, batch: Batch) -> Tensor | None:
        """Return (K, C) some of the states at the beginning's predicting tokens, None where nothing can be said."""
        length, prompt = batch.input_ids.shape[1], len(self._job.prompt)
        if length <= self._keys or length <= prompt or len(batch.members) > 1:
            return None
        low = max(int(self._keys) + 1, prompt)
        cut = min(length - 1, low + round((length - 1 - low) * _SHARE))
        base = self._job.head.base
        with torch.no_grad():
            states = self._some(last_hidden(base, _first(batch, cut)))
            if self._reach is None:
                self._reach = states[:0]
                if is_half(base):
                    self._reach = self._some(last_hidden(base, other_start(_first(batch, cut)))) - states
        return states

    def _some(self, hidden: Tensor) -> Tensor:
        # tokens before them may not have run through the last layer's MLP
        return hidden[0, len(self._job.prompt) - 1 :, :: max(1, hidden.shape[-1] // _COLUMNS)].double()

    def compare(self, batch: Batch, beginning: Tensor | None, hidden: Tensor) -> None:
        """Hold the beginning's states against those of the whole response, (1, T, D).

        Raises:
            GradvarError: They are others.
        """
        if beginning is None or self._reach is None:
            return
        base = self._job.head.base
        states = self._some(hidden.detach())[: len(beginning)]
        if bool(beginning.isfinite().all()) and not same_states(states, beginning, self._reach, base):
            raise GradvarError(
                f"{type(base).__name__} is not causal beyond {self._keys} tokens: its attention chooses so many keys, "
                "and which depends on what follows (equal or later ones are among them), so it gives no "
                f"log-probability of response {self._job.ids[batch.members[0]]}; leave longer ones out"
            )


def _first(batch: Batch, cut: int) -> Batch:
    """Return the first tokens of a batch of one response."""
    return Batch(
        members=batch.members, input_ids=batch.input_ids[:, :cut], attention_mask=None, real=None, bounds=((0, cut),),
        firsts=(0,),
    )  # fmt: skip
