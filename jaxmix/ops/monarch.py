"""Monarch matrices: products of block-diagonal matrices and of permutations between them, and the
nearest one to a dense matrix.

A Monarch matrix of order 2 and N x N entries holds 2 N^1.5 numbers. It is a transform, such as that
of Fourier; a convolution takes two, with a product by the spectrum between them. Dao et al. 2022
(arXiv 2204.00595), section 3; of higher order, Fu et al. 2023 (arXiv 2310.12109), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.ops.products import product


def block_diagonal_multiply(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Each block of channels by a matrix of its own.

      y[k q + o] = sum_i weight[k, o, i] x[k p + i]

  Args:
    x: [..., K p], float32, bfloat16 or complex.
    weight: [K, q, p], K blocks from p to q channels; cast to the dtype of x.
  Returns:
    [..., K q] in the dtype of x; sums are float32 at least.
  Raises:
    ValueError: x does not have K p channels.
  Source: arXiv 2204.00595, section 3.1. Cost K p q multiply-adds a row of x.
  """
  blocks, wide, narrow = _check_factor("block_diagonal_multiply", "weight", weight)
  if x.ndim < 1 or x.shape[-1] != blocks * narrow:
    raise ValueError(
      f"block_diagonal_multiply: x has shape {x.shape}, expected [..., {blocks * narrow}], since "
      f"weight has {blocks} blocks of {narrow} inputs; pad the channels of x with zeros"
    )
  y = _blockwise(x.reshape(-1, blocks, narrow), weight)
  return y.reshape(*x.shape[:-1], blocks * wide)


