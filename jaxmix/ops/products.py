"""Matrix products of many matrices, and the inverse of a unit triangular matrix made of them.

Arrays are [..., ., .]: axes of a batch, and a matrix. One that is the same along an axis of the
batch has length 1 there, and no product repeats it.
"""

from __future__ import annotations

import functools
import math
import re
import string

import jax
import jax.numpy as jnp
import numpy as np

BASE = 16  # rows of the blocks inside which small levels are whole products, masked


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(spec: str, dtype, a: jax.Array, b: jax.Array) -> jax.Array:
  """einsum of two arrays of matrices with operands in `dtype`, accumulated in float32 at least.

  Gradients are products of the same kind: their operands are rounded to `dtype`, they are not.

  Args:
    spec: such as "ck,sk->cs", for the axes after those of the batch.
    dtype: of the operands. float32 is kept from being rounded to bfloat16, which a TPU does by
      default.
    a, b: [..., matrix], the batches of as many axes; an axis of length 1 stands for all.
  """
  left, right, out = _axes(spec, a.ndim)
  sizes = dict(zip(right, b.shape, strict=True))
  for axis, size in zip(left, a.shape, strict=True):
    sizes[axis] = max(size, sizes.get(axis, 1))
  return _contract(dtype, (a, left), (b, right), out, [sizes[axis] for axis in out])


def _product_forward(spec: str, dtype, a, b):
  return product(spec, dtype, a, b), (a, b)


def _product_backward(spec: str, dtype, operands, cotangent):
  (a, b), (left, right, out) = operands, _axes(spec, operands[0].ndim)
  da = _contract(dtype, (cotangent, out), (b, right), left, a.shape)
  db = _contract(dtype, (cotangent, out), (a, left), right, b.shape)
  return da.astype(a.dtype), db.astype(b.dtype)


product.defvjp(_product_forward, _product_backward)


def _axes(spec: str, rank: int) -> list[str]:
  """Names of all axes of the operands and of the result; `rank` is that of the first operand."""
  matrices = re.split(",|->", spec)
  return [string.ascii_uppercase[: rank - len(matrices[0])] + axes for axes in matrices]


def _contract(dtype, one, other, axes, shape):
  """The product of two (array, axes), in the axes and the shape given; an axis of length 1 there is
  summed over."""
  (a, left), (b, right) = (_squeezed(x.astype(dtype), names) for x, names in (one, other))
  out = [axis for axis, size in zip(axes, shape, strict=True) if size > 1]
  batch = [axis for axis in out if axis in left and axis in right]
  summed = [axis for axis in left if axis in right and axis not in out]
  # Of a batch, what is shared in the result: added up behind the product, whose sum is over one
  # axis then.
  shared = [axis for axis in summed if axis.isupper()]
  summed = [axis for axis in summed if axis not in shared]
  batch = shared + batch
  rows, columns = ([axis for axis in out if axis in x and axis not in batch] for x in (left, right))
  a, b = _as_matrices(a, left, batch, rows, summed), _as_matrices(b, right, batch, summed, columns)
  accumulator = jnp.promote_types(dtype, jnp.float32)
  precision = "highest" if dtype == accumulator else "default"
  c = jnp.matmul(a, b, preferred_element_type=accumulator, precision=precision)
  c = c.sum(tuple(range(len(shared))))
  sizes = dict(zip(axes, shape, strict=True))
  found = (*batch[len(shared) :], *rows, *columns)
  c = c.reshape([sizes[axis] for axis in found])
  return c.transpose([found.index(axis) for axis in out]).reshape(shape)


def _squeezed(x, names: str):
  """The array and its axes without those of length 1."""
  kept = "".join(axis for axis, size in zip(names, x.shape, strict=True) if size > 1)
  return x.reshape([size for size in x.shape if size > 1]), kept


def _as_matrices(x, names: str, batch: list, rows: list, columns: list):
  """[*batch, rows, columns], the axes of each in one, since not every compiler takes several."""
  x = x.transpose([names.index(axis) for axis in (*batch, *rows, *columns)])
  lengths = x.shape[: len(batch)], x.shape[len(batch) : len(batch) + len(rows)]
  return x.reshape(*lengths[0], math.prod(lengths[1]), -1)


