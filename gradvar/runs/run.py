"""One run directory: what it holds, read and written file by file (format_version 1)."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradvar.errors import GradvarError
from gradvar.runs import provenance, storage
from gradvar.runs.config import CONFIGS, Config, EstimateConfig, as_json, resolve
from gradvar.runs.files import RunFiles, rollouts_digest
from gradvar.runs.measures import Measures, PrefixNorms, TauEstimate, read_left_out
from gradvar.runs.records import PromptScores, Rollout, ScoreGram

FORMAT_VERSION = 1
SUM = "sum"
"""The pseudo target that stands for all measured targets together."""


class Run(RunFiles):
    """A run directory that exists. Made by `open_run` or `create_run`."""

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        super().__init__(path)
        self.info = info

    # --- run.json -----------------------------------------------------------------------------------------------

    def config(self, kind: type[Config]) -> Config:
        """Return the section of the configuration that `kind` describes, as this run holds it."""
        return resolve(kind, self.stored(kind))

    def stored(self, kind: type[Config]) -> dict[str, Any]:
        """Return the settings of one section as run.json holds them (empty before its stage ran)."""
        return dict(self.info["config"].get(_section(kind), {}))

    def options(self, stage: str) -> EstimateConfig:
        """Return the options that an estimating stage's tables were made with, the defaults before it ran.

        They describe tables that are there, and are no later command's defaults. Runs of earlier versions hold one
        set for all stages.
        """
        made = self.info["stages"].get(stage, {}).get("options")
        return resolve(EstimateConfig, self.stored(EstimateConfig) if made is None else made)

    def save(self) -> None:
        """Write run.json."""
        storage.write_json(self.path / "run.json", self.info)

    def begin(
        self, stage: str, config: Config | None = None, *, device: str | None = None, started: str | None = None
    ) -> None:
        """Note in run.json that a stage started, with its settings and what it runs on.

        How estimates are made belongs to the stage (`options`), everything else to the run (`config`).
        """
        how = as_json(config) if isinstance(config, EstimateConfig) else None
        if config is not None and how is None:
            self.info["config"][_section(type(config))] = as_json(config)
        self.info["status"] = f"{stage}: running"
        self.info["stages"][stage] = {
            "status": "running",
            "started": started or provenance.utc_now(),
            "packages": provenance.package_versions(),
            "git": provenance.git_state(),
            "host": provenance.host(),
            **({"device": device} if device else {}),
            **({"options": how} if how is not None else {}),
        }
        self.save()
        self.log(f"{stage} started")

    def finish(self, stage: str, **facts: Any) -> None:
        """Note in run.json that a stage is complete."""
        self.info["status"] = f"{stage}: complete"
        self.info["stages"][stage].update({"status": "complete", "finished": provenance.utc_now(), **facts})
        self.save()
        self.log(f"{stage} complete", **facts)

    def log(self, event: str, **facts: Any) -> None:
        """Append one line to log.jsonl."""
        line = json.dumps({"time": provenance.utc_now(), "event": event, **facts}, ensure_ascii=False) + "\n"
        try:
            with (self.path / "log.jsonl").open("a", encoding="utf-8") as handle:
                handle.write(line)
        except OSError as error:
            raise GradvarError(
                f"cannot write {self.path / 'log.jsonl'}: {error.strerror}; make room, then run the same command again"
            ) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for writing; the lock goes with the process, however it ends.

        Raises:
            GradvarError: Another process is working on this run, or the folder is not writable.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / ".lock").open("w")
        except OSError as error:
            raise GradvarError(
                f"cannot write to {self.path}: {error.strerror}; choose a run folder you may write to"
            ) from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise GradvarError(
                    f"another process is working on {self.path}; wait for it to end, then run the command again"
                ) from None
            yield

    # --- for the estimators -------------------------------------------------------------------------------------

    @property
    def targets(self) -> list[str]:
        """Targets that every measured prompt holds, in the order they were measured."""
        measured = [self.gram_targets(p) for p in self.measured_prompt_ids()]
        return [name for name in measured[0] if all(name in others for others in measured)] if measured else []

    def measured_prompt_ids(self) -> list[str]:
        """Prompts whose Grams are in the run."""
        return [p for p in self.prompt_ids if self.file("grams", p).exists()]

    def scores(self, target: str = SUM) -> list[PromptScores]:
        """Return what the estimators need of every measured prompt, for one target or the sum of all.

        A prompt without rewards gets NaN rewards: unverified, so score-only results remain. A response that was left
        out over one target is left out of all, so that targets compare.

        Raises:
            GradvarError: Nothing was measured, or the target is not in the run.
        """
        return self.scores_of([target])

    def scores_of(self, targets: Sequence[str]) -> list[PromptScores]:
        """Return what the estimators need for several targets, target after target; every file is read once.

        Raises:
            GradvarError: As `scores`.
        """
        prompt_ids = self.measured_prompt_ids()
        if not prompt_ids:
            raise GradvarError(f"{self.path} holds no score Grams: run `gradvar measure {self.path}` first")
        known = self.targets
        if not known:
            raise GradvarError(f"prompts of {self.path} have no target in common: run `gradvar measure {self.path}`")
        for target in targets:
            if target != SUM and target not in known:
                raise GradvarError(f"target {target!r} is not in {self.path}: known are {', '.join([SUM, *known])}")
        if self.info["stages"].get("reward", {}).get("status") == "running":
            raise GradvarError(f"scoring {self.path} was not finished: run `gradvar reward {self.path}` again")
        max_length = int(self.info["config"].get("sample", {}).get("max_tokens", 0))
        scores: dict[str, list[PromptScores]] = {target: [] for target in targets}
        for prompt_id in prompt_ids:
            grams, rollouts = self.grams(prompt_id), self._measured_rollouts(prompt_id)
            measures = self.measures(prompt_id) if self.file("measures", prompt_id).exists() else None
            ids = _kept_ids([grams[name] for name in known], measures)
            if len(ids) < 2:
                raise GradvarError(f"prompt {prompt_id!r} has fewer than 2 responses that were not left out")
            place = {r.rollout_id: row for row, r in enumerate(rollouts)}
            rows = [place[name] for name in ids]
            parts = {name: _restricted(grams[name], ids) for name in known if SUM in targets or name in targets}
            has_rewards = self.file("rewards", prompt_id).exists()
            rewards = self.rewards(prompt_id)[: len(rollouts)] if has_rewards else np.full(len(rollouts), np.nan)
            if len(rewards) != len(rollouts):
                raise GradvarError(f"prompt {prompt_id!r} has unscored rollouts: run `gradvar reward {self.path}`")
            kept = [rollouts[row] for row in rows]
            lengths = np.array([r.length for r in kept], dtype=np.float64)
            shared: dict[str, Any] = {
                "prompt_id": prompt_id,
                "rewards": rewards[rows],
                "lengths": lengths,
                "truncated": np.array([r.finish_reason == "length" for r in kept]),
                "log_probs": None if measures is None else _summed_log_probs(measures, kept),
                "max_length": max(max_length, int(lengths.max())),
                "rollout_ids": ids,
            }
            for target, found in scores.items():
                gram = np.sum(list(parts.values()), axis=0) if target == SUM else parts[target]
                found.append(PromptScores(target=target, gram=gram, **shared))
        return [one for found in scores.values() for one in found]

    def taus(self) -> dict[tuple[str, str], TauEstimate]:
        """Return tau of the responses in `scores`, in their order, by (prompt_id, target); where it was measured."""
        return {
            (prompt_id, key): tau for prompt_id, kept in self._kept_measures() for key, tau in kept.taus.items()
        }  # fmt: skip

    def prefixes(self) -> dict[tuple[str, str], PrefixNorms]:
        """Return prefix norms of the responses in `scores`, in their order, by (prompt_id, target); where measured."""
        return {
            (prompt_id, key): norms for prompt_id, kept in self._kept_measures() for key, norms in kept.prefixes.items()
        }  # fmt: skip

    def left_out(self) -> dict[str, dict[int, str]]:
        """Return, by prompt, the rollout ids that are in no estimate and what of them was not finite."""
        paths = {name: self.file("measures", name) for name in self.measured_prompt_ids()}
        return {name: found for name, path in paths.items() if path.exists() and (found := read_left_out(path))}

    def _kept_measures(self) -> Iterator[tuple[str, Measures]]:
        known = self.targets
        for prompt_id in self.measured_prompt_ids():
            if self.file("measures", prompt_id).exists():
                grams, measures = self.grams(prompt_id), self.measures(prompt_id)
                ids = _kept_ids([grams[name] for name in known], measures)
                if set(ids) <= set(measures.rollout_ids):
                    yield prompt_id, measures.select(ids)

    def _measured_rollouts(self, prompt_id: str) -> list[Rollout]:
        """Return the rollouts that the prompt's Grams were measured on; the run may hold more by now."""
        rollouts, measured = self.rollouts(prompt_id), self.measured_ids(prompt_id)
        before = rollouts[: len(measured)]
        if measured != tuple(r.rollout_id for r in before):
            raise GradvarError(
                f"the Grams of prompt {prompt_id!r} were measured on other rollouts: "
                f"run `gradvar measure {self.path}` again"
            )
        if self.grams_label(prompt_id) != rollouts_digest(before):
            raise GradvarError(
                f"the Grams of prompt {prompt_id!r} were measured on other tokens: "
                f"run `gradvar measure {self.path}` again"
            )
        return before


