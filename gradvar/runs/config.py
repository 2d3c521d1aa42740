"""Every setting of a run, once: frozen dataclasses, checked when built.

`resolve` layers settings: defaults, then what the run was made with, then a TOML or YAML file, then the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from gradvar.errors import GradvarError

ENGINES = ("auto", "vllm", "transformers", "imported")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
CROSS = ("none", "sketch", "exact")
ATTENTION = (
    "auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention",
    "gradvar_varlen",
)  # fmt: skip
CHECKPOINTING = ("off", "reentrant", "non_reentrant")
ADVANTAGE_KINDS = ("grpo", "mean", "rloo", "raw", "score", "opo")
"""Names of the advantage estimators, which `estimators.advantages` defines."""
RULES = ("grpo", "dapo", "dr_grpo", "vl_norm")
"""Aggregators compared where none is named."""
ALPHAS = (0.5, 0.75, 1.0, 1.5, 2.0)
"""Exponents of vl_norm compared where none is named."""
EQUALITY_MARGIN = 0.05
"""CVs whose ratio lies within [1 / 1.05, 1.05] count as equal."""

MAX_SEED = 2**63 - 1
"""Tables hold seeds as signed 64-bit integers."""

_OPTIONS = {"alphas": "alpha", "rules": "rule", "plan_rules": "plan-rule", "include_bias": "bias"}


def _option(name: str) -> str:
    """Return a setting's name on the command line."""
    return "--" + _OPTIONS.get(name, name).replace("_", "-")


