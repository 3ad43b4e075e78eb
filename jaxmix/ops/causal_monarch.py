"""Causal maps that are learnt as Monarch matrices: polynomials in a triangular basis.

A row u of n tokens is the polynomial sum_j u_j q_j(Z). Its values at the N-th roots of unity,
N = 2 n, are a Monarch transform of u where the basis factors by the digits of j. Products of the
values of two rows are the values of the product of their polynomials, and the inverse Fourier
transform gives its coefficients. None hangs on later tokens, as no q_j has a term of degree below
j:

    q_j(Z) = l_{j0}(Z) r_{j0, j1}(Z^b)        j = j1 b + j0,  n = b^2 / 2
    l_{j0} = sum_{a >= j0} low[j0, a] Z^a        r_{j0, j1} = sum_{c >= j1} high[j0, j1, c] Z^c

With identity coefficients q_j = Z^j, and the map is the causal convolution. Fu et al. 2023 (arXiv
2310.12109), section 4 and its theory of causal maps, in the order 2.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.ops.monarch import monarch_multiply


def causal_monarch(u: jax.Array, kernel: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
  """The product of rows with a kernel, both as polynomials in the basis (see the module).

  Args:
    u: [B, T, D], float32.   kernel: [D, L].
    low: [b, b], of the low digits, of which the part on and above the diagonal counts.
    high: [b, b / 2, b / 2], of the high digits by the low one, the same.
    b is even, and T and L are at most b^2 / 2; what is missing are zeros.
  Returns:
    [B, T, D], the first T coefficients. No output depends on a later token but for rounding, see
    `jaxmix.ops.long_convolution`.
  Raises:
    ValueError: shapes do not fit one another.
  Cost O(T^1.5 D) time, O(b^3) parameters.
  """
  base = _check(u, kernel, low, high)
  factors, length = monarch_factors(low, high), u.shape[1]

  def transform(rows):
    rows = jnp.pad(rows, [*((0, 0),) * (rows.ndim - 1), (0, base * base // 2 - rows.shape[-1])])
    return monarch_multiply(rows.astype(factors[0].dtype), factors, leading_permutation=True)

  product = transform(u.swapaxes(1, 2)) * transform(kernel)
  return jnp.fft.ifft(product).real[..., :length].swapaxes(1, 2)


def monarch_base(length: int) -> int:
  """The smallest b whose rows hold that many tokens."""
  base = math.isqrt(2 * length - 1) + 1
  return base + base % 2


def _check(u, kernel, low, high) -> int:
  base = low.shape[0]
  expected = (base, base), (base, base // 2, base // 2)
  if base % 2 or (low.shape, high.shape) != expected:
    raise ValueError(
      f"causal_monarch: low and high have shapes {low.shape}, {high.shape}, expected [b, b] "
      "and [b, b / 2, b / 2] for an even b"
    )
  longest = base * base // 2
  if u.ndim != 3 or kernel.ndim != 2 or u.shape[2] != kernel.shape[0]:
    raise ValueError(
      f"causal_monarch: u and kernel have shapes {u.shape}, {kernel.shape}, expected [B, T, D] and "
      "[D, L]"
    )
  if max(u.shape[1], kernel.shape[1]) > longest:
    raise ValueError(
      f"causal_monarch: {u.shape[1]} tokens and {kernel.shape[1]} lags, expected at most "
      f"{longest}, b^2 / 2 for b={base}; take b={monarch_base(max(u.shape[1], kernel.shape[1]))}"
    )
  return base


def monarch_factors(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The factors, complex, with which `monarch_multiply` with a leading permutation takes
  coefficients in the basis to values at the N-th roots of unity: [j0, i0, j1], r_{j0, j1} at the
  roots of order b, and [i0, i1, j0], l_{j0} at those of order N, of number i0 + b i1."""
  base = low.shape[0]
  dtype = jnp.result_type(low.dtype, jnp.complex64)
  small = np.outer(np.arange(base), np.arange(base // 2)) % base
  small = jnp.asarray(np.exp(-2j * np.pi * small / base), dtype)
  first = jnp.einsum("ic,jkc->jik", small, jnp.triu(high).astype(dtype), precision="highest")
  number = np.arange(base)[:, None] + base * np.arange(base)
  turns = number[..., None] * np.arange(base) % base**2
  large = jnp.asarray(np.exp(-2j * np.pi * turns / base**2), dtype)
  second = jnp.einsum("xya,ja->xyj", large, jnp.triu(low).astype(dtype), precision="highest")
  return first, second
