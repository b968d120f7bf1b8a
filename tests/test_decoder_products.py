"""The products of the native decoder with packed weights, on every instruction set."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from fenced import fenced
from torch import Tensor

native = pytest.importorskip("fused_attn._C", exc_type=ImportError)
native.bind_torch(torch)
checks: ModuleType = native.decoder_checks

COMPUTES = ("float32", "bfloat16", "int8")
GROUP = {"float32": 1, "bfloat16": 2, "int8": 4}
PADDED_TO = {"float32": 16, "bfloat16": 32, "int8": 64}
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
SIZES = (0, 1, 7, 17, 37, 63, 64, 65, 130)
PANEL = 64
EPSILON = torch.finfo(torch.float32).eps

every_isa = pytest.mark.parametrize("isa", native.cpu_isas_supported())
every_compute = pytest.mark.parametrize("compute", COMPUTES)


@pytest.fixture(autouse=True)
def isa_of_before() -> Iterator[None]:
    before = native.cpu_isa()
    yield
    native.set_cpu_isa(before)


def product(
    compute: str, weights: Tensor, x: Tensor, start: Tensor | None = None, stride: int = 0
) -> Tensor:
    """start + x weights^T by the kernel, into memory with NaN around it that must stay."""
    rows, outputs = x.shape[0], weights.shape[0]
    around = torch.full((rows + 2, outputs + max(stride, 1)), torch.nan)
    out = around[1 : rows + 1, :outputs]
    checks.product(checks.PackedWeights(compute, weights), x, start, out)
    outside = torch.ones_like(around, dtype=torch.bool)
    outside[1 : rows + 1, :outputs] = False
    assert around[outside].isnan().all()
    return out


class Integers(NamedTuple):
    """Rows as int8: each is ``scales`` times ``integers``."""

    integers: Tensor  # (rows, width) int64
    scales: Tensor  # (rows,) float32


def quantised(rows: Tensor) -> Integers:
    largest = (
        rows.abs().amax(dim=1, keepdim=True) if rows.shape[1] else rows.new_zeros(len(rows), 1)
    )
    factor = torch.tensor(127.0) / largest  # 127 / largest would be its reciprocal times 127
    integers = torch.where(largest > 0, rows * factor, 0).round().long()
    return Integers(integers, (largest / 127).squeeze(1))


def numbers(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def unpacked(compute: str, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The stored numbers (outputs padded, inputs padded), the scales and the sums of rows."""
    panels, scales, sums = checks.PackedWeights(compute, weights).contents()
    outputs, inputs = (
        -(-size // to) * to
        for size, to in zip(weights.shape, (PANEL, PADDED_TO[compute]), strict=True)
    )
    group = GROUP[compute]
    stored = numbers(panels, STORED[compute])
    stored = stored.view(outputs // PANEL, inputs // group, PANEL, group)
    return (
        stored.permute(0, 2, 1, 3).reshape(outputs, inputs),
        numbers(scales, torch.float32),
        numbers(sums, torch.int32),
    )


def float64_product(compute: str, weights: Tensor, x: Tensor) -> Tensor:
    """The product of the operands as the kernel has them after rounding them to ``compute``."""
    if compute == "bfloat16":
        weights, x = weights.bfloat16(), x.bfloat16()
    return x.double() @ weights.double().T


def integer_product(weights: Tensor, x: Tensor, start: Tensor | None = None) -> Tensor:
    """The formula of int8 in float32, rounded after each operation."""
    (w, w_scales), (q, x_scales) = quantised(weights), quantised(x)
    sums = (q.double() @ w.double().T).float()  # the integers are exact in float64
    products = sums * (x_scales[:, None] * w_scales)
    return products + (0.0 if start is None else start)


@every_isa
@every_compute
def test_every_size_and_the_same_bits_for_every_number_of_rows(compute: str, isa: str) -> None:
    native.set_cpu_isa(isa)
    generator = torch.Generator().manual_seed(1)
    for outputs, inputs in itertools.product(SIZES, SIZES):
        weights = torch.randn(outputs, inputs, generator=generator)
        x = fenced(torch.randn(max(SIZES), inputs, generator=generator))
        everything = product(compute, weights, x)
        if compute == "int8":
            assert torch.equal(everything, integer_product(weights, x)), (outputs, inputs)
        else:
            error = (everything - float64_product(compute, weights, x)).abs()
            bound = 4 * EPSILON * (x.abs() @ weights.abs().T)
            assert (error <= bound).all(), (outputs, inputs)
        packed = checks.PackedWeights(compute, weights)
        for rows in SIZES:
            out = torch.full((rows, outputs), torch.nan)
            checks.product(packed, x[:rows], None, out)
            assert torch.equal(out, everything[:rows]), (rows, outputs, inputs)


@every_isa
@every_compute
def test_a_row_has_the_same_bits_alone_and_anywhere_among_others(compute: str, isa: str) -> None:
    native.set_cpu_isa(isa)
    generator = torch.Generator().manual_seed(2)
    weights, x = (torch.randn(n, 600, generator=generator) for n in (70, 100))
    packed = checks.PackedWeights(compute, weights)
    alone = torch.cat([product(compute, weights, row[None]) for row in x])
    for rows in range(1, 101):
        for first in (0, 100 - rows):
            out = torch.empty(rows, 70)
            checks.product(packed, x[first : first + rows], None, out)
            assert torch.equal(out, alone[first : first + rows])


@every_isa
@every_compute
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_what_a_product_is_added_to(compute: str, isa: str, rows: int) -> None:
    native.set_cpu_isa(isa)
    generator = torch.Generator().manual_seed(3)
    weights, x = (torch.randn(n, 333, generator=generator) for n in (77, rows))
    bias = torch.randn(77, generator=generator)
    matrix = fenced(torch.randn(rows, 77, generator=generator))
    bare = product(compute, weights, x)
    bound = 2 * EPSILON * (bare.abs() + 30)
    for start in (bias, matrix, bias.expand(rows, 77)):
        assert ((product(compute, weights, x, start, 7) - (bare + start)).abs() <= bound).all()
    beside, inside = product(compute, weights, x, matrix), matrix.clone()
    checks.product(checks.PackedWeights(compute, weights), x, inside, inside)
    assert torch.equal(inside, beside)


@every_isa
@pytest.mark.parametrize("inputs", [40, 512, 1536])
@pytest.mark.parametrize(("compute", "times"), [("float32", 2), ("bfloat16", 4)])
def test_products_add_like_torch_in_float32(
    compute: str, times: int, inputs: int, isa: str
) -> None:
    """The largest error is at most ``times`` that of torch; in float32, so is the mean square."""
    native.set_cpu_isa(isa)
    generator = torch.Generator().manual_seed(4)
    weights, x = (torch.randn(n, inputs, generator=generator) for n in (128, 48))
    right = float64_product(compute, weights, x)
    error = (product(compute, weights, x) - right).abs()
    rounded, rows = (t.to(STORED[compute]).float() for t in (weights, x))
    of_torch = (rows @ rounded.T - right).abs()
    assert error.max() <= times * of_torch.max() + EPSILON * right.abs().max()
    if compute == "float32":
        assert error.square().mean().sqrt() <= 2 * of_torch.square().mean().sqrt() + EPSILON


@every_isa
@pytest.mark.parametrize("rows", [1, 2, 16, 50])
def test_int8_is_the_integer_formula_to_the_bit(isa: str, rows: int) -> None:
    native.set_cpu_isa(isa)
    generator = torch.Generator().manual_seed(6)
    for inputs in (1, 37, 512, 2100):
        weights = torch.randn(90, inputs, generator=generator)
        x, start = (torch.randn(rows, n, generator=generator) for n in (inputs, 90))
        assert torch.equal(product("int8", weights, x), integer_product(weights, x))
        assert torch.equal(product("int8", weights, x, start), integer_product(weights, x, start))


@every_isa
@pytest.mark.parametrize("rows", [1, 3])
def test_the_largest_integer_sum(isa: str, rows: int) -> None:
    native.set_cpu_isa(isa)
    most = (2**31 - 1) // 127**2
    for sign in (1.0, -1.0):
        weights, x = torch.full((2, most), sign), torch.ones(rows, most)
        assert torch.equal(product("int8", weights, x), integer_product(weights, x))
    with pytest.raises(ValueError, match=f"at most {most} inputs, got {most + 1}"):
        checks.PackedWeights("int8", torch.ones(1, most + 1))


@every_isa
@every_compute
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_show_where_they_belong(
    compute: str, isa: str, value: float
) -> None:
    native.set_cpu_isa(isa)
    generator = torch.Generator().manual_seed(7)
    for rows in (1, 20):
        weights, x = (torch.randn(n, 70, generator=generator) for n in (67, rows))
        assert product(compute, weights, x).isfinite().all()
        spoilt = x.clone()
        spoilt[rows // 2, 69] = value
        finite = product(compute, weights, spoilt).isfinite()
        assert not finite[rows // 2].any() and finite.sum() == (rows - 1) * 67
        spoilt = weights.clone()
        spoilt[66, 3] = value
        finite = product(compute, spoilt, x).isfinite()
        assert not finite[:, 66].any() and finite.sum() == rows * 66


@every_isa
def test_rows_convert_like_torch(isa: str) -> None:
    native.set_cpu_isa(isa)
    generator = torch.Generator().manual_seed(8)
    for width in (1, 31, 64, 77):
        rows = torch.randn(6, width, generator=generator)
        rows[1], rows[2] = 0.0, 1e-39
        rows[3] *= 1e-42
        rows[4] *= 1e37
        rows[5] = torch.arange(width) + 0.5  # ties
        rows = fenced(rows)
        data, nothing = checks.convert("bfloat16", rows)
        padded = numbers(data, torch.bfloat16).view(6, -1)
        assert not nothing and torch.equal(padded[:, :width], rows.bfloat16())
        assert not padded[:, width:].any() and padded.shape[1] == -(-width // 32) * 32

        data, scales = checks.convert("int8", rows)
        padded = numbers(data, torch.int8).view(6, -1)
        found = numbers(scales, torch.float32)
        right = quantised(rows[[0, 1, 4, 5]])
        assert torch.equal(padded[[0, 1, 4, 5], :width].long(), right.integers)
        assert torch.equal(found[[0, 1, 4, 5]], right.scales)
        assert not padded[:, width:].any() and padded.shape[1] == -(-width // 64) * 64
        # Numbers below the normal range: 127 / largest is infinite in float32.
        tiny = padded[2:4, :width].double() / 127 * rows[2:4].abs().double().amax(1, keepdim=True)
        half = rows[2:4].abs().double().amax(1, keepdim=True) / 253
        assert ((tiny - rows[2:4].double()).abs() <= half).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@every_isa
def test_a_row_that_is_not_finite_converts_to_a_scale_of_nan(isa: str, value: float) -> None:
    native.set_cpu_isa(isa)
    for place in (0, 16, 69):
        x = torch.randn(3, 70)
        x[1, place] = value
        _, scales = checks.convert("int8", x)
        found = numbers(scales, torch.float32)
        assert found.isnan().tolist() == [False, True, False]
        data, _ = checks.convert("bfloat16", x)
        wide = numbers(data, torch.bfloat16).view(3, -1)[:, :70]
        assert torch.equal(wide.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))


@every_compute
@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (65, 130), (130, 63), (0, 5), (5, 0)])
def test_panels_hold_the_rounded_weights_and_zeros(compute: str, shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    stored, scales, sums = unpacked(compute, weights)
    inside = stored[:outputs, :inputs]
    if compute == "int8":
        right = quantised(weights)
        assert torch.equal(inside.long(), right.integers)
        assert torch.equal(scales[:outputs], right.scales) and not scales[outputs:].any()
        assert (
            torch.equal(sums[:outputs].long(), right.integers.sum(1)) and not sums[outputs:].any()
        )
    else:
        assert torch.equal(inside, weights.to(STORED[compute]))
    assert not stored[outputs:].any() and not stored[:, inputs:].any()


@every_compute
def test_strided_weights_pack_like_contiguous_ones(compute: str) -> None:
    generator = torch.Generator().manual_seed(10)
    weights = torch.randn(130, 77, generator=generator)
    wide = torch.randn(130, 2 * 77 + 5, generator=generator)
    wide[:, 3 : 3 + 2 * 77 : 2] = weights
    right = checks.PackedWeights(compute, weights).contents()
    for same in (weights.T.contiguous().T, wide[:, 3 : 3 + 2 * 77 : 2], fenced(weights)):
        assert torch.equal(same, weights) and same.stride() != weights.stride()
        assert checks.PackedWeights(compute, same).contents() == right


def test_stored_integers_come_back_from_the_floats_they_stand_for() -> None:
    generator = torch.Generator().manual_seed(11)
    integers = torch.randint(-127, 128, (500, 300), generator=generator)
    integers[:, 7] = 127
    integers[250:, 7] = -127
    scales = torch.exp(4 * torch.randn(500, 1, generator=generator))
    stored, found, _ = unpacked("int8", integers * scales)
    assert torch.equal(stored[:500, :300].long(), integers)
    assert ((found[:500] - scales[:, 0]).abs() <= EPSILON * scales[:, 0]).all()


@every_isa
def test_weights_and_rows_of_zeros_leave_the_start(isa: str) -> None:
    native.set_cpu_isa(isa)
    start = torch.randn(4, 66, generator=torch.Generator().manual_seed(12))
    for compute in COMPUTES:
        for weights, x in (
            (torch.zeros(66, 33), torch.ones(4, 33)),
            (torch.ones(66, 33), torch.zeros(4, 33)),
            (torch.ones(66, 0), torch.ones(4, 0)),
        ):
            assert torch.equal(product(compute, weights, x, start), start)


@every_isa
@every_compute
def test_threads_at_the_same_time_compute_the_same(compute: str, isa: str) -> None:
    native.set_cpu_isa(isa)
    generator = torch.Generator().manual_seed(13)
    weights, x = (torch.randn(n, 700, generator=generator) for n in (300, 40))
    packed, right = checks.PackedWeights(compute, weights), product(compute, weights, x)

    def repeat(_: int) -> Tensor:
        out = torch.empty(40, 300)
        checks.product(packed, x, None, out, 20)
        return out

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(out, right) for out in pool.map(repeat, range(8)))


def test_the_instruction_sets_are_those_of_the_processor() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    if not flags:
        pytest.skip("/proc/cpuinfo does not tell what the processor has")
    has = set(flags[1].split())
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}
    needs = {
        "generic": set(),
        "avx2": avx2,
        "avx2_vnni": avx2 | {"avx_vnni"},
        "avx512": avx512,
        "avx512_vnni": avx512 | {"avx512_vnni"},
        "avx512_bf16": avx512 | {"avx512_vnni", "avx512_bf16"},
        "avx512_amx": avx512 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"},
    }
    expected = {isa for isa, flags_needed in needs.items() if flags_needed <= has}
    supported = set(native.cpu_isas_supported())
    assert supported <= expected
    assert expected - supported <= {"avx512_amx"}  # the system may refuse its registers


@pytest.mark.skipif("avx512_amx" not in native.cpu_isas_supported(), reason="needs AMX")
@pytest.mark.parametrize("exponent", [-42, -38, -20, 0])
def test_few_rows_of_bfloat16_have_the_bits_of_tiles(exponent: int) -> None:
    """Vectors do what the tiles do: signs of zeros and flushed subnormals included."""
    native.set_cpu_isa("avx512_amx")
    for inputs in (1, 31, 32, 33, 300):
        generator = torch.Generator().manual_seed(inputs)
        weights = torch.randn(70, inputs, generator=generator) * 10.0**exponent
        weights[::2] = -weights[::2].abs()
        x = torch.randn(40, inputs, generator=generator)
        x[:, ::3] = 0.0
        packed = checks.PackedWeights("bfloat16", weights)
        for start in (None, torch.full((70,), 1e-40)):
            tiles = torch.empty(40, 70)
            checks.product(packed, x, start, tiles)
            for rows in (1, 2):
                vectors = torch.empty(rows, 70)
                checks.product(packed, x[5 : 5 + rows], start, vectors)
                same = vectors.view(torch.int32) == tiles[5 : 5 + rows].view(torch.int32)
                assert same.all()