def _require(condition: bool, name: str, expected: str, received: object) -> None:
    if not condition:
        raise GradvarError(f"{_option(name)}: expected {expected}, received {received!r}")


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How prompts and rollouts are made."""

    model: str = ""
    """Folder or hub id of a Hugging Face causal LM."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships."""
    prompts: str | None = None
    """File of problems: jsonl, json, parquet or csv."""
    prompt_column: str | None = None
    """Column that holds the question, for files of no known schema."""
    answer_column: str | None = None
    """Column that holds the gold answer, for files of no known schema."""
    template: str = "auto"
    """auto, chat, none, countdown, orz, or a file."""
    n_prompts: int | None = None
    """How many prompts, chosen by the seed; None means all."""
    prompt_ids: tuple[str, ...] = ()
    """Row numbers of the problems to take, instead of a seeded choice."""
    rollouts: int = 128
    """Responses a prompt."""
    temperature: float = 1.0
    """Softmax temperature of sampling and of every log-probability."""
    max_tokens: int = 3072
    """Longest response in tokens."""
    engine: str = "auto"
    """vllm, transformers, or auto: vllm where it is installed and a GPU is there."""
    dtype: str = "auto"
    """Model dtype for sampling and measuring; auto is bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..., or balanced: spread over all GPUs, then the host's memory, by accelerate."""
    seed: int = 0
    """Seed of the choice of prompts and of every rollout."""
    batch_size: int = 128
    """Responses generated together by the transformers engine; part of what a seed means."""
    tensor_parallel_size: int = 1
    """GPUs that vLLM spreads one model over."""
    gpu_memory_utilization: float = 0.9
    """Fraction of the GPU's memory that vLLM may take."""

    def __post_init__(self) -> None:
        _require(self.rollouts >= 2, "rollouts", "at least 2 (a variance needs two responses)", self.rollouts)
        _require(_is_positive(self.temperature), "temperature", "a number above 0", self.temperature)
        _require(self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        _require(self.n_prompts is None or self.n_prompts >= 1, "n_prompts", "at least 1", self.n_prompts)
        _require(self.engine in ENGINES, "engine", f"one of {', '.join(ENGINES)}", self.engine)
        _require(self.dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        _require(0 <= self.seed <= MAX_SEED, "seed", "a whole number from 0 to 2^63 - 1", self.seed)
        _require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        _require(self.tensor_parallel_size >= 1, "tensor_parallel_size", "at least 1", self.tensor_parallel_size)
        _require(
            0 < self.gpu_memory_utilization <= 1,
            "gpu_memory_utilization",
            "a fraction above 0, at most 1",
            self.gpu_memory_utilization,
        )


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How responses are scored."""

    reward: str | None = None
    """A reward's name or file.py:function; None lets the data's source choose."""


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Which gradients are measured."""

    targets: tuple[str, ...] = ("last:qkv",)
    """Target specs: last:qkv, 14:qkv,mlp, 0-3:attn, all:mlp, or a glob over module names."""
    include_bias: bool = True
    """Count the targets' biases among the parameters."""
    attention: str = "auto"
    """auto, eager, sdpa, flash_attention_2, flash_attention_3, flash_attention_4, flex_attention or gradvar_varlen;
    auto takes variable-length kernels on a GPU where the model can have them, else transformers' choice."""
    packing: bool | None = None
    """Responses one after another in one row, without padding; None: where the attention has kernels for it."""
    token_budget: int | None = None
    """Padded tokens in one forward pass; None chooses."""
    memory_budget: float | None = None
    """GiB that measuring may use; None chooses."""
    host_memory_budget: float | None = None
    """GiB of the host's memory for gradients that the device has no room for; None chooses."""
    probes: int = 0
    """Random-sign probes of a response for tau, one truncated backward pass each; 0 measures none."""
    prefixes: int = 0
    """Lengths along each response at which the score's squared norm is taken; 0 measures none."""
    cross: str = "none"
    """sketch or exact: also measure inner products between responses to different prompts, for batches of prompts."""
    sketch_dim: int = 4096
    """Numbers kept of each response's gradient over a target: an inner product errs by about 1 / sqrt(sketch_dim)."""
    seed: int = 0
    """Seed of the probes' signs and of the sketches."""
    checkpointing: str | None = None
    """off, reentrant or non_reentrant; None chooses."""
    leave_out_non_finite: bool = False
    """Leave out responses whose gradient is not finite, instead of stopping."""
    logprob_limit: float = 0.05
    """Mean absolute difference in nats per token between sampler and policy above which the user is warned."""

    def __post_init__(self) -> None:
        _require(len(self.targets) > 0, "targets", "at least one target", self.targets)
        _require(self.attention in ATTENTION, "attention", f"one of {', '.join(ATTENTION)}", self.attention)
        _require(self.token_budget is None or self.token_budget >= 1, "token_budget", "at least 1", self.token_budget)
        _require(
            self.memory_budget is None or _is_positive(self.memory_budget),
            "memory_budget",
            "GiB above 0",
            self.memory_budget,
        )
        _require(
            self.host_memory_budget is None or self.host_memory_budget == 0 or _is_positive(self.host_memory_budget),
            "host_memory_budget",
            "GiB, 0 or more",
            self.host_memory_budget,
        )
        _require(self.probes >= 0, "probes", "0 or more", self.probes)
        _require(
            self.prefixes == 0 or self.prefixes >= 2, "prefixes", "at least 2 lengths, or 0 for none", self.prefixes
        )
        _require(self.cross in CROSS, "cross", f"one of {', '.join(CROSS)}", self.cross)
        d = self.sketch_dim
        _require(256 <= d <= 65536 and d & (d - 1) == 0, "sketch_dim", "a power of two from 256 to 65536", d)
        _require(0 <= self.seed <= MAX_SEED, "seed", "a whole number from 0 to 2^63 - 1", self.seed)
        _require(
            self.checkpointing is None or self.checkpointing in CHECKPOINTING,
            "checkpointing",
            f"one of {', '.join(CHECKPOINTING)}",
            self.checkpointing,
        )
        _require(_is_positive(self.logprob_limit), "logprob_limit", "nats above 0", self.logprob_limit)


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """How the numbers are made from the Grams."""

    group_size: int = 8
    """Responses in the group that an aggregator sums over."""
    advantage: str = "grpo"
    """grpo, mean, rloo, raw, score or opo."""
    rules: tuple[str, ...] = RULES
    """Aggregators to compare."""
    alphas: tuple[float, ...] = ALPHAS
    """Exponents of vl_norm to compare."""
    plan_rules: tuple[str, ...] = ("grpo", "vl_norm:1")
    """Rules whose group size is planned; vl_norm with its alpha after a colon."""
    batch_prompts: tuple[int, ...] = (8, 128)
    """Prompts of a batch, where the run holds products between prompts; each has a group of responses."""
    level: float = 0.95
    """Coverage of the intervals."""
    margin: float = 0.25
    """How far the exponent may lie from 1 and still count as proportional."""
    identity_margin: float = 0.1
    """Audit, assumption 0: ||E s||^2 below this share of the noise in a group."""
    token_margin: float = 0.1
    """Audit, assumption 1: absolute share of token covariance below this."""
    baseline_margin: float = 0.1
    """Audit, assumption 3: ratio of variances within this of 1."""
    length_margin: float = 0.25
    """Audit, assumption 4: variance of E[g | L] below this share of ||E g||^2."""
    equality_margin: float = EQUALITY_MARGIN
    """The paper's order: CVs count as equal where their ratio lies within [1 / (1 + margin), 1 + margin]."""
    overlong_buffer: int | None = None
    """Tokens before the length limit in which soft overlong punishment grows; None: a fifth of the limit, as DAPO."""
    seed: int = 0
    """Seed of permutations and tie breaks."""

    def __post_init__(self) -> None:
        _require(self.group_size >= 2, "group_size", "at least 2", self.group_size)
        _require(self.advantage in ADVANTAGE_KINDS, "advantage", f"one of {', '.join(ADVANTAGE_KINDS)}", self.advantage)
        _require(
            self.overlong_buffer is None or self.overlong_buffer >= 1,
            "overlong_buffer",
            "at least 1 token",
            self.overlong_buffer,
        )
        _require(len(self.rules) > 0, "rules", "at least one aggregator", self.rules)
        _require(len(self.plan_rules) > 0, "plan_rules", "at least one aggregator", self.plan_rules)
        _require(all(map(math.isfinite, self.alphas)), "alphas", "finite numbers", self.alphas)
        sizes = self.batch_prompts
        _require(len(sizes) > 0 and min(sizes) >= 1, "batch_prompts", "numbers of prompts from 1", sizes)
        _require(0.5 <= self.level < 1, "level", "a fraction from 0.5, below 1", self.level)
        for name in ("margin", *(f"{what}_margin" for what in ("identity", "token", "baseline", "length", "equality"))):
            _require(_is_positive(getattr(self, name)), name, "a number above 0", getattr(self, name))
        _require(0 <= self.seed <= MAX_SEED, "seed", "a whole number from 0 to 2^63 - 1", self.seed)


CONFIGS: dict[str, type[Any]] = {
    "sample": SampleConfig,
    "reward": RewardConfig,
    "measure": MeasureConfig,
    "estimate": EstimateConfig,
}
"""Section of run.json to its dataclass."""

IDENTITY: dict[str, tuple[str, ...]] = {
    "sample": ("template", "temperature", "max_tokens", "engine", "dtype", "seed", "batch_size"),
    "measure": ("include_bias",),
}
"""Settings that one run may hold one value of; the model is compared by its weights' hash, prompts by their texts."""

Config = TypeVar("Config", SampleConfig, RewardConfig, MeasureConfig, EstimateConfig)


def resolve(kind: type[Config], *layers: Mapping[str, Any]) -> Config:
    """Build a config from layers of settings, the later winning; None means not given.

    Raises:
        GradvarError: A value has the wrong type or is out of range.
    """
    hints = typing.get_type_hints(kind)
    given = {name: value for layer in layers for name, value in layer.items() if name in hints and value is not None}
    return kind(**{name: _converted(name, value, hints[name]) for name, value in given.items()})


def read_settings(path: Path) -> dict[str, Any]:
    """Read a TOML or YAML file of settings with the command line's names (dashes or underscores).

    Raises:
        GradvarError: The file is missing, of another kind, malformed, or has a setting that does not exist.
    """
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise GradvarError(
            f"--config {path}: expected a .toml, .yaml or .yml file, received {path.suffix or path.name!r}"
        )
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except OSError as error:
        raise GradvarError(f"--config {path}: {error.strerror}; give a file that exists and can be read") from error
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise GradvarError(f"--config {path}: not valid {path.suffix[1:].upper()}: {reason}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise GradvarError(f"--config {path}: expected names with values, received {type(content).__name__}")
    known = [field.name for kind in CONFIGS.values() for field in dataclasses.fields(kind)]
    settings = {str(name).replace("-", "_"): value for name, value in content.items()}
    if "bias" in settings:
        settings["include_bias"] = settings.pop("bias")
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(set(known)))}"
            raise GradvarError(f"--config {path}: no setting named {name!r}{hint}")
    return settings


def as_json(config: object) -> dict[str, Any]:
    """Return a config as JSON-ready values."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()}


def _converted(name: str, value: Any, hint: Any) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is tuple:
            item = typing.get_args(option)[0]
            if isinstance(value, dict):
                continue
            values = [value] if isinstance(value, str | int | float) else list(value)
            return tuple(_converted(name, one, item) for one in values)
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if option is str and isinstance(value, str | int) and not isinstance(value, bool):
            return str(value)
    expected = " or ".join(getattr(o, "__name__", str(o)) for o in options if o is not type(None))
    raise GradvarError(f"{_option(name)}: expected {expected}, received {value!r}")
