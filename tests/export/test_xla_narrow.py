"""Quantised weights of the target `xla` against the layout's definition in `graphs.quantized`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.tolerances import FP32_PRODUCT
from transom.graphs import quantized

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
    packed = None if symmetric else quantized.pack(zeros, bits)
    dense = quantized.dequantize(quantized.pack(codes, bits), scales, packed, bits)
    dtype: Any = {(8, True): np.int8, (4, True): ml_dtypes.int4, (4, False): ml_dtypes.uint4}[bits, symmetric]
    middle = 2 ** (bits - 1) if symmetric else 0
    held = stored(
        (codes.numpy().astype(np.int32) - middle).astype(dtype),
        scales.numpy(),
        None if symmetric else zeros.numpy().astype(dtype),
        table=table,
    )
    return [None if part is None else jax.numpy.asarray(np.ascontiguousarray(part)) for part in held], dense


@pytest.mark.parametrize(("bits", "block", "symmetric"), FORMATS)
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("shape", [(COLUMNS,), (1, 1, COLUMNS), (1, 5, COLUMNS)])
def test_linears_give_the_numbers_of_the_dequantised_matrix(
    bits: int, block: int, symmetric: bool, table: bool, shape: tuple[int, ...]
) -> None:
    """One token and several; weights of linears, and tables that serve as the head."""
    held, dense = _matrix(bits, block, symmetric, table)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    wanted: NDArray[np.float32] = (x @ dense.T).numpy()
    found = np.asarray(jax.jit(narrow.linear_quantized)(x.numpy(), *held))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=FP32_PRODUCT * float(np.abs(wanted).max()))


@pytest.mark.parametrize(("bits", "block", "symmetric"), FORMATS)
@pytest.mark.parametrize("tokens", [[[0]], [[ROWS - 1]], [[3, ROWS - 1, 128]]])
def test_rows_of_tables_are_exact(bits: int, block: int, symmetric: bool, tokens: list[list[int]]) -> None:
    held, dense = _matrix(bits, block, symmetric, table=True)
    found = np.asarray(jax.jit(narrow.embedding_quantized)(np.array(tokens, np.int32), *held))
    np.testing.assert_array_equal(found, dense[torch.tensor(tokens)].numpy())


def test_a_symbolic_number_of_wanted_positions_can_be_exported() -> None:
    held, dense = _matrix(8, 128, True, table=True)
    (positions,) = jax.export.symbolic_shape("P")
    shapes = [None if part is None else jax.ShapeDtypeStruct(part.shape, part.dtype) for part in held]
    exported = jax.export.export(jax.jit(narrow.linear_quantized))(
        jax.ShapeDtypeStruct((1, positions, COLUMNS), np.float32), *shapes
    )
    x = torch.randn((1, 7, COLUMNS), generator=torch.Generator().manual_seed(1))
    wanted = (x @ dense.T).numpy()
    np.testing.assert_allclose(exported.call(x.numpy(), *held), wanted, atol=FP32_PRODUCT * float(np.abs(wanted).max()))


def test_float8_codes_stay_narrow_too() -> None:
    """No scheme of ours makes them yet; what reads them is ready."""
    codes = torch.randn((ROWS, 4, 64), generator=torch.Generator().manual_seed(2)).to(torch.float8_e4m3fn)
    scales = torch.rand((ROWS, 4), generator=torch.Generator().manual_seed(3)) + 0.1
    dense = (codes.float() * scales[..., None]).view(ROWS, COLUMNS)
    held = stored(codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn), scales.numpy(), None, table=False)
    x = torch.randn((3, COLUMNS), generator=torch.Generator().manual_seed(4))
    program = jax.jit(lambda x, codes, scales: narrow.linear_quantized(x, codes, scales, None))
    wanted = (x @ dense.T).numpy()
    found = program(x.numpy(), *map(np.ascontiguousarray, held[:2]))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=FP32_PRODUCT * float(np.abs(wanted).max()))
