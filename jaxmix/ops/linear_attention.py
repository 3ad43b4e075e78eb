"""Causal linear attention: argument checks, the chunked matmul form and its gradient.

A chunk of C tokens needs one [C, C] product of queries and keys and the state S before it; the
states of the N chunks follow one another by additions of [K, V] matrices. Everything else is
parallel over chunks, so the work is matmuls. With documents packed in a row, a query reads S only
while no document has begun since S was taken, and S after the chunk keeps only what the chunk's
last document wrote.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxmix.ops import implementation as implementations
from jaxmix.ops.segments import check_segment_ids, document_indices
from pallas_kernels.linear_attention import reference

NORMALIZER_EPS = (
  1e-10  # added to the sum of weights; as in the published implementations of the normalised form
)


def linear_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  scale: float | None = None,
  state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  normalize: bool = False,
  chunk_size: int | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Causal linear attention with carried state.

      S_t = S_{t-1} + k_t v_t^T        y_t = scale * S_t^T q_t

  With `normalize`, y_t is divided by scale * q_t . z_t + 1e-10, where z_t = z_{t-1} + k_t; z is
  then the last column of the state, as if v had a last channel of ones.

  Args:
    q, k: [B, T, H, K], after their feature map.   v: [B, T, H, V].   float32 or bfloat16.
    scale: multiplies q; None means K ** -0.5.
    state: [B, H, K, V] float32 ([B, H, K, V + 1] with `normalize`), S_0; None means zeros. It
      belongs to the document of the first token that is not padding.
    segment_ids: [B, T] int32; the state is cleared where the id changes. 0 marks padding, whose
      output is 0.
    normalize: divide by the sum of weights; q and k should then not be negative.
    chunk_size: tokens a chunk of the matmul form; None chooses. The result does not depend on it
      but for rounding.
    implementation: None, "reference" or "xla".
  Returns:
    y: [B, T, H, V] in the dtype of v;   state: S_T, float32.
  Raises:
    ValueError: shapes disagree, or `implementation` cannot run this call (the message says why).
  Source: Katharopoulos et al. 2020 (arXiv 2006.16236), section 3.3; chunked as in Yang et al. 2024
    (arXiv 2312.06635), section 4. Cost O(T (C + V) K) time, O(K V) state.
  """
  batch, length, heads, key_dim = _check(q, k, v, segment_ids)
  dtype = v.dtype
  scale = key_dim**-0.5 if scale is None else scale
  chunk_size = min(chunk_size or 64, max(length, 1))
  if segment_ids is not None:
    live = (segment_ids != 0)[..., None, None]
    q, k, v = (jnp.where(live, x, 0) for x in (q, k, v))
  if normalize:
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
  shape = (batch, heads, key_dim, v.shape[-1])
  if state is None:
    state = jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))
  elif state.shape != shape:
    raise ValueError(
      f"linear_attention: state has shape {state.shape}, expected {shape}, that is [B, H, K, V"
      f"{' + 1] with normalize=True (the sum of keys is its last column)' if normalize else ']'}"
    )
  if length == 0:
    return jnp.zeros((batch, 0, heads, v.shape[-1] - normalize), dtype), state

  def by_definition(q, k, v, state, segment_ids):
    ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
    return reference.linear_attention(q, k, v, state, ids, scale=scale)

  y, state = implementations.run(
    "linear_attention",
    implementation,
    (q, k, v, state, segment_ids),
    functions={
      "reference": by_definition,
      "xla": functools.partial(_chunked, scale=scale, chunk_size=chunk_size),
    },
    refusals={},
  )
  if normalize:
    y = y[..., :-1] / (y[..., -1:] + NORMALIZER_EPS)
  return y.astype(dtype), state


def _check(q, k, v, segment_ids) -> tuple[int, int, int, int]:
  if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
    raise ValueError(
      f"linear_attention: q, k, v have shapes {q.shape}, {k.shape}, {v.shape}, expected [B, T, H, "
      "K], [B, T, H, K], [B, T, H, V]; "
      "repeat the heads of k and v where q has more"
    )
  check_segment_ids("linear_attention", segment_ids, *q.shape[:2])
  return q.shape


