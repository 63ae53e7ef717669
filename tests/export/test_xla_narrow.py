"""Quantised weights of the target `xla` against the layout's definition in `formats.quantized`."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.tolerances import FP32_PRODUCT
from transom.formats import quantized

jax = pytest.importorskip("jax")
jax.config.update("jax_platforms", "cpu")
ml_dtypes = pytest.importorskip("ml_dtypes")
narrow = pytest.importorskip("transom.export.xla.narrow")

ROWS, COLUMNS = 200, 256

FORMATS = [(8, 32, True), (8, 128, True), (4, 32, False), (4, 32, True)]
"""(bits, block, symmetric) of the schemes."""


def stored(codes: Any, scales: Any, zero_points: Any | None, *, table: bool) -> tuple[Any, Any, Any | None]:
    """Arrange a matrix as programs take it.

    Args:
        codes: One number a code [R, G, C], of numpy or jax; signed if there are no zero points.
        scales: float32 [R, G].
        zero_points: One number a block [R, G], or None.
        table: Whether rows are looked up.
    """
    rows, blocks, block = codes.shape
    arranged = codes.reshape(rows, blocks * block) if table else codes.transpose(1, 2, 0)
    return arranged, scales.transpose(), None if zero_points is None else zero_points.transpose()


def _matrix(bits: int, block: int, symmetric: bool, table: bool) -> tuple[list[Any], torch.Tensor]:
    """A random matrix as programs take it, and its numbers."""
    generator = torch.Generator().manual_seed(bits + block)
    blocks = COLUMNS // block
    codes = torch.randint(0, 2**bits, (ROWS, blocks, block), generator=generator, dtype=torch.uint8)
    scales = torch.rand((ROWS, blocks), generator=generator) + 0.1
    zeros = torch.randint(0, 2**bits, (ROWS, blocks), generator=generator, dtype=torch.uint8)
    format = f"int{bits}"
    packed = None if symmetric else quantized.pack(zeros, format)
    dense = quantized.dequantize(quantized.pack(codes, format), scales, packed, format)
    dtype: Any = {(8, True): np.int8, (4, True): ml_dtypes.int4, (4, False): ml_dtypes.uint4}[bits, symmetric]
    middle = 2 ** (bits - 1) if symmetric else 0
    parts = stored(
        (codes.numpy().astype(np.int32) - middle).astype(dtype),
        scales.numpy(),
        None if symmetric else zeros.numpy().astype(dtype),
        table=table,
    )
    return [None if part is None else jax.numpy.asarray(np.ascontiguousarray(part)) for part in parts], dense


@pytest.mark.parametrize(("bits", "block", "symmetric"), FORMATS)
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("shape", [(COLUMNS,), (1, 1, COLUMNS), (1, 5, COLUMNS)])
def test_linears_give_the_numbers_of_the_dequantised_matrix(
    bits: int, block: int, symmetric: bool, table: bool, shape: tuple[int, ...]
) -> None:
    """One token and several; weights of linears, and tables that serve as the head."""
    parts, dense = _matrix(bits, block, symmetric, table)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected: NDArray[np.float32] = (x @ dense.T).numpy()
    product = np.asarray(jax.jit(functools.partial(narrow.linear_quantized, format=f"int{bits}"))(x.numpy(), *parts))
    assert product.dtype == np.float32
    np.testing.assert_allclose(product, expected, rtol=0, atol=FP32_PRODUCT * float(np.abs(expected).max()))


@pytest.mark.parametrize(("bits", "block", "symmetric"), FORMATS)
@pytest.mark.parametrize("tokens", [[[0]], [[ROWS - 1]], [[3, ROWS - 1, 128]]])
def test_rows_of_tables_are_exact(bits: int, block: int, symmetric: bool, tokens: list[list[int]]) -> None:
    parts, dense = _matrix(bits, block, symmetric, table=True)
    rows = np.asarray(
        jax.jit(functools.partial(narrow.embedding_quantized, format=f"int{bits}"))(np.array(tokens, np.int32), *parts)
    )
    np.testing.assert_array_equal(rows, dense[torch.tensor(tokens)].numpy())


def test_a_symbolic_number_of_wanted_positions_can_be_exported() -> None:
    parts, dense = _matrix(8, 128, True, table=True)
    (positions,) = jax.export.symbolic_shape("P")
    shapes = [None if part is None else jax.ShapeDtypeStruct(part.shape, part.dtype) for part in parts]
    exported = jax.export.export(jax.jit(functools.partial(narrow.linear_quantized, format="int8")))(
        jax.ShapeDtypeStruct((1, positions, COLUMNS), np.float32), *shapes
    )
    x = torch.randn((1, 7, COLUMNS), generator=torch.Generator().manual_seed(1))
    expected = (x @ dense.T).numpy()
    np.testing.assert_allclose(
        exported.call(x.numpy(), *parts), expected, atol=FP32_PRODUCT * float(np.abs(expected).max())
    )


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("format", ["float8_e4m3fn", "sfp8"])
def test_every_8_bit_float(format: str, table: bool) -> None:
    """All codes but those that are no number, as weights of a linear and as a table."""
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).repeat(4, 1)
    codes[:, [0x7F, 0xFF]] = 0
    scales = torch.rand((4, 2), generator=torch.Generator().manual_seed(3)) + 0.1
    own = codes.view(torch.float8_e4m3fn) if format == "float8_e4m3fn" else codes
    dense = quantized.dequantize(own.view(4, 2, 128), scales, None, format)
    raw = codes.view(4, 2, 128).numpy()
    parts = stored(
        raw.view(ml_dtypes.float8_e4m3fn) if format == "float8_e4m3fn" else raw, scales.numpy(), None, table=table
    )
    given = [None if part is None else jax.numpy.asarray(np.ascontiguousarray(part)) for part in parts]
    # Ones at one column each: the products are the numbers themselves.
    product = np.asarray(
        jax.jit(functools.partial(narrow.linear_quantized, format=format))(np.eye(256, dtype=np.float32), *given)
    )
    np.testing.assert_array_equal(product.T, dense.numpy())
    if table:
        rows = np.asarray(
            jax.jit(functools.partial(narrow.embedding_quantized, format=format))(np.array([[3, 0]]), *given)
        )
        np.testing.assert_array_equal(rows[0], dense[[3, 0]].numpy())
