"""Models and tokenizers from a folder or the hub: safetensors only, nothing in them runs unless asked by name."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.utils.logging
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gradvar.attention import choose_attention
from gradvar.errors import GradvarError

transformers.utils.logging.disable_progress_bar()  # gradvar shows progress of its own

BALANCED = "balanced"
"""The device setting that spreads a model over all devices."""
_WEIGHTS_SHARE = 0.7
"""Part of each device that a spread model's weights may take; measuring has the rest."""
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model on this machine's disk."""

    name: str
    """What the user asked for: a path or a hub id."""
    path: Path
    """The folder with config.json and the weights."""
    revision: str | None
    """Commit of a hub model; None for a folder."""

    def weights_hash(self) -> str:
        """Return the SHA-256 over the configuration and every weight file: the model's identity in a run."""
        files = [self.path / "config.json", *sorted(self.path.glob("*.safetensors"))]
        return _hash_files(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))

    def max_positions(self, trust_remote_code: bool = False) -> int | None:
        """Return the model's context in tokens, None where its configuration states none."""
        config = self.load_config(trust_remote_code)
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            value = getattr(config.get_text_config(), name, None)
            if isinstance(value, int) and value > 0:
                return value
        return None

    def vocab_size(self, trust_remote_code: bool = False) -> int:
        """Return the number of token ids the model knows."""
        return int(self.load_config(trust_remote_code).get_text_config().vocab_size)

    def load_config(self, trust_remote_code: bool = False) -> Any:
        """Load config.json as transformers' configuration object.

        Raises:
            GradvarError: It is damaged, or of a model type that this transformers does not know.
        """
        try:
            return AutoConfig.from_pretrained(self.path, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise GradvarError(f"model {self.name}: its config.json cannot be used: {_first_line(error)}") from error


def find_model(name: str, revision: str | None = None, *, needs_weights: bool = True) -> ModelFolder:
    """Return the folder of a model, fetching a hub id into the local cache.

    Args:
        name: A folder or a hub id.
        revision: Branch, tag or commit of a hub model.
        needs_weights: False where the configuration alone will do: no weights are fetched or looked for.

    Raises:
        GradvarError: No such folder or hub model, or no config or safetensors weights in it.
    """
    if not name:
        raise GradvarError("no model given: expected --model with a folder or a hub id such as Qwen/Qwen2.5-0.5B")
    path, commit = Path(name).expanduser(), None
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep not in name:
            raise GradvarError(
                f"--model {name}: no such folder; give a model folder or a hub id such as Qwen/Qwen2.5-0.5B"
            )
        path = _fetch(name, revision, weights=needs_weights)
        commit = path.name
    if not path.is_dir():
        raise GradvarError(f"--model {name}: expected a folder with config.json and *.safetensors, received a file")
    if not (path / "config.json").is_file():
        raise GradvarError(f"--model {name}: the folder has no config.json; expected a Hugging Face causal LM")
    if needs_weights and not any(path.glob("*.safetensors")):
        raise GradvarError(
            f"--model {name}: the folder has no *.safetensors weights; save the model with "
            "save_pretrained(..., safe_serialization=True)"
        )
    return ModelFolder(name=name, path=path.resolve(), revision=commit)


def load_tokenizer(folder: ModelFolder, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer.

    Raises:
        GradvarError: There is none, it is damaged, or it has no end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder.path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizer libraries raise bare Exceptions
        raise GradvarError(f"model {folder.name}: its tokenizer cannot be loaded: {_first_line(error)}") from error
    end, known = tokenizer.eos_token_id, folder.vocab_size(trust_remote_code)
    if end is None or end >= known:  # some tokenizer classes bring an end token that the model never learned
        raise GradvarError(
            f"model {folder.name}: its tokenizer has no end token (eos_token) among the model's {known} tokens, so no "
            "response could stop; set eos_token in tokenizer_config.json"
        )
    return tokenizer


def load_model(
    folder: ModelFolder,
    *,
    dtype: str,
    device: str,
    trust_remote_code: bool = False,
    attention: str | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> PreTrainedModel:
    """Load the causal LM in eval mode onto a device, or spread over all there are.

    Args:
        folder: Where `find_model` found it.
        dtype: float32, bfloat16, float16 or float64.
        device: A torch device name, or "balanced": accelerate spreads the layers over all GPUs, then the host's memory,
            then the disk.
        trust_remote_code: Run code that the model's repository ships.
        attention: transformers' name of the attention, or gradvar_varlen; "auto" takes variable-length kernels where
            the device and the model can have them; None leaves the choice to transformers.
        max_memory: With "balanced", what weights may take of each device (0, 1, "cpu"), as accelerate reads it. None
            leaves room for measuring.

    Raises:
        GradvarError: The weights do not load, or not with that attention, accelerate is missing for "balanced", or some
            of the model's weights are missing from the files.
    """
    name = choose_attention(attention, folder.load_config(trust_remote_code), device, dtype) if attention else None
    options: dict[str, Any] = {"attn_implementation": name} if name else {}
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder.path,
            dtype=_DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
            **(_spread(max_memory) if device == BALANCED else {}),
        )
    except GradvarError:
        raise
    except Exception as error:  # damaged files surface as many types, SafetensorError among them
        what = (
            "it cannot be loaded with this --attention"
            if _is_about_attention(error)
            else "its weights cannot be loaded"
        )
        raise GradvarError(f"model {folder.name}: {what}: {_first_line(error)}") from error
    problems = [*loading["missing_keys"], *loading["mismatched_keys"]]
    if problems:
        raise GradvarError(
            f"model {folder.name}: {len(problems)} weights are missing from its files or have another shape "
            f"(first: {problems[0]}); they would be random"
        )
    if dtype == "float64" and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product that transformers chooses takes no float64
    return (model if device == BALANCED else model.to(device)).eval()


def _is_about_attention(error: Exception) -> bool:
    return isinstance(error, (ImportError, ValueError)) and "ttention" in str(error)


def load_skeleton(folder: ModelFolder, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the model's modules without weights or memory, to look at their names and shapes.

    Raises:
        GradvarError: The configuration is not that of a causal LM.
    """
    config = folder.load_config(trust_remote_code)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise GradvarError(f"model {folder.name}: not a causal LM: {_first_line(error)}") from error


def resolve_device(device: str) -> str:
    """Return the torch device for a setting, auto being the first GPU where there is one.

    Raises:
        GradvarError: No such device here.
    """
    if device == BALANCED:
        return device
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise GradvarError(f"--device {device}: expected auto, cpu, cuda, cuda:1 or balanced") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise GradvarError(f"--device {device}: no CUDA device here; use --device cpu")
    return device


def token_device(model: PreTrainedModel) -> torch.device:
    """Return the device that token ids go to, and that logits come from."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)  # accelerate's, of a spread model
    place = getattr(hook, "execution_device", None)
    return torch.device(place) if place is not None else next(embedding.parameters()).device


def resolve_dtype(dtype: str, device: str) -> str:
    """Return the model dtype for a setting, auto being bfloat16 on a GPU and float32 on a CPU."""
    if dtype != "auto":
        return dtype
    on_gpu = torch.cuda.is_available() if device == BALANCED else device.startswith("cuda")
    return "bfloat16" if on_gpu else "float32"


def _spread(max_memory: Mapping[int | str, int | str] | None) -> dict[str, Any]:
    """Return transformers' options for a model on all devices."""
    if importlib.util.find_spec("accelerate") is None:
        raise GradvarError(f"--device {BALANCED} needs accelerate: pip install accelerate")
    options: dict[str, Any] = {"device_map": "auto"}
    if max_memory is not None:
        options["max_memory"] = dict(max_memory)
    elif torch.cuda.is_available():
        gpus = range(torch.cuda.device_count())
        options["max_memory"] = {i: int(_WEIGHTS_SHARE * torch.cuda.mem_get_info(i)[0]) for i in gpus}
        options["max_memory"]["cpu"] = int(_WEIGHTS_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return options


@functools.lru_cache(maxsize=8)
def _hash_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash names and contents; sizes and times are there so that a changed file is read again."""
    hasher = hashlib.sha256()
    for file, _, _ in files:
        hasher.update(file.name.encode())
        with file.open("rb") as handle:
            while block := handle.read(1 << 22):
                hasher.update(block)
    return hasher.hexdigest()


def _fetch(name: str, revision: str | None, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"] if weights else ["config.json", "*.py"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # offline, unknown, gated: many types, one meaning for the user
        raise GradvarError(
            f"--model {name}: neither a folder here nor to be had from the hub ({_first_line(error)}); "
            "check the name, or give a local folder"
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
