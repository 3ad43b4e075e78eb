"""The inverses of unit lower triangular matrices inside a TPU kernel.

Matrices [C, C] lie side by side along the lanes, [C, L], as many as make a row of 128. The inverse
X of I + M is built from the diagonal outwards: blocks of 8 rows by substitution, then twice as
large ones from pairs of those, the coupling block of each pair being -X_22 M_21 X_11. No powers of
M are formed: those grow without bound where keys repeat, while X does not.

Substitution needs the columns of M, each spread over the 8 lanes of its block by the lane unit, and
two vector operations a row. Each doubling is two products with [L, L] on the MXU, in which the
blocks are side by side again, [b, L]: so few rows that pushing the weights is what costs. For
bfloat16 kernels such a product is hi * hi + hi * lo + lo * hi of parts in bfloat16, an error of
2^-16, 256 times below the rounding of the inverse to bfloat16 that follows. hi * hi and hi * lo
share one push: the rows of the weights that belong to the other block of each pair would be zeros.
"""

from __future__ import annotations

from collections.abc import Generator

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chunks_tpu import dot, where

ROWS = 8  # of the blocks inverted by substitution: those of a register


def unit_lower_inverses(matrix: jax.Array, *, exact: bool) -> Generator[None, None, jax.Array]:
  """(I + M)^-1 of each M, strictly lower triangular.

  It yields where its next step waits for the one before, so that others can be written between.

  Args:
    matrix: [C, L] float32, matrices [C, C] side by side; C is 8 times a power of two.
    exact: products in float32; else in three passes of bfloat16.
  Returns:
    [C, L] float32.
  """
  size, width = matrix.shape
  lane = jax.lax.broadcasted_iota(jnp.int32, (ROWS, width), 1)
  inverse = yield from _substitute(matrix, lane)
  parts = _parts(matrix, exact)
  while (half := inverse.shape[0]) < size:
    block = lane // half
    # For each pair of blocks the rows of M_21, and those of X_11, where their columns lie.
    coupling, inner = [], []
    of_inverse = _parts(inverse, exact)
    for first in range(0, width // half, 2):
      columns, second = block == first, (first + 1) * half % size
      coupling += [_rows(part, second, half, columns) for part in reversed(parts)]
      inner += [_rows(part, 0, half, columns) for part in of_inverse]
    product = yield from _multiply(of_inverse, coupling, exact, second=True)
    product = yield from _multiply(_parts(product, exact), inner, exact, second=False)
    of_first = jax.lax.broadcasted_iota(jnp.int32, (half, width), 1) // half % 2 == 0
    inverse = jnp.concatenate([where(of_first, inverse), jnp.where(of_first, -product, inverse)])
  return inverse


def _substitute(matrix, lane):
  """The inverses of the blocks of 8 rows on the diagonal: [8, L], one beside the other."""
  size = matrix.shape[0]
  blocks = matrix[:ROWS]
  for i in range(1, size // ROWS):
    here = lane % size // ROWS == i
    blocks = jnp.where(here, matrix[i * ROWS : (i + 1) * ROWS], blocks)
  row = jax.lax.broadcasted_iota(jnp.int32, blocks.shape, 0)
  inverse = jnp.where(row == lane % ROWS, 1.0, 0.0)
  for i in range(ROWS - 1):
    column = jnp.take_along_axis(blocks, lane // ROWS * ROWS + i, axis=1)
    inverse = inverse - column * inverse[i : i + 1]
    yield
  return inverse


def _parts(x, exact: bool):
  """x as a sum of two: what bfloat16 holds of it, and the rest; or all of it, and nothing."""
  high = x if exact else x.astype(jnp.bfloat16).astype(jnp.float32)
  return high, x - high


def _rows(part, at: int, count: int, mask):
  """`count` rows of `part` from `at`, 0 outside the mask."""
  rows = (where(mask, part[i : i + ROWS]) for i in range(at, at + count, ROWS))
  return jnp.concatenate(list(rows))


def _multiply(parts, weights, exact: bool, *, second: bool):
  """What the blocks [b, b] of `parts`, [b, L] each, give that are the second, or the first, of
  their pairs.

  The weights hold the first part of their numbers in the rows that those blocks meet, and the
  second part in the rows that the others of the pairs meet: to these the first part is copied.
  """
  high, low = parts
  half, width = high.shape
  own = jax.lax.broadcasted_iota(jnp.int32, high.shape, 1) // half % 2 == second
  high = jnp.where(own, high, pltpu.roll(high, width - half if second else half, 1))
  weights = jnp.concatenate(weights)
  if not exact:
    high = jnp.concatenate([high, where(own, low)]).astype(jnp.bfloat16)
    weights = weights.astype(jnp.bfloat16)
  yield
  product = dot(high, weights, (1, 0))
  yield
  return product if exact else product[:half] + product[half:]
