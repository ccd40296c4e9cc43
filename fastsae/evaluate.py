"""How good a dictionary is on held-out text: reconstruction, sparsity, density, and what the model loses by it.

Axes: B contexts, T tokens in a context, N tokens scored, F dictionary size, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.contexts import ContextBatch, Packing, context_batches, model_limits
from fastsae.errors import DataError, FastSAEError, TooDenseError
from fastsae.harvest import check_options, load_model
from fastsae.hooks import capture
from fastsae.hooks import replace as replace_output
from fastsae.progress import Meter, progress
from fastsae.sae import SAE

_BINS_PER_DECADE = 4


@dataclass(frozen=True)
class EvalConfig:
    """How to evaluate. Raises FastSAEError for values that cannot be meant."""

    tokens: int = 200_000
    """Tokens of text to use at most. A feature that fires less than once in so many counts as dead."""
    context: int = 128
    """Tokens in a context, the begin-of-text token included; as in the harvest."""
    packing: Packing = "concat"
    """concat: join documents and cut the stream into full contexts; cut: each document in contexts of its own."""
    bos: bool = True
    """Begin each context with the tokenizer's begin-of-text token if it has one; as in the harvest."""
    skip_first: int = 0
    """Leave this many tokens at the start of each context as they are; as in the harvest."""
    batch_size: int = 16
    """Contexts in a forward pass."""

    def __post_init__(self) -> None:
        for name in ("tokens", "context", "batch_size"):
            if getattr(self, name) < 1:
                raise FastSAEError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.skip_first < self.context:
            raise FastSAEError(f"skip_first must be in [0, context = {self.context}), got {self.skip_first}")


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` found. Cross-entropies (ce_…) in nats per token.

    tokens: N, activations scored. mse: mean over tokens of Σ_d (x̂ − x)², in the units of x. fve: 1 − Σ‖x − x̂‖² /
    Σ‖x − mean‖². nmse: Σ‖x − x̂‖² / Σ‖x‖², the mean not taken off (with it taken off it would be 1 − fve). l0: active
    features per token. l1: mean over tokens of Σ_f f, in the dictionary's units. dead: fraction of features that never
    fired on these N tokens.
    density: [F], fraction of tokens on which each feature fires. histogram: counts of features by log10 of their
    density between histogram_edges (dead ones left out). ce_raw: of the model itself; ce_spliced, ce_zero, ce_mean:
    with the reconstruction, zero, or the mean activation in place of each activation. recovered_zero, recovered_mean:
    (ce_ablated − ce_spliced) / (ce_ablated − ce_raw), 1 being no loss; NaN where ablation costs nothing. kl: mean over
    the same tokens as the cross-entropies of KL(model ‖ model with the reconstruction), nats per token.
    """

    tokens: int
    mse: float
    fve: float
    nmse: float
    l0: float
    l1: float
    dead: float
    ce_raw: float
    ce_spliced: float
    ce_zero: float
    ce_mean: float
    recovered_zero: float
    recovered_mean: float
    kl: float
    histogram: list[int]
    histogram_edges: list[float]
    density: Tensor = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the per-feature densities, ready for JSON (NaN becomes None)."""
        values = asdict(self)
        del values["density"]
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


@torch.no_grad()
def evaluate(
    sae: SAE | str | Path,
    model: Any,
    tokenizer: Any,
    documents: Iterable[Any],
    hook: str,
    config: EvalConfig | None = None,
    *,
    mean: Tensor | None = None,
    show_progress: bool = True,
    **options: Any,
) -> EvalResult:
    """Score an SAE on text that neither it nor the model was trained on.

    sae: an SAE or the folder of one. model, tokenizer, documents, hook: as for `harvest`. mean: [D], what the mean
    ablation puts in (a store's `mean`); None takes the mean over the evaluated tokens. config, or its fields as
    options: see EvalConfig.

    Activations at begin- and end-of-text tokens, at padding and before `skip_first` are not the dictionary's business:
    they are neither scored nor replaced, in none of the four runs, as the harvest left them out. The cross-entropy is
    that of every text token given those before it. Chunked: memory holds one batch.
    Raises FastSAEError: no text, no such module, an SAE of another width, non-finite activations.
    """
    config = replace(config or EvalConfig(), **check_options(EvalConfig, options))
    if not isinstance(sae, SAE):
        sae = SAE.from_pretrained(sae)
    model, tokenizer, _ = load_model(model, tokenizer)
    model_limits(model, tokenizer, config.context)
    batches = list(_batches(tokenizer, documents, config))
    was_training = sae.training, model.training
    sae.eval()
    model.eval()
    run = _Evaluation(sae, model, hook, config.skip_first)
    total = 4 * sum(int(batch.keep.sum()) for batch in batches)
    try:
        with progress("evaluate (4 runs)", total, "tokens", show=show_progress) as meter:
            raw, spliced, kl = run.observe(batches, meter)
            stand_in = run.mean if mean is None else mean
            zero = run.cross_entropy(batches, torch.zeros_like, meter)
            average = run.cross_entropy(batches, lambda x: stand_in.to(x).expand_as(x), meter)
    finally:
        sae.train(was_training[0])
        model.train(was_training[1])
    return run.result(raw, spliced, kl, zero, average)


def _batches(tokenizer: Any, documents: Iterable[Any], config: EvalConfig) -> Iterable[ContextBatch]:
    """Whole contexts until they hold config.tokens tokens of text."""
    seen = 0
    for batch in context_batches(
        tokenizer, documents, config.context, config.batch_size, config.packing, config.bos, seed=None
    ):
        if seen >= config.tokens:
            return
        rows = batch.keep.sum(1).cumsum(0) - batch.keep.sum(1) < config.tokens - seen
        batch = ContextBatch(*(column[rows] for column in batch))
        seen += int(batch.keep.sum())
        yield batch


class _Evaluation:
    """Sums over the runs of one evaluation, in float64."""

    def __init__(self, sae: SAE, model: nn.Module, hook: str, skip_first: int) -> None:
        self.sae, self.model, self.hook, self.skip_first = sae, model, hook, skip_first
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        D, F = sae.cfg.d_in, sae.cfg.d_sae
        self.n = 0
        self.sum = torch.zeros(D, dtype=torch.float64)
        self.squares = self.error = self.active = self.l1 = 0.0
        self.fired = torch.zeros(F, dtype=torch.int64, device=sae.device)

    @property
    def mean(self) -> Tensor:
        """Of the activations seen by `observe`, [D] float64."""
        return self.sum / self.n

    def observe(self, batches: list[ContextBatch], meter: Meter) -> tuple[float, float, float]:
        """(cross-entropy of the untouched model, with the reconstruction, KL from the first to the second) in nats per
        token, and on the way the moments of the activations and of the code. Both runs of a batch stand side by side,
        for the KL needs the logits of both."""
        nats, spliced, kl, targets = 0.0, 0.0, 0.0, 0
        for batch in batches:
            with capture(self.model, self.hook) as outputs:
                raw = self._logits(batch)
            if not outputs:
                raise FastSAEError(f"the model's forward pass does not run {self.hook}: hook another module")
            x = self._scored(outputs[0], batch).double()
            self.sum += x.sum(0).cpu()
            self.squares += float(x.square().sum())
            self.n += len(x)
            meter.advance(len(x))
            new = self._replaced(batch, self.reconstruct)
            wanted = self._targets(batch)
            nats, spliced, targets = nats + _nats(raw, wanted), spliced + _nats(new, wanted), targets + len(wanted)
            kl += _divergence(raw, new)
            meter.advance(len(x))
        if not self.n or not targets:
            raise FastSAEError("expected text of a few tokens at least, got too little to predict anything")
        return nats / targets, spliced / targets, kl / targets

    def cross_entropy(self, batches: list[ContextBatch], function: Callable[[Tensor], Tensor], meter: Meter) -> float:
        """Nats per token while function ([N, D] → [N, D]) replaces the activations at the scored places."""
        nats, targets = 0.0, 0
        for batch in batches:
            wanted = self._targets(batch)
            nats, targets = nats + _nats(self._replaced(batch, function), wanted), targets + len(wanted)
            meter.advance(int(batch.keep.sum()))
        return nats / targets

    def _replaced(self, batch: ContextBatch, function: Callable[[Tensor], Tensor]) -> Tensor:
        """_logits while function replaces the activations at the scored places."""

        def splice(x: Tensor) -> Tensor:
            place = self._places(batch).to(x.device)
            new = x.clone()
            new[place] = function(x[place]).to(x)
            return new

        with replace_output(self.model, self.hook, splice):
            return self._logits(batch)

    def reconstruct(self, x: Tensor) -> Tensor:
        """x̂ [N, D], on the way counting what fires and what is lost."""
        sae = self.sae
        rows = x.to(sae.device, torch.float32)
        try:
            code = sae.encode_sparse(rows)
            x_hat = sae.decode(code)
            on = code.values > 0
            self.fired.index_add_(0, code.indices.flatten().long(), on.flatten().long())
            self.active += int(on.sum())
            self.l1 += float(code.values.double().sum())
        except TooDenseError:  # a poor dictionary still deserves its figures
            dense = sae.encode(rows)
            x_hat = sae.decode(dense)
            self.fired += (dense > 0).sum(0)
            self.active += int((dense > 0).sum())
            self.l1 += float(dense.double().sum())
        self.error += float((x_hat.float() - rows).double().square().sum())
        return x_hat

    def _places(self, batch: ContextBatch) -> Tensor:
        """[B, T] bool: where activations are scored and replaced."""
        keep = batch.keep.clone()
        keep[:, : self.skip_first] = False
        return keep

    def _scored(self, x: Tensor, batch: ContextBatch) -> Tensor:
        if x.shape[:2] != batch.token_ids.shape or x.shape[-1] != self.sae.cfg.d_in:
            raise DataError(
                f"the SAE reads activations of width {self.sae.cfg.d_in}, {self.hook} puts out {list(x.shape)}: "
                f"hook the module it was trained on"
            )
        rows = x[self._places(batch).to(x.device)]
        if not torch.isfinite(rows).all():
            raise DataError(f"activations at {self.hook} must be finite, got NaN or infinity: run the model in float32")
        return rows

    def _logits(self, batch: ContextBatch) -> Tensor:
        """[M, V] float32: what the model says of each text token of a batch that has a token before it."""
        logits = self.model(batch.token_ids.to(self.device))
        logits = getattr(logits, "logits", logits)[:, :-1]  # [B, T - 1, V]
        return logits[batch.keep[:, 1:].to(self.device)].float()

    def _targets(self, batch: ContextBatch) -> Tensor:
        """[M]: those tokens."""
        return batch.token_ids[:, 1:][batch.keep[:, 1:]].to(self.device)

    def result(self, raw: float, spliced: float, kl: float, zero: float, average: float) -> EvalResult:
        density = self.fired.cpu().double() / self.n
        spread = self.squares - self.n * float(self.mean.square().sum())
        counts, edges = density_histogram(density, self.n)
        return EvalResult(
            tokens=self.n,
            mse=self.error / self.n,
            fve=1 - self.error / spread if spread > 0 else math.nan,
            nmse=self.error / self.squares if self.squares > 0 else math.nan,
            l0=self.active / self.n,
            l1=self.l1 / self.n,
            dead=float((density == 0).double().mean()),
            ce_raw=raw,
            ce_spliced=spliced,
            ce_zero=zero,
            ce_mean=average,
            recovered_zero=_recovered(raw, spliced, zero),
            recovered_mean=_recovered(raw, spliced, average),
            kl=kl,
            histogram=counts,
            histogram_edges=edges,
            density=density.float(),
        )


def _nats(logits: Tensor, targets: Tensor) -> float:
    """Σ over M tokens of −log p(target), logits [M, V]."""
    return float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))


def _divergence(logits: Tensor, other: Tensor) -> float:
    """Σ over M tokens of KL(p ‖ q) = Σ_v p_v (log p_v − log q_v), of logits [M, V] each."""
    total = 0.0
    for rows in torch.arange(len(logits)).split(512):  # several [512, V] at once, not several [M, V]
        p, q = (part[rows.to(part.device)].log_softmax(-1) for part in (logits, other))
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return total


def density_histogram(density: Tensor, tokens: int) -> tuple[list[int], list[float]]:
    """Features by log10 of their density [F], a quarter decade a bin, from 1 / tokens to 1: (counts, edges)."""
    low = math.floor(-math.log10(max(tokens, 1)))
    edges = [low + i / _BINS_PER_DECADE for i in range(-low * _BINS_PER_DECADE + 1)] or [0.0]
    logs = density[density > 0].double().log10()
    places = torch.bucketize(logs, torch.tensor(edges[1:-1], dtype=torch.float64), right=True)
    return torch.bincount(places, minlength=max(len(edges) - 1, 1)).tolist(), edges


def _recovered(raw: float, spliced: float, ablated: float) -> float:
    """Bricken et al. 2023: the share of what ablation costs that the reconstruction gives back."""
    return (ablated - spliced) / (ablated - raw) if ablated - raw > 1e-6 else math.nan
