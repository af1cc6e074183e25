"""Every Triton kernel in the shapes that its launcher picks, as signatures to compile ahead of time."""

from typing import NamedTuple

import torch

from ivfast.kernels.card import Card

CARDS = {
    80: Card("cuda", 80, 163 * 1024, 108),  # A100
    86: Card("cuda", 86, 99 * 1024, 84),  # RTX 30; RTX 40 is much the same
    90: Card("cuda", 90, 227 * 1024, 132),  # H100 and H200
    100: Card("cuda", 100, 227 * 1024, 148),  # B200
    120: Card("cuda", 120, 99 * 1024, 170),  # RTX 50; GB10 is much the same
    "gfx942": Card("hip", "gfx942", 64 * 1024, 304, 64),  # MI300
    "gfx950": Card("hip", "gfx950", 160 * 1024, 256, 64),  # MI350
    "gfx1100": Card("hip", "gfx1100", 64 * 1024, 96, 32),  # Radeon RX 7900
}
TARGETS = (80, 90, 100, 120)
AMD = ("gfx942", "gfx950", "gfx1100")


class Variant(NamedTuple):
    kernel: str  # <module>.<function> below kernels/
    types: (
        str  # of its parameters in order: a type, :16 if divisible by it; a number, None or a precision is a constant
    )
    options: dict
    targets: tuple[int, ...] = TARGETS
    products: bool = False  # on the tensor cores, one program of eight warps per SM: any number of registers


def filled(kernel: str, options: dict, **given) -> Variant:
    """A variant whose parameters are float32 arrays and sizes unless given by name."""
    import importlib

    module, name = kernel.split(".")
    names = getattr(importlib.import_module(f"ivfast.kernels.{module}"), name).arg_names
    assert set(given) <= set(names) | {"targets", "products"}
    rest = {key: given.pop(key) for key in ("targets", "products") if key in given}
    usual = {"N": "i32:16", "share": "i32:16"} | dict.fromkeys(("p_mark", "p_mark_x", "p_mark_y"), "*i32:16")
    types = [str(given.get(n, usual.get(n, "*fp32:16" if n.startswith("p_") else "i32"))) for n in names]
    return Variant(kernel, " ".join(types), options, **rest)


def some(kernel: str, options: dict, **given) -> Variant:
    """`filled`, updated with the entries of `given` that are parameters of the kernel."""
    import importlib

    module, name = kernel.split(".")
    names = getattr(importlib.import_module(f"ivfast.kernels.{module}"), name).arg_names
    names = {*names, "targets", "products"}
    return filled(kernel, options, **{key: value for key, value in given.items() if key in names})


def variants() -> list[Variant]:
    """Every Triton kernel in the shapes that its launcher picks. Run in a process where Triton is not interpreted."""
    from ivfast.kernels import multi_js

    found = [Variant("multi_js._sum_kernel", f"*fp32:16 *fp32:16 i32 {multi_js.PARTS}", multi_js.OPTIONS)]
    for classes, dtype, weighted in (
        (2, "fp32", True), (5, "fp32", True), (5, "fp32", False), (5, "bf16", True), (5, "fp16", False),
        (5, "fp64", True), (33, "fp32", False), (1000, "bf16", False), (65536, "fp32", True), (65536, "fp64", False),
    ):  # fmt: skip
        arithmetic = "fp64" if dtype == "fp64" else "fp32"
        dt = torch.float64 if arithmetic == "fp64" else torch.float32
        rows, columns = multi_js._Shape(1, 4096, classes * 4096, classes, dt).tile
        x, y, numbers, tile = f"*{dtype}:16", f"*{arithmetic}:16", "fp32 fp32 i32 i32 i32", f"{rows} {columns}"
        weights = y if weighted else "None"
        found += [
            Variant(
                "multi_js._forward_kernel",
                f"{x} {weights} {y} {y} {numbers} {int(weighted)} {tile}",
                multi_js.FORWARD_OPTIONS,
            ),
            Variant("multi_js._backward_kernel", f"{x} {x} {weights} {y} {x} {numbers} {tile}", multi_js.OPTIONS),
        ]
        given = {"p_logits": x, "p_weights": weights, "p_out": y, "s_high": "fp32", "s_low": "fp32", "start": "i64"}
        given |= {"SMOOTH": int(weighted), "GRADIENT": 1, "ROWS": rows, "COLUMNS": columns}
        found.append(filled("multi_js._rows_kernel", multi_js.OPTIONS, **given))
    found += blocks_variants() + statistics_variants() + frechet_variants()
    return found + svgd_variants() + median_variants() + bridge_variants() + mmd_variants() + as_distance_variants()


