"""SAEConfig: the options of an SAE, checked when they are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from fastsae.errors import ConfigError

Activation = Literal["relu", "topk", "batchtopk", "jumprelu"]
Backend = Literal["auto", "triton", "torch"]
DType = Literal["float32", "bfloat16", "float16", "float64"]


def _one_of(name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")


def _number(name: str, value: Any, low: float, *, whole: bool = False, high: float = float("inf")) -> None:
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not low <= value <= high:
        span = f"≥ {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}]"
        raise ConfigError(f"{name} must be {kind} {span}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Everything that fixes an SAE but its weights. Units of the coefficients: see `fastsae.activations`."""

    d_in: int
    """D, the width of the activations."""
    d_sae: int
    """F, the number of latents."""
    activation: Activation = "topk"
    """Selection rule; every rule is followed by ReLU."""
    k: int = 32
    """topk: latents kept per token. batchtopk: on average over the batch."""
    l1_coefficient: float = 5.0
    """relu: weight of Σ f (per token, a sum) against Σ_d error² (a sum). 5 suits data with E‖x‖² = D."""
    l1_weighting: Literal["decoder_norm", "plain"] = "decoder_norm"
    """relu: whether Σ f weighs each latent with the norm of its decoder row, which closes the way to a smaller
    penalty by shrinking f and growing the row. The two agree while rows have unit norm."""
    l0_coefficient: float = 1.0
    """jumprelu: weight of the number of active latents per token against Σ_d error². 1 suits data with E‖x‖² = D."""
    bandwidth: float = 0.05
    """jumprelu: width of the band around a threshold, in units of the normalised input, whose tokens pull at it.
    0.001 in the paper, for inputs with a mean square norm of 1; that is 0.001 · √D for E‖x‖² = D."""
    init_threshold: float = 0.01
    """jumprelu: every threshold at the start."""
    threshold_rate: float = 0.01
    """batchtopk: how fast the threshold of evaluation follows the smallest value that a training batch kept."""
    aux_coefficient: float = 1 / 32
    """topk, batchtopk: weight of the error that dead latents leave of the residual. 0 turns AuxK off."""
    k_aux: int | None = None
    """topk, batchtopk: dead latents used per token for AuxK; None means d_in // 2."""
    dead_after_tokens: int = 10_000_000
    """A latent is dead when it has not fired on this many training tokens."""
    apply_b_dec_to_input: bool = True
    """Whether the encoder sees x − b_dec or x."""
    max_l0: int | None = None
    """relu, jumprelu: the most entries a token's code may have before the batch takes the dense path, which is exact,
    slower and has no SparseCode: active latents and, while thresholds are trained, those in the band below them. None
    means max(d_sae // 8, min(d_sae, 256))."""
    decoder_norm: Literal["unit", "free"] = "unit"
    """What the trainer keeps W_dec's rows at after each step. `loss` itself constrains nothing."""
    init_decoder_norm: float = 1.0
    """Norm of W_dec's rows at the start."""
    init_encoder: Literal["tied", "random"] = "tied"
    """tied: encoder rows start as the decoder rows. random: other directions of the same norm."""
    dtype: DType = "float32"
    """Of parameters and computation; a torch.dtype is taken too."""
    backend: Backend = "auto"
    """auto: kernels where the tensors are on a CUDA device and Triton is there, torch otherwise."""
    seed: int = 0
    """Of the initial weights. The global random state is neither read nor changed."""

    def __post_init__(self) -> None:
        if isinstance(self.dtype, torch.dtype):
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        _number("d_in", self.d_in, 1, whole=True)
        _number("d_sae", self.d_sae, 1, whole=True)
        _one_of("activation", self.activation, Activation)
        _number("k", self.k, 1, whole=True)
        if self.activation in ("topk", "batchtopk") and self.k > self.d_sae:
            raise ConfigError(f"k must be at most d_sae = {self.d_sae}, got {self.k}; lower k or widen the dictionary")
        _number("l1_coefficient", self.l1_coefficient, 0)
        _one_of("l1_weighting", self.l1_weighting, Literal["decoder_norm", "plain"])
        _number("l0_coefficient", self.l0_coefficient, 0)
        _number("bandwidth", self.bandwidth, 1e-9)
        _number("init_threshold", self.init_threshold, 1e-9)
        _number("threshold_rate", self.threshold_rate, 0, high=1)
        _number("aux_coefficient", self.aux_coefficient, 0)
        if self.k_aux is not None:
            _number("k_aux", self.k_aux, 1, whole=True)
        _number("dead_after_tokens", self.dead_after_tokens, 1, whole=True)
        if self.max_l0 is not None:
            _number("max_l0", self.max_l0, 1, whole=True)
        _one_of("decoder_norm", self.decoder_norm, Literal["unit", "free"])
        _number("init_decoder_norm", self.init_decoder_norm, 1e-6)
        if self.decoder_norm == "unit" and self.init_decoder_norm != 1:
            raise ConfigError(
                f"decoder_norm='unit' starts at norm 1, got init_decoder_norm={self.init_decoder_norm}; "
                "set decoder_norm='free' to start elsewhere"
            )
        _one_of("init_encoder", self.init_encoder, Literal["tied", "random"])
        _one_of("dtype", self.dtype, DType)
        _one_of("backend", self.backend, Backend)
        _number("seed", self.seed, 0, whole=True)

    @property
    def max_active(self) -> int:
        """max_l0 with its default filled in."""
        return self.max_l0 if self.max_l0 is not None else max(self.d_sae // 8, min(self.d_sae, 256))

    @property
    def aux_active(self) -> int:
        """k_aux with its default filled in."""
        return min(self.k_aux if self.k_aux is not None else max(self.d_in // 2, 1), self.d_sae)
