"""Norms and rotary embedding against fp64: as near to it as torch's own operations in the same dtype, within a factor."""

import math

import cases
import pytest
import torch
import torch.nn.functional as F
from accuracy import errors
from large import REACH, ROOM
from svg2_pack.svg2_core.ops.norm_rope import MAX_WIDTH, layer_norm, rms_norm, rms_norm_rotary, rotary

EPS = 1e-6
PAIRS = ["interleaved", "halves"]


def random(seed: int, *shape, device, dtype=torch.float32):
    """Rows of different sizes and means, so that what belongs to another row shows."""
    g = cases.generator(seed)
    x = torch.randn(shape, generator=g)
    if len(shape) > 1:
        x = x * torch.rand(*shape[:-1], 1, generator=g).add(0.2) + torch.randn(*shape[:-1], 1, generator=g)
    return x.to(device, dtype)


def assert_as_good(result, torchs, truth):
    """result's error against fp64 `truth` is at most twice that of torch's result, or one rounding."""
    floor = torch.finfo(result.dtype).eps / 2
    assert result.shape == truth.shape
    for ours, theirs in zip(errors(result, truth), errors(torchs, truth), strict=True):
        assert ours <= 2 * theirs + floor, f"error {ours:.2e}, torch's own {theirs:.2e}"


# The definitions, in fp64 and by sums


def norm64(x, weight=None, bias=None, factor=None, shift=None, centred=False):
    x = x.double()
    d = x.shape[-1]
    mean = x.sum(-1, keepdim=True) / d if centred else torch.zeros_like(x[..., :1])
    y = (x - mean) / (((x - mean) ** 2).sum(-1, keepdim=True) / d + EPS) ** 0.5
    for term, add in ((weight, False), (bias, True), (factor, False), (shift, True)):
        if term is not None:
            y = y + term.double() if add else y * term.double()
    return y


def rotary64(x, rotation, pairs):
    """Pair by pair: the vector of the two values times its token's matrix."""
    x, rotation, half = x.double(), rotation.double(), x.shape[-1] // 2
    out = torch.empty_like(x)
    for j in range(half):
        places = [2 * j, 2 * j + 1] if pairs == "interleaved" else [j, j + half]
        out[..., places] = (rotation[..., j, :, :] @ x[..., places, None])[..., 0]
    return out


def norm_by_torch(x, weight=None, bias=None, factor=None, shift=None, centred=False):
    """As the models do it, each operation rounded to the dtype."""
    width = x.shape[-1:]
    y = F.layer_norm(x, width, weight, bias, EPS) if centred else F.rms_norm(x, width, weight, EPS)
    y = y if factor is None else y * factor
    return y if shift is None else y + shift


def rotary_by_torch(x, rotation, pairs):
    half = x.shape[-1] // 2
    y = x.to(rotation.dtype)
    a, b = (y[..., 0::2], y[..., 1::2]) if pairs == "interleaved" else (y[..., :half], y[..., half:])
    rotated = [rotation[..., i, 0] * a + rotation[..., i, 1] * b for i in range(2)]
    return torch.stack(rotated, -1 if pairs == "interleaved" else -2).flatten(-2).to(x.dtype)


def angles(seed: int, n: int, d: int, device, heads: int = 1, rows: int = 1):
    """`[rows, heads, N, D/2, 2, 2]` fp32, rotations by any angles, as the models' tables are."""
    a = 2 * math.pi * torch.rand(rows, heads, n, d // 2, generator=cases.generator(seed))
    return torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], -1).unflatten(-1, (2, 2)).to(device)


# Norms


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("d", [1, 64, 100, 128, 1536, 3072, 5120])
def test_norm_of_every_width(backend, dtype, device, d, centred):
    x, w = random(1, 2, 5, d, device=device, dtype=dtype), random(2, d, device=device, dtype=dtype)
    terms = {"weight": w, "bias": 0.1 * w.flip(0)} if centred else {"weight": w}
    result = (layer_norm if centred else rms_norm)(x, **terms, eps=EPS, backend=backend)
    assert result.dtype == dtype and result.is_contiguous()
    assert_as_good(result, norm_by_torch(x, **terms, centred=centred), norm64(x, **terms, centred=centred))