def blocks_variants() -> list[Variant]:
    from ivfast.kernels import bridge

    found = []
    for dtype, size, index, ones in (
        ("fp32", "i32", "i64", {}), ("bf16", "i64", "i32", {}), ("fp64", "i32", "i64", {"d": 1, "t": 1, "width": 1}),
    ):  # fmt: skip
        arrays = dict.fromkeys(("p_z", "p_draws", "p_bridges", "p_grad", "p_dz", "p_out"), f"*{dtype}:16")
        for draws in (arrays["p_draws"], "None"):
            given = arrays | {"p_draws": draws, "p_index": f"*{index}:16", "size": size, "ELEMENTS": bridge.ELEMENTS}
            names = ["_substitute_kernel"]
            if draws != "None":
                names += [f"_{kind}{step}_kernel" for kind in ("blockwise", "radial") for step in ("", "_backward")]
            found += [some(f"bridge.{name}", bridge.OPTIONS, **given, **ones) for name in names]
    return found + gaussian_variants()


def gaussian_variants() -> list[Variant]:
    from ivfast.kernels import gaussian

    found = []
    for dtype, n, d in (("fp32", 128, 128), ("bf16", 4096, 2), ("fp64", 4096, 1), ("fp64", 8, 65536)):
        rows, columns = gaussian._tile(n, d)
        x, y = f"*{dtype}:16", "*fp64:16" if dtype == "fp64" else "*fp32:16"
        names = ("p_mu", "p_logvar", "p_draws", "p_z", "p_kl", "p_dz", "p_dkl", "p_dmu", "p_dlogvar")
        given = dict.fromkeys(names, x) | {"p_kl": y, "p_dkl": y, "ROWS": rows, "COLUMNS": columns}
        for left_out in ((), ("p_draws", "p_z", "p_dz"), ("p_mu", "p_dkl")):
            kernels = ("_backward_kernel",) if "p_mu" in left_out else ("_forward_kernel", "_backward_kernel")
            rest = given | dict.fromkeys(left_out, "None")
            found += [some(f"gaussian.{kernel}", gaussian.OPTIONS, **rest) for kernel in kernels]
    return found + sample_loss_variants()


def sample_loss_variants() -> list[Variant]:
    from ivfast.kernels import exp_elbo, importance, reconstruction

    found = [
        filled("reconstruction._sum_kernel", reconstruction.OPTIONS, p_parts=y, p_loss=y, BLOCK=reconstruction.PARTS)
        for y in ("*fp32:16", "*fp64:16")
    ]
    for dtype, n, m, kinds in (("fp32", 16, 784, (0, 1, 2)), ("bf16", 4096, 2, (0, 1, 2)), ("fp64", 4096, 1, (2,))):
        x, y = f"*{dtype}:16", "*fp64:16" if dtype == "fp64" else "*fp32:16"
        arrays = ("p_logits", "p_dlogits", "p_reconstruction", "p_kl", "p_dreconstruction", "p_dkl")
        given = dict.fromkeys((*arrays, "p_output", "p_target", "p_doutput", "p_dtarget"), x)
        given |= {"p_grad": y, "p_loss": y, "A": 1, "B": 1}
        given |= dict.fromkeys(("a_high", "a_low", "b_high", "b_low", "alpha_high", "alpha_low"), "fp32")
        rows, columns = reconstruction._tile(n, m)
        for step in ("_forward_kernel", "_backward_kernel"):
            found += [
                some(f"importance.{step}", importance.OPTIONS, **given, BLOCK=importance.BLOCK),
                some(f"exp_elbo.{step}", exp_elbo.OPTIONS, **given, BLOCK=exp_elbo.BLOCK),
            ]
            for kind in kinds:
                tile = {"KIND": kind, "ROWS": rows, "COLUMNS": columns}
                found.append(some(f"reconstruction.{step}", reconstruction.OPTIONS, **given, **tile))
    return found


