"""The activation rules: which latents are active, and what the loss asks for beside reconstruction.

Units. Every loss term is a mean over rows (tokens) of a sum, in the units of the normalised input:

    mse      = mean_n Σ_d (x̂[n, d] − x[n, d])²          a sum over the width D, not a mean
    sparsity = l1_coefficient · mean_n Σ_f f[n, f]        (l1_weighting="plain")
    sparsity = l1_coefficient · mean_n Σ_f f[n, f]·‖d_f‖  (l1_weighting="decoder_norm"; the same if rows are unit norm)
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

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastsae import ops
from fastsae.codes import SparseCode
from fastsae.ops import squared_error, wide

if TYPE_CHECKING:
    from fastsae.sae import SAE


class Parts(NamedTuple):
    """What a rule makes of rows [N, D], in the SAE's units.

    x_hat [N, D]; mse, sparsity and aux, scalars that add up to the loss; code None where it was too dense; active:
    entries of the code, a scalar; fired [F] bool.
    """

    x_hat: Tensor
    mse: Tensor
    sparsity: Tensor
    aux: Tensor
    code: SparseCode | None
    active: Tensor
    fired: Tensor


class ReLU:
    """Every positive pre-activation, with an L1 penalty."""

    @staticmethod
    def encode(sae: SAE, rows: Tensor) -> SparseCode | None:
        return ops.encode_relu(
            rows, sae.encoder.weight, sae.encoder.bias, sae.cfg.max_active, sae.centre, sae.cfg.backend,
            capacity=sae.capacity,
        )

    @staticmethod
    def encode_dense(sae: SAE, rows: Tensor) -> Tensor:
        return ops.pre_activations(rows, sae.encoder.weight, sae.encoder.bias, sae.centre).relu()

    @staticmethod
    def reconstruct(sae: SAE, rows: Tensor) -> Tensor:
        code = ReLU.encode(sae, rows)
        if code is not None:
            return decode_rows(sae, code)
        return ops.relu_dense(rows, sae.encoder.weight, sae.encoder.bias, sae.W_dec, False, sae.centre)[0] + sae.b_dec

    @staticmethod
    def parts(sae: SAE, rows: Tensor, wanted: Tensor) -> Parts:
        weighted = sae.cfg.l1_weighting == "decoder_norm"
        code = ReLU.encode(sae, rows)
        if code is None:
            dense = ops.relu_dense(rows, sae.encoder.weight, sae.encoder.bias, sae.W_dec, weighted, sae.centre)
            x_hat, l1, l0, fired = dense
            x_hat = x_hat + sae.b_dec
            mse = squared_error(x_hat, wanted)
            active = l0.sum()
        else:
            x_hat, mse, l1 = ops.decode_error(code, sae.W_dec, sae.b_dec, wanted, sae.cfg.backend, weighted)
            l1 = l1 if weighted else code.values
            active, fired = activity(code)
        sparsity = sae.cfg.l1_coefficient * wide(l1).sum() / max(rows.shape[0], 1)
        return Parts(x_hat, mse, sparsity, torch.zeros_like(sparsity), code, active, fired)


class TopK:
    """The k largest pre-activations, of equal ones the lower features; AuxK keeps dead latents in reach."""

    @staticmethod
    def encode(sae: SAE, rows: Tensor) -> SparseCode:
        return ops.encode_topk(
            rows, sae.encoder.weight, sae.encoder.bias, sae.cfg.k, sae.centre, backend=sae.cfg.backend
        )

    @staticmethod
    def encode_dense(sae: SAE, rows: Tensor) -> Tensor:
        return TopK.encode(sae, rows).to_dense().to(rows.dtype)

    @staticmethod
    def reconstruct(sae: SAE, rows: Tensor) -> Tensor:
        return decode_rows(sae, TopK.encode(sae, rows))

    @staticmethod
    def parts(sae: SAE, rows: Tensor, wanted: Tensor) -> Parts:
        code = TopK.encode(sae, rows)
        x_hat, mse, _ = ops.decode_error(code, sae.W_dec, sae.b_dec, wanted, sae.cfg.backend)
        aux = TopK.aux(sae, rows, wanted, x_hat)
        return Parts(x_hat, mse, torch.zeros_like(aux), aux, code, *activity(code))

    @staticmethod
    def aux(sae: SAE, rows: Tensor, wanted: Tensor, x_hat: Tensor) -> Tensor:
        """aux_coefficient · mean_n ‖ê − e‖²: the residual e rebuilt by the k_aux best dead latents, b_dec left out.

        "Scaling and evaluating sparse autoencoders" (2024), §A.2, in the units of the mse. 0 without dead latents, and
        outside of training mode, where it has no use.
        """
        cfg = sae.cfg
        zero = wide(rows.new_zeros(()))
        if cfg.aux_coefficient == 0 or not sae.training:
            return zero
        dead = (sae.tokens_since_fired >= cfg.dead_after_tokens).nonzero().squeeze(1)
        if dead.numel() == 0:
            return zero
        k = min(cfg.aux_active, dead.numel())
        code = ops.encode_topk(rows, sae.encoder.weight, sae.encoder.bias, k, sae.centre, subset=dead)
        residual = (wanted - x_hat).detach()
        return cfg.aux_coefficient * squared_error(ops.decode(code, sae.W_dec, cfg.backend, check=False), residual)


def activity(code: SparseCode) -> tuple[Tensor, Tensor]:
    """Entries of a code in which every used slot is positive: how many, and by which latents [F] bool."""
    used = code.indices.new_tensor(code.indices.numel()) if code.counts is None else code.counts.sum()
    times = torch.bincount(code.indices.reshape(-1), minlength=code.d_sae)
    times[0] -= code.indices.numel() - used  # unused slots hold index 0
    return used, times > 0


def decode_rows(sae: SAE, code: SparseCode) -> Tensor:
    """x̂ [N, D] in the SAE's units."""
    return ops.decode(code, sae.W_dec, sae.cfg.backend, check=False) + sae.b_dec


RULES: dict[str, type[ReLU] | type[TopK]] = {"relu": ReLU, "topk": TopK}
AVAILABLE = tuple(RULES)