MODULATIONS = {
    "a row of the batch": (3, 1, 96),
    "a token": (3, 11, 96),
    "all": (96,),
    "one video's tokens": (1, 11, 96),
    "a value for all dimensions": (3, 11, 1),
}


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("of", MODULATIONS)
def test_modulation(backend, dtype, device, of, centred):
    x = random(3, 3, 11, 96, device=device, dtype=dtype)
    factor, shift = (random(seed, *MODULATIONS[of], device=device, dtype=dtype) for seed in (4, 5))
    run = layer_norm if centred else rms_norm
    for terms in ({"factor": factor, "shift": shift}, {"factor": factor}, {"shift": shift}):
        result = run(x, eps=EPS, **terms, backend=backend)
        assert_as_good(result, norm_by_torch(x, **terms, centred=centred), norm64(x, **terms, centred=centred))


def test_factor_and_shift_of_different_shapes(backend, device):
    x, factor, shift = (
        random(6 + i, *shape, device=device) for i, shape in enumerate([(2, 7, 64), (2, 1, 64), (7, 64)])
    )
    result = layer_norm(x, eps=EPS, factor=factor, shift=shift, backend=backend)
    terms = {"factor": factor, "shift": shift, "centred": True}
    assert_as_good(result, norm_by_torch(x, **terms), norm64(x, **terms))


def test_modulation_of_cosmos(backend, dtype, device):
    """Video first, then batch: `[T, H, W, B, D]` with a modulation `[1, 1, 1, B, D]`; and frame by frame `[B, T, 1, 1, D]`."""
    for x_shape, shape in (((2, 3, 4, 2, 64), (1, 1, 1, 2, 64)), ((2, 2, 3, 4, 64), (2, 2, 1, 1, 64))):
        x, terms = random(9, *x_shape, device=device, dtype=dtype), {}
        terms["factor"], terms["shift"] = (random(seed, *shape, device=device, dtype=dtype) for seed in (10, 11))
        result = layer_norm(x, eps=EPS, **terms, backend=backend)
        assert_as_good(result, norm_by_torch(x, **terms, centred=True), norm64(x, **terms, centred=True))


def test_a_modulation_of_higher_precision_decides_the_result(backend, device):
    x = random(12, 2, 3, 64, device=device, dtype=torch.float16)
    factor = random(13, 2, 1, 64, device=device)
    result = layer_norm(x, eps=EPS, factor=factor, backend=backend)
    assert result.dtype == torch.float32
    assert errors(result, norm64(x, factor=factor, centred=True))[0] < 1e-6


@pytest.mark.parametrize("memory", cases.MEMORY)
def test_norm_of_any_memory(backend, dtype, device, memory):
    x = cases.MEMORY[memory](random(14, 2, 3, 13, 64, device=device, dtype=dtype))
    weight = random(15, 128, device=device, dtype=dtype)[::2]
    factor = random(16, 2, 1, 13, 128, device=device, dtype=dtype)[..., ::2]
    result = rms_norm(x, weight, eps=EPS, factor=factor, backend=backend)
    assert_as_good(result, norm_by_torch(x, weight, factor=factor), norm64(x, weight, factor=factor))


def test_norm_of_rows_that_do_not_merge(backend, device):
    x = random(17, 3, 5, 2, 4, 32, device=device).permute(3, 1, 0, 2, 4)[:, ::2]
    assert_as_good(rms_norm(x, eps=EPS, backend=backend), norm_by_torch(x), norm64(x))


def test_large_means_do_not_cancel(backend, device):
    """E[x^2] - mean^2 would have nothing left in fp32."""
    x = 1000 + random(18, 4, 512, device=device)
    assert errors(layer_norm(x, eps=EPS, backend=backend), norm64(x, centred=True))[0] < 1e-4


def test_rows_of_zeros(backend, dtype, device):
    x = torch.zeros(3, 64, device=device, dtype=dtype)
    assert (rms_norm(x, eps=EPS, backend=backend) == 0).all() and (layer_norm(x, eps=EPS, backend=backend) == 0).all()


def test_squares_beyond_half_precision(backend, device):
    x = 3000 * random(19, 2, 128, device=device, dtype=torch.float16)
    assert_as_good(rms_norm(x, eps=EPS, backend=backend), norm64(x).half(), norm64(x))