def statistics_variants() -> list[Variant]:
    from ivfast.kernels import gaussian_statistics

    found = []
    for d, ones in ((64, {}), (256, {}), (1, {"n": 1, "d": 1})):
        given = {"p_means": "*fp64:16", "p_parts": "*fp64:16", "share": "i32:16", **ones}
        given |= {
            "BLOCKS": -(-d // gaussian_statistics.BLOCK),
            "ROWS": gaussian_statistics.ROWS,
            "BLOCK": gaussian_statistics.BLOCK,
        }
        found.append(filled("gaussian_statistics._scatter_kernel", gaussian_statistics.OPTIONS, **given))
    return found


def frechet_variants() -> list[Variant]:
    from ivfast.kernels import fld, inverse_root

    found = []
    for m, dtype, wide, ones in ((128, "fp32", 0, {}), (64, "bf16", 1, {}), (1, "fp64", 0, {"m": 1, "d": 1})):
        (N, block), options = inverse_root.shape_of("fld_gram", torch.empty(0, dtype=torch.float64), m)
        given = dict.fromkeys(("p_gradient", "p_a", "p_inverse", "p_trace"), f"*{dtype}:16")
        given["p_z"] = "*fp32:16" if dtype == "bf16" else f"*{dtype}:16"
        given |= dict.fromkeys(("p_parts", "p_means", "p_mu", "p_work"), "*fp64:16")
        given |= {"p_distance": "*fp64:16" if dtype == "fp64" else "*fp32:16", **ones}
        given |= {"WIDE": wide, "N": N, "BLOCK": block, "ROWS": fld.ROWS, "products": True}
        names = [
            "fld._scatter_kernel",
            "fld._gradient_kernel",
            "fld._root_kernel" if wide else "inverse_root._root_kernel",
        ]
        found += [some(name, options, **given) for name in names]
    return found


def svgd_variants() -> list[Variant]:
    from ivfast.kernels import far, particles, svgd, svgd_far

    found = []
    for D, dtype, backward in ((16, "fp32", True), (64, "bf16", False), (512, "fp16", True)):
        x, y = f"*{dtype}:16", "*fp32:16" if backward else "None"
        width = svgd.backward_tile(D, CARDS[90]).width if backward else svgd.forward_tile(D, CARDS[90]).width
        shape = {"D": D, "ROWS": particles.ROWS, "WIDTH": width, "PRECISION": "tf32x3" if backward else "tf32"}
        gradient = {"p_grad": x, "p_G": y, "p_p": y} if backward else dict.fromkeys(("p_grad", "p_G", "p_p"), "None")
        pack = {"p_x": x, "p_score": x if backward else "None", "WITH_V": 1, **gradient}
        finish = {"p_x": x, "p_score": pack["p_score"], "D": D, "ROWS": svgd.FINISH_ROWS}
        finish["WIDTH"] = min(D, svgd.FINISH_WIDTH)
        found += [
            filled("particles._pack_kernel", particles.OPTIONS, **pack, **shape, products=True),
            filled("svgd._finish_forward_kernel", particles.OPTIONS, p_phi=x, **finish),
        ]
        given = {"p_x": x, "p_score": pack["p_score"]}
        far_shapes = [
            dict(zip(("ROWS", "COLUMNS", "WIDTH"), far.shape(D, elements), strict=True))
            for elements in (svgd_far.FORWARD, svgd_far.BACKWARD)
        ]
        found.append(filled("svgd_far._forward_kernel", particles.OPTIONS, p_phi=x, **given, **far_shapes[0]))
        del finish["p_x"], finish["p_score"]
        outputs = {"p_grad": x, "p_dx": x, "p_dscore": x if backward else "None", "p_dh": y}
        found += [
            filled("svgd._finish_backward_kernel", particles.OPTIONS, **outputs, **finish),
            filled("svgd_far._backward_kernel", svgd_far.BACKWARD_OPTIONS, **outputs, **given, **far_shapes[1], D=D),
        ]
    for target in TARGETS:
        for D, precision in (
            (16, "tf32x3"),
            (32, "tf32"),
            (64, "tf32x3"),
            (128, "tf32x3"),
            (512, "tf32x3"),
        ):
            for kernel, tile in (
                ("forward", svgd.forward_tile(D, CARDS[target])),
                ("backward", svgd.backward_tile(D, CARDS[target])),
            ):
                shape = {"D": D, "WIDTH": tile.width, "PRECISION": precision}
                shape |= {"ROWS": tile.rows, "COLUMNS": tile.columns, "VALUES": tile.values}
                name = f"svgd._{kernel}_kernel"
                found.append(filled(name, tile.options, **shape, targets=(target,), products=True))
    return found


def median_variants() -> list[Variant]:
    from ivfast.kernels import median, particles, selection

    found = []
    exact = {"PRECISION": "tf32x3"}
    for n, d, dtype, squared in ((3, 1, "bf16", 1), (64, 512, "fp32", 0)):
        D, N, width = median._small_shape(n, d)
        given = {"D": D, "N": N, "WIDTH": width, "SQUARED": squared, "divisor": "fp32", "products": True} | exact
        x, options = f"*{dtype}:16", median.SMALL_OPTIONS
        found += [
            filled("median._small_kernel", options, p_x=x, **given),
            filled("median._small_backward_kernel", options, p_x=x, p_dx=x, **given),
        ]
    for D, counts, rank in ((16, "i32", "i32"), (512, "i64", "i64")):
        shape = {"D": D, "TILE": selection.TILE, "WIDTH": selection.width(D)}
        window = {"p_window": "*i32:16", "p_counts": f"*{counts}:16", "BINS": selection.BINS}
        sample = {"WIDTH": shape["WIDTH"], "ROWS": selection.SAMPLE_ROWS}
        tail = {"p_window": "*i32:16", "divisor": "fp32", "SQUARED": 0, "TWO": 1}
        found += [
            filled(
                "selection._count_kernel",
                selection.TILE_OPTIONS,
                **window,
                **shape,
                **exact,
                SEGMENT=selection.SEGMENT,
                TWO=1,
                products=True,
            ),
            filled("selection._narrow_kernel", particles.OPTIONS, **window, rank_0=rank, rank_1=rank),
            filled("selection._sample_kernel", particles.OPTIONS, **sample),
            filled("selection._lost_kernel", selection.FEW_OPTIONS, WIDTH=shape["WIDTH"], FEW=selection.FEW),
            filled("median._finish_kernel", particles.OPTIONS, **tail, TILE=shape["TILE"], WIDTH=shape["WIDTH"]),
        ]
        apart = shape | exact | {"p_count": "*i32:16", "sets": 1, "products": True}
        found += [filled("median_pairs.apart_kernel", selection.TILE_OPTIONS, **apart, FAR=far) for far in (0, 1)]
    window = {"p_window": "*i32:16", "SAMPLES": selection.MANY_SAMPLES, "BINS": selection.BINS}
    return [*found, filled("selection._bracket_kernel", selection.BRACKET_OPTIONS, **window)]


def bridge_variants() -> list[Variant]:
    from ivfast.kernels import particles, svgd_bridge

    found = []
    numbers = {"step_size": "fp32", "scale": "fp32", "noise": "fp32", "divisor": "fp32"}
    for n, dtype, ones in ((2, "fp32", {"d": 1, "iterations": 1, "rank_0": 1}), (32, "fp16", {}), (64, "bf16", {})):
        targets = tuple(target for target in TARGETS if svgd_bridge._one_program(n, 16, CARDS[target]))
        (D, N), options = svgd_bridge._one_program(n, 16, CARDS[90])
        x = f"*{dtype}:16"
        given = {"p_z": x, "p_draws": x, "p_bridges": x, "D": D, "N": N, "targets": targets}
        given |= {"PRECISION": "tf32x3", "EXACT": "tf32x3"}
        found.append(filled("svgd_bridge._forward_kernel", options, **numbers, **ones, **given, products=True))
        step = {"p_draw": x, "p_bridge": x, "step_size": "fp32", "noise": "fp32", "ELEMENTS": svgd_bridge.ELEMENTS}
        found.append(filled("svgd_bridge._step_kernel", particles.OPTIONS, **step))
    return found


def mmd_variants() -> list[Variant]:
    from ivfast.kernels import far, mmd, mmd_far, particles

    found = [
        filled("mmd._finish_kernel", particles.OPTIONS, D=D, ROWS=mmd.FINISH_ROWS, WIDTH=min(D, mmd.FINISH_WIDTH))
        for D in (16, 512)
    ]
    for target in TARGETS:
        for D, precision, imq, scales, gradient in (
            (16, "tf32x3", 1, 7, 1), (32, "tf32x3", 1, 8, 0), (64, "tf32x3", 1, 7, 1), (64, "tf32", 1, 7, 1),
            (64, "tf32x3", 0, mmd.RBF_SCALES, 1), (128, "tf32x3", 1, 8, 0), (512, "tf32x3", 1, 8, 1),
        ):  # fmt: skip
            tile = mmd.tile_of(D, CARDS[target], bool(gradient))
            shape = {"D": D, "WIDTH": tile.width, "PRECISION": precision, "ROWS": tile.rows, "COLUMNS": tile.columns}
            shape |= {"IMQ": imq, "COUNT": scales, "GRADIENT": gradient, "VALUES": tile.values if gradient else 16}
            shape |= {f"s_{k}": "fp32" for k in range(mmd.SCALES)} | {"UNBIASED": 1, "BETWEEN": 1}
            shape |= {"M": "i32:16", "p_parts": "*fp64:16", "smallest": "fp32"}
            shape |= {} if gradient else {"p_SZ": "None", "p_r": "None", "p_bandwidth": "None"}
            found.append(filled("mmd._sums_kernel", tile.options, **shape, targets=(target,), products=True))
    for D, imq, scales, gradient in ((16, 1, 7, 1), (64, 0, mmd.RBF_SCALES, 1), (512, 1, 8, 0)):
        rows, columns, width = far.shape(D, mmd_far.ELEMENTS)
        given = {"IMQ": imq, "COUNT": scales, "GRADIENT": gradient, "UNBIASED": 1, "BETWEEN": 1, "FIRST": 1}
        given |= {"ROWS": rows, "COLUMNS": columns, "WIDTH": width, "M": "i32:16", "p_parts": "*fp64:16"}
        given |= {f"s_{k}": "fp32" for k in range(mmd.SCALES)} | {"smallest": "fp32"}
        given |= {} if gradient else {"p_dx": "None", "p_bandwidth": "None"}
        found.append(filled("mmd_far._rows_kernel", mmd_far.ROWS_OPTIONS, **given))
    return found


def as_distance_variants() -> list[Variant]:
    from ivfast.kernels import as_distance, as_distance_backward, particles

    shape = {"ROWS": as_distance.PACK_ROWS, "WIDTH": as_distance.PACK_WIDTH}
    parts = {"p_rr": "*fp64:16", "p_gg": "*fp64:16", "p_rg": "*fp64:16", "BLOCK": as_distance.PARTS}
    parts["p_sums"] = "*fp64:16"
    found = [
        filled("as_distance._combine_kernel", particles.OPTIONS, **parts, LOG=log, UNBIASED=1 - log) for log in (0, 1)
    ]
    for dtype, prior in (("fp32", 0), ("bf16", 1)):
        x = f"*{dtype}:16"
        given = {"p_mu": x, "p_logvar": x, "p_wide": "*i32:16", "PRIOR": prior}
        found += [
            filled("as_distance._pack_kernel", particles.OPTIONS, **given, **shape),
            filled("as_distance_backward._finish_kernel", particles.OPTIONS, p_dmu=x, p_dlogvar=x, **shape),
        ]
    for additive in (0, 1):
        for prior in (0, 1):
            pairs = {"ADDITIVE": additive, "PRIOR": prior, "DIAGONAL": prior, "OWNED": as_distance.OWNED}
            pairs |= {"p_wide": "*i32:16", "p_wide_j": "*i32:16", "M": "i32:16"}
            pairs |= {"p_parts": "*fp64:16", "p_sums": "*fp64:16", "p_dsums": "*fp64:16"}
            forward = {"OTHERS": as_distance.OTHERS, "WITHIN": 1 - prior}
            backward = {"OTHERS": as_distance_backward.OTHERS, "KIND": 2 * prior, "LOG": additive}
            options = as_distance_backward.GRADIENT_OPTIONS
            found += [
                some("as_distance._sums_kernel", as_distance.SUMS_OPTIONS, **pairs, **forward),
                some("as_distance_backward._gradient_kernel", options, **pairs, **backward),
            ]
    return found
