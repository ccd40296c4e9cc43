"""TrainStep: forward, backward and optimizer in one, without [F, D] gradients.

    step = fastsae.TrainStep(sae, lr=3e-4)
    metrics = step(x)

The backward pass goes through the latents some rows at a time: it finishes their gradients and updates these rows at
once. What autograd and a torch optimizer do in five passes over [F, D] is one, and the memory of the gradients is free.

Axes: N tokens, F dictionary size, D width, B rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsae import auxk, fused_rows, living
from fastsae.errors import DataError
from fastsae.gradients import WeightGradients, widened
from fastsae.moments import Rows, State
from fastsae.row_adam import AdamOptions, RowAdam, project_
from fastsae.row_blocks import Dead, Part, RowBlocks, Weights
from fastsae.sae import SAE, explained
from fastsae.step_options import ClipBy, Master, StepMetrics, Sums, check, check_state

# Through all rows once, with options, and whether the norm is wanted and the update is: `TrainStep._pass`.
Pass = Callable[..., tuple[dict[str, Tensor], Tensor | None]]


class TrainStep:
    """`step(x)`: one step of Adam on the loss of x, as `sae.loss(x).loss.backward()` and `torch.optim.Adam` make it.

    optimizer: "adam", or "adamw" with weight_decay. lr, betas, eps: as for torch's.
    state: how the moments of the two matrices are kept. "fp32"; "bf16"; "8bit", with a scale for every 256 neighbours;
    "rowwise", one second moment for a row (the first in bf16). What is narrower than fp32 is rounded at random.
    master: "fp32" updates fp32 weights (a copy of them, if the SAE itself is in half precision); "bf16-sr" the
    bfloat16 weights themselves, with stochastic rounding.
    clip: the largest norm of all gradients together, 0 for no limit. clip_by: "exact" makes the gradients twice, first
    for their norm; "previous" takes the norm of the step before, and no limit in the first.
    lazy: whether latents that were not touched wait, moments and all, until they are, which is an *approximation* for
    β₁ > 0, where Adam goes on moving them. With β₁ = 0 and no weight decay it is no approximation, and always done.
    dead_every: in which steps dead latents (silent for the SAE's dead_after_tokens) are evaluated and trained: in every
    dead_every-th. In the others only the living are there, and the encoder's product shrinks to those. Dead ones then
    rest, moments and all (their biases follow what momentum is left), and come back later than they would. Until
    `restore_order()` is called the latents stand in another order, the living first; `order` [F] says which latent
    stands where.
    seed: of the random rounding.

    lr, penalty (a factor of the sparsity penalty, for its warm-up) and k (of topk and batchtopk, None for the SAE's)
    may be set between steps. decoder_norm, k and the rest are the SAE's own configuration; `tokens_since_fired` is
    counted as in `SAE.loss`. Gradients of parameters (`p.grad`) stay None. On a CUDA device the kernels run, where D is
    at most 4096, and topk waits for nothing; the codes of the other rules wait for their size. One process, one GPU.

    Raises ConfigError for options that cannot be meant and for frozen parameters; DataError for a loss that is not
    finite (on the CPU, where asking costs nothing), for shapes that do not fit, and for an SAE that was moved or
    converted since.
    """

    def __init__(
        self, sae: SAE, optimizer: str = "adam", *, lr: float = 3e-4, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.0, state: State = "fp32", master: Master = "fp32",
        clip: float = 0.0, clip_by: ClipBy = "exact", lazy: bool = False, dead_every: int = 1,
        seed: int = 0,
    ) -> None:  # fmt: skip
        check(sae, optimizer, lr, betas, eps, weight_decay, state, master, clip, clip_by, lazy, dead_every)
        self.sae, self.lr, self.betas, self.eps, self.weight_decay = sae, lr, betas, eps, weight_decay
        self.clip, self.clip_by, self.seed = clip, clip_by, seed
        self.penalty = 1.0
        self.k: int | None = None
        self.steps = 0
        stochastic = master == "bf16-sr"
        self.w_dec = RowAdam(sae.W_dec, state, betas[0], stochastic)
        self.weight = RowAdam(sae.encoder.weight, state, betas[0], stochastic)
        # Vectors are small: always dense and in fp32.
        vectors = {"bias": sae.encoder.bias, "b_dec": sae.b_dec}
        if sae.cfg.activation == "jumprelu":
            vectors["log_threshold"] = sae.log_threshold
        self.vectors = {name: RowAdam(p.view(1, -1), "fp32", 1.0, False) for name, p in vectors.items()}
        waits = lazy or (betas[0] == 0 and not weight_decay)
        self.last = torch.zeros(sae.cfg.d_sae, dtype=torch.int32, device=sae.device) if waits else None
        self.norm = torch.zeros((), dtype=torch.promote_types(sae.dtype, torch.float32), device=sae.device)
        self.norms, self._version = self.norm.new_empty(sae.cfg.d_sae), -1
        self.dead_every, self.living = dead_every, sae.cfg.d_sae
        self.order = torch.arange(sae.cfg.d_sae, device=sae.device) if dead_every > 1 else None
        self._weighted = bool(sae.rule.options.get("weighted"))
        self._used: int | None = None  # latents that the update under way works on
        self._zeros: dict[int, Tensor] = {}
        self._parts: list[Part] = []
        self._dead: list[Dead] = []
        self._sums: Sums | None = None
        self._norms: Tensor | None = None

    # --- what a user calls ------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor, target: Tensor | None = None, mask: Tensor | None = None) -> StepMetrics:
        """x [..., D], target and mask as for `SAE.loss`."""
        self.accumulate(x, target, mask)
        return self.update()

    @torch.no_grad()
    def accumulate(self, x: Tensor, target: Tensor | None = None, mask: Tensor | None = None) -> None:
        """The forward pass of one of several micro-batches; `update` then takes the mean over all of their rows.

        Kept until then are x, the residual and the code: N · (2 D + 2 K) elements.
        """
        sae = self.sae
        if not sae.training:
            raise DataError("the SAE is in evaluation mode; call sae.train() before the next step")
        self._check_parameters()
        rows, wanted, _ = sae.prepared(x, target, mask)
        if self._sums is None:
            self._used = self._first()
        rule, first = sae.rule, self._used
        more = rule.training_options | ({} if self.k is None else {"k": self.k})
        made = rule.autoencode(rows, wanted, first, **more, whole=True, norms=self._current_norms())
        centred = rows - sae.b_dec if sae.cfg.apply_b_dec_to_input else rows
        out = made.residual.to(rows.dtype).mul_(2)  # under autocast it comes in that dtype
        self._norms = made.norms.to(rows.dtype) if made.norms.numel() else None
        of_l1, of_l0 = rule.coefficients
        pull_l1, pull_l0 = (
            made.l1.new_full(made.l1.shape, coefficient * self.penalty) if coefficient * self.penalty else None
            for coefficient in (of_l1, of_l0)
        )
        aux = made.error.new_zeros(())
        dead = rule.dead() if first is None else {}
        if dead and rows.shape[0]:
            which, is_dead = dead["dead"], dead["is_dead"]
            weights = auxk.take(which, is_dead, sae.encoder.weight, sae.encoder.bias, sae.W_dec)
            with torch.autocast(sae.device.type, enabled=False):
                pull = auxk.pull_of(centred, out / -2, weights, dead["k_aux"])
            aux = sae.cfg.aux_coefficient * pull.error.sum()
            pull.out.mul_(sae.cfg.aux_coefficient)
            self._dead.append(Dead(pull, which, is_dead))
        mse, sparsity = made.error.sum(), rule.penalty(made)
        loss = mse + sparsity + aux
        if loss.device.type == "cpu" and not torch.isfinite(loss):
            self._forget()
            sae.explain_not_finite(rows, wanted)
        self._parts.append(Part(centred, out, made.values, made.indices, made.counts, pull_l1, pull_l0))
        rule.observe(made)
        sae.count_fired(_padded(made.fired > 0, sae.cfg.d_sae), rows.shape[0])
        fve = explained(mse / max(rows.shape[0], 1), wanted)
        sums = Sums(rows.shape[0], mse, sparsity, aux, made.l0.sum(), fve)
        self._sums = sums if self._sums is None else self._sums.plus(sums)

    @torch.no_grad()
    def update(self) -> StepMetrics:
        """One step on what was accumulated. Raises DataError where nothing was."""
        sums = self._sums
        if sums is None:
            raise DataError("there is nothing to update with: call accumulate(x) first, or step(x), which does both")
        n = max(sums.rows, 1)
        for part in self._parts:
            for t in (part.out, part.l1, part.l0):
                if t is not None:
                    t.div_(n)
        for one in self._dead:
            one.pull.out.div_(n)
        self.steps += 1
        options = AdamOptions(self.lr, *self.betas, self.eps, self.weight_decay, self.steps)
        with torch.autocast(self.sae.device.type, enabled=False):
            grad_norm = self._update_rows(options)
        self._forget()
        if self.order is not None and (self.steps - 1) % self.dead_every == 0:
            dead = self.sae.tokens_since_fired >= self.sae.cfg.dead_after_tokens
            self.living = living.living_first(self.order, dead, self._of_latents) or self.sae.cfg.d_sae
        self._version = _version_of(self.sae)
        mse, sparsity, aux = sums.mse / n, sums.sparsity / n, sums.aux / n
        loss = mse + self.penalty * sparsity + aux
        return StepMetrics(loss, mse, sparsity, aux, sums.l0 / n, sums.fve, grad_norm)

    def reset_rows(self, which: Tensor) -> None:
        """Adam begins again for some latents, [F] bool or [B] int64, whose weights were set from outside."""
        at = which.nonzero().squeeze(1) if which.dtype == torch.bool else which
        self.w_dec.reset(at)
        self.weight.reset(at)
        for name in ("bias", "log_threshold"):
            if name in self.vectors:
                state = self.vectors[name]
                for _, t in state.tensors.items():
                    t[0, at] = 0
                if state.copy is not None:
                    state.copy[0, at] = state.weight[0, at].to(state.copy.dtype)

    @torch.no_grad()
    def restore_order(self) -> None:
        """Every latent goes back to its place; only dead_every takes them away from it. The next step evaluates all."""
        if self.order is not None:
            living.restore(self.order, self._of_latents)
            self.living = self.sae.cfg.d_sae

    @property
    def _of_latents(self) -> list[Tensor]:
        """All tensors that have a row for each latent."""
        sae = self.sae
        found = [sae.encoder.weight, sae.W_dec, sae.encoder.bias, sae.tokens_since_fired, self.norms]
        found += [*self.w_dec.tensors.values(), *self.weight.tensors.values()]
        for name in ("bias", "log_threshold"):
            if name in self.vectors:
                found += [t[0] for t in self.vectors[name].tensors.values()]
        if "log_threshold" in self.vectors:
            found.append(sae.log_threshold)
        return [t.detach() for t in found + ([] if self.last is None else [self.last])]

    def _check_parameters(self) -> None:
        """Raises DataError where the SAE's parameters are no longer the memory that updates go to."""
        states = {"W_dec": self.w_dec, "encoder.weight": self.weight, **self.vectors}
        states["encoder.bias"] = states.pop("bias")
        for name, state in states.items():
            if self.sae.get_parameter(name).data_ptr() != state.weight.data_ptr():
                raise DataError(
                    f"{name} is another tensor than when this TrainStep was made: move, convert and load the SAE "
                    "first, then make the TrainStep"
                )

    def _first(self) -> int | None:
        """How many latents the next update works on; None for all."""
        return None if self.steps % self.dead_every == 0 or self.living == self.sae.cfg.d_sae else self.living

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by name, the very tensors: what a checkpoint holds beside the SAE and `numbers`."""
        states = {"W_dec": self.w_dec, "encoder.weight": self.weight, **self.vectors}
        found = {f"{name}.{part}": t for name, state in states.items() for part, t in state.tensors.items()}
        more = {"norm": self.norm, "last": self.last, "order": self.order}
        # Norms are state where they are used: those of a kernel differ in the last bits from what is made of weights.
        more |= {"norms": self._current_norms()} if self._weighted else {}
        return found | {name: t for name, t in more.items() if t is not None}

    @property
    def numbers(self) -> dict[str, int]:
        """The rest of it."""
        return {"steps": self.steps, "living": self.living}

    def state_dict(self) -> dict[str, Any]:
        """`tensors` and `numbers` in one dictionary; between updates (what is accumulated is not in it)."""
        return {**self.tensors, **self.numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What state_dict gave, of a TrainStep with the same options. Raises ConfigError where it does not fit."""
        there = self.tensors
        check_state(there, self.numbers, state)
        for name, t in there.items():
            t.copy_(state[name])
        self.go_on({name: state[name] for name in self.numbers})

    def go_on(self, numbers: dict[str, int]) -> None:
        """From `numbers`, once the SAE and `tensors` have been filled in."""
        self.steps, self.living = int(numbers["steps"]), int(numbers["living"])
        self._version = _version_of(self.sae)

    # --- the update -------------------------------------------------------------------------------------------------

    def _update_rows(self, options: AdamOptions) -> Tensor | None:
        sae = self.sae
        at = slice(0, self._used)
        threshold = sae.threshold[at] if sae.cfg.activation == "jumprelu" and sae.threshold is not None else None
        given = Weights(
            sae.encoder.weight[at], sae.encoder.bias[at], sae.W_dec[at], threshold, sae.cfg.bandwidth, self._norms
        )
        clips = self.clip > 0
        passes = self._fused_passes(given) if fused_rows.fits(given, self._parts, sae.cfg.backend) else None
        run = passes or self._torch_passes(given)
        if clips and self.clip_by == "previous":
            options = options._replace(factor=self._factor() if self.steps > 1 else None)
        if clips and self.clip_by == "exact":
            self._keep_norm(*run(options, wants_norm=True, update=False))
            options = options._replace(factor=self._factor())
        vectors, square = run(options, wants_norm=clips and self.clip_by == "previous", update=True)
        if square is not None:
            self._keep_norm(vectors, square)
        for name, g in vectors.items():
            size = self.vectors[name].weight.shape[1]
            self.vectors[name].update(slice(None), _padded(widened(g), size).view(1, -1), options, False)
        return self.norm.clone() if clips else None

    def _keep_norm(self, vectors: dict[str, Tensor], square: Tensor | None) -> None:
        """square: of the gradients of both matrices."""
        assert square is not None
        self.norm.copy_((square + sum(widened(g).square().sum() for g in vectors.values())).sqrt())

    def _vectors(
        self, d_bias: Tensor, d_b_dec: Tensor, d_threshold: Tensor | None, given: Weights
    ) -> dict[str, Tensor]:
        found = {"bias": d_bias, "b_dec": d_b_dec}
        if d_threshold is not None and given.threshold is not None:
            found["log_threshold"] = d_threshold * given.threshold  # θ = exp(log_threshold)
        return found

    def _of_output(self) -> Tensor:
        """dL/d b_dec [D], of the decoder's end alone."""
        return sum((widened(part.out.sum(0)) for part in self._parts), widened(torch.zeros_like(self.sae.b_dec)))

    def _fused_passes(self, given: Weights) -> Pass:
        """By the kernels."""
        sae, unit = self.sae, self.sae.cfg.decoder_norm == "unit"
        at = slice(0, given.bias.numel())
        rows = fused_rows.FusedRows(given, self._parts, self._dead, None if self.last is None else self.last[at])
        d_b_dec = self._of_output()
        if sae.cfg.apply_b_dec_to_input:
            d_b_dec -= rows.d_bias @ given.weight
        vectors = self._vectors(rows.d_bias, d_b_dec, rows.d_threshold, given)

        def run(options: AdamOptions, wants_norm: bool, update: bool) -> tuple[dict[str, Tensor], Tensor | None]:
            square = torch.zeros(given.bias.shape, device=sae.device) if wants_norm else None
            seed = (self.seed * 1_000_003 + self.steps) % 2**31
            rows.run((self.w_dec, self.weight), options, unit, seed, self.norms[at], square, update)
            return vectors, None if square is None else square.sum()

        return run

    def _torch_passes(self, given: Weights) -> Pass:
        """By torch operations."""
        blocks = RowBlocks.of(given, self._parts, self._dead, self.last is not None)
        return partial(self._pass, blocks, given)

    def _pass(
        self, blocks: RowBlocks, given: Weights, options: AdamOptions, wants_norm: bool, update: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Through all rows once: gradients of the vectors, the squared norm of those of the matrices if wanted, and the
        update of these, if asked for."""
        unit, generator = self.sae.cfg.decoder_norm == "unit", self._generator()
        d_bias = torch.zeros_like(given.bias)
        d_threshold = None if given.threshold is None else torch.zeros_like(given.threshold)
        d_b_dec = self._of_output()
        square = torch.zeros_like(self.norm) if wants_norm else None
        for block, at, made in blocks:
            d_bias[at] = made.bias
            if d_threshold is not None and made.threshold is not None:
                d_threshold[at] = made.threshold
            if self.sae.cfg.apply_b_dec_to_input:
                d_b_dec -= made.bias @ given.weight[at]
            if unit:
                project_(made.w_dec, self.w_dec.rows(at))  # rows without a gradient have nothing to drop
            if square is not None:
                square += made.w_dec.square().sum() + made.weight.square().sum()
            if update:
                self._update(block, at, made, options, unit, generator)
        return self._vectors(d_bias, d_b_dec, d_threshold, given), square

    def _update(
        self, block: slice | None, at: Rows, made: WeightGradients, options: AdamOptions, unit: bool,
        generator: torch.Generator | None,
    ) -> None:  # fmt: skip
        if block is not None and isinstance(at, Tensor):
            rows = at - block.start
            spread = [self._spread(which, block, rows, g) for which, g in enumerate((made.w_dec, made.weight))]
            made = made._replace(w_dec=spread[0], weight=spread[1])
            self._update(block, block, made, options, unit, generator)
            for whole in spread:
                whole.index_fill_(0, rows, 0)
            return
        silent = None
        if self.last is not None:
            silent = (self.steps - 1 - self.last[at])[:, None]
            self.last[at] = self.steps
        self.w_dec.update(at, made.w_dec, options, unit, silent, generator)
        if self._weighted:
            self.norms[at] = torch.linalg.vector_norm(widened(self.sae.W_dec[at]), dim=1).to(self.norms.dtype)
        self.weight.update(at, made.weight, options, False, silent, generator)

    def _spread(self, which: int, block: slice, rows: Tensor, g: Tensor) -> Tensor:
        """Gradients g of some rows of a range, among rows of 0; in a buffer that is 0 between calls."""
        size = block.stop - block.start
        if which not in self._zeros or self._zeros[which].shape[0] < size:
            self._zeros[which] = g.new_zeros(size, g.shape[1])
        return self._zeros[which][:size].index_copy_(0, rows, g)

    def _current_norms(self) -> Tensor:
        """‖W_dec[f]‖ as the last update left them; made anew where somebody else has written to W_dec since."""
        if self._weighted and self._version != _version_of(self.sae):
            # Some rows at a time: of a dictionary in half precision the whole in fp32 would be more than all its state.
            rows = self.sae.W_dec.detach().split(max(1, 2**20 // self.sae.cfg.d_in))
            torch.cat([torch.linalg.vector_norm(widened(part), dim=1) for part in rows], out=self.norms)
        return self.norms

    def _factor(self) -> Tensor:
        return (self.clip / (self.norm + 1e-6)).clamp(max=1.0)

    def _generator(self) -> torch.Generator:
        """Of this step's rounding: the same for the same seed and step, however the run was cut."""
        return torch.Generator(self.sae.device).manual_seed((self.seed * 1_000_003 + self.steps) % 2**63)

    def _forget(self) -> None:
        self._parts, self._dead, self._sums, self._norms = [], [], None, None


def _padded(t: Tensor, size: int) -> Tensor:
    """t [n] with zeros after it: [size]."""
    return t if t.numel() == size else torch.cat([t, t.new_zeros(size - t.numel())])


def _version_of(sae: SAE) -> int:
    """Grows with every operation of torch that writes to W_dec."""
    return sae.W_dec._version
