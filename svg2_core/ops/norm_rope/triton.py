"""Triton kernels of norms and rotary embedding: each value is read once and written once.

A row of a norm stays in registers between its statistics and its result.
"""

import triton
import triton.language as tl

# Values per program: enough loads in flight, and no more than some tens of registers a thread.
_TILE = 4096


@triton.jit
def _inverse_root_mean(squares, count, eps):
    """1 / sqrt(squares / count + eps), correctly rounded: fp32 inputs are as good as torch's own."""
    count = tl.zeros_like(squares) + count
    root = tl.sqrt_rn(tl.div_rn(squares, count) + eps)
    return tl.div_rn(tl.full(root.shape, 1.0, tl.float32), root)


@triton.jit
def norm_kernel(
    x, weight, bias, factor, shift, out, eps, d, n_1, n_2, chunks,
    x_0, x_1, x_2, x_d, f_0, f_1, f_2, f_d, s_0, s_1, s_2, s_d,
    CENTRED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr, SHIFT: tl.constexpr,
    PER_ROW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[row] = norm(x[row]) * weight + bias, * factor + shift; rows are [n_0, n_1, n_2], out is contiguous.

    PER_ROW: factor and shift change along the last dimension of rows.
    """
    outer, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    i_0, i_1 = (outer // n_1).to(tl.int64), (outer % n_1).to(tl.int64)
    rows = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    i_2 = rows.to(tl.int64)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    wide = dims.to(tl.int64)
    real = dims < d
    inside = (rows < n_2)[:, None] & real
    # x passes through; the rows of weights and modulation stay in the cache for the next programs.
    y = tl.load(
        x + i_0 * x_0 + i_1 * x_1 + i_2 * x_2 + wide * x_d, mask=inside, other=0.0, eviction_policy="evict_first"
    ).to(tl.float32)
    if CENTRED:
        mean = tl.sum(y, axis=1) / d
        y = tl.where(real, y - mean[:, None], 0.0)
    y = y * _inverse_root_mean(tl.sum(y * y, axis=1), d, eps)[:, None]
    if WEIGHT:
        y = y * tl.load(weight + dims, mask=real, other=0.0).to(tl.float32)
    if BIAS:
        y = y + tl.load(bias + dims, mask=real, other=0.0).to(tl.float32)
    factor += i_0 * f_0 + i_1 * f_1 + wide * f_d
    shift += i_0 * s_0 + i_1 * s_1 + wide * s_d
    used = real
    if PER_ROW:
        factor += i_2 * f_2
        shift += i_2 * s_2
        used = inside
    if FACTOR:
        y = y * tl.load(factor, mask=used, other=0.0).to(tl.float32)
    if SHIFT:
        y = y + tl.load(shift, mask=used, other=0.0).to(tl.float32)
    tl.store(out + (outer.to(tl.int64) * n_2 + i_2) * d + wide, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotary_kernel(
    x, weight, rotation, out, eps, h, d, half, count,
    x_b, x_h, x_n, x_d, r_b, r_h, r_n, r_p, r_i, r_j, o_b, o_h, o_n, o_d,
    INTERLEAVED: tl.constexpr, NORM: tl.constexpr, OVER_TOKEN: tl.constexpr, WEIGHT: tl.constexpr,
    PER_HEAD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Some heads of a token (all of them with OVER_TOKEN): normalised, then rotated pair by pair.

    half: pairs per head; count: values that are normalised together. PER_HEAD: each head has rotations of its own.
    """
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    pair = tl.arange(0, BLOCK_P)
    real = (heads < h)[:, None] & (pair < half)[None, :]
    wide_heads, wide_pair = heads.to(tl.int64)[:, None], pair.to(tl.int64)[None, :]
    x += row * x_b + token * x_n + wide_heads * x_h
    out += row * o_b + token * o_n + wide_heads * o_h
    if INTERLEAVED:
        # Loaded contiguously, then split into pairs: neighbours go in one transaction.
        dims = tl.arange(0, 2 * BLOCK_P)
        both_real = (heads < h)[:, None] & (dims < d)[None, :]
        wide_dims = dims.to(tl.int64)[None, :]
        both = tl.load(x + wide_dims * x_d, mask=both_real, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (BLOCK_H, BLOCK_P, 2)))
    else:
        a = tl.load(x + wide_pair * x_d, mask=real, other=0.0).to(tl.float32)
        b = tl.load(x + (wide_pair + half) * x_d, mask=real, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
        if OVER_TOKEN:
            squares = tl.zeros_like(squares) + tl.sum(squares, axis=0)
        scale = _inverse_root_mean(squares, count, eps)[:, None]
        a, b = a * scale, b * scale
    if WEIGHT:
        if OVER_TOKEN:
            weight += wide_heads * d
            weight_real = real
        else:
            weight_real = (pair < half)[None, :]
        if INTERLEAVED:
            both = tl.load(weight + wide_dims, mask=both_real if OVER_TOKEN else (dims < d)[None, :], other=0.0)
            w_a, w_b = tl.split(tl.reshape(both, (BLOCK_H if OVER_TOKEN else 1, BLOCK_P, 2)))
        else:
            w_a = tl.load(weight + wide_pair, mask=weight_real, other=0.0)
            w_b = tl.load(weight + wide_pair + half, mask=weight_real, other=0.0)
        a, b = a * w_a.to(tl.float32), b * w_b.to(tl.float32)
    rotation += row * r_b + token * r_n + wide_pair * r_p
    rotation_real = (pair < half)[None, :]
    if PER_HEAD:
        rotation += wide_heads * r_h
        rotation_real = real
    r_00 = tl.load(rotation, mask=rotation_real, other=0.0).to(tl.float32)
    r_01 = tl.load(rotation + r_j, mask=rotation_real, other=0.0).to(tl.float32)
    r_10 = tl.load(rotation + r_i, mask=rotation_real, other=0.0).to(tl.float32)
    r_11 = tl.load(rotation + r_i + r_j, mask=rotation_real, other=0.0).to(tl.float32)
    rotated_a = (r_00 * a + r_01 * b).to(out.dtype.element_ty)
    rotated_b = (r_10 * a + r_11 * b).to(out.dtype.element_ty)
    if INTERLEAVED:
        tl.store(out + wide_dims * o_d, tl.interleave(rotated_a, rotated_b), mask=both_real)
    else:
        tl.store(out + wide_pair * o_d, rotated_a, mask=real)
        tl.store(out + (wide_pair + half) * o_d, rotated_b, mask=real)


def norm(x, weight, bias, eps: float, factor, shift, out, centred: bool) -> None:
    """See `rms_norm` and `layer_norm` in `__init__.py`; factor and shift are expanded to x's shape."""
    d = x.shape[-1]
    terms = [x, *(term for term in (factor, shift) if term is not None)]
    rows = rows_of(x.shape[:-1], [term.stride()[:-1] for term in terms])
    if rows is None:  # strides that no model has
        x, factor, shift = (None if term is None else term.contiguous() for term in (x, factor, shift))
        terms = [x, *(term for term in (factor, shift) if term is not None)]
        rows = rows_of(x.shape[:-1], [term.stride()[:-1] for term in terms])
    sizes, strides = rows
    of_x, *of_terms = ((*rows, term.stride(-1)) for rows, term in zip(strides, terms, strict=True))
    of_factor = of_terms.pop(0) if factor is not None else (0, 0, 0, 0)
    of_shift = of_terms.pop(0) if shift is not None else (0, 0, 0, 0)
    block_d = max(16, triton.next_power_of_2(d))
    block_r = max(1, min(32, _TILE // block_d))
    chunks = triton.cdiv(sizes[2], block_r)
    # An omitted term still needs a pointer; its flag says that it is not read.
    norm_kernel[(chunks * sizes[0] * sizes[1],)](
        x, *(x if row is None else row.contiguous() for row in (weight, bias)),
        *(x if term is None else term for term in (factor, shift)), out,
        eps, d, sizes[1], sizes[2], chunks, *of_x, *of_factor, *of_shift,
        CENTRED=centred, WEIGHT=weight is not None, BIAS=bias is not None, FACTOR=factor is not None,
        SHIFT=shift is not None, PER_ROW=bool(of_factor[2] or of_shift[2]), BLOCK_R=block_r, BLOCK_D=block_d,
        num_warps=8 if block_d * block_r > 4096 else 4,
    )  # fmt: skip


def rows_of(sizes, strides: list[tuple]) -> tuple[list[int], list[list[int]]] | None:
    """The rows of several tensors of the same `sizes` as three dimensions: -> sizes, and strides for each tensor.

    Neighbouring dimensions that step alike in every tensor become one. None where more than three are left.
    """
    merged: list[tuple[int, list[int]]] = []
    for axis in reversed(range(len(sizes))):
        if sizes[axis] == 1:
            continue
        steps = [of_tensor[axis] for of_tensor in strides]
        if merged and steps == [merged[0][0] * inner for inner in merged[0][1]]:
            merged[0] = (sizes[axis] * merged[0][0], merged[0][1])
        else:
            merged.insert(0, (sizes[axis], steps))
    if len(merged) > 3:
        return None
    merged = [(1, [0] * len(strides))] * (3 - len(merged)) + merged
    return [size for size, _ in merged], [[steps[i] for _, steps in merged] for i in range(len(strides))]


def rotary(x, weight, rotation, eps: float, interleaved: bool, over: str, out) -> None:
    """See `rms_norm_rotary` in `__init__.py`; rotation is expanded to all rows and heads; over is "" for no norm."""
    b, h, n, d = x.shape
    block_p = max(8, triton.next_power_of_2(d // 2))
    all_heads = triton.next_power_of_2(h)
    block_h = all_heads if over == "token" else min(all_heads, max(1, _TILE // (2 * block_p)))
    rotary_kernel[n, triton.cdiv(h, block_h), b](
        x, x if weight is None else weight.contiguous(), rotation, out, eps, h, d, d // 2, h * d if over == "token" else d,
        *x.stride(), *rotation.stride(), *out.stride(),
        INTERLEAVED=interleaved, NORM=bool(over), OVER_TOKEN=over == "token", WEIGHT=weight is not None,
        PER_HEAD=rotation.stride(1) != 0 and h > 1, BLOCK_H=block_h, BLOCK_P=block_p,
        num_warps=8 if block_h * block_p > 2048 else 4,
    )  # fmt: skip
