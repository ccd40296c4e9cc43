"""How many bytes a run of TrainStep takes, from its config alone: what stays, and what each phase of a step adds.

The sums follow the code they are about, phase by phase; what they are about stands beside them. Not known from a config
are the length of ReLU's and JumpReLU's rows, taken as `init_l0`, and the number of dead latents, taken as none
(`dead_bytes` says what each adds).

Axes: N tokens, K slots per token, F dictionary size, D width, M = N · L0 used slots, B rows of a block, R rows and C
columns of a chunk, G groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from fastsae import cpu
from fastsae.moments import QUANTISED
from fastsae.recipe import START_ROWS, STATISTICS_ROWS, TrainConfig
from fastsae.row_blocks import BLOCK_ELEMENTS
from fastsae.sae import DRAWN_ELEMENTS

SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
LONG = 8  # bytes of an int64
# Memory that is not in tensors. On the CPU buffers in which the matrix library packs its operands, and stacks of
# threads: measured as peak RSS less the allocator's own count. On a GPU cuBLAS's workspace, 32 MiB on sm_90.
OUTSIDE = {"cpu": 5_000_000, "cuda": 32 * 2**20}
# What a heap takes in which blocks of 2 MiB are made and freed in turn, over what is alive in it: measured, 1.7 to 2.2
# with glibc (1.0 if it is told to map each block, which takes longer). Torch's allocator on GPUs is asked for what is
# alive, as max_memory_allocated is.
HEAP = {"cpu": 2.0, "cuda": 1.0}


class Resident(NamedTuple):
    """Bytes that stay from the first step to the last."""

    parameters: int
    buffers: int
    master: int
    state: int


class Phase(NamedTuple):
    """Bytes that a phase of the step adds: rows of the batch in some form, the code in some form, and the rest; lost:
    of that, what the heap loses between tensors."""

    name: str
    batch: int
    codes: int
    workspace: int
    lost: int = 0

    @property
    def total(self) -> int:
        return self.batch + self.codes + self.workspace


@dataclass(frozen=True)
class Footprint:
    """making: the peak while the initial weights are drawn, before there is any state. allocated: the most that is in
    tensors at one time, which is less by what the heap loses and by what is in none. dense: whether the first steps
    make all latents, for want of a code that fits into slots."""

    resident: Resident
    phase: Phase
    making: int
    outside: int
    allocated: int
    dense: bool

    @property
    def step(self) -> int:
        return sum(self.resident) + self.phase.total + self.outside

    @property
    def total(self) -> int:
        return max(self.step, self.making)


def footprint(config: TrainConfig, kind: str = "cpu") -> Footprint:
    """config: complete (d_in, d_sae). kind: cpu or cuda."""
    sizes = _Sizes.of(config, kind)
    phases = [sizes.encoder(), sizes.decode(), sizes.after()]
    phases += [sizes.pieces(), sizes.fused()] if sizes.fuses else [sizes.by_feature(), sizes.blocks()]
    stays = resident(config)
    making = _making(config, stays.parameters + stays.buffers)
    phase = max(phases, key=lambda p: p.total)
    tensors = max(p.total - p.lost for p in phases) + sum(stays)
    if kind == "cpu":  # pages that are not written to yet are allocated all the same
        tensors = max(tensors, making)
    return Footprint(stays, phase, making, OUTSIDE[kind], tensors, sizes.dense)


def _making(config: TrainConfig, weights: int) -> int:
    """Footprint.making: SAE.reset_parameters with the rows that it draws at a time (on the host, where weights are on a
    GPU: small enough to count them here as well), then recipe.start with its sample of the data, of which there are
    three copies (as it is, less the mean, and scaled), or two of the larger one that a mean is subtracted from."""
    rows = max(3 * START_ROWS, 2 * STATISTICS_ROWS if config.normalise == "centre" else 0)
    drawn = min(DRAWN_ELEMENTS, config.d_sae * config.d_in)
    return weights + 4 * max(rows * config.d_in, drawn)


def resident(config: TrainConfig) -> Resident:
    """SAE.__init__, RowAdam and the moments, tensor by tensor: exact."""
    F, D, e = config.d_sae, config.d_in, SIZES[config.dtype]
    w = max(e, 4)
    vectors = F + D + (F if config.activation == "jumprelu" else 0)
    buffers = LONG * F + e * (D + 1) + (4 if config.activation == "batchtopk" else 0)
    master = 0 if e >= 4 else w * vectors + (0 if config.master == "bf16-sr" else 2 * w * F * D)
    whole = {"fp32": w * D, "bf16": 2 * D, "8bit": D + 4 * -(-D // QUANTISED), "rowwise": 4}[config.state]
    first = whole if config.state != "rowwise" else 2 * D
    # Of vectors always both moments in fp32; then the norm of all gradients, and norms of the decoder's rows.
    state = 2 * F * (whole + (first if config.beta1 else 0)) + 2 * w * vectors + w + w * F
    if waits(config):
        state += 4 * F
    if config.dead_every > 1:
        state += LONG * F  # which latent stands where
    return Resident(e * (2 * F * D + vectors), buffers, master, state)


def waits(config: TrainConfig) -> bool:
    """Whether latents without a gradient are left alone, as TrainStep decides."""
    return config.lazy or config.beta1 == 0


def dead_bytes(config: TrainConfig) -> int:
    """What AuxK adds for each dead latent: copies of its two rows. 0 where there is no AuxK."""
    return 2 * config.d_in * SIZES[config.dtype] if _has_aux(config) else 0


def active(config: TrainConfig) -> int:
    """Latents of a token, on average; relu and jumprelu: what the run starts with, half of all where the bias is 0."""
    if config.activation in ("topk", "batchtopk"):
        return max(config.k, config.k_start)
    return min(config.init_l0, config.d_sae // 2) if config.init_l0 else config.d_sae // 2


def _has_aux(config: TrainConfig) -> bool:
    return config.activation in ("topk", "batchtopk") and config.aux_coefficient > 0


def kept_per_group(k: int, groups: int) -> int:
    """As fastsae.gpu.kept_per_group, which needs Triton to be imported."""
    return 2 if groups >= 256 * k else 3 if groups >= 32 * k else 4


def slots_for(k: int) -> int:
    """As fastsae.gpu.slots_for."""
    return 1 << max(2 * k + 63, 127).bit_length()


@dataclass(frozen=True)
class _Sizes:
    """e, w: bytes of an element of the weights, and of what is summed in. value, index: of a slot of the code."""

    config: TrainConfig
    kind: str
    N: int
    D: int
    F: int
    K: int
    M: int
    e: int
    w: int
    value: int
    index: int
    dense: bool

    @property
    def kernels(self) -> bool:
        """Whether Triton's kernels make the code."""
        return self.index == 4

    @property
    def fuses(self) -> bool:
        """Whether a kernel updates the rows, as fused_rows.fits decides, and not blocks of them in torch operations."""
        return self.kernels and not self.dense and self.D <= 4096

    @classmethod
    def of(cls, config: TrainConfig, kind: str) -> _Sizes:
        e = SIZES[config.dtype]
        mean = active(config)
        # The fullest row sets the slots; rows of a rule without a K are about Poisson, and the fullest of thousands has
        # four and a half deviations more.
        slots = mean if config.activation == "topk" else min(config.d_sae, mean + math.ceil(4.5 * math.sqrt(mean)))
        dense = config.activation in ("relu", "jumprelu") and slots > config.max_active
        kernels = kind == "cuda" and config.backend != "torch" and e <= 4
        value, index = (4, 4) if kernels else (e, LONG)
        return cls(
            config, kind, config.batch_size, config.d_in, config.d_sae, 0 if dense else slots,
            0 if dense else config.batch_size * mean, e, max(e, 4), value, index, dense,
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """[N, D] in the weights' dtype."""
        return self.N * self.D * self.e

    @property
    def widened(self) -> int:
        """A copy of [N, D] in fp32 that float32 does not need."""
        return 0 if self.e == self.w else self.N * self.D * self.w

    @property
    def given(self) -> int:
        """The batch as the store gives it, in float32, and as SAE._rows makes of it, on a GPU without looking whether
        it has to."""
        made = self.config.normalise != "none" or self.config.dtype != "float32" or self.kind == "cuda"
        return 4 * self.N * self.D + (self.rows if made else 0)

    @property
    def code(self) -> int:
        """values, indices [N, K] and counts [N]."""
        return self.N * self.K * (self.value + self.index) + self.N * self.index

    # --- forward ----------------------------------------------------------------------------------------------------

    def encoder(self) -> Phase:
        """x − b_dec, and what selection makes; of vectors the bias in fp32 or norms, and for JumpReLU thresholds."""
        batch = self.given + self.rows
        vectors = self.F * self.w * (3 if self.config.activation == "jumprelu" else 1)
        if self.kernels:
            return Phase("encoder", batch, self.code, vectors + self._groups())
        chosen = {"topk": self._topk, "batchtopk": self._batchtopk}.get(self.config.activation, self._above)
        codes, workspace = chosen()
        return Phase("encoder", batch, codes, vectors + workspace)

    def _groups(self) -> int:
        """The kernels: best and place of r entries of every group (kernels/encode.py, 5 r N F / 32 bytes), then slots
        for what reaches the bound and a list of failed groups (kernels/select.py)."""
        groups = -(-self.F // 32)
        topk = self.config.activation == "topk"
        r = 4 if self.config.activation in ("relu", "jumprelu") else kept_per_group(self.K, groups)
        slots = slots_for(self.K) if topk else self.K + self.K // 2
        found = self.N * (8 * slots + 4 * 32 + 12)
        cut = 8 * self.N * slots if self.config.activation == "batchtopk" else 0  # kernels/batch_cut.py: what is kept
        chunk = 0 if self.D % 16 == 0 else 32 * 2**20  # the encoder for other widths, kernels/encode.py CHUNK_BYTES
        return 5 * r * self.N * groups + found + cut + chunk

    def _chunk(self, R: int, C: int) -> int:
        """cpu.chunks: pre-activations [R, C], and the largest of each group of them."""
        return R * min(C, self.F) * self.e * (cpu.GROUP + 1) // cpu.GROUP

    def _candidates(self, entries: float) -> int:
        """cpu._above for so many entries, in about as many groups: the groups with their members, which of these count
        (bytes), and then rows and places (int64, twice: as nonzero gives them and as they are wanted) and values."""
        return int(entries * (2 * LONG + cpu.GROUP * (self.e + 1) + 4 * LONG + self.e))

    def _topk(self) -> tuple[int, int]:
        """cpu.encode_topk: the first chunk lets about 1.4 K entries of a row through, the later ones as many in all."""
        R, C = cpu.by_rows(self.N, self.F)
        return self.code, self._chunk(R, C) + self._candidates(1.4 * R * self.K)

    def _above(self) -> tuple[int, int]:
        """cpu.encode_relu: entries of all chunks, then once more in one piece, sorted."""
        R, C = cpu.by_columns(self.N, self.F)
        chunk, entry = self._chunk(R, C), 2 * LONG + self.e
        if self.dense:  # half of each chunk is above 0, and it is given up when a row has more than max_active
            held = R * self.config.max_active * entry
            return 0, chunk + held + R * C // 2 * (4 * LONG + self.e) + R * C * (self.e + 1 + LONG // 4)
        sorting = self.M * (2 * entry + 4 * LONG)  # codes.pack_rows: four lists of places
        return self.code, chunk + max(self._candidates(self.M * C / self.F) + self.M * entry, sorting)

    def _batchtopk(self) -> tuple[int, int]:
        """cpu.encode_batchtopk: up to twice as many entries as are kept, in pieces and in one."""
        R, C = cpu.by_columns(self.N, self.F)
        entry = 2 * LONG + self.e
        kept = 4 * self.M * entry
        return 0, self._chunk(R, C) + max(kept, self._candidates(1.4 * self.M) + 2 * self.M * entry)

    # --- after the code is there ------------------------------------------------------------------------------------

    def decode(self) -> Phase:
        """autoencode: x − b_dec, the decoder's sums, x̂ (b_dec added) and x̂ − target; then its square, in fp32. Or, of a
        code too dense for slots, chunks of all latents."""
        batch = self.given + 3 * self.rows + self.N * self.D * self.w + self.widened
        if self.dense:
            C = cpu.by_columns(self.N, self.F)[1]  # f, and f > 0
            return Phase("decode", batch, 0, self.N * C * (self.e + 1) + self.N * self.D * self.w)
        used = self.N * self.K * (1 + self.w) + 2 * LONG * self.M  # active, values in fp32; indices of active ones
        if batch - self.given > used:
            return Phase("decode", batch, self.code, 0)
        return Phase("fired", self.given + 3 * self.rows, self.code, used + 2 * LONG * self.F)

    def after(self) -> Phase:
        """TrainStep.accumulate: x̂, residual and x − b_dec; of AuxK the halved residual, the pull, and the pull times
        whether there is anyone to pull at. Then the variance of x, in fp32."""
        aux = 3 * self.rows if _has_aux(self.config) else 0
        kept = self.rows if aux else 0
        batch = self.given + self._centred + 2 * self.rows + max(aux, kept + self.widened)
        return Phase("loss", batch, self.code, self.F * (4 + 1))

    @property
    def _centred(self) -> int:
        return self.rows if self.config.apply_b_dec_to_input else 0

    @property
    def _kept(self) -> int:
        """Until the update: the batch, x − b_dec or x in the SAE's units, the residual, and AuxK's pull."""
        given = 4 * self.N * self.D + (self.rows if self._centred else self.given - 4 * self.N * self.D)
        return given + self.rows * (2 if _has_aux(self.config) else 1)

    def pieces(self) -> Phase:
        """kernels/weight_grad.by_feature: the sort, and tables of int64 over pieces (five columns, twice, and what they
        are made of) and features."""
        pieces = self._touched + self.M // 256
        codes = self.code + self.N * self.K * (4 + 3 * LONG + 3 * 4)
        return Phase("backward", self._kept, codes, LONG * (21 * pieces + 12 * self.F))

    def fused(self) -> Phase:
        """kernels/row_update: the tables, dL/df and dL/dpre [N, K], and sums of features that are split."""
        pieces = self._touched + self.M // 256
        codes = self.code + self.N * self.K * (LONG + 2 * 4)
        sums = self.M // 256 * (2 * 2 * self.D * 4 + 4 * LONG)
        return Phase("update", self._kept, codes, LONG * (5 * pieces + self._touched) + sums + 5 * self.w * self.F)

    @property
    def _touched(self) -> int:
        return min(self.M, self.F) if waits(self.config) else self.F

    def by_feature(self) -> Phase:
        """gradients.ByFeature.of: the used slots in 32 bits, sorted, and where they were; then feature, token and slot
        in 64; and vectors over F: how often, summed up, padded."""
        sorting = self.M * (4 + 4 + 3 * LONG)
        return Phase("backward", self._kept, self.code + sorting, 3 * LONG * self.F)

    @property
    def _sorted(self) -> int:
        """What ByFeature keeps: feature, token, slot, value and dL/dpre of the used slots, and offsets."""
        return self.M * (3 * LONG + 2 * self.e) + LONG * self.F

    def blocks(self) -> Phase:
        """RowBlocks and RowAdam: rows and residual in fp32, sums over F, and a block's gradients and moments."""
        vectors = self.F * self.w * (5 if self.config.activation == "jumprelu" else 3)
        vectors += self.F * (4 * LONG) if waits(self.config) else 0
        block = self._block()
        lost = int((HEAP[self.kind] - 1) * block)
        return Phase("update", self._kept + 2 * self.widened, self.code + self._sorted, vectors + block + lost, lost)

    @property
    def block_rows(self) -> int:
        """B, as RowBlocks chooses it."""
        size = max(64, BLOCK_ELEMENTS // self.D)
        if self.dense:
            size = min(size, max(64, cpu.CHUNK_ELEMENTS // self.N))
        return min(size, self.F)

    def _block(self) -> int:
        size = self.block_rows
        # The next block's two gradients are made while the last one's are there.
        block = size * self.D * self.w * max(4.0, 2.0 + self._moments())
        if self.dense:
            block += self.N * size * (2 * self.e + 1)  # dense.of_features: pre, dL/df, and which are above 0
        return int(block)

    def _moments(self) -> float:
        """How many copies of a block, in fp32, RowAdam._step and the moments' `write` make at most."""
        config, scattered = self.config, waits(self.config)
        first = 1.0 if config.beta1 else 0.0
        if config.state == "fp32" and first and not scattered:
            return 0.5 if self.e != self.w else 0.0  # torch's own kernel; weights rounded
        # w where it is no view; g², v, m; and of the widest moment what its `write` makes.
        copied = 1.0 if scattered or config.master == "bf16-sr" else 0.0
        padded = 1.0 if self.D > QUANTISED else 0.0
        made = {
            "fp32": 3.0,  # v read or with β₂^silent; v / (1 − β₂ᵗ)
            "bf16": 3.5,  # g², v, noise, rounded
            "8bit": 7.25 + padded,  # g², v, share, codes, low, high, noise, and which go up
            "rowwise": 1.5,  # noise, rounded; g²
        }[config.state]
        return copied + first + made


def blocks_of(config: TrainConfig, kind: str) -> int:
    """Blocks of rows that an update goes through; none where a kernel does it in one."""
    sizes = _Sizes.of(config, kind)
    return 0 if sizes.fuses else -(-sizes.F // sizes.block_rows)


def randoms(config: TrainConfig) -> int:
    """Random numbers that an update of all rows draws, to round what is narrower than fp32."""
    first = 1 if config.beta1 else 0
    moments = {"fp32": 0, "bf16": 1 + first, "8bit": 1 + first, "rowwise": first}[config.state]
    return 2 * config.d_sae * config.d_in * (moments + (config.master == "bf16-sr"))
