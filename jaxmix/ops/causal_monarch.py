"""Causal maps that are learnt as Monarch matrices: polynomials in a triangular basis.

A document u of n tokens is the polynomial sum_j u_j q_j(Z), a filter likewise, and the coefficients
of their product are the result. None hangs on later tokens, as no q_j has a term of degree below j:

    q_j(Z) = l_{j0}(Z) r_{j0, j1}(Z^b)        j = j1 b + j0,  n = b^2 / 2
    l_{j0} = sum_{a >= j0} low[j0, a] Z^a        r_{j0, j1} = sum_{c >= j1} high[j0, j1, c] Z^c

The map from u to the values of its polynomial at the roots of unity of order 2 n is a Monarch
matrix. So is that to the coefficients of the powers of Z, Q, which is triangular: with it the
product is the causal convolution of Q u with Q k. With identity coefficients Q is the identity. Fu
et al. 2023 (arXiv 2310.12109), section 4 and its theory of causal maps, in the order 2.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxmix.ops.gated_convolution import gated
from jaxmix.ops.long_convolution import LazyKernel, convolution_state, long_convolution
from jaxmix.ops.segments import document_indices, document_positions, last_token


def causal_monarch(
  u: jax.Array,
  kernel: jax.Array | LazyKernel,
  low: jax.Array,
  high: jax.Array,
  *,
  skip: jax.Array | None = None,
  pre_gate: jax.Array | None = None,
  post_gate: jax.Array | None = None,
  state: dict | None = None,
  segment_ids: jax.Array | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, dict]:
  """The product of documents with a filter, both as polynomials in the basis (see the module).

      v = Q (pre_gate * u)        y = post_gate * (causal convolution of v with Q kernel + skip * v)

  Args:
    u: [B, T, D], float32 or bfloat16; computed in float32.
    kernel: [D, L], or a `LazyKernel`; what it lacks to n lags are zeros.
    low: [b, b], of the low digits, of which the part on and above the diagonal counts.
    high: [b, b / 2, b / 2], of the high digits by the low one, the same.
    b is even, and T, L and a stream's documents have at most n = b^2 / 2 tokens.
    skip, pre_gate, post_gate, segment_ids, implementation: as in `jaxmix.ops.long_convolution`.
    state: from `causal_monarch_state` or an earlier call; None means nothing before the first
      token. It belongs to the document of the first token that is not padding.
  Returns:
    y: [B, T, D] in the dtype of u;   state: a dict of memory [B, n, D], the inputs of the row's
    last document by position; length [B] int32, how many there are; and "convolved", that of the
    convolution.
  Raises:
    ValueError: shapes do not fit one another, or `implementation` cannot run this call.
  Cost O(T^1.5 D) time of a row of one document, O(b^3) parameters; with segment ids or behind a
  state the weights of all pairs of tokens are made, O(T^2 D); of a token of a stream, O(n D).
  """
  base = _check(u, kernel, low, high, state)
  dtype = jnp.promote_types(u.dtype, jnp.float32)
  if u.shape[1] == 0:
    return u, causal_monarch_state(u.shape[0], base, u.shape[2], dtype) if state is None else state
  low, high = jnp.triu(low.astype(dtype)), jnp.triu(high.astype(dtype))
  if not isinstance(kernel, LazyKernel):
    lags = kernel.astype(dtype)
    kernel = LazyKernel(lags.shape, lambda count: lags[:, :count])

  def first(count: int):
    given = kernel.first(min(count, kernel.shape[1]))
    given = jnp.pad(given, ((0, 0), (0, count - given.shape[1])))
    return _to_powers(given.T[None], low, high)[0].T

  v, after = _expanded(gated(u, pre_gate), low, high, state, segment_ids)
  y, after["convolved"] = long_convolution(
    v,
    LazyKernel((u.shape[2], base * base // 2), first),
    skip=skip,
    post_gate=post_gate,
    state=None if state is None else state["convolved"],
    segment_ids=segment_ids,
    implementation=implementation,
  )
  return y.astype(u.dtype), after


def causal_monarch_state(batch: int, base: int, channels: int, dtype=jnp.float32) -> dict:
  """The state of `batch` rows before the first token; b is `base`."""
  longest = base * base // 2
  return {
    "memory": jnp.zeros((batch, longest, channels), dtype),
    "length": jnp.zeros(batch, jnp.int32),
    "convolved": convolution_state(batch, longest, channels, dtype),
  }


def monarch_base(length: int) -> int:
  """The smallest b whose rows hold that many tokens."""
  base = math.isqrt(2 * length - 1) + 1
  return base + base % 2


def basis_flops(length: int, base: int) -> int:
  """Floating-point operations of Q times one channel of a row, a multiply-add counted as two."""
  count = -(-length // base)
  return 2 * base * count * (count + base)


def _check(u, kernel, low, high, state) -> int:
  base = low.shape[0]
  expected = (base, base), (base, base // 2, base // 2)
  if base % 2 or (low.shape, high.shape) != expected:
    raise ValueError(
      f"causal_monarch: low and high have shapes {low.shape}, {high.shape}, expected [b, b] "
      "and [b, b / 2, b / 2] for an even b"
    )
  longest = base * base // 2
  if u.ndim != 3 or len(kernel.shape) != 2 or u.shape[2] != kernel.shape[0]:
    raise ValueError(
      f"causal_monarch: u and kernel have shapes {u.shape}, {kernel.shape}, expected [B, T, D] and "
      "[D, L]"
    )
  if max(u.shape[1], kernel.shape[1]) > longest:
    raise ValueError(
      f"causal_monarch: {u.shape[1]} tokens and {kernel.shape[1]} lags, expected at most "
      f"{longest}, b^2 / 2 for b={base}; take b={monarch_base(max(u.shape[1], kernel.shape[1]))}"
    )
  shape = (u.shape[0], longest, u.shape[2])
  if state is not None and state["memory"].shape != shape:
    raise ValueError(
      f"causal_monarch: the state has a memory {state['memory'].shape}, expected {shape}; make it "
      "by causal_monarch_state"
    )
  return base


def _expanded(g, low, high, state, segment_ids):
  """Q g [B, T, D] of each document, anything at padding, and memory and length after the rows."""
  batch, length, _ = g.shape
  longest = low.shape[0] ** 2 // 2
  if state is None and segment_ids is None:
    memory = jnp.pad(g, ((0, 0), (0, longest - length), (0, 0)))
    after = {"memory": memory, "length": jnp.full(batch, length, jnp.int32)}
    return _to_powers(g, low, high), after
  if state is None:
    memory, count = jnp.zeros((batch, longest, g.shape[2]), g.dtype), jnp.zeros(batch, jnp.int32)
  else:
    memory, count = state["memory"], state["length"]
  ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
  live, documents = ids != 0, document_indices(ids)
  positions = jnp.minimum(document_positions(ids, count), longest - 1)
  seen = (documents[:, :, None] == documents[:, None]) & live[:, None]
  weights = _entries(low, high, positions[:, :, None], positions[:, None])
  g = jnp.where(live[..., None], g, 0)
  v = _product(jnp.where(seen, weights, 0), g)
  if state is not None:
    before = _entries(low, high, positions[:, :, None], jnp.arange(longest))
    v = v + _product(jnp.where((documents == 0)[..., None], before, 0), memory)
  last = live & (documents == documents[:, -1:])
  kept = jnp.where((documents[:, -1:] == 0)[..., None], memory, 0)
  places = jnp.where(last, positions, longest)
  memory = kept.at[jnp.arange(batch)[:, None], places].set(g, mode="drop")
  return v, {"memory": memory, "length": last_token(ids, positions + 1, count)}


def _entries(low, high, to, of):
  """Q at rows `to` and columns `of`, arrays of indices that broadcast; low and high triangular."""
  base = low.shape[0]
  return low[of % base, to % base] * high[of % base, of // base, to // base]


def _product(weights, rows):
  return jnp.einsum("bts,bsd->btd", weights, rows, precision="highest")


def _to_powers(rows, low, high):
  """Q times rows [B, T, D] of one document each: a Monarch matrix, block diagonal over the low
  digits of the basis, then over the high digits of the powers."""
  (batch, length, channels), base = rows.shape, low.shape[0]
  count = -(-length // base)
  rows = jnp.pad(rows, ((0, 0), (0, count * base - length), (0, 0)))
  rows = rows.reshape(batch, count, base, channels)
  inner = jnp.einsum("bijd,jic->bcjd", rows, high[:, :count, :count], precision="highest")
  powers = jnp.einsum("bcjd,ja->bcad", inner, low, precision="highest")
  return powers.reshape(batch, -1, channels)[:, :length]