def monarch_multiply(
  x: jax.Array, factors: Sequence[jax.Array], *, leading_permutation: bool
) -> jax.Array:
  """A Monarch matrix times x.

  Two factors, w1 [K, q, p] and w2 [L, s, r] with K q = L r, map K p channels to L s:

      h[a q + o] = sum_i w1[a, o, i] x[a p + i]        y[t L + e] = sum_c w2[e, t, c] h[c L + e]

  More factors are square. With N = N_1 ... N_P, an input counts by its digits n_1 ... n_P, n_1 the
  slowest, an output by k_1 ... k_P, k_1 the fastest, and factor s, [N / N_s, N_s, N_s], puts digit
  k_s in the place of n_s, by a matrix for each value of the others (k_1 ... k_{s-1}, n_{s+1} ...
  n_P), the last the fastest.

  Args:
    x: [..., N], float32, bfloat16 or complex.
    factors: at least one, applied in this order; cast to the dtype of x.
    leading_permutation: whether x is in natural order, its digits n_1 ... n_P with n_1 the slowest,
      as the discrete Fourier transform has it (arXiv 2310.12109). False: n_1 is the fastest, as two
      factors above are written, with no permutation before the first (arXiv 2204.00595).
  Returns:
    [..., N'] in the dtype of x.
  Raises:
    ValueError: the sizes of factors do not fit one another, or x.
  Source: see the module. Cost N (N_1 + ... + N_P) multiply-adds a row of x for square factors.
  """
  name, factors = "monarch_multiply", tuple(factors)
  for number, factor in enumerate(factors):
    _check_factor(name, f"factors[{number}]", factor)
  channels, sizes = x.shape[-1], [factor.shape for factor in factors]
  if len(factors) == 2:
    (k, q, p), (blocks, _, r) = sizes
    fits, inputs = k * q == blocks * r, k * p
    rule = "[K, q, p] and [L, s, r] with K q = L r"
  else:
    inputs = math.prod(size[2] for size in sizes)
    fits = factors and all(size == (inputs // size[2], size[2], size[2]) for size in sizes)
    rule = "[N / N_s, N_s, N_s] each, N the product of all N_s"
  if not fits or channels != inputs:
    raise ValueError(
      f"{name}: x has {channels} channels and the factors have shapes {sizes}, expected {rule}, "
      f"and {inputs} channels of x"
    )
  rows = x.reshape(-1, channels)
  y = (_two_factors if len(factors) == 2 else _digits)(rows, factors, leading_permutation)
  return y.reshape(*x.shape[:-1], y.shape[-1])


def monarch_to_dense(factors: Sequence[jax.Array], *, leading_permutation: bool) -> jax.Array:
  """[N', N], the matrix that `monarch_multiply` with these arguments multiplies by."""
  inputs = factors[0].shape[0] * factors[0].shape[2]
  eye = jnp.eye(inputs, dtype=factors[0].dtype)
  return monarch_multiply(eye, factors, leading_permutation=leading_permutation).T


def project_to_monarch(
  dense: jax.Array, *, blocks: tuple[int, int] | None = None, rank: int = 1
) -> tuple[jax.Array, jax.Array]:
  """The Monarch matrix of order 2 that is nearest to a dense one in the Frobenius norm.

  Its entries fall into K L blocks of L's rows and K's columns that are of low rank each and share
  no entry, so that a singular value decomposition of each is the optimum.

  Args:
    dense: [M, N], float32, float64 or complex.
    blocks: (K, L), blocks of the first and of the second factor, divisors of N and M; None, for a
      square matrix, means the two divisors of N nearest to its root, the larger first.
    rank: of the blocks; 1 is a Monarch matrix proper, min(M / L, N / K) any matrix at all.
  Returns:
    w1 [K, rank L, N / K] and w2 [L, M / L, K rank], for `monarch_multiply` without a leading
    permutation.
  Raises:
    ValueError: the numbers of blocks do not divide the sizes.
  Source: arXiv 2204.00595, section 3.3 and algorithm 1. Which of two vectors has the sign of a pair
    of singular vectors is open: compare the matrices, not factors.
  """
  rows, columns = dense.shape
  if blocks is None:
    if rows != columns:
      raise ValueError(
        f"project_to_monarch: dense has shape {dense.shape} and blocks=None, which is for square "
        "matrices; give blocks=(K, L)"
      )
    small = max(d for d in range(1, math.isqrt(rows) + 1) if rows % d == 0)
    blocks = rows // small, small
  first, second = blocks
  if columns % first or rows % second:
    raise ValueError(
      f"project_to_monarch: blocks={blocks} and dense [{rows}, {columns}]; expected the first to "
      f"divide {columns} and the second {rows}"
    )
  most = min(rows // second, columns // first)
  if not 1 <= rank <= most:
    raise ValueError(f"project_to_monarch: rank={rank}, expected 1 to {most}, the size of a block")
  tiles = dense.reshape(rows // second, second, first, columns // first).transpose(2, 1, 0, 3)
  u, sigma, v = jnp.linalg.svd(tiles, full_matrices=False)
  root = jnp.sqrt(sigma[..., :rank]).astype(dense.dtype)
  w1 = (root[..., None] * v[..., :rank, :]).transpose(0, 2, 1, 3)
  w2 = (root[..., None, :] * u[..., :rank]).transpose(1, 2, 0, 3)
  return (
    w1.reshape(first, rank * second, columns // first),
    w2.reshape(second, rows // second, first * rank),
  )


def fourier_factors(radices: Sequence[int]) -> tuple[np.ndarray, ...]:
  """The factors, complex128, with which `monarch_multiply` with a leading permutation is the
  discrete Fourier transform of length N_1 ... N_P.

  Args:
    radices: N_1 ... N_P.
  """
  total, factors = math.prod(radices), []
  for stage, radix in enumerate(radices):
    before, after = radices[:stage], math.prod(radices[stage + 1 :])
    # The output digits up to this one as a number, k_1 the fastest.
    known = np.zeros((), np.int64)
    for axis, size in enumerate((*before, radix)):
      step = math.prod(radices[:axis])
      known = known[..., None] + step * np.arange(size)
    turns = np.arange(radix) * after * known[..., None]
    factor = np.exp(-2j * np.pi * (turns % total) / total)
    factor = np.broadcast_to(
      factor.reshape(-1, 1, radix, radix), (math.prod(before), after, radix, radix)
    )
    factors.append(factor.reshape(-1, radix, radix))
  return tuple(factors)


def _check_factor(name: str, which: str, factor) -> tuple[int, int, int]:
  if factor.ndim != 3:
    raise ValueError(
      f"{name}: {which} has shape {factor.shape}, expected [blocks, outputs, inputs] of a block"
    )
  return factor.shape


def _blockwise(x, weight):
  """[T, K, p], [K, q, p] -> [T, K, q]."""
  y = product("ti,oi->to", x.dtype, x.swapaxes(0, 1), weight.astype(x.dtype))
  return y.swapaxes(0, 1).astype(x.dtype)


def _two_factors(x, factors, leading_permutation: bool):
  (k, _, p), (blocks, s, r) = (factor.shape for factor in factors)
  x = x.reshape(-1, p, k).swapaxes(1, 2) if leading_permutation else x.reshape(-1, k, p)
  h = _blockwise(x, factors[0]).reshape(-1, r, blocks).swapaxes(1, 2)
  return _blockwise(h, factors[1]).swapaxes(1, 2).reshape(-1, blocks * s)


def _digits(x, factors, leading_permutation: bool):
  radices = [factor.shape[2] for factor in factors]
  order = len(radices)
  if leading_permutation:
    x = x.reshape(-1, *radices)
  else:
    x = x.reshape(-1, *radices[::-1]).transpose(0, *range(order, 0, -1))
  for stage, (radix, factor) in enumerate(zip(radices, factors, strict=True), 1):
    digits = jnp.moveaxis(x, stage, -1)
    y = _blockwise(digits.reshape(-1, factor.shape[0], radix), factor)
    x = jnp.moveaxis(y.reshape(digits.shape), -1, stage)
  return x.transpose(0, *range(order, 0, -1)).reshape(x.shape[0], -1)