@jax.custom_vjp
def scale_rows(x: jax.Array, weight: jax.Array) -> jax.Array:
  """x * weight, for [..., C, K] and [..., C, 1]."""
  return x * weight


def _scale_rows_forward(x, weight):
  return x * weight, (x, weight)


def _scale_rows_backward(operands, cotangent):
  # The sum over a row as a product: XLA's own sum of products takes a CPU many times as long.
  x, weight = operands
  ones = jnp.ones((x.shape[-1], 1), x.dtype)
  dweight = jnp.matmul(cotangent * x, ones, precision="highest")
  return cotangent * weight, dweight


scale_rows.defvjp(_scale_rows_forward, _scale_rows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def solve_unit_lower(dtype, m: jax.Array, r: jax.Array) -> jax.Array:
  """(I + M)^-1 R.

  Args:
    dtype: of the operands of the product with R; the inverse is computed in that of M.
    m: [..., C, C], of which the part below the diagonal counts.   r: [..., C, V].
  """
  return product("cs,sv->cv", dtype, invert_unit_lower(m), r)


def _solve_forward(dtype, m, r):
  x = invert_unit_lower(m)
  solution = product("cs,sv->cv", dtype, x, r)
  return solution, (x, solution)


def _solve_backward(dtype, residuals, cotangent):
  x, solution = residuals
  dr = product("cs,cv->sv", dtype, x, cotangent)
  dm = -product("cv,sv->cs", dtype, dr, solution)
  return jnp.tril(dm, -1).astype(x.dtype), dr


solve_unit_lower.defvjp(_solve_forward, _solve_backward)


def invert_unit_lower(m: jax.Array) -> jax.Array:
  """(I + M)^-1 for M below the diagonal, by doubling the size of the blocks that are inverted.

  With X the inverses of the diagonal blocks of one size and M_l the part of M that couples two
  neighbours, X - X M_l X are the inverses of the blocks of twice the size. No power of M is formed:
  powers grow without bound where keys repeat, though the inverse has entries of order one.

  Args:
    m: [..., C, C], C a power of two; what is on and above the diagonal is not read.
  """
  length = m.shape[-1]
  base = min(BASE, length)

  def between(a, b):
    return product("mij,mjk->mik", m.dtype, a, b)

  below = jnp.stack([m[..., i : i + base, i : i + base] for i in range(0, length, base)], axis=-3)
  blocks = jnp.eye(base, dtype=m.dtype) - jnp.where(coupling(base, 1), below, 0)
  for half in powers(2, base):
    corner = between(between(blocks, jnp.where(coupling(base, half), below, 0)), blocks)
    blocks = blocks - corner
  for half in powers(base, length):
    starts = range(0, length, 2 * half)
    below = jnp.stack([m[..., i + half : i + 2 * half, i : i + half] for i in starts], axis=-3)
    lower, upper = blocks[..., ::2, :, :], blocks[..., 1::2, :, :]
    blocks = join_blocks(lower, -between(between(upper, below), lower), upper)
  return blocks[..., 0, :, :]


def join_blocks(lower: jax.Array, corner: jax.Array, upper: jax.Array) -> jax.Array:
  """[[lower, 0], [corner, upper]] for [..., C, C] each."""
  above = jnp.concatenate([lower, jnp.zeros_like(lower)], axis=-1)
  return jnp.concatenate([above, jnp.concatenate([corner, upper], axis=-1)], axis=-2)


def powers(first: int, end: int) -> list[int]:
  """first, 2 * first, 4 * first, ... below end."""
  return [first << shift for shift in range((end // first).bit_length()) if first << shift < end]


def coupling(size: int, half: int) -> np.ndarray:
  """Which entries of [size, size] couple the two halves of a block of 2 * half, below the
  diagonal."""
  row, column = np.indices((size, size))
  same = row // (2 * half) == column // (2 * half)
  return same & (row // half % 2 == 1) & (column // half % 2 == 0)
