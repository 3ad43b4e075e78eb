"""What log-decays do within a chunk: how much of the state before it a token reads, how much of
what a token writes is left after it, and the weight of each pair of tokens.

Log-decays are only ever added to one another, never subtracted, so that no decay, however strong,
costs the digits of another, and every exponent is at most 0.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxmix.ops.products import BASE, coupling, join_blocks, powers, product

STRONGEST = -128.0  # exp of it is 0 in float32 and 1e-56 in float64: stronger decays change nothing
GRAIN = 256.0  # sums of multiples of 1 / 256 are exact up to 65,536 in float32


def sums_of_chunk(g: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Log-decays summed up to each token, it included, and after each token, to the chunk's end.

  Args:
    g: [..., N, C, K or 1].
  """
  sums = _Sums(g)
  return sums.until_here(), sums.after_here()


class _Sums:
  """Sums of log-decays within aligned spans of tokens; blocks of BASE are summed once."""

  def __init__(self, g: jax.Array):
    *lead, length, width = self.shape = g.shape
    self.base = min(BASE, length)
    self.count = length // self.base
    halves = [_towards_middle(self.base, half) for half in powers(1, self.base)]
    spans = np.stack([*halves, *_whole(self.base)])
    blocks = g.reshape(*lead[:-1], -1, self.base, width)  # those of all chunks, one after the other
    inside = _add_up(spans, blocks, "rts,...sk->...rtk")
    self.inside = inside[..., : len(halves), :, :]
    self.until, self.after = (
      inside[..., len(halves) + i, :, :].reshape(*lead, self.count, self.base, width)
      for i in range(2)
    )

  def towards_middle(self, half: int) -> jax.Array:
    """In blocks of 2 * half tokens, for half of BASE or more: from each token of the first half to
    its end, without that token, and from the beginning of the second half to each of its tokens,
    with it."""
    upper = np.arange(self.count) // (half // self.base) % 2 == 1
    inside = jnp.where(upper[:, None, None], self.until, self.after)
    return self._with_blocks(inside, _towards_middle(self.count, half // self.base))

  def until_here(self) -> jax.Array:
    """From the beginning of the chunk to each token, with it."""
    return self._with_blocks(self.until, np.tri(self.count, k=-1))

  def after_here(self) -> jax.Array:
    """From each token, without it, to the end of the chunk."""
    return self._with_blocks(self.after, np.tri(self.count, k=-1).T)

  def _with_blocks(self, inside, others: np.ndarray):
    """Sums inside the blocks and the totals of other blocks."""
    if self.count > 1:
      others = others * (1 - np.eye(self.count))
      totals = self.until[..., -1, :]
      inside = inside + _add_up(others, totals, "ts,...sk->...tk")[..., None, :]
    return inside.reshape(self.shape)


def _add_up(which: np.ndarray | jax.Array, terms: jax.Array, spec: str) -> jax.Array:
  return jnp.einsum(spec, which.astype(terms.dtype), terms, precision="highest")


def _towards_middle(size: int, half: int) -> np.ndarray:
  """[size, size]: the tokens (columns) between each token (row) and the middle of its block of 2 *
  half; a token of the second half is counted for itself."""
  row, column = np.indices((size, size))
  same = row // half == column // half
  upper = row // half % 2 == 1
  return same & np.where(upper, column <= row, column > row)


def _whole(size: int) -> tuple[np.ndarray, np.ndarray]:
  """The tokens up to each token, it included, and those after it."""
  return np.tri(size) > 0, np.tri(size, k=-1).T > 0


def pair_decays(g: jax.Array, visible: jax.Array) -> jax.Array:
  """exp(g_{s+1} + ... + g_r) for key s (column) and query r (row) where visible, else 0.

  Args:
    g: [..., C, 1].   visible: [..., C, C], the keys s <= r of the query's document.
  """
  # A difference of sums would lose the digits that the larger sum lacks. In two parts it does not:
  # the one adds and subtracts exactly, the other stays small.
  coarse = jnp.round(jax.lax.stop_gradient(g) * GRAIN) / GRAIN
  parts = jnp.concatenate([coarse, g - coarse], axis=-1)
  parts = _add_up(visible, parts, "...ts,...sk->...kt")  # from the beginning of the document
  coarse, fine = (parts[..., i, :, None] - parts[..., i, None, :] for i in range(2))
  return jnp.exp(jnp.where(visible, coarse + fine, -jnp.inf))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def decayed_scores(
  dtype, q: jax.Array, k: jax.Array, g: jax.Array, visible: jax.Array
) -> jax.Array:
  """sum_k q_rk k_sk exp(g_{s+1,k} + ... + g_rk) for key s and query r where visible, else 0.

  A pair of tokens is met at the size of block whose halves part them. With the boundary between the
  halves as anchor the decay is one factor of the query times one of the key, neither above 1, so
  each size is a matrix product.

  Args:
    dtype: of the operands of the products.
    q, k, g: [..., N, C, K], C a power of two.
    visible: [..., N, C, C], the keys s <= r of the query's document.
  Returns:
    [..., N, C, C].
  """
  return jnp.where(visible, _scores(dtype, q, k, _Sums(g)), 0)


def _scores(dtype, q, k, sums: _Sums):
  length = q.shape[-2]

  def blocks(x, size):
    return x.reshape(*x.shape[:-2], length // size, size, x.shape[-1])

  def all_blocks(x):  # those of all chunks, one after the other
    return x.reshape(*x.shape[:-3], -1, sums.base, x.shape[-1])

  base = sums.base
  scores = np.eye(base) * jnp.sum(all_blocks(q * k), axis=-1, keepdims=True)
  if base > 1:  # inside the blocks all sizes are one product, of which each size gives its pairs
    decay = jnp.exp(sums.inside)
    of_query, of_key = (_at_each_size(all_blocks(x), decay) for x in (q, k))
    pairs = jnp.unstack(product("rck,rsk->rcs", dtype, of_query, of_key), axis=-3)
    for half, of_size in zip(powers(1, base), pairs, strict=True):
      scores = scores + jnp.where(coupling(base, half), of_size, 0)
  scores = scores.reshape(*q.shape[:-2], -1, base, base)
  for half in powers(base, length):
    decay = blocks(jnp.exp(sums.towards_middle(half)), half)
    of_query = (blocks(q, half) * decay)[..., 1::2, :, :]
    of_key = (blocks(k, half) * decay)[..., ::2, :, :]
    corner = product("mck,msk->mcs", dtype, of_query, of_key)
    scores = join_blocks(scores[..., ::2, :, :], corner, scores[..., 1::2, :, :])
  return scores[..., 0, :, :]


@jax.custom_vjp
def _at_each_size(x, decay):
  """[..., C, K] and [..., sizes, C, K] -> the same; the decay gets no gradient."""
  return x[..., None, :, :] * decay


def _at_each_size_forward(x, decay):
  return _at_each_size(x, decay), decay


def _at_each_size_backward(decay, cotangent):
  # Added one by one: a sum over an axis before the last takes a CPU ten times as long.
  return sum(jnp.unstack(cotangent * decay, axis=-3)), None


_at_each_size.defvjp(_at_each_size_forward, _at_each_size_backward)


def _decayed_scores_forward(dtype, q, k, g, visible):
  return decayed_scores(dtype, q, k, g, visible), (q, k, g, visible)


def _decayed_scores_backward(dtype, arrays, cotangent):
  q, k, g, visible = arrays
  sums = _Sums(g)
  _, pull = jax.vjp(lambda q, k: _scores(dtype, q, k, sums), q, k)
  dq, dk = pull(jnp.where(visible, cotangent, 0))
  # A score is multiplied by exp of a sum that ends at its query and begins after its key. What a
  # document's sums get adds up to nothing but for rounding, which must not reach another document.
  dsum = q * dq - k * dk
  visible = jnp.broadcast_to(visible, (*dsum.shape[:-1], visible.shape[-1]))
  return dq, dk, _add_up(visible, dsum, "...ts,...tk->...sk"), None


decayed_scores.defvjp(_decayed_scores_forward, _decayed_scores_backward)
