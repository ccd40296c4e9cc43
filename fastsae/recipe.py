"""How a dictionary is trained: TrainConfig, its presets, and the start of the SAE from data.

Axes: N tokens, F dictionary size, D width.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastsae.config import SAEConfig
from fastsae.errors import ConfigError, FastSAEError
from fastsae.moments import State
from fastsae.optim import default_lr, geometric_median
from fastsae.sae import SAE
from fastsae.step import ClipBy, Master
from fastsae.store import ActivationStore, MemoryStore, steps_per_epoch

Preset = Literal["monosemanticity", "april2024", "relu", "topk"]
Store = ActivationStore | MemoryStore

STATISTICS_ROWS = 2**16  # for E‖x − mean‖: its standard error is 1/256 of the spread of the norms
START_ROWS = 2**14


@dataclass(frozen=True, kw_only=True)
class TrainConfig(SAEConfig):
    """Everything that fixes a training run but its data: the options of SAEConfig, and these.

    Lengths are in tokens (activations) or fractions of the run, so that a recipe keeps its shape at any scale.
    Raises ConfigError for values that cannot be meant.
    """

    d_in: int = 0
    """D, the width of the activations; 0 takes the store's."""
    d_sae: int = 0
    """F, the number of latents; 0 means 8 × width."""
    dead_after_tokens: int = 0
    """A latent is dead when it has not fired on this many training tokens. 0 means: with resampling, half of the
    shortest time between two of them; else 10M tokens or a tenth of the run, whichever is less."""
    tokens: int = 0
    """Training tokens in all; more than the store holds are taken in further passes, each in another order. 0 means
    one pass over the store."""
    batch_size: int = 4096
    """Tokens in an optimizer step."""
    lr: float = 0.0
    """Peak learning rate of Adam; 0 means 2e-4 / √(F / 2¹⁴), and up to five times as much in runs of < 20,000 steps."""
    beta1: float = 0.9
    """Adam's decay of the mean of gradients."""
    beta2: float = 0.999
    """Adam's decay of the mean of squared gradients."""
    lr_warmup: float = 0.01
    """Fraction of the run over which the learning rate rises from 0."""
    lr_decay: float = 0.2
    """Fraction of the run, at its end, over which the learning rate falls to 0."""
    l1_warmup: float = 0.05
    """Fraction of the run over which the sparsity penalty rises from 0."""
    clip: float = 1.0
    """Largest norm of all gradients together, 0 for no limit. In the units of the loss: with unit-norm decoders and
    E‖x‖ = √D gradients are well above 1 at the start, which Adam does not mind."""
    clip_by: ClipBy = "exact"
    """exact makes the gradients twice, first for their norm; previous takes the norm of the step before."""
    state: State = "fp32"
    """How Adam's moments are kept: fp32, bf16, 8bit, or rowwise (one second moment for a latent); see TrainStep."""
    master: Master = "fp32"
    """fp32 updates fp32 weights, a copy of them for a dictionary in half precision; bf16-sr (with dtype bfloat16) the
    weights themselves, with stochastic rounding."""
    lazy: bool = False
    """Whether latents that did not fire wait, moments and all, which is an approximation unless beta1 is 0."""
    dead_every: int = 1
    """Dead latents are evaluated and trained in every dead_every-th step only; the others work on the living alone."""
    k_start: int = 0
    """topk, batchtopk: latents kept per token at the start; 0 means k."""
    k_anneal: float = 0.0
    """Fraction of the run over which they come down from k_start to k."""
    normalise: Literal["none", "scale", "centre"] = "scale"
    """What is done to the input (and undone at the output): nothing; one factor, so that E‖x‖ = √D; or the mean
    subtracted first. Where the mean is most of ‖x‖, centre."""
    init_b_dec: Literal["geometric_median", "mean", "zero"] = "geometric_median"
    """Where b_dec starts: at the geometric median or the mean of the (normalised) data, or at 0."""
    init_l0: int = 64
    """relu, jumprelu: the encoder bias starts where each latent fires on init_l0 / F of the tokens, so that the
    first batches are sparse already: at F 4096 that saved half of the first steps' time and left 0.6 % of latents
    dead instead of 23 %. 0 starts it at 0, where half of all latents fire."""
    resample_at: tuple[float, ...] = ()
    """Fractions of the run after which dead latents are resampled (relu, jumprelu; the others have AuxK)."""
    resample_inputs: int = 65_536
    """Inputs whose loss is computed to draw the new directions from, at most the store's."""
    log_every: int = 50
    """Steps between lines of the log."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes the GPU if there is one."""

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae", "tokens", "dead_after_tokens", "init_l0"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("batch_size", "resample_inputs", "log_every", "checkpoint_every", "dead_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a finite number ≥ 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.k_start < 0 or (self.d_sae and self.k_start > self.d_sae):
            raise ConfigError(f"k_start must be in 0 … d_sae = {self.d_sae}, got {self.k_start}")
        if bool(self.k_start) != bool(self.k_anneal):
            raise ConfigError(
                f"k_start and k_anneal go together, got {self.k_start} and {self.k_anneal}: from how many, and how long"
            )
        if self.master == "bf16-sr" and self.dtype != "bfloat16":
            raise ConfigError(f"master='bf16-sr' goes with dtype='bfloat16', got dtype={self.dtype!r}")
        for name, kind in (("state", State), ("master", Master), ("clip_by", ClipBy)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        if self.dtype == "float64" and self.state != "fp32":
            raise ConfigError(f"dtype='float64' keeps float64 moments, got state={self.state!r}; leave state at 'fp32'")
        for name in ("lr_warmup", "lr_decay", "l1_warmup", "k_anneal"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a fraction of the run in [0, 1], got {getattr(self, name)}")
        for name, choices in (("normalise", ("none", "scale", "centre")), ("init_b_dec", _B_DEC)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        at = self.resample_at
        if any(not 0 < a < 1 for a in at) or list(at) != sorted(set(at)):
            raise ConfigError(f"resample_at must be rising fractions of the run in (0, 1), got {at}")
        if self.d_sae:
            self._sae_config(self.d_in or 1, self.dead_after_tokens or 1)  # K > F and the like, before any work

    def complete(self, width: int, count: int) -> TrainConfig:
        """This config with everything filled in that depends on the data: a store of `count` rows of `width`."""
        if self.d_in not in (0, width):
            raise ConfigError(
                f"the store holds activations of width {width}, got d_in={self.d_in}: leave d_in out, or harvest the "
                f"module you mean"
            )
        steps_per_epoch(count, self.batch_size)
        d_sae = self.d_sae or 8 * width
        tokens = self.tokens or count
        return dataclasses.replace(
            self,
            d_in=width,
            d_sae=d_sae,
            tokens=tokens,
            lr=self.lr or default_lr(d_sae, max(1, tokens // self.batch_size)),
            dead_after_tokens=self.dead_after_tokens or self._dead_window(tokens),
        )

    def _dead_window(self, tokens: int) -> int:
        if not self.resample_at:
            return max(1, min(10_000_000, tokens // 10))
        gaps = [b - a for a, b in zip((0.0, *self.resample_at), self.resample_at, strict=False)]
        return max(1, round(min(gaps) / 2 * tokens))

    @property
    def steps(self) -> int:
        """Optimizer steps, of a complete config."""
        return max(1, self.tokens // self.batch_size)

    @property
    def sae(self) -> SAEConfig:
        """The SAE's own part, of a complete config."""
        return self._sae_config(self.d_in, self.dead_after_tokens)

    def _sae_config(self, d_in: int, dead_after_tokens: int) -> SAEConfig:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(SAEConfig)}
        values.update(d_in=d_in, dead_after_tokens=dead_after_tokens)
        return SAEConfig(**values)

    @classmethod
    def preset(cls, name: Preset, **overrides: Any) -> TrainConfig:
        """A recipe by its name, with `overrides` on top.

        monosemanticity: Bricken et al. 2023; needs d_in, because its λ = 0.004 stands before a *mean* over the width
        and is 0.004 · D here. april2024: Anthropic's update on training of April 2024. relu: April 2024's loss with
        unit decoder rows, b_dec at the median and a sparse start, for short runs. topk: "Scaling and evaluating sparse
        autoencoders", 2024. Lengths are fractions of the run: give `tokens` (Bricken et al.: 8.2G).
        """
        if name not in get_args(Preset):
            raise ConfigError(f"preset must be one of {', '.join(get_args(Preset))}, got {name!r}")
        values = dict(_PRESETS[name])
        if name == "monosemanticity" and "l1_coefficient" not in overrides:
            if not overrides.get("d_in"):
                raise ConfigError("preset monosemanticity needs d_in, the width of the activations: its λ is 0.004 · D")
            values["l1_coefficient"] = 0.004 * overrides["d_in"]
        return cls(**values | overrides)


_B_DEC = ("geometric_median", "mean", "zero")

_PRESETS: dict[str, dict[str, Any]] = {
    "monosemanticity": {
        "activation": "relu",
        "l1_weighting": "plain",
        "init_encoder": "random",
        "init_l0": 0,
        "normalise": "none",
        "batch_size": 8192,
        "lr": 1e-3,  # not in our notes of the paper: what converges on one-layer MLP activations
        "lr_warmup": 0.0,
        "lr_decay": 0.0,
        "l1_warmup": 0.0,
        "clip": 0.0,
        "resample_at": (0.025, 0.05, 0.075, 0.1),  # steps 25k … 100k of 1M; dead: 12.5k steps, half of the gap
        "resample_inputs": 819_200,
    },
    "april2024": {
        "activation": "relu",
        "l1_coefficient": 5.0,
        "l1_weighting": "decoder_norm",
        "decoder_norm": "free",
        "init_decoder_norm": 0.1,
        "init_encoder": "tied",
        "init_b_dec": "zero",
        "init_l0": 0,
        "apply_b_dec_to_input": False,
        "normalise": "scale",
        "batch_size": 4096,
        "lr": 5e-5,
        "lr_warmup": 0.0,
        "lr_decay": 0.2,
        "l1_warmup": 0.05,
        "clip": 1.0,
    },
    "relu": {
        "activation": "relu",
        "l1_coefficient": 5.0,
        "l1_weighting": "decoder_norm",
    },
    "topk": {
        "activation": "topk",
        "k": 32,
        "aux_coefficient": 1 / 32,
    },
}


@torch.no_grad()
def start(config: TrainConfig, store: Store, device: torch.device | str = "cpu") -> SAE:
    """A fresh SAE of a complete config: initial weights, and from the data input normalisation, b_dec, encoder bias."""
    sae = SAE(config.sae, device=device)
    if config.normalise != "none":
        mean = store.mean if config.normalise == "centre" else torch.zeros(config.d_in)
        norm = store.mean_norm
        if config.normalise == "centre":
            rows = store.sample(STATISTICS_ROWS, seed=config.seed)
            norm = float(torch.linalg.vector_norm(rows - mean, dim=1).mean())
        if not norm > 0:
            raise FastSAEError("the activations are all the same, nothing can be learned: hook another module")
        sae.set_input_normalisation(mean, math.sqrt(config.d_in) / norm)
    rows = normalised(sae, store.sample(START_ROWS, seed=config.seed).to(device))
    if config.init_b_dec != "zero":
        sae.b_dec.copy_(geometric_median(rows) if config.init_b_dec == "geometric_median" else rows.mean(0))
    if config.activation in ("relu", "jumprelu") and config.init_l0:
        _sparse_bias_(sae, rows, config.init_l0)
    return sae


def _sparse_bias_(sae: SAE, rows: Tensor, l0: int) -> None:
    """Set b_enc so that every latent is above 0 on l0 / F of the rows [N, D], but for sampling error."""
    centred = rows - sae.b_dec if sae.cfg.apply_b_dec_to_input else rows
    rate = min(l0 / sae.cfg.d_sae, 0.5)
    n = max(1, round(rate * len(rows)))
    for columns, bias in zip(sae.W_enc.split(256, dim=1), sae.b_enc.split(256), strict=True):
        pre = centred @ columns.to(centred.dtype)  # [N, 256]: never the whole of [N, F]
        bias.copy_(-pre.topk(n, dim=0).values[-1])


def normalised(sae: SAE, x: Tensor) -> Tensor:
    """x [N, D] in the units the SAE works in."""
    return (x - sae.input_mean) * sae.input_scale