def _kept_ids(grams: Sequence[ScoreGram], measures: Measures | None) -> tuple[int, ...]:
    """Return the rollouts that all these Grams of a prompt hold and nobody left out, in their order."""
    common = set.intersection(*[set(gram.rollout_ids) for gram in grams])
    if measures is not None:
        common -= set(measures.left_out)
    return tuple(name for name in grams[0].rollout_ids if name in common)


def _summed_log_probs(measures: Measures, rollouts: Sequence[Rollout]) -> NDArray[np.float64] | None:
    ids = [r.rollout_id for r in rollouts]
    if not set(ids) <= set(measures.rollout_ids):
        return None
    masks = [np.ones(len(r.token_ids)) if r.loss_mask is None else np.array(r.loss_mask) for r in rollouts]
    logprobs = measures.select(ids).policy_logprobs
    return np.array([float(lp.astype(np.float64) @ mask) for lp, mask in zip(logprobs, masks, strict=True)])


def _restricted(gram: ScoreGram, ids: Sequence[int]) -> NDArray[np.float64]:
    """Return the Gram's matrix of these rollouts alone."""
    place = {name: row for row, name in enumerate(gram.rollout_ids)}
    rows = [place[name] for name in ids]
    return gram.matrix[np.ix_(rows, rows)]


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open an existing run directory; loads no torch.

    Args:
        path: The folder that `gradvar run` or `gradvar sample` made.

    Raises:
        GradvarError: The folder is missing, is not a run, is damaged, or is of a newer format.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise GradvarError(
            f"no run directory at {folder}: expected a folder that `gradvar run` or `gradvar sample` made"
        )
    if not (folder / "run.json").is_file():
        raise GradvarError(
            f"{folder} is not a gradvar run: it has no run.json; `gradvar sample {folder} ...` makes one"
        )
    try:
        info = storage.read_json(folder / "run.json")
    except GradvarError as error:
        reason = str(error).rpartition(";")[0]
        raise GradvarError(f"{reason}; put a copy of it back: without it the run cannot be read") from error
    if not isinstance(info, dict) or not isinstance(info.get("format_version"), int):
        raise storage.damaged(folder / "run.json", "no format_version")
    if info["format_version"] > FORMAT_VERSION:
        raise GradvarError(
            f"{folder} has format_version {info['format_version']}, this gradvar reads up to {FORMAT_VERSION}: "
            "upgrade gradvar"
        )
    if not isinstance(info.get("config"), dict) or not isinstance(info.get("stages"), dict):
        raise storage.damaged(folder / "run.json", "no config or stages")
    return Run(folder, info)


def create_run(path: str | os.PathLike[str]) -> Run:
    """Return the run in a folder, or a new one, which is written when its first stage begins.

    Raises:
        GradvarError: The folder holds something else, or cannot be written.
    """
    folder = Path(path)
    if (folder / "run.json").exists():
        return open_run(folder)
    if folder.exists() and not folder.is_dir():
        raise GradvarError(f"{folder} is a file: expected a new or empty folder, or an existing run")
    leftovers = [p.name for p in folder.iterdir() if not p.name.startswith(".")] if folder.is_dir() else []
    if leftovers:
        raise GradvarError(
            f"{folder} is not a gradvar run and not empty (it holds {leftovers[0]!r}): choose a new folder"
        )
    return Run(
        folder,
        {
            "format_version": FORMAT_VERSION,
            "status": "new",
            "created": provenance.utc_now(),
            "model": {},
            "config": {},
            "stages": {},
        },
    )


def _section(kind: type[Any]) -> str:
    return next(name for name, each in CONFIGS.items() if each is kind)