@pytest.mark.parametrize("n", [1, 3, 4, 5, 33, 127])
def test_ragged_numbers_of_rows(backend, device, n):
    x, factor = random(20, 2, n, 48, device=device), random(21, 2, 1, 48, device=device)
    assert_as_good(
        rms_norm(x, eps=EPS, factor=factor, backend=backend), norm_by_torch(x, factor=factor), norm64(x, factor=factor)
    )


def test_nothing(backend, device):
    assert rms_norm(torch.zeros(2, 0, 8, device=device), eps=EPS, backend=backend).shape == (2, 0, 8)
    table = torch.zeros(1, 1, 0, 4, 2, 2, device=device)
    assert rotary(torch.zeros(1, 3, 0, 8, device=device), table, pairs="halves", backend=backend).shape == (1, 3, 0, 8)


# Rotary embedding


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("d", [2, 64, 96, 128])
def test_rotary(backend, dtype, device, pairs, d):
    x, table = random(22, 2, 3, 7, d, device=device, dtype=dtype), angles(23, 7, d, device)
    result = rotary(x, table, pairs=pairs, backend=backend)
    assert result.dtype == dtype
    assert_as_good(result, rotary_by_torch(x, table, pairs), rotary64(x, table, pairs))


def test_any_matrix(backend, device):
    """The op takes the table as it is: some models scale it."""
    x, table = random(24, 1, 2, 5, 16, device=device), random(25, 1, 1, 5, 8, 2, 2, device=device)
    assert_as_good(
        rotary(x, table, pairs="halves", backend=backend),
        rotary_by_torch(x, table, "halves"),
        rotary64(x, table, "halves"),
    )


@pytest.mark.parametrize(("rows", "heads"), [(2, 1), (1, 3), (2, 3)])
def test_tables_of_a_row_and_of_a_head(backend, device, rows, heads):
    x, table = random(26, 2, 3, 7, 32, device=device), angles(27, 7, 32, device, heads, rows)
    w = random(28, 96, device=device)
    result = rms_norm_rotary(x, w, table, eps=EPS, over="token", pairs="interleaved", backend=backend)
    truth = rotary64(over_token(norm64, x, w), table, "interleaved")
    assert_as_good(result, rotary_by_torch(over_token(norm_by_torch, x, w), table, "interleaved"), truth)


def over_token(norm, x, weight):
    """A norm of all heads of a token together, by putting them side by side."""
    return norm(x.transpose(1, 2).flatten(2), weight).unflatten(2, (x.shape[1], -1)).transpose(1, 2)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize(
    ("over", "h", "d"),
    [("head", 3, 128), ("head", 24, 64), ("head", 70, 64), ("token", 12, 128), ("token", 40, 128), ("token", 3, 80)],
)
def test_norm_and_rotary(backend, dtype, device, pairs, over, h, d):
    x, table = random(29, 2, h, 5, d, device=device, dtype=dtype), angles(30, 5, d, device)
    w = random(31, h * d if over == "token" else d, device=device, dtype=dtype)
    result = rms_norm_rotary(x, w, table, eps=EPS, over=over, pairs=pairs, backend=backend)
    truth, torchs = (over_token(f, x, w) if over == "token" else f(x, w) for f in (norm64, norm_by_torch))
    assert_as_good(result, rotary_by_torch(torchs, table, pairs), rotary64(truth, table, pairs))


def test_norm_and_rotary_without_a_weight(backend, device):
    x, table = random(32, 1, 2, 5, 16, device=device), angles(33, 5, 16, device)
    result = rms_norm_rotary(x, None, table, eps=EPS, over="head", pairs="halves", backend=backend)
    assert_as_good(result, rotary_by_torch(norm_by_torch(x), table, "halves"), rotary64(norm64(x), table, "halves"))


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("memory", cases.MEMORY)
def test_rotary_of_any_memory(backend, dtype, device, memory, pairs):
    """In and out, each with its own strides; what lies between the places of out stays."""
    x = cases.MEMORY[memory](random(34, 2, 3, 13, 64, device=device, dtype=dtype))
    table = angles(35, 26, 64, device).to(torch.float64)[:, :, ::2]
    out = cases.MEMORY[memory](torch.zeros(2, 3, 13, 64, device=device, dtype=dtype))
    result = rms_norm_rotary(x, None, table, eps=EPS, over="head", pairs=pairs, out=out, backend=backend)
    assert result is out
    assert_as_good(out, rotary_by_torch(norm_by_torch(x), table, pairs), rotary64(norm64(x), table, pairs))


