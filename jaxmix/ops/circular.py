"""Convolution of rows with filters, as XLA compiles it: by Fourier transforms, and by products with
Toeplitz matrices for short rows; and its gradient.

Both are circular convolutions with one filter c of a length N at which nothing wraps around: lags
0, 1, ... stand at its front and those of later tokens, -1, -2, ..., at its end.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from jaxmix import sharding
from jaxmix.ops.implementation import by_platform

CACHE_BYTES = 2**21  # of the rows of a block of channels, in that of a CPU
SHORT = 64  # tokens of a row up to which the product is used
# Logical axes: rows [B, T, D], filters [D, N], and the gradients of those.
ROWS, FILTERS, DOCUMENTS = ("batch", None, "channels"), ("channels", None), ("batch", None)
PARTS = ("batch", "channels", None)


def convolve(g, kernel, reverse_kernel, documents):
  """sum_j kernel[:, j] g_{t-j} + sum_j reverse_kernel[:, j] g_{t+1+j}, within documents.

  Args:
    g: [B, T, D].   kernel: [D, L].   reverse_kernel: [D, L'] or None.
    documents: [B, T] int32, the number of the document of each token, -1 for padding; or None for
      one document a row.
  Returns:
    [B, T, D].
  """
  return _convolve(g, filters(kernel, reverse_kernel, g.shape[1]), documents)


def filters(kernel, reverse_kernel, length: int, size: int | None = None):
  """One filter c [D, N] of both for rows of that length; N is `size`, or of fast transforms."""
  later = 0 if reverse_kernel is None else min(reverse_kernel.shape[1], length - 1)
  kernel = kernel[:, :length]
  size = size or smooth(length + max(kernel.shape[1] - 1, later))
  c = jnp.pad(kernel, ((0, 0), (0, size - kernel.shape[1] - later)))
  return jnp.concatenate([c, reverse_kernel[:, later - 1 :: -1]], 1) if later else c


def smooth(size: int) -> int:
  """The smallest number from `size` on without other prime factors than 2, 3 and 5: transforms of
  such lengths are fast."""
  best, fives = 1 << (size - 1).bit_length(), 1
  while fives < best:
    threes = fives
    while threes < best:
      quotient = -(-size // threes)
      best = min(best, threes << (quotient - 1).bit_length())
      threes *= 3
    fives *= 5
  return best


def low_pass(
  kernel: jax.Array, reverse_kernel: jax.Array | None = None, *, frequencies: int
) -> tuple[jax.Array, jax.Array]:
  """Filters of a `long_convolution` without their high frequencies.

  Of a filter to both sides, written around a circle of 2 L lags, the first `frequencies` of L + 1
  are kept. What remains of a causal filter is smooth at lag 0 and so reaches later tokens.

  Args:
    kernel: [D, L].   reverse_kernel: [D, L'], or None for zeros.
    frequencies: at least 1; a wave of number f turns f times around the circle.
  Returns:
    kernel and reverse_kernel, [D, L] both, for rows of at most L tokens.
  Raises:
    ValueError: `frequencies` is below 1.
  Source: the frequency-sparse convolution of Fu et al. 2023 (arXiv 2311.05908).
  """
  if frequencies < 1:
    raise ValueError(
      f"low_pass: frequencies={frequencies}, expected at least 1, which is the mean of the filter"
    )
  length = kernel.shape[1]
  c = filters(kernel, reverse_kernel, length, 2 * length)
  kept = jnp.arange(length + 1) < frequencies
  c = jnp.fft.irfft(jnp.where(kept, jnp.fft.rfft(c), 0), 2 * length)
  return c[:, :length], c[:, : length - 1 : -1]


def transform_flops(length: int) -> int:
  """Floating-point operations of a real transform of a row of that length, padded for a
  convolution: half of 5 N log2 N."""
  size = smooth(2 * length)
  return round(2.5 * size * math.log2(size))


@jax.custom_vjp
def _convolve(g, c, documents):
  # Each device by itself: transforms are along the whole length, and the compiler cuts none well.
  return sharding.shard_kernel(_forward, (ROWS, FILTERS, DOCUMENTS), ROWS)(g, c, documents)


def _convolve_forward(g, c, documents):
  # Spectra are made again in the backward pass: they are twice the inputs and more.
  return _convolve(g, c, documents), (g, c, documents)


def _convolve_backward(residuals, dy):
  run = sharding.shard_kernel(_backward, (ROWS, FILTERS, DOCUMENTS, ROWS), (ROWS, PARTS))
  dg, dc = run(*residuals, dy)
  return dg, dc.sum(0), None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _forward(g, c, documents):
  short = g.shape[1] <= SHORT
  form = functools.partial(_by_product if short else _by_transform, c=c)
  return each_document(documents, form, g)


def _backward(g, c, documents, dy):
  """dg, and dc [1, D, N] of all rows of this device."""
  short = g.shape[1] <= SHORT
  form = functools.partial(_by_product_backward if short else _by_transform_backward, c=c)
  dg, dc = each_document(documents, form, g, dy)
  return dg, dc[None]


def each_document(documents, function, *arrays):
  """The sum of function(*arrays) over documents, with zeros outside of each, where only its own
  tokens count of results [B, T, D]."""
  if documents is None:
    return function(*arrays)

  def of(number):
    mine = (documents == number)[..., None]
    results = function(*(jnp.where(mine, array, 0) for array in arrays))
    return jax.tree.map(lambda x: jnp.where(mine, x, 0) if x.ndim == 3 else x, results)

  def add(number, total):
    return jax.tree.map(jnp.add, total, of(number))

  return jax.lax.fori_loop(1, jnp.max(documents) + 1, add, of(0))


def _by_transform(g, c):
  def form(g, c):
    return _back(_spectrum(g, c) * _spectrum(c), g, c)

  return _in_cache(form, g, c=c)


def _by_transform_backward(g, dy, c):
  return _in_cache(_transform_backward, g, dy, c=c)


def _in_cache(function, *rows, c):
  """function(*rows, c), of channels by themselves, which gives rows, and the gradient of c: on a
  CPU of a block of channels after another, whose spectra stay in the cache from step to step."""
  batch, channels = rows[0].shape[0], c.shape[0]
  most = max(CACHE_BYTES // (batch * c.shape[1] * c.dtype.itemsize), 1)
  width = max(n for n in range(1, min(most, channels) + 1) if channels % n == 0)
  if width == channels:
    return function(*rows, c)

  def in_blocks(*arrays):
    def of(block):
      def cut(x, axis):
        return jax.lax.dynamic_slice_in_dim(x, block * width, width, axis)

      *rows, c = arrays
      return function(*(cut(x, 2) for x in rows), cut(c, 0))

    def joined(x):
      if x.ndim == 3:
        return x.reshape(c.shape)
      return jnp.moveaxis(x, 0, 2).reshape(rows[0].shape)

    return jax.tree.map(joined, jax.lax.map(of, jnp.arange(channels // width)))

  return by_platform(*rows, c, cpu=in_blocks, default=function)


def _transform_backward(g, dy, c):
  of_g, of_c, of_dy = _spectrum(g, c), _spectrum(c), _spectrum(dy, c)
  dc = jnp.fft.irfft(jnp.sum(jnp.conj(of_g) * of_dy, 0), c.shape[1])
  return _back(jnp.conj(of_c) * of_dy, g, c), dc


def _spectrum(x, c=None):
  """Of c [D, N], or of rows [B, T, D] -> [B, D, frequencies]."""
  return jnp.fft.rfft(x) if c is None else jnp.fft.rfft(x.swapaxes(1, 2), c.shape[1])


def _back(spectrum, g, c):
  return jnp.fft.irfft(spectrum, c.shape[1])[..., : g.shape[1]].swapaxes(1, 2)


def _by_product(g, c):
  index = jnp.arange(g.shape[1])
  toeplitz = c[:, (index[:, None] - index) % c.shape[1]]
  return jnp.einsum("dts,bsd->btd", toeplitz, g, precision="highest")


def _by_product_backward(g, dy, c):
  return jax.vjp(_by_product, g, c)[1](dy)
