"""The activation rules: which latents are active, and what the loss asks for beside reconstruction.

Units. Every loss term is a mean over rows (tokens) of a sum, in the units of the normalised input:

    mse      = mean_n Σ_d (x̂[n, d] − x[n, d])²          a sum over the width D, not a mean
    sparsity = l1_coefficient · mean_n Σ_f f[n, f]        (l1_weighting="plain")
    sparsity = l1_coefficient · mean_n Σ_f f[n, f]·‖d_f‖  (l1_weighting="decoder_norm"; the same if rows are unit norm)
    sparsity = l0_coefficient · mean_n Σ_f 1[f > 0]       JumpReLU
    aux      = aux_coefficient · mean_n Σ_d (ê[n, d] − e[n, d])², e = x − x̂ detached, ê from dead latents only
    loss     = mse + sparsity + aux

Because mse grows with the square of the data's scale and L1 linearly, scaling x by s needs a coefficient scaled by s.
What a coefficient λ of another source is called here, at width D and F latents, for the same data:

    source                                           its loss                  l1_coefficient here
    Towards Monosemanticity (2023)                   mean_d error² + λ Σ f     λ · D  (0.004 · 512 = 2.05)
    April 2024 update, data with E‖x‖² = D           Σ_d error² + λ Σ f·‖d‖    λ  (5)
    SAELens, standard                                Σ_d error² + λ Σ f·‖d‖    λ  (before v3: λ · D, a mean over d)
    dictionary_learning, StandardTrainerAprilUpdate  Σ_d error² + λ Σ f·‖d‖    λ
    dictionary_learning, StandardTrainer             ‖error‖ + λ Σ f           2 · ‖error‖ · λ, see below
    nn.MSELoss, and λ · f.sum(-1)                    mean_d error² + λ Σ f     λ · D
    nn.MSELoss, and λ · f.mean()                     mean_d error² + λ mean f  λ · D / F

An error norm that is not squared has no fixed counterpart: its gradient equals that of Σ_d error² at 2·‖error‖·λ, so
the coefficient follows from the error that training ends with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastsae import ops, reference
from fastsae.autoencode import Autoencoded, autoencode
from fastsae.auxk import dead_latents
from fastsae.codes import SparseCode

if TYPE_CHECKING:
    from fastsae.sae import SAE


class Parts(NamedTuple):
    """What a rule makes of rows [N, D], in the SAE's units: mse, sparsity and aux, scalars that add up to the loss, and
    what else came of it."""

    mse: Tensor
    sparsity: Tensor
    aux: Tensor
    made: Autoencoded


class Rule:
    """What the rules share; each says which latents it selects, and which penalty it asks for."""

    sae: SAE

    def __init__(self, sae: SAE) -> None:
        self.sae = sae

    @property
    def options(self) -> dict[str, Any]:
        """Of `autoencode`."""
        return {"rule": self.sae.cfg.activation}

    @property
    def training_options(self) -> dict[str, Any]:
        """Of `autoencode`, for a caller that makes the gradients itself, with autograd turned off."""
        return self.options

    def encode(self, rows: Tensor) -> SparseCode | None:
        raise NotImplementedError

    def encode_dense(self, rows: Tensor) -> Tensor:
        code = self.encode(rows)
        assert code is not None
        return code.to_dense().to(rows.dtype)

    def pre_activations(self, rows: Tensor) -> Tensor:
        return ops.pre_activations(rows, self.sae.encoder.weight, self.sae.encoder.bias, self.sae.centre)

    def autoencode(self, rows: Tensor, wanted: Tensor | None, first: int | None = None, **more: Any) -> Autoencoded:
        """Without wanted only x̂ means something. first: of how many latents, of all F by default."""
        sae, options = self.sae, self.options | more
        weight, bias, w_dec = sae.encoder.weight, sae.encoder.bias, sae.W_dec
        if first is not None:
            weight, bias, w_dec = weight[:first], bias[:first], w_dec[:first]
            options |= {name: options[name][:first] for name in ("threshold", "norms") if options.get(name) is not None}
            options |= {"k": min(options["k"], first)} if "k" in options else {}
        return autoencode(
            rows, weight, bias, w_dec, sae.b_dec, target=wanted, centred=sae.cfg.apply_b_dec_to_input,
            backend=sae.cfg.backend, room=sae.room, **options,
        )  # fmt: skip

    def parts(self, rows: Tensor, wanted: Tensor) -> Parts:
        made = self.autoencode(rows, wanted, **self.dead())
        n = max(rows.shape[0], 1)
        aux = self.sae.cfg.aux_coefficient * made.aux.sum()
        self.observe(made)
        return Parts(made.error.sum() / n, self.penalty(made) / n, aux / n, made)

    @property
    def coefficients(self) -> tuple[float, float]:
        """What l1 and l0 of a row are multiplied with in the loss."""
        return 0.0, 0.0

    def penalty(self, made: Autoencoded) -> Tensor:
        """A sum over rows."""
        of_l1, of_l0 = self.coefficients
        found = made.l1.new_zeros(())
        for coefficient, rows in ((of_l1, made.l1), (of_l0, made.l0)):
            if coefficient:
                found = found + coefficient * rows.sum()
        return found

    def observe(self, made: Autoencoded) -> None:
        """What a rule learns from a training batch beside its parameters."""

    def dead(self) -> dict[str, Any]:
        """Options of `autoencode` for AuxK; none where the rule has no AuxK, it is turned off, or outside of
        training."""
        return {}


class ReLU(Rule):
    """Every positive pre-activation, with an L1 penalty."""

    @property
    def options(self) -> dict[str, Any]:
        cfg = self.sae.cfg
        return {"rule": "relu", "most": cfg.max_active, "weighted": cfg.l1_weighting == "decoder_norm"}

    def encode(self, rows: Tensor) -> SparseCode | None:
        sae = self.sae
        return ops.encode_relu(
            rows, sae.encoder.weight, sae.encoder.bias, sae.cfg.max_active, sae.centre, sae.cfg.backend, room=sae.room
        )

    def encode_dense(self, rows: Tensor) -> Tensor:
        return self.pre_activations(rows).relu()

    @property
    def coefficients(self) -> tuple[float, float]:
        return self.sae.cfg.l1_coefficient, 0.0


class JumpReLU(Rule):
    """Every pre-activation above its latent's own threshold, which is trained; the penalty is L0 itself.

    "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders" (2024).
    """

    @property
    def options(self) -> dict[str, Any]:
        most, threshold = self.sae.cfg.max_active, self.sae.threshold
        return {"rule": "jumprelu", "most": most, "threshold": threshold, "bandwidth": self.bandwidth}

    @property
    def training_options(self) -> dict[str, Any]:
        return self.options | {"bandwidth": self.sae.cfg.bandwidth}

    @property
    def bandwidth(self) -> float:
        """0 where there are no gradients: the entries of the band, which only the threshold's gradient needs, are left
        out then."""
        return self.sae.cfg.bandwidth if torch.is_grad_enabled() else 0.0

    def encode(self, rows: Tensor) -> SparseCode | None:
        sae = self.sae
        assert sae.threshold is not None
        return ops.encode_jumprelu(
            rows, sae.encoder.weight, sae.encoder.bias, sae.threshold, sae.cfg.max_active, sae.centre,
            self.bandwidth, backend=sae.cfg.backend, room=sae.room,
        )  # fmt: skip

    def encode_dense(self, rows: Tensor) -> Tensor:
        assert self.sae.threshold is not None
        return reference.jumprelu(self.pre_activations(rows), self.sae.threshold, self.sae.cfg.bandwidth)

    @property
    def coefficients(self) -> tuple[float, float]:
        return 0.0, self.sae.cfg.l0_coefficient


class TopK(Rule):
    """The k largest pre-activations, of equal ones the lower features; AuxK keeps dead latents in reach."""

    @property
    def options(self) -> dict[str, Any]:
        return {"rule": "topk", "k": self.sae.cfg.k}

    def encode(self, rows: Tensor) -> SparseCode:
        sae = self.sae
        return ops.encode_topk(
            rows, sae.encoder.weight, sae.encoder.bias, sae.cfg.k, sae.centre, backend=sae.cfg.backend
        )

    def dead(self) -> dict[str, Any]:
        sae = self.sae
        if sae.cfg.aux_coefficient == 0 or not sae.training:
            return {}
        dead, is_dead = dead_latents(sae.tokens_since_fired, sae.cfg.dead_after_tokens, sae.room)
        return {"dead": dead, "is_dead": is_dead, "k_aux": sae.cfg.aux_active}


class BatchTopK(TopK):
    """In training the N · k largest of the batch; in evaluation those above a threshold, so that rows do not depend on
    each other: the running mean of the smallest value that training kept. AuxK as for TopK.

    "BatchTopK Sparse Autoencoders" (2024).
    """

    @property
    def options(self) -> dict[str, Any]:
        sae = self.sae
        if sae.training:
            return {"rule": "batchtopk", "k": sae.cfg.k}
        return {"rule": "jumprelu", "most": sae.cfg.max_active, "threshold": sae.threshold}

    def encode(self, rows: Tensor) -> SparseCode | None:
        sae = self.sae
        weights = rows, sae.encoder.weight, sae.encoder.bias
        if sae.training:
            return ops.encode_batchtopk(*weights, sae.cfg.k, sae.centre, sae.cfg.backend, room=sae.room)
        assert sae.threshold is not None
        return ops.encode_jumprelu(
            *weights, sae.threshold, sae.cfg.max_active, sae.centre, backend=sae.cfg.backend, room=sae.room
        )

    def encode_dense(self, rows: Tensor) -> Tensor:
        if self.sae.training:
            return super().encode_dense(rows)
        assert self.sae.threshold is not None
        return reference.jumprelu(self.pre_activations(rows), self.sae.threshold, 0.0)

    def observe(self, made: Autoencoded) -> None:
        """Moves the running threshold towards the smallest value that was kept; to it, the first time."""
        if not self.sae.training:
            return
        running, rate = self.sae.running_threshold, self.sae.cfg.threshold_rate
        with torch.no_grad():  # as a decorator it would end torch.compile's graph
            if made.cut.numel():  # rows may be missing from values
                least = made.cut[0].int().view(torch.float32)
            else:
                values = made.values.detach()
                kept = torch.cat([values.reshape(-1), values.new_zeros(1)])  # there may be none
                least = torch.where(kept > 0, kept, float("inf")).amin()
            least = least.to(running.dtype)
            step = torch.where(running > 0, running + rate * (least - running), least)
            running.copy_(torch.where(torch.isfinite(least), step, running))


RULES: dict[str, type[Rule]] = {"relu": ReLU, "topk": TopK, "batchtopk": BatchTopK, "jumprelu": JumpReLU}
