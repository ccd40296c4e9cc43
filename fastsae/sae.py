"""SAE, and what its loss returns.

Axes: N tokens (all leading axes of x together), K active latents per token, F dictionary size (`d_sae`), D width
(`d_in`). x̂ = f · W_dec + b_dec with f = ReLU(select((x − b_dec) · W_encᵀ + b_enc)).
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastsae import activations, checkpoint, ops
from fastsae.autoencode import Autoencoded
from fastsae.capacity import new_room
from fastsae.codes import SparseCode
from fastsae.config import SAEConfig
from fastsae.errors import ConfigError, DataError, TooDenseError
from fastsae.gradients import widened

DRAWN_ELEMENTS = 1 << 22  # of the initial weights, at a time


@dataclass(frozen=True, eq=False)
class LossOutput:
    """What `SAE.loss` returns. Scalars are fp32, or float64 of a float64 SAE; units: `fastsae.activations`.

    loss = mse + sparsity + aux, to call backward on; the three parts carry gradients too. x_hat: x's shape, in the
    units of x; rows left out by a mask are 0. code: the SparseCode of the rows that were not left out, or None where a
    ReLU or JumpReLU code was denser than `max_l0`, or one in kernels needed more slots than calls before it. l0: active
    latents per row. fve: 1 − Σ‖x − x̂‖² / Σ‖x − mean(x)‖². l0 and fve carry no gradient.
    """

    loss: Tensor
    mse: Tensor
    sparsity: Tensor
    aux: Tensor
    x_hat: Tensor
    l0: Tensor
    fve: Tensor
    made: Autoencoded = field(repr=False)
    d_sae: int = field(repr=False)
    batch_shape: tuple[int, ...] = field(repr=False)

    @property
    def code(self) -> SparseCode | None:
        """Made when asked for."""
        code = self.made.code(self.d_sae)
        return None if code is None else dataclasses.replace(code, batch_shape=self.batch_shape)


class SAE(nn.Module):
    """A sparse autoencoder: `SAE(config)` or `SAE(d_in=…, d_sae=…, activation=…, …)`.

    Parameters: encoder.weight [F, D], encoder.bias [F], W_dec [F, D], b_dec [D]; of jumprelu also log_threshold [F].
    Buffers: input_mean [D] and input_scale [] (identity unless set), tokens_since_fired [F] int64; of batchtopk also
    running_threshold [].
    Raises ConfigError for fields that cannot be meant, DataError for input of another width.
    """

    encoder: nn.Linear
    log_threshold: nn.Parameter
    running_threshold: Tensor
    tokens_since_fired: Tensor
    input_mean: Tensor
    input_scale: Tensor

    def __init__(self, config: SAEConfig | None = None, *, device: torch.device | str | None = None, **fields: Any):
        super().__init__()
        if config is None:
            known = {field.name for field in dataclasses.fields(SAEConfig)}
            unknown = sorted(set(fields) - known)
            if unknown:
                raise ConfigError(f"SAE has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
            missing = sorted({"d_in", "d_sae"} - set(fields))
            if missing:
                raise ConfigError(f"SAE needs {' and '.join(missing)}, e.g. SAE(d_in=512, d_sae=16384)")
            config = SAEConfig(**fields)
        elif not isinstance(config, SAEConfig):
            raise ConfigError(f"SAE takes an SAEConfig, got {type(config).__name__}; or fields by keyword, d_in=…")
        elif fields:
            raise ConfigError(f"SAE takes an SAEConfig or fields, got both (fields: {', '.join(sorted(fields))})")
        # A subclass, such as a trainer's configuration, brings fields that are none of the SAE's, or of its file's.
        self.cfg = SAEConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(SAEConfig)})
        D, F = config.d_in, config.d_sae
        device = torch.get_default_device() if device is None else device
        factory: dict[str, Any] = {"device": device, "dtype": getattr(torch, config.dtype)}
        self.encoder = nn.Linear(D, F, device="meta", dtype=factory["dtype"]).to_empty(device=device)
        self.W_dec = nn.Parameter(torch.empty(F, D, **factory))
        self.b_dec = nn.Parameter(torch.empty(D, **factory))
        self.register_buffer("input_mean", torch.zeros(D, **factory))
        self.register_buffer("input_scale", torch.ones((), **factory))
        self.register_buffer("tokens_since_fired", torch.zeros(F, dtype=torch.int64, device=device))
        if config.activation == "jumprelu":
            self.log_threshold = nn.Parameter(torch.empty(F, **factory))
        if config.activation == "batchtopk":
            self.register_buffer("running_threshold", torch.zeros((), dtype=torch.float32, device=device))
        self.room = new_room()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Decoder rows: random directions of norm init_decoder_norm. Encoder: as cfg.init_encoder. Biases: 0."""
        if self.device.type == "meta":  # from_pretrained brings the tensors
            return
        generator = torch.Generator().manual_seed(self.cfg.seed)
        self._draw(self.W_dec, generator)
        if self.cfg.init_encoder == "tied":
            self.encoder.weight.copy_(self.W_dec)
        else:
            self._draw(self.encoder.weight, generator)
        self.encoder.bias.zero_()
        self.b_dec.zero_()
        self.tokens_since_fired.zero_()
        if self.cfg.activation == "jumprelu":
            self.log_threshold.fill_(math.log(self.cfg.init_threshold))
        if self.cfg.activation == "batchtopk":
            self.running_threshold.zero_()

    def _draw(self, weight: Tensor, generator: torch.Generator) -> None:
        """Random directions of norm init_decoder_norm into weight [F, D]; the same on every device, and some rows at a
        time, so that a wide dictionary needs no second one in float32 to begin with."""
        F, D = weight.shape
        step = max(16, DRAWN_ELEMENTS // D // 16 * 16)  # torch draws 16 at a time: whole ones make blocks one sequence
        start = 0
        while start < F:
            stop = F if F - start < step + 16 else start + step
            rows = torch.randn(stop - start, D, generator=generator, device="cpu")
            weight[start:stop] = rows.mul_(self.cfg.init_decoder_norm / rows.norm(dim=1, keepdim=True))
            start = stop

    # --- names that other libraries use -------------------------------------------------------------------------

    @property
    def W_enc(self) -> Tensor:
        """[D, F], a view of encoder.weight."""
        return self.encoder.weight.T

    @property
    def b_enc(self) -> Tensor:
        """[F], encoder.bias."""
        return self.encoder.bias

    @property
    def threshold(self) -> Tensor | None:
        """What a pre-activation has to exceed, [F]: of jumprelu, and of batchtopk in evaluation; else None."""
        if self.cfg.activation == "jumprelu":
            return self.log_threshold.exp()
        if self.cfg.activation == "batchtopk":
            return self.running_threshold.to(self.dtype).expand(self.cfg.d_sae)
        return None

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    # --- input and its normalisation ----------------------------------------------------------------------------

    def _rows(self, x: Tensor) -> Tensor:
        """x [..., D] in the SAE's dtype, flattened to [N, D] and normalised."""
        if x.ndim < 1 or x.shape[-1] != self.cfg.d_in:
            raise DataError(f"expected activations [..., {self.cfg.d_in}], got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise DataError(f"expected floating-point activations, got {x.dtype}; convert them first")
        if x.device != self.device:
            raise DataError(f"the SAE is on {self.device} and x on {x.device}; move one with .to()")
        rows = x.reshape(-1, self.cfg.d_in).to(self.dtype)
        return (rows - self.input_mean) * self.input_scale if self._normalises() else rows

    def _restore(self, rows: Tensor) -> Tensor:
        """Undo the normalisation of _rows: [N, D] in the units of x."""
        return rows / self.input_scale + self.input_mean if self._normalises() else rows

    def _normalises(self) -> bool:
        # Elsewhere than on the CPU asking would wait for the device, which costs more than the two passes it spares.
        if self.device.type != "cpu" or torch.compiler.is_compiling():
            return True
        return bool(self.input_scale != 1) or bool(self.input_mean.any())

    @torch.no_grad()
    def set_input_normalisation(self, mean: Tensor | None = None, scale: float | Tensor = 1.0) -> None:
        """From now on the SAE computes on (x − mean) · scale and undoes it in its output. mean: [D], or None for 0.

        x̂ stays in the units of x; f, the loss terms and the parameters are in those of the normalised input. For
        E‖x‖² = D after subtracting the mean, scale = √(D / E‖x − mean‖²).
        """
        factor = torch.as_tensor(scale, dtype=torch.float64)
        mean = torch.zeros(self.cfg.d_in) if mean is None else torch.as_tensor(mean)
        if mean.shape != (self.cfg.d_in,) or not torch.isfinite(mean).all():
            raise DataError(f"mean must be {self.cfg.d_in} finite numbers, got shape {tuple(mean.shape)}")
        if factor.ndim != 0 or not 0 < float(factor) < float("inf"):
            raise DataError(f"scale must be one positive number, got {factor.tolist()}")
        self.input_mean.copy_(mean)
        self.input_scale.copy_(factor)

    @torch.no_grad()
    def fold_normalisation_(self) -> SAE:
        """Fold the input's normalisation into the weights and forget it: encode and forward give what they gave.

        Latents keep their values, so decoder rows are divided by the scale (and decoder_norm becomes "free"), and the
        loss from now on is in the units of x. What an export to another library needs.
        """
        mean, scale = self.input_mean.clone(), self.input_scale.clone()
        # ((x − μ)s − b_dec)·W = (x − (b_dec/s + μ))·sW, and (f·W_dec + b_dec)/s + μ = f·(W_dec/s) + (b_dec/s + μ).
        self.encoder.weight.mul_(scale)
        self.W_dec.div_(scale)
        self.b_dec.div_(scale).add_(mean)
        if not self.cfg.apply_b_dec_to_input:
            self.encoder.bias.sub_(self.encoder.weight @ mean)
        self.set_input_normalisation()
        if scale != 1:
            self.cfg = dataclasses.replace(self.cfg, decoder_norm="free")
        return self

    @torch.no_grad()
    def initialise_from_data(self, x: Tensor) -> SAE:
        """Set b_dec to the geometric median of x [..., D], as normalised. A few thousand rows are enough."""
        from fastsae.optim import geometric_median

        rows = self._rows(x)
        if rows.shape[0] == 0 or not torch.isfinite(rows).all():
            raise DataError(f"expected at least one row and finite numbers to start from, got shape {tuple(x.shape)}")
        self.b_dec.copy_(geometric_median(rows))
        return self

    @property
    def rule(self) -> activations.Rule:
        """The activation's selection rule and penalty."""
        return activations.RULES[self.cfg.activation](self)

    @property
    def centre(self) -> Tensor | None:
        """b_dec if the encoder subtracts it from its input, else None."""
        return self.b_dec if self.cfg.apply_b_dec_to_input else None

    # --- the autoencoder ----------------------------------------------------------------------------------------

    def encode_sparse(self, x: Tensor) -> SparseCode:
        """The active latents of x [..., D]. Differentiable in `values`.

        Raises TooDenseError where a ReLU code has a row of more than `cfg.max_active` active latents.
        """
        code = self.rule.encode(self._rows(x))
        if code is None:
            raise TooDenseError(
                f"a token has more than max_l0={self.cfg.max_active} active latents of {self.cfg.d_sae} (those in a "
                "trained threshold's band counted), too many for a SparseCode; use encode(x), "
                "or raise max_l0 in the SAEConfig"
            )
        return dataclasses.replace(code, batch_shape=tuple(x.shape[:-1]))

    def encode(self, x: Tensor) -> Tensor:
        """All latents of x [..., D], dense: [..., F]. For tools that need it; the library itself never calls it."""
        return self.rule.encode_dense(self._rows(x)).reshape(*x.shape[:-1], self.cfg.d_sae)

    def decode(self, f: Tensor | SparseCode) -> Tensor:
        """x̂ [..., D] in the units of x, from latents [..., F] or a SparseCode."""
        F = f.d_sae if isinstance(f, SparseCode) else (f.shape[-1] if f.ndim else 0)
        if F != self.cfg.d_sae:
            raise DataError(f"expected latents [..., {self.cfg.d_sae}], got a last axis of {F}")
        if isinstance(f, SparseCode):
            rows = ops.decode(f, self.W_dec, backend=self.cfg.backend)
        else:
            rows = f.reshape(-1, F).to(self.dtype) @ self.W_dec
        return self._restore(rows + self.b_dec).reshape(*f.shape[:-1], self.cfg.d_in)

    def forward(self, x: Tensor) -> Tensor:
        """x̂ [..., D] in x's units and dtype, through the sparse path."""
        x_hat = self.rule.autoencode(self._rows(x), None).x_hat
        return self._restore(x_hat).reshape(x.shape).to(x.dtype)

    def loss(self, x: Tensor, target: Tensor | None = None, mask: Tensor | None = None) -> LossOutput:
        """Reconstruction error of x [..., D] (or of a target of the same shape: a transcoder) plus penalties.

        mask: bool, x.shape[:-1]; False leaves a row out of everything (padding, BOS, attention sinks).
        In training mode it also counts, per latent, the tokens since it last fired (`tokens_since_fired`).
        Raises DataError for shapes that disagree, and when the loss is not finite.
        """
        rows, wanted, keep = self.prepared(x, target, mask)
        shape = tuple(x.shape[:-1]) if keep is None else (rows.shape[0],)
        mse, sparsity, aux, made = self.rule.parts(rows, wanted)
        loss = mse + sparsity + aux
        # Elsewhere than on the CPU asking would wait for the device; the trainer asks when it writes its log.
        if loss.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.isfinite(loss):
            self.explain_not_finite(rows, wanted)
        if self.training:
            self.count_fired(made.fired > 0, rows.shape[0])
        x_hat = self._restore(made.x_hat)
        if keep is not None:
            x_hat = x_hat.new_zeros(x.numel() // self.cfg.d_in, self.cfg.d_in).index_put((keep,), x_hat)
        l0 = made.l0.detach().sum() / max(rows.shape[0], 1)
        x_hat = x_hat.reshape(x.shape).to(x.dtype)
        return LossOutput(
            loss, mse, sparsity, aux, x_hat, l0, explained(mse, wanted), made, self.cfg.d_sae, shape
        )

    def prepared(
        self, x: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows [N, D] as the encoder takes them, those wanted of the output, and which of x's they are, None for all.

        x, target, mask: as for `loss`."""
        rows = self._rows(x)
        wanted = rows if target is None else self._target(x, target)
        keep = None if mask is None else self._kept(x, mask)
        return (rows, wanted, None) if keep is None else (rows[keep], wanted[keep], keep)

    def _target(self, x: Tensor, target: Tensor) -> Tensor:
        if target.shape != x.shape:
            raise DataError(f"target must have x's shape {tuple(x.shape)}, got {tuple(target.shape)}")
        return self._rows(target)

    def _kept(self, x: Tensor, mask: Tensor) -> Tensor:
        if mask.shape != x.shape[:-1] or mask.dtype != torch.bool:
            raise DataError(
                f"mask must be bool of shape {tuple(x.shape[:-1])}, got {mask.dtype} {tuple(mask.shape)}; "
                "True keeps a row"
            )
        return mask.reshape(-1).nonzero().squeeze(1)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write cfg.json and sae.safetensors (shards of it above 5 GB) to a folder, which is made if needed."""
        checkpoint.save(self, folder)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, device: torch.device | str | None = None, revision: str | None = None
    ) -> SAE:
        """The SAE in a folder of save_pretrained of a training run, or of a Hugging Face hub id. In training mode.

        Raises CheckpointError where either is missing, incomplete or of another format.
        """
        return checkpoint.load(cls, source, device, revision)

    @torch.no_grad()
    def count_fired(self, fired: Tensor, tokens: int) -> None:
        """fired: [F] bool, the latents that were active in a batch of that many tokens."""
        self.tokens_since_fired.add_(tokens).masked_fill_(fired, 0)

    def explain_not_finite(self, rows: Tensor, wanted: Tensor) -> None:
        """Raises DataError with what is wrong with rows or wanted [N, D] or the parameters."""
        bad = [name for name, p in self.named_parameters() if not torch.isfinite(p).all()]
        if bad:
            raise DataError(f"the loss is not finite because of {', '.join(bad)}; lower the learning rate or clip")
        broken = ~(torch.isfinite(rows).all(-1) & torch.isfinite(wanted).all(-1))
        count = int(broken.sum())
        if count:
            raise DataError(f"{count} of {rows.shape[0]} activation rows hold NaN or infinity; mask or drop them")
        raise DataError(f"the loss overflows {self.dtype}; scale the activations (set_input_normalisation)")

    def extra_repr(self) -> str:
        cfg = self.cfg
        name = {"relu": "l1_coefficient", "jumprelu": "l0_coefficient"}.get(cfg.activation, "k")
        size = f"{name}={getattr(cfg, name)}"
        return f"d_in={cfg.d_in}, d_sae={cfg.d_sae}, activation={cfg.activation!r}, {size}"


@torch.no_grad()
def explained(mse: Tensor, wanted: Tensor) -> Tensor:
    """fve of rows wanted [N, D]: 1 − squared error / squared distance from their mean; −∞ where all are alike and
    missed."""
    rows = widened(wanted)
    if rows.shape[0] == 0:
        return torch.ones_like(mse)
    return 1 - mse.detach() / rows.var(0, correction=0).sum().clamp_min(torch.finfo(rows.dtype).tiny)
