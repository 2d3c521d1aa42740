"""All prompts of a measurement in one process: the model's weights are read once."""

import numpy as np
import transformers.modeling_utils

import gradvar
from gradvar.models import find_model, load_model
from gradvar.stages import measure
from tests.stages.small import make_run


def test_two_prompts_are_measured_with_one_load_of_the_model(tmp_path, monkeypatch):
    """Counted are the openings of the weights file, by transformers' own loader, which goes on as ever."""
    run, opened = make_run(tmp_path, prompts=2), []
    own = transformers.modeling_utils.safe_open

    def counted(path, *args, **options):
        opened.append(str(path))
        return own(path, *args, **options)

    folder = find_model(str(tmp_path / "model"))
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", counted)
    load_model(folder, dtype="float32", device="cpu")
    once = [path for path in opened if path.endswith(".safetensors")]
    assert once, "the loader opens its files another way: count there"
    opened.clear()
    measure(run, {"targets": ("last:qkv",)})
    assert [path for path in opened if path.endswith(".safetensors")] == once
    measured = gradvar.open_run(run.path)
    for prompt_id in ("0", "1"):
        assert len(measured.grams(prompt_id)) == 3
        assert all(np.isfinite(gram.matrix).all() for gram in measured.grams(prompt_id).values())
