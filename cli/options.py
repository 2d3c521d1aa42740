"""Options that several commands share, each written once. None means not given: the default shown.

What a run holds one value of (model, temperature, dtype, ...) and what its rollouts were made with stays the run's own;
an option of the estimates is never taken over from an earlier command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="TOML or YAML file of options by the same names; the command line wins."),
]


Source = Annotated[
    Path | None,
    typer.Option(
        "--from",
        help="Rollouts made elsewhere, instead of sampling: parquet or jsonl with prompt_token_ids and "
        "response_token_ids; optional loss_mask, reward, logprobs, prompt_id, finish_reason.",
    ),
]


def _option(kind: Any, name: str, text: str, *, default: object = None, panel: str | None = None) -> Any:
    shown = str(default) if default is not None else False
    return Annotated[kind | None, typer.Option(name, help=text, show_default=shown, rich_help_panel=panel)]


_M, _P, _S, _G, _E = "Model", "Prompts", "Sampling", "Measuring", "Estimates"

Model = _option(str, "--model", "Model folder or hub id.", panel=_M)
Revision = _option(str, "--revision", "Branch, tag or commit of a hub model.", panel=_M)
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option("--trust-remote-code", help="Run the model repository's own Python code.", rich_help_panel=_M),
]
Dtype = _option(
    str,
    "--dtype",
    "float32, bfloat16, float16, float64.",
    default="auto: bfloat16 on a GPU, float32 on a CPU",
    panel=_M,
)
Device = _option(
    str,
    "--device",
    "cpu, cuda, cuda:1, or balanced: a model too large for one GPU, spread by accelerate over all GPUs, then the "
    "host's memory, then the disk.",
    default="auto",
    panel=_M,
)

Prompts = _option(
    str,
    "--prompts",
    "Problems: jsonl, json, parquet or csv; verl, Open-Reasoner-Zero, CountDown, GSM8K, MATH-500 and plain `prompt` "
    "files are recognised by their columns.",
    panel=_P,
)
PromptColumn = _option(str, "--prompt-column", "Column of the question, for other files.", panel=_P)
AnswerColumn = _option(str, "--answer-column", "Column of the gold answer, for other files.", panel=_P)
Template = _option(str, "--template", "chat, none, countdown, orz, or a file.", default="auto", panel=_P)
NPrompts = _option(int, "--n-prompts", "How many prompts, chosen by the seed.", default="all", panel=_P)
PromptIds = _option(str, "--prompt-ids", "Row numbers of the problems to take: 3,17,40.", panel=_P)

Rollouts = _option(int, "--rollouts", "Responses a prompt.", default=128, panel=_S)
Temperature = _option(float, "--temperature", "Softmax temperature.", default=1.0, panel=_S)
MaxTokens = _option(int, "--max-tokens", "Longest response in tokens.", default=3072, panel=_S)
Engine = _option(
    str, "--engine", "vllm or transformers.", default="auto: vllm where it is installed and a GPU is there", panel=_S
)
Seed = _option(int, "--seed", "Seed of every random choice.", default=0, panel=_S)
BatchSize = _option(int, "--batch-size", "Responses generated together (transformers).", default=128, panel=_S)
TensorParallel = _option(int, "--tensor-parallel-size", "GPUs for one model (vLLM).", default=1, panel=_S)
GpuMemory = _option(float, "--gpu-memory-utilization", "Fraction of the GPU's memory for vLLM.", default=0.9, panel=_S)

Reward = _option(
    str,
    "--reward",
    "countdown, math, gsm8k, exact, or your own file.py:function (verl's compute_score form).",
    default="chosen by the data's source",
)

Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--targets",
        help="last:qkv, 14:qkv,mlp, 0-3:attn, all:mlp, or a glob over module names; several times.",
        show_default="last:qkv",
        rich_help_panel=_G,
    ),
]
Bias = Annotated[
    bool | None,
    typer.Option(
        "--bias/--no-bias", help="Count biases among the parameters.", show_default="bias", rich_help_panel=_G
    ),
]
Attention = _option(
    str,
    "--attention",
    "eager, sdpa, flash_attention_2, flash_attention_3, flash_attention_4, flex_attention, or gradvar_varlen: torch's "
    "own kernel for sequences of several lengths, no flash-attn needed. Part of what a run's Grams are.",
    default="auto: variable-length kernels on a GPU where the model can have them, else sdpa",
    panel=_G,
)
Packing = Annotated[
    bool | None,
    typer.Option(
        "--packing/--no-packing",
        help="Responses one after another in one row, without padding; refused where the attention would mix them.",
        show_default="where the attention has variable-length kernels, on a GPU",
        rich_help_panel=_G,
    ),
]
TokenBudget = _option(int, "--token-budget", "Padded tokens in one forward pass.", panel=_G)
MemoryBudget = _option(
    float,
    "--memory-budget",
    "GiB that measuring may use beside the model; more passes, smaller batches and checkpointing keep to it.",
    default="most of what is free",
    panel=_G,
)
HostMemoryBudget = _option(
    float,
    "--host-memory-budget",
    "GiB of the host's memory for gradients that the device has no room for, before more passes are made; 0: none.",
    default="half of what is free beside a CUDA device, else none",
    panel=_G,
)
Probes = _option(
    int,
    "--probes",
    "Random-sign probes of each response for tau, the sum of its tokens' squared gradients (assumption 1 of "
    "`gradvar audit`): one more truncated backward pass each; 4 are a good start. Adds to a measured run.",
    default=0,
    panel=_G,
)
Prefixes = _option(
    int,
    "--prefixes",
    "Lengths along each response at which its gradient's squared norm is taken, from the same pass. Adds to a "
    "measured run.",
    default=0,
    panel=_G,
)
Checkpointing = _option(
    str,
    "--checkpointing",
    "off, reentrant or non_reentrant: above the lowest target activations are made again, not kept. Less memory, "
    "more time, the same numbers.",
    default="chosen by the memory budget",
    panel=_G,
)
Cross = _option(
    str,
    "--cross",
    "none, sketch or exact: inner products between responses to different prompts, for the CV of batches of prompts "
    "(`gradvar cv`). sketch: a random projection of each gradient, from the same pass. Adds to a measured run.",
    default="none",
    panel=_G,
)
SketchDim = _option(
    int,
    "--sketch-dim",
    "Numbers kept of each gradient and target, a power of two: products err by about 1/sqrt of it, measured and shown.",
    default=4096,
    panel=_G,
)
LeaveOut = Annotated[
    bool | None,
    typer.Option(
        "--leave-out-non-finite/--refuse-non-finite",
        help="Go on without responses whose gradient is not finite; every later table says how many.",
        show_default="refuse",
        rich_help_panel=_G,
    ),
]
LogprobLimit = _option(
    float,
    "--logprob-limit",
    "Mean difference between sampler and policy, nats per token, above which you are warned.",
    default=0.05,
    panel=_G,
)

RULE_NAMES = (
    "grpo, seq-mean-token-mean, sequence_mean, dapo, token-mean, token_mean, bnpo, prompt_mean, dr_grpo, "
    "seq-mean-token-sum-norm, seq_mean_token_sum_norm, vl_norm, token_sum, token-sum, token_sum_norm, "
    "seq_mean_token_sum, seq-mean-token-sum"
)
"""Every name of a rule, written down so that `--help` need not import the registry; a test compares."""

GroupSize = _option(int, "--group-size", "Responses an aggregator sums over.", default=8, panel=_E)
Advantage = _option(str, "--advantage", "grpo, mean, rloo, raw, score or opo.", default="grpo", panel=_E)
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        help=f"An aggregator to compare; several times, each rule once under any name: {RULE_NAMES}. Framework by "
        "framework, with arguments and scope: docs/aggregators.md.",
        show_default="grpo, dapo, dr_grpo, vl_norm",
        rich_help_panel=_E,
    ),
]
Alphas = Annotated[
    list[float] | None,
    typer.Option(
        "--alpha", help="An exponent of vl_norm; several times.", show_default="0.5 0.75 1 1.5 2", rich_help_panel=_E
    ),
]
PlanRules = Annotated[
    list[str] | None,
    typer.Option(
        "--plan-rule",
        help="An aggregator whose group size is planned, vl_norm with its alpha: vl_norm:0.75; several times.",
        show_default="grpo, vl_norm:1",
        rich_help_panel=_E,
    ),
]
BatchPrompts = Annotated[
    list[int] | None,
    typer.Option(
        "--batch-prompts",
        help="Prompts of a batch, each with a group of responses, where products between prompts are measured; several "
        "times.",
        show_default="8 128",
        rich_help_panel=_E,
    ),
]
Level = _option(float, "--level", "Coverage of the intervals.", default=0.95, panel=_E)
Margin = _option(
    float, "--margin", "How far the exponent may lie from 1 and count as proportional.", default=0.25, panel=_E
)
IdentityMargin = _option(
    float, "--identity-margin", "Assumption 0: the mean score's share of the noise in a group.", default=0.1, panel=_E
)
TokenMargin = _option(float, "--token-margin", "Assumption 1: share of token covariance.", default=0.1, panel=_E)
BaselineMargin = _option(
    float, "--baseline-margin", "Assumption 3: how far the ratio of variances may lie from 1.", default=0.1, panel=_E
)
LengthMargin = _option(
    float, "--length-margin", "Assumption 4: variance of E[g | L] over ||E g||².", default=0.25, panel=_E
)
EqualityMargin = _option(
    float,
    "--equality-margin",
    "The paper's order: CVs count as equal where their ratio lies within 1/(1 + margin) and 1 + margin.",
    default=0.05,
    panel=_E,
)
Extras = Annotated[
    bool,
    typer.Option(
        "--extras",
        help="Also with and without DAPO's overlong filtering, soft overlong punishment and dynamic sampling.",
        rich_help_panel=_E,
    ),
]
OverlongBuffer = _option(
    int,
    "--overlong-buffer",
    "Tokens before the length limit in which soft overlong punishment grows.",
    default="a fifth of the limit",
    panel=_E,
)
Rule = _option(str, "--rule", "The aggregator studied, by any name that `cv --rule` takes.", default="grpo", panel=_E)
Alpha = _option(float, "--alpha", "Its exponent, where it is vl_norm.", panel=_E)


def given(config: Path | None, **options: Any) -> dict[str, Any]:
    """Return the settings that were given: those of the config file under those of the command line.

    Raises:
        GradvarError: The file is missing, malformed, or has a setting that does not exist.
    """
    from gradvar.errors import GradvarError
    from gradvar.runs.config import read_settings

    settings = read_settings(config) if config is not None else {}
    merged = {**settings, **{name: value for name, value in options.items() if value not in (None, [], ())}}
    if isinstance(ids := merged.get("prompt_ids"), str):
        merged["prompt_ids"] = tuple(part.strip() for part in ids.split(",") if part.strip())
        if not merged["prompt_ids"]:
            raise GradvarError(f"--prompt-ids: expected row numbers such as 3,17, received {ids!r}")
    return merged