def _chunked(q, k, v, state, segment_ids, *, scale: float, chunk_size: int):
  """Cuts the length into chunks and heads apart, and puts the result together again."""
  length = q.shape[1]
  tail = -length % chunk_size

  def cut(x):  # [B, T, H, K] -> [B, H, N, C, K]
    x = jnp.pad(x, ((0, 0), (0, tail), (0, 0), (0, 0)))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk_size, *x.shape[2:]), 3, 1)

  documents = None
  if segment_ids is not None:
    documents = jnp.pad(document_indices(segment_ids), ((0, 0), (0, tail)), mode="edge")
    documents = documents.reshape(documents.shape[0], 1, -1, chunk_size)
  y, state = _attend_chunks(cut(q), cut(k), cut(v), state, documents, scale)
  y = jnp.moveaxis(y, 1, 3)
  return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length], state


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend_chunks(q, k, v, state, documents, scale):
  """[B, H, N, C, K], [B, H, N, C, K], [B, H, N, C, V], [B, H, K, V], [B, 1, N, C] or None -> y [B,
  H, N, C, V], S_T."""
  return _attend_chunks_forward(q, k, v, state, documents, scale)[0]


def _attend_chunks_forward(q, k, v, state, documents, scale):
  dot = _dot(q.dtype)
  visible, reads, writes, keeps = _masks(documents, q.shape[3])
  scores = jnp.where(visible, dot("bhnck,bhnsk->bhncs", q, k), 0)
  added = dot("bhnck,bhncv->bhnkv", _where(writes, k), v)
  starts, state = _accumulate(state, added, keeps)
  within = dot("bhncs,bhnsv->bhncv", scores.astype(v.dtype), v)
  before = dot("bhnck,bhnkv->bhncv", _where(reads, q), starts.astype(q.dtype))
  return (scale * (within + before), state), (q, k, v, starts, documents)


def _attend_chunks_backward(scale, residuals, cotangents):
  # Kept from the forward pass: the inputs and the state before each chunk. Recomputing the states
  # would read k and v once more and repeat the sequential part; keeping them costs K * V / C floats
  # a token and head.
  q, k, v, starts, documents = residuals
  dy, dstate = cotangents
  dot = _dot(q.dtype)
  visible, reads, writes, keeps = _masks(documents, q.shape[3])
  dy = (scale * dy).astype(v.dtype)
  scores = jnp.where(visible, dot("bhnck,bhnsk->bhncs", q, k), 0).astype(v.dtype)
  dscores = jnp.where(visible, dot("bhncv,bhnsv->bhncs", dy, v), 0).astype(q.dtype)
  # The cotangent of a state runs through the same recurrence from the end to the start.
  added = dot("bhnck,bhncv->bhnkv", _where(reads, q), dy)
  dends, dstate = _accumulate(dstate, added, keeps, reverse=True)
  dends = dends.astype(v.dtype)
  dq = dot("bhncs,bhnsk->bhnck", dscores, k) + _where(
    reads, dot("bhncv,bhnkv->bhnck", dy, starts.astype(v.dtype))
  )
  dk = dot("bhncs,bhnck->bhnsk", dscores, q) + _where(writes, dot("bhncv,bhnkv->bhnck", v, dends))
  dv = dot("bhncs,bhncv->bhnsv", scores, dy) + dot("bhnck,bhnkv->bhncv", _where(writes, k), dends)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dstate, None


_attend_chunks.defvjp(_attend_chunks_forward, _attend_chunks_backward)


def _dot(dtype):
  """einsum with float32 accumulation; float32 operands are not rounded to bfloat16, which a TPU
  does by default."""
  accumulator = jnp.promote_types(dtype, jnp.float32)
  precision = "highest" if dtype == accumulator else "default"
  return functools.partial(jnp.einsum, preferred_element_type=accumulator, precision=precision)


def _masks(documents, chunk_size: int):
  """Which keys a query sees [.., C, C], and which tokens read and write the state [.., C, 1]; which
  chunks keep it [.., 1, 1]."""
  visible = jnp.tril(jnp.ones((chunk_size, chunk_size), bool))
  if documents is None:
    return visible, None, None, None
  visible = visible & (documents[..., :, None] == documents[..., None, :])
  last = documents[..., -1:]
  before = jnp.pad(
    last[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0))
  )  # the state given belongs to document 0
  return (
    visible,
    (documents == before)[..., None],
    (documents == last)[..., None],
    (last == before)[..., None],
  )


def _where(mask, x):
  return x if mask is None else jnp.where(mask, x, 0)


def _accumulate(state, added, keeps, *, reverse: bool = False):
  """Runs S' = keep * S + added over the chunks; returns S before each chunk [B, H, N, K, V] and the
  last one."""
  keeps = jnp.ones((1, 1, added.shape[2], 1, 1), bool) if keeps is None else keeps

  def step(state, chunk):
    added, keep = chunk
    return jnp.where(keep, state, 0) + added, state

  chunks = (jnp.moveaxis(added, 2, 0), jnp.moveaxis(keeps, 2, 0))
  state, before = jax.lax.scan(step, state, chunks, reverse=reverse)
  return jnp.moveaxis(before, 0, 2), state
