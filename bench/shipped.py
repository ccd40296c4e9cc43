"""Every kernel in every variant that a launcher can ask for, where variants differ in code and not only in sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Triton's names of the dtypes of inputs, and how their products are made.
INPUTS = {"bf16": ("half", "tf32"), "fp16": ("half", "tf32"), "tf32": ("tf32", "tf32"), "ieee": ("ieee", "ieee")}
WIDTH = 4096
ODD_WIDTH = 507  # rows that start anywhere
RAGGED_WIDTH = 1008  # rows that are aligned, and end within a block


@dataclass(frozen=True)
class Shipped:
    """A kernel with one set of argument types and constants that a launcher can give it."""

    op: str
    variant: str
    kernel: Any  # triton.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]  # pointers and sizes that are multiples of 16 in this variant
    num_warps: int
    num_stages: int = 3
    capabilities: tuple[int, ...] = ()  # where it is used; empty: everywhere
    maxnreg: int | None = None  # registers a thread that the assembler may use, where it is told


def shipped() -> Iterator[Shipped]:
    yield from _decode()
    yield from _encode()
    yield from _select()
    yield from _repair_and_exact()
    yield from _weight_grad()
    yield from _dense_rows()
    yield from _batch_cut()


def _types(pointers: dict[str, str], sizes: str, strides: str) -> dict[str, str]:
    return pointers | dict.fromkeys(sizes.split(), "i32") | dict.fromkeys(strides.split(), "i64")


def _decode() -> Iterator[Shipped]:
    from fastsae.kernels import decode

    strides = ("stride_in", "stride_vn", "stride_wf", "stride_tn", "stride_on")
    kinds = {"": (False, False, False), " counts": (True, False, False), " order": (True, True, False),
             " error": (True, False, True)}  # fmt: skip
    for dtype, kind, whole in itertools.product(("fp32", "bf16", "fp16"), kinds, (False, True)):
        has_counts, has_order, has_target = kinds[kind]
        own = f"*{dtype}"
        pointers = {"indices_ptr": "*i32", "values_ptr": "*fp32", "counts_ptr": "*i32", "order_ptr": "*i32",
                    "w_ptr": own, "bias_ptr": own, "target_ptr": own, "out_ptr": own, "residual_ptr": own,
                    "error_ptr": "*fp32" if has_target else own}  # fmt: skip
        yield Shipped(
            op="decode",
            variant=f"{dtype}{kind}{'' if whole else ' odd D'}",
            kernel=decode.decode_kernel,
            signature=_types(pointers, "K D", " ".join(strides)),
            # Triton makes a constant of a stride of 1.
            constexprs={"stride_ik": 1, "stride_vk": 1,
                        "HAS_COUNTS": has_counts, "HAS_ORDER": has_order, "HAS_TARGET": has_target,
                        "BLOCK_D": decode.BLOCK_D, "UNROLL": decode.UNROLL},
            aligned=(*pointers, *(("D", "stride_wf", "stride_tn", "stride_on") if whole else ())),
            num_warps=decode.NUM_WARPS,
        )


def _operands(name: str) -> dict[str, str]:
    dtype = "fp32" if name in ("tf32", "ieee") else name
    return {"x_ptr": f"*{dtype}", "w_ptr": f"*{dtype}", "bias_ptr": "*fp32"}


def _encode() -> Iterator[Shipped]:
    from fastsae.kernels import encode

    kept = {"best_ptr": "*fp32", "place_ptr": "*u8"}
    same = {80: (80,), 86: (86, 89), 90: (90,), 100: (100,), 120: (120,)}
    for generation, tiles in encode.TILES.items():
        for name, (kind, precision) in INPUTS.items():
            for r, width in ((2, WIDTH), (3, WIDTH), (4, WIDTH), (4, RAGGED_WIDTH)):
                tile = tiles[kind]
                pointers = _operands(name) | kept
                yield Shipped(
                    op="encode",
                    variant=f"fused {name} r {r}{'' if width == WIDTH else ' ragged'}",
                    kernel=encode.encode_kernel,
                    signature=_types(pointers, "N F G", "stride_xn stride_wf stride_br stride_bn"),
                    constexprs={"D": width, "R": r, "PRECISION": precision,
                                "BLOCK_N": tile.BLOCK_N, "BLOCK_F": tile.BLOCK_F, "BLOCK_D": tile.BLOCK_D,
                                "TOGETHER": encode.TILES_N_TOGETHER},
                    aligned=(*pointers, "stride_xn", "stride_wf"),
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    capabilities=same[generation],
                )
    for r in (2, 3, 4):
        pointers = {"z_ptr": "*fp32", **kept}
        yield Shipped(
            op="encode",
            variant=f"chunked r {r}",
            kernel=encode.group_kernel,
            signature=_types(pointers, "N C SPAN", "stride_zn stride_br stride_bn"),
            constexprs={"R": r, "BLOCK_N": encode.GROUP_BLOCK_N,
                        "GROUPS": encode.GROUP_BLOCK_GROUPS},
            aligned=("z_ptr",),
            num_warps=encode.GROUP_WARPS,
        )


def _select() -> Iterator[Shipped]:
    from fastsae.kernels import select

    for sets in (32, 512, 1024, 2048, select.MOST_SETS):
        yield Shipped(
            "select", f"bound {sets} sets", select.bound_kernel,
            _types({"best_ptr": "*fp32", "bound_ptr": "*fp32"}, "G K", "stride_bn"),
            {"SETS": sets, "BITS": select.BOUND_BITS}, ("best_ptr", "bound_ptr"), select.bound_warps(sets),
        )
    yield Shipped(
        "select", "histogram", select.histogram_kernel,
        _types({"best_ptr": "*fp32", "histogram_ptr": "*i32"}, "", "M"),
        {"BITS": select.HISTOGRAM_BITS, "BLOCK": select.HISTOGRAM_BLOCK, "BLOCKS": select.HISTOGRAM_BLOCKS},
        ("best_ptr", "histogram_ptr"), select.HISTOGRAM_WARPS,
    )
    for r, block in itertools.product((2, 3, 4), (32, 256, select.COLLECT_BLOCK)):
        pointers = {"best_ptr": "*fp32", "place_ptr": "*u8", "bound_ptr": "*fp32", "values_ptr": "*fp32",
                    "indices_ptr": "*i32", "counts_ptr": "*i32", "failed_ptr": "*i32", "n_failed_ptr": "*i32"}
        yield Shipped(
            "select", f"collect r {r} block {block}", select.collect_kernel,
            _types(pointers, "G SPAN C MOST_FAILED", "stride_br stride_bn"),
            {"R": r, "BLOCK": block}, tuple(pointers), select.COLLECT_WARPS,
        )
    for slots, fired in itertools.product((128, 256, 512, 1024, 2048), (False, True)):
        pointers = {"found_ptr": "*fp32", "features_ptr": "*i32", "n_found_ptr": "*i32", "n_failed_ptr": "*i32",
                    "values_ptr": "*fp32", "indices_ptr": "*i32", "counts_ptr": "*i32",
                    "fired_ptr": "*i32"}
        yield Shipped(
            "select", f"finish {slots} slots{' fired' if fired else ''}", select.finish_kernel,
            _types(pointers, "K MOST_FAILED", ""),
            {"HAS_FIRED": fired, "C": slots}, tuple(pointers), select.finish_warps(slots),
        )


def _repair_and_exact() -> Iterator[Shipped]:
    from fastsae.kernels import exact, repair

    for name, (_, precision) in INPUTS.items():
        pointers = _operands(name) | {"bound_ptr": "*fp32", "failed_ptr": "*i32", "n_failed_ptr": "*i32",
                                      "values_ptr": "*fp32", "indices_ptr": "*i32", "counts_ptr": "*i32"}  # fmt: skip
        for odd in (False, True):
            yield Shipped(
                "repair", f"{name}{' odd D' if odd else ''}", repair.repair_kernel,
                _types(pointers, "F SPAN C MOST_FAILED", "stride_xn stride_wf"),
                {"D": ODD_WIDTH if odd else WIDTH, "PRECISION": precision, "BLOCK_D": repair.BLOCK_D},
                tuple(pointers) + (() if odd else ("stride_xn", "stride_wf")),
                repair.NUM_WARPS, repair.NUM_STAGES,
            )
    for name in ("bf16", "fp16", "ieee"):  # of float32 there is one kernel: it has no product for tensor cores
        pointers = _operands(name) | {"n_found_ptr": "*i32", "n_failed_ptr": "*i32", "partial_ptr": "*i64"}
        for block, odd in itertools.product((64, 128, 256, 512), (False, True)):
            block_d, warps = exact.shape(block, name != "ieee", not odd)
            yield Shipped(
                "exact", f"{name.replace('ieee', 'fp32')} {block} slots{' odd D' if odd else ''}", exact.exact_kernel,
                _types(pointers, "F C MOST_FAILED PER_SPLIT", "stride_xn stride_wf"),
                {"D": ODD_WIDTH if odd else WIDTH, "B": block, "BLOCK_D": block_d},
                tuple(pointers) + (() if odd else ("stride_xn", "stride_wf")), warps, exact.NUM_STAGES,
                maxnreg=exact.REGISTERS,
            )
    for block in (64, 128, 256, 512):
        pointers = {"partial_ptr": "*i64", "n_found_ptr": "*i32", "n_failed_ptr": "*i32", "values_ptr": "*fp32",
                    "indices_ptr": "*i32", "counts_ptr": "*i32", "fired_ptr": "*i32"}
        yield Shipped(
            "exact", f"merge {block} slots", exact.exact_merge_kernel,
            _types(pointers, "C MOST_FAILED K SPLITS", ""),
            {"HAS_FIRED": True, "B": block}, tuple(pointers), exact.shape(block, False, True)[1],
        )


def _weight_grad() -> Iterator[Shipped]:
    from fastsae.kernels import weight_grad

    widths = {"": weight_grad.WIDEST, " D 512": 512, " odd D": ODD_WIDTH}
    # Of the penalties: none (TopK), weighted L1, and JumpReLU with a gradient of the values besides, which is all of
    # them.
    kinds = {"": (), " L1": ("HAS_L1", "HAS_NORMS"), " JumpReLU": ("HAS_D_VALUES", "HAS_L0", "HAS_THETA")}
    for dtype, kind, width, dots in itertools.product(("fp32", "bf16", "fp16"), kinds, widths, (False, True)):
        if dots and width not in ("", " odd D"):
            continue
        flags = {f"HAS_{name}": f"HAS_{name}" in kinds[kind] for name in ("NORMS", "THETA")}
        more = {f"HAS_{name}": f"HAS_{name}" in kinds[kind] for name in ("D_VALUES", "L1", "L0")}
        own = f"*{dtype}"
        unused = "*i64"
        theta, norms = (own if flags[f"HAS_{name}"] else unused for name in ("THETA", "NORMS"))
        d_values, l1, l0 = ("*fp32" if more[f"HAS_{name}"] else unused for name in ("D_VALUES", "L1", "L0"))
        ends = {"d_w_ptr": own, "d_weight_ptr": own, "d_bias_ptr": own, "d_theta_ptr": theta}
        given = {"w_ptr": own, "norms_ptr": norms}
        sums = {"partial_ptr": "*fp32", "scalars_ptr": "*fp32"}
        pointers = given | sums | ends | {
            "pieces_ptr": "*i64", "order_ptr": "*i64", "values_ptr": "*fp32", "g_ptr": own, "x_ptr": own,
            "dots_ptr": "*fp32" if dots else unused, "d_values_ptr": d_values, "l1_ptr": l1, "l0_ptr": l0,
            "theta_ptr": theta, "d_pre_ptr": "*fp32",
        }  # fmt: skip
        D = widths[width]
        block_d = min(1 << (D - 1).bit_length(), weight_grad.SLICE if dots else D * 2)
        size = {"BLOCK_D": block_d}
        whole = ("D",) if D % 16 == 0 else ()
        yield Shipped(
            "weight_grad", f"{dtype}{kind}{width}{' dots' if dots else ''}", weight_grad.weight_grad_kernel,
            _types(pointers, "F K D", "stride_gn stride_xn stride_wf") | {"bandwidth": "fp32"},
            flags | more | size | {"TOGETHER": weight_grad.TOGETHER, "HAS_DOTS": dots},
            (*pointers, *whole, *(("stride_gn", "stride_xn", "stride_wf") if whole else ())),
            weight_grad.warps(block_d, 8 if dots else 16), maxnreg=weight_grad.REGISTERS,
        )
        if dots:
            continue
        pointers = {"split_ptr": "*i64"} | sums | given | ends
        yield Shipped(
            "weight_grad", f"reduce {dtype}{kind}{width}", weight_grad.reduce_kernel,
            _types(pointers, "D", "stride_wf"), flags | size,
            (*pointers, *whole, *(("stride_wf",) if whole else ())), weight_grad.warps(block_d, 8),
        )
    for dtype, counts, odd in itertools.product(("fp32", "bf16", "fp16"), (False, True), (False, True)):
        own = f"*{dtype}"
        pointers = {"indices_ptr": "*i32", "counts_ptr": "*i32", "g_ptr": own, "w_ptr": own, "dots_ptr": "*fp32"}
        yield Shipped(
            "weight_grad", f"dots {dtype}{' counts' if counts else ''}{' odd D' if odd else ''}",
            weight_grad.dots_kernel, _types(pointers, "K D", "stride_gn stride_wf"),
            {"HAS_COUNTS": counts, "BLOCK_K": weight_grad.DOTS_K, "BLOCK_D": weight_grad.DOTS_D},
            (*pointers, *(() if odd else ("D", "stride_gn", "stride_wf"))), weight_grad.DOTS_WARPS,
        )


def _dense_rows() -> Iterator[Shipped]:
    from fastsae.kernels import dense_rows

    kinds = {"": (), " L1": ("HAS_L1", "HAS_NORMS"), " JumpReLU": ("HAS_L0", "HAS_THETA"),
             " BatchTopK": ("HAS_CUT",)}  # fmt: skip
    blocks = {"BLOCK_N": dense_rows.BLOCK_N, "BLOCK_F": dense_rows.BLOCK_F, "BLOCK_D": dense_rows.BLOCK_D,
              "SLICE": dense_rows.SLICE}  # fmt: skip
    for (name, (_, precision)), kind, odd in itertools.product(INPUTS.items(), kinds, (False, True)):
        own = _operands(name)["x_ptr"]
        has = {flag: flag in kinds[kind] for flag in ("HAS_THETA", "HAS_CUT", "HAS_NORMS")}
        pulls = {flag: flag in kinds[kind] for flag in ("HAS_L1", "HAS_L0")}
        theta, norms, l1, l0 = (
            kind_of if {**has, **pulls}[flag] else "*i32"
            for flag, kind_of in (("HAS_THETA", own), ("HAS_NORMS", own), ("HAS_L1", "*fp32"), ("HAS_L0", "*fp32"))
        )
        common = {"list_ptr": "*i32", "n_list_ptr": "*i32", "x_ptr": own, "w_ptr": own, "bias_ptr": own,
                  "theta_ptr": theta, "cut_ptr": "*i64" if has["HAS_CUT"] else "*i32", "w_dec_ptr": own,
                  "norms_ptr": norms}  # fmt: skip
        forward = common | {"b_dec_ptr": own, "target_ptr": own, "out_ptr": own, "residual_ptr": own, "l1_ptr": "*fp32",
                            "l0_ptr": "*fp32", "fired_ptr": "*i32"}  # fmt: skip
        backward = common | {"g_ptr": own, "l1_ptr": l1, "l0_ptr": l0}
        weights = backward | {"d_w_dec_ptr": own, "d_w_ptr": own, "d_bias_ptr": own, "d_theta_ptr": theta}
        constants = {"D": ODD_WIDTH if odd else WIDTH, "PRECISION": precision} | blocks
        for kernel, pointers, sizes, strides, flags in (
            (dense_rows.forward_kernel, forward, "F tiles", "stride_xn stride_wf stride_vf stride_tn",
             has | {"HAS_TARGET": True}),
            (dense_rows.weights_kernel, weights, "F tiles", "stride_xn stride_gn stride_wf stride_vf", has | pulls),
            (dense_rows.inputs_kernel, backward | {"d_x_ptr": own}, "F tiles",
             "stride_xn stride_gn stride_wf stride_vf", has | pulls),
        ):  # fmt: skip
            more = {} if kernel is dense_rows.forward_kernel else {"bandwidth": "fp32"}
            yield Shipped(
                "dense_rows", f"{kernel.__name__.split('_')[0]} {name}{kind}{' odd D' if odd else ''}", kernel,
                _types(pointers, sizes, strides) | more, flags | constants,
                (*pointers, *(() if odd else strides.split())), dense_rows.warps(precision, name in ("bf16", "fp16")),
                dense_rows.NUM_STAGES, maxnreg=dense_rows.REGISTERS,
            )


def _batch_cut() -> Iterator[Shipped]:
    from fastsae.kernels import batch_cut, dense_rows

    counted = {"state_ptr": "*i64", "histogram_ptr": "*i64"}
    digit = {"BITS": batch_cut.DIGIT_BITS}
    slots = {"values_ptr": "*fp32", "indices_ptr": "*i32"} | counted
    yield Shipped(
        "batch_cut", "slots", batch_cut.count_slots_kernel, _types(slots, "C F level shift", "M"),
        digit | {"BLOCK": batch_cut.SLOTS_BLOCK, "BLOCKS": batch_cut.SLOTS_BLOCKS}, tuple(slots), batch_cut.SLOTS_WARPS,
    )
    yield Shipped(
        "batch_cut", "narrow", batch_cut.narrow_kernel, _types(counted, "level", "total"), digit, tuple(counted),
        batch_cut.NARROW_WARPS,
    )
    kept = {"found_ptr": "*fp32", "features_ptr": "*i32", "n_found_ptr": "*i32", "cut_ptr": "*i64",
            "values_ptr": "*fp32", "indices_ptr": "*i32", "counts_ptr": "*i32"}  # fmt: skip
    yield Shipped(
        "batch_cut", "keep", batch_cut.keep_kernel, _types(kept, "C F", ""), {"BLOCK": batch_cut.KEEP_BLOCK},
        tuple(kept), batch_cut.KEEP_WARPS,
    )
    blocks = {"BLOCK_N": dense_rows.BLOCK_N, "BLOCK_F": dense_rows.BLOCK_F, "BLOCK_D": dense_rows.BLOCK_D}
    for (name, (_, precision)), odd in itertools.product(INPUTS.items(), (False, True)):
        pointers = {"list_ptr": "*i32", "n_list_ptr": "*i32"} | _operands(name) | {"bound_ptr": "*fp32"} | counted
        yield Shipped(
            "batch_cut", f"rows {name}{' odd D' if odd else ''}", batch_cut.count_rows_kernel,
            _types(pointers, "F tiles level shift", "stride_xn stride_wf"),
            digit | blocks | {"D": ODD_WIDTH if odd else WIDTH, "PRECISION": precision},
            (*pointers, *(() if odd else ("stride_xn", "stride_wf"))),
            dense_rows.warps(precision, name in ("bf16", "fp16")), dense_rows.NUM_STAGES, maxnreg=dense_rows.REGISTERS,
        )
