"""Dead latents begin again where reconstruction is worst ("Towards Monosemanticity", appendix on resampling).

Axes: N inputs, F dictionary size, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fastsae.sae import SAE
from fastsae.step import TrainStep

ENCODER_SCALE = 0.2  # of the mean norm of the alive encoder rows; paper
_PARAMETERS = ("encoder.weight", "encoder.bias", "W_dec", "log_threshold")  # those with a row per latent


@torch.no_grad()
def resample(
    sae: SAE, optimizer: torch.optim.Optimizer | TrainStep, batches: Iterable[Tensor], dead: Tensor,
    generator: torch.Generator,
) -> int:  # fmt: skip
    """Re-initialise the latents in `dead` [F] bool from inputs that the SAE does badly on; how many there were.

    batches: tensors [n, D] of inputs in the units of x, together the N candidates (819,200 in the paper). Each dead
    latent gets one of them, drawn with probability ∝ loss², as the encoder sees it (x − b_dec, in the normalised units
    of the input, or x where b_dec is not subtracted): decoder row = that direction with unit norm, encoder row = the
    same direction with 0.2 × the mean norm of the alive encoder rows, encoder bias = 0, threshold (of
    JumpReLU) as at the start, Adam's moments of all = 0. The counter of tokens since it fired starts anew. An input is
    drawn twice only if dead latents outnumber the candidates. generator: a CPU generator.
    """
    n_dead = int(dead.sum())
    if not n_dead:
        return 0
    inputs, losses = _candidates(sae, batches)
    weight = losses.double().cpu().square()  # Σ may exceed float32's exact range
    if not weight.sum() > 0:  # everything is reconstructed: any input is as good as another
        weight = torch.ones_like(weight)
    enough = int((weight > 0).sum()) >= n_dead
    chosen = torch.multinomial(weight, n_dead, replacement=not enough, generator=generator)
    direction = torch.nn.functional.normalize(inputs[chosen.to(inputs.device)], dim=1)  # [n_dead, D]

    parameters = dict(sae.named_parameters())
    encoder = parameters["encoder.weight"]
    alive_norms = torch.linalg.vector_norm(encoder, dim=1)[~dead]
    norm = alive_norms.mean() if len(alive_norms) else torch.ones((), device=sae.device)
    direction = direction.to(sae.dtype)
    sae.W_dec[dead] = direction
    encoder[dead] = direction * (ENCODER_SCALE * norm)
    parameters["encoder.bias"][dead] = 0
    sae.tokens_since_fired[dead] = 0
    if "log_threshold" in parameters:
        parameters["log_threshold"][dead] = math.log(sae.cfg.init_threshold)
    if isinstance(optimizer, TrainStep):
        optimizer.reset_rows(dead)
        return n_dead
    for name in _PARAMETERS:
        if name not in parameters:
            continue
        for moment in optimizer.state[parameters[name]].values():
            if isinstance(moment, Tensor) and moment.shape[:1] == dead.shape:  # not the scalar step count
                moment[dead] = 0
    return n_dead


def _candidates(sae: SAE, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs as the encoder sees them [N, D], and the loss of each [N]. The SAE's counters are left alone."""
    inputs, losses = [], []
    was_training = sae.training
    sae.eval()
    try:
        for x in batches:
            x = x.to(sae.device)
            made = sae.loss(x).made
            of_l1, of_l0 = sae.rule.coefficients
            losses.append(made.error + of_l1 * made.l1 + of_l0 * made.l0)
            rows = (x - sae.input_mean) * sae.input_scale
            inputs.append(rows - sae.b_dec if sae.cfg.apply_b_dec_to_input else rows)
    finally:
        sae.train(was_training)
    return torch.cat(inputs), torch.cat(losses)