@pytest.mark.parametrize("pairs", PAIRS)
def test_into_a_part_of_a_tensor(backend, device, pairs):
    joint = torch.full((1, 2, 9, 16), torch.nan, device=device)
    x, table = random(36, 1, 2, 5, 16, device=device), angles(37, 9, 16, device)
    rotary(x, table[:, :, 3:8], pairs=pairs, out=joint[:, :, 3:8], backend=backend)
    assert_as_good(joint[:, :, 3:8], rotary_by_torch(x, table[:, :, 3:8], pairs), rotary64(x, table[:, :, 3:8], pairs))
    assert joint[:, :, :3].isnan().all() and joint[:, :, 8:].isnan().all()


# Tensors that reach past 2^31 elements, see test_large_offsets.py

def far(memory, place: int, near, axis: int):
    """A copy of `near` in `memory` whose elements are far apart along `axis`."""
    strides = list(near.movedim(axis, 0).contiguous().movedim(0, axis).stride())
    strides[axis] = REACH // (near.shape[axis] - 1)
    view = memory.as_strided(near.shape, strides, 2**31 + place * ROOM)
    assert strides[axis] < 2**31 < (near.shape[axis] - 1) * strides[axis]
    return view.copy_(near)


@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["batch", "head", "token", "dimension"])
def test_far_apart(backend, device, memory, axis):
    near = random(38, 3, 3, 5, 16, device=device, dtype=torch.float16)
    x, out = far(memory, 0, near, axis), far(memory, 1, torch.zeros_like(near), axis)
    factor, table = random(39, 3, 1, 1, 16, device=device, dtype=torch.float16), angles(40, 5, 16, device)
    assert torch.equal(
        layer_norm(x, eps=EPS, factor=factor, backend=backend),
        layer_norm(near, eps=EPS, factor=factor, backend=backend),
    )
    for pairs in PAIRS:
        settings = {"eps": EPS, "over": "token", "pairs": pairs, "backend": backend}
        rms_norm_rotary(x, None, table, out=out, **settings)
        assert torch.equal(out, rms_norm_rotary(near, None, table, **settings))


# Errors


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, "x is torch.float64"),
        ({"x": torch.zeros(1, MAX_WIDTH + 1)}, "D from 1"),
        ({"weight": torch.zeros(7)}, "weight must be"),
        ({"bias": torch.zeros(1, 8)}, "bias must be"),
        ({"factor": torch.zeros(3, 8)}, "factor .* does not broadcast"),
        ({"shift": torch.zeros(4, 2, 8)}, "shift .* does not broadcast"),
        ({"factor": torch.zeros(8, dtype=torch.int32)}, "factor is torch.int32"),
    ],
)
def test_bad_input_to_a_norm_is_named(backend, arguments, named):
    good = {"x": torch.zeros(2, 8), "eps": EPS}
    layer_norm(**good, backend=backend)
    with pytest.raises(ValueError, match=named):
        layer_norm(**{**good, **arguments}, backend=backend)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"x": torch.zeros(2, 3, 8)}, "x must be"),
        ({"x": torch.zeros(1, 2, 3, 7)}, "even D"),
        ({"pairs": "thirds"}, "thirds"),
        ({"over": "row"}, "row"),
        ({"rotation": torch.zeros(1, 1, 4, 4, 2, 2)}, "rotation must be"),
        ({"rotation": torch.zeros(1, 3, 3, 4, 2, 2)}, "rotation must be"),
        ({"weight": torch.zeros(16)}, "weight must be"),
        ({"out": torch.zeros(1, 2, 3, 8, dtype=torch.float16)}, "out must be"),
        ({"x": torch.zeros(1, 2, 3, 8, dtype=torch.int32)}, "x is torch.int32"),
    ],
)
def test_bad_input_to_rotary_is_named(backend, arguments, named):
    good = {
        "x": torch.zeros(1, 2, 3, 8),
        "weight": None,
        "rotation": torch.zeros(1, 1, 3, 4, 2, 2),
        "eps": EPS,
        "over": "head",
        "pairs": "halves",
    }
    rms_norm_rotary(**good, backend=backend)
    with pytest.raises(ValueError, match=named):
        rms_norm_rotary(**{**good, **arguments}, backend=backend)
