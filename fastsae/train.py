"""Train a dictionary on stored activations: one loop, top to bottom.

Axes: N tokens in a batch, F dictionary size, D width.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae import shards
from fastsae.device import choose_device
from fastsae.errors import DataError, FastSAEError
from fastsae.estimate import check_fits
from fastsae.files import claim_folder, truncate_log, write_json
from fastsae.harvest import check_options
from fastsae.interrupt import uninterrupted
from fastsae.optim import k_at, lr_factor, penalty_factor
from fastsae.progress import Meter, progress
from fastsae.recipe import Preset, Store, TrainConfig, start
from fastsae.resample import resample
from fastsae.sae import SAE
from fastsae.step import StepMetrics, TrainStep
from fastsae.store import MemoryStore

__all__ = ["TrainConfig", "train"]

LOG, CHECKPOINT, FOLDER, RESULT = "log.jsonl", "checkpoint", "sae", "train.json"

Row = dict[str, float]


def train(
    store: Store | Tensor,
    config: TrainConfig | None = None,
    out: str | Path | None = None,
    *,
    preset: Preset | None = None,
    resume: bool = False,
    show_progress: bool = True,
    on_log: Callable[[Row], None] | None = None,
    **options: Any,
) -> SAE:
    """Train an SAE on a store, or on a tensor of activations [N, D].

    config, or a preset's name, or nothing for the defaults; options: fields of TrainConfig, on top of either.
    out: folder for `log.jsonl` (one object every `log_every` steps), `checkpoint/`, and at the end `sae/`
    (`SAE.from_pretrained`) and `train.json` (the last line of the log). None writes nothing.
    resume: go on from the folder's checkpoint, on the CPU (with as many threads) bit for bit as if never stopped, or
    take the finished SAE.
    on_log: called with each log line. Ctrl-C finishes the step, writes a checkpoint and raises KeyboardInterrupt.

    A log line: step, tokens, loss, mse, sparsity, aux (units: fastsae.activations), l0, fve (of that batch), dead (the
    fraction of latents that has not fired for `dead_after_tokens`), lr, penalty (factor of the warm-up), tokens_per_s,
    and where gradients are clipped grad_norm, the norm before that.

    Raises FastSAEError: a store of another width, K > F, fewer rows than a batch, a loss that is not finite, a folder
    that holds another run, a full disk, and before anything is allocated, a device with less memory than it takes.
    """
    source = MemoryStore(store) if isinstance(store, Tensor) else store
    if preset is not None:
        if config is not None:
            raise FastSAEError("expected a config or a preset, got both: give the preset and options on top of it")
        config = TrainConfig.preset(preset, **{"d_in": source.width} | check_options(TrainConfig, options))
    else:
        config = replace(config or TrainConfig(), **check_options(TrainConfig, options))
    config = config.complete(source.width, source.count)
    run = _Run(config, source, None if out is None else Path(out), resume)
    if run.finished is not None:
        return run.finished
    total, done = config.steps * config.batch_size, run.step * config.batch_size
    with progress("train", total, "tokens", done, show_progress) as meter:
        try:
            _loop(run, meter, on_log)
        except KeyboardInterrupt:
            run.save()
            raise
    return run.finish()


def _loop(run: _Run, meter: Meter, on_log: Callable[[Row], None] | None) -> None:
    config = run.config
    resample_steps = {max(1, round(a * config.steps)) for a in config.resample_at}
    run.sae.train()
    for batch in run.store.batches(config.batch_size, seed=config.seed, start_step=run.step):
        if run.step == config.steps:
            break
        with uninterrupted():
            metrics = _step(run, batch.x)
            if run.step in resample_steps:
                _resample(run)
            meter.advance(config.batch_size)
            if run.step % config.log_every == 0 or run.step == config.steps:
                row = run.log(metrics, meter.rate)
                meter.note = f"loss {row['loss']:.4g}, L0 {row['l0']:.1f}, FVE {row['fve']:.3f}, dead {row['dead']:.1%}"
                if on_log is not None:
                    on_log(row)
            if run.step % config.checkpoint_every == 0:
                run.save()


def _step(run: _Run, x: Tensor) -> StepMetrics:
    """One optimizer step on x [N, D]."""
    config, step = run.config, run.train_step
    step.lr = config.lr * lr_factor(run.step, config.steps, config.lr_warmup, config.lr_decay)
    step.penalty = penalty_factor(run.step, config.steps, config.l1_warmup)
    step.k = k_at(run.step, config.steps, config.k_start or config.k, config.k, config.k_anneal)
    try:
        metrics = step(x.to(run.sae.device, non_blocking=True))
    except DataError as error:  # rows of a store are finite, so what is not was made here
        raise DataError(f"in step {run.step + 1}: {error}, or lower lr (it is {config.lr:.2g})") from None
    run.step += 1
    return metrics


def _resample(run: _Run) -> None:
    config, sae = run.config, run.sae
    wanted = min(config.resample_inputs, run.store.count)
    size = min(4096, wanted)
    seed = config.seed + 7919 * run.step  # its own order of the data, the same after a resume
    batches = run.store.batches(size, seed=seed)
    inputs = (next(batches).x for _ in range(wanted // size))
    dead = sae.tokens_since_fired >= config.dead_after_tokens
    run.resampled += resample(sae, run.train_step, inputs, dead, torch.Generator().manual_seed(seed))


class _Run:
    """What a checkpoint holds, and the folder it lives in."""

    def __init__(self, config: TrainConfig, store: Store, out: Path | None, resume: bool) -> None:
        self.config, self.store, self.out = config, store, out
        self.step, self.resampled = 0, 0
        self.last: Row = {}
        self.finished: SAE | None = None
        saved = None
        if out is not None:
            settings = {k: v for k, v in asdict(config).items() if k not in ("log_every", "checkpoint_every", "device")}
            claim_folder(out, "train", {"train": settings, "store": store.identity}, resume)
            if (out / RESULT).exists():
                self.finished = SAE.from_pretrained(out / FOLDER)
                return
            saved = out / CHECKPOINT if shards.exists(out / CHECKPOINT) else None
        device = choose_device(config.device)
        check_fits(config, device)
        self.sae = SAE(config.sae, device=device) if saved else start(config, store, device)
        self.train_step = TrainStep(
            self.sae, betas=(config.beta1, config.beta2), state=config.state, master=config.master, clip=config.clip,
            clip_by=config.clip_by, lazy=config.lazy, dead_every=config.dead_every, seed=config.seed,
        )  # fmt: skip
        if saved:
            about = shards.about(saved)
            shards.read(saved, into=self.tensors)
            self.step, self.resampled = about["step"], about["resampled"]
            self.train_step.go_on(about)
        if out is not None:
            truncate_log(out / LOG, self.step)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds but numbers, the very tensors."""
        parts = {"sae": self.sae.state_dict(), "adam": self.train_step.tensors}
        return {f"{part}.{name}": t for part, tensors in parts.items() for name, t in tensors.items()}

    def log(self, metrics: StepMetrics, rate: float) -> Row:
        """One line of the log; the only place where the loop waits for the device."""
        dead = self.sae.tokens_since_fired >= self.config.dead_after_tokens
        row: Row = {
            "step": self.step,
            "tokens": self.step * self.config.batch_size,
            **{name: float(getattr(metrics, name)) for name in ("loss", "mse", "sparsity", "aux", "l0", "fve")},
            "dead": float(dead.float().mean()),
            "lr": self.train_step.lr,
            "penalty": self.train_step.penalty,
            "resampled": self.resampled,
            "tokens_per_s": rate,
        }
        if metrics.grad_norm is not None:
            row["grad_norm"] = float(metrics.grad_norm)
        if not math.isfinite(row["loss"]):
            raise FastSAEError(
                f"the loss became {row['loss']} at step {self.step}: lower lr (it is {self.config.lr:.2g}) or normalise"
            )
        if self.out is not None:
            with open(self.out / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.last = row
        return row

    def save(self) -> None:
        """A checkpoint, atomically."""
        if self.out is None:
            return
        about = {"step": self.step, "resampled": self.resampled, **self.train_step.numbers}
        shards.write(self.out / CHECKPOINT, self.tensors, about)

    def _summary(self) -> dict[str, Any]:
        """The last row of the log, the configuration, and what the activations are of, where a harvest has noted it."""
        noted = {key: self.store.meta[key] for key in ("model", "hook") if key in self.store.meta}
        return self.last | {"config": asdict(self.config)} | ({"activations": noted} if noted else {})

    def finish(self) -> SAE:
        """Save the SAE in its final form, drop the checkpoint."""
        self.train_step.restore_order()
        self.sae.eval()
        if self.out is not None:
            self.sae.save_pretrained(self.out / FOLDER)
            write_json(self.out / RESULT, self._summary())
            shutil.rmtree(self.out / CHECKPOINT, ignore_errors=True)
        return self.sae
