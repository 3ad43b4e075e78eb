"""Softmax attention: argument checks, the KV cache as its state, and the choice between JAX's own
forms.

The cache holds one document. Slot j of S holds the newest position p with p % S == j, so that a
cache as large as the window is a ring that forgets exactly what the window hides.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxmix import sharding
from jaxmix.ops import implementation as implementations
from jaxmix.ops import parts
from jaxmix.ops.segments import check_segment_ids, document_indices, document_positions
from pallas_kernels.attention import reference, tpu

# Logical axes of q, k, v and y, and of the document of each token.
ROWS, DOCUMENTS = ("batch", None, "heads", None), ("batch", None)


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  scale: float | None = None,
  state: dict[str, jax.Array] | None = None,
  segment_ids: jax.Array | None = None,
  visibility: str = "causal",
  window: int | None = None,
  capacity: int | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
  """Softmax attention with a KV cache.

      y_t = sum_s softmax_s(scale * q_t . k_s) v_s        over the keys s that t sees

  A token sees its own document: up to itself (`visibility="causal"`), and of that the newest
  `window` tokens.

  Args:
    q: [B, T, H, K].   k: [B, T, G, K].   v: [B, T, G, V].   H is a multiple of G (grouped heads).
    scale: multiplies q; None means K ** -0.5.
    state: the cache of `attention_state`; None means empty. It belongs to the document of the first
      token that is not padding.
    segment_ids: [B, T] int32; a change starts a new document. 0 marks padding, whose output is 0.
      Padding inside a document counts towards `window` where state is None, and not otherwise.
    visibility: "causal", or "full" (no cache).
    window: tokens that a query sees, itself among them; None means all.
    capacity: slots of the returned cache where state is None; None means `window`, or T without
      one.
    implementation: None, "reference", "xla" (jax.nn.dot_product_attention) or "tpu" (JAX's splash
      attention).
  Returns:
    y: [B, T, H, V] in the dtype of v, NaN where a cache without window has no slot left;
    state: {"k": [B, S, G, K], "v": [B, S, G, V], "length": [B] int32}; None when visibility is
      "full".
  Raises:
    ValueError: shapes or options disagree, or `implementation` cannot run this call (the message
      says why).
  Source: Vaswani et al. 2017 (arXiv 1706.03762); grouped heads: Ainslie et al. 2023 (arXiv
    2305.13245). O(T^2 K) time, O(T K) state.
  """
  batch, length, heads, key_dim = _check(q, k, v, segment_ids, visibility, window, state)
  scale = key_dim**-0.5 if scale is None else scale
  causal = visibility == "causal"
  fresh = state is None
  if causal and fresh:
    capacity = capacity or window or length
    if window is None and capacity < length:
      raise ValueError(
        f"attention: a cache of capacity={capacity} cannot hold {length} tokens; raise the "
        "capacity or set window"
      )
    state = attention_state(batch, capacity, k.shape[2:], v.shape[2:], k.dtype)
  if length == 0:
    return jnp.zeros((batch, 0, heads, v.shape[-1]), v.dtype), state

  documents = positions = None
  if segment_ids is not None:
    segment_ids = sharding.constrain(segment_ids, "batch", None)  # keys are those of whole rows
    documents = jnp.where(segment_ids != 0, document_indices(segment_ids) + 1, 0)  # 0 is padding
  if causal:
    ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
    positions = document_positions(ids, state["length"])

  if fresh:
    y = _attend_row(
      q, k, v, documents, scale=scale, causal=causal, window=window, implementation=implementation
    )
    state = _write(state, k, v, documents, positions) if causal else None
  else:
    y, state = _attend_cache(
      q,
      k,
      v,
      state,
      documents,
      positions,
      scale=scale,
      window=window,
      implementation=implementation,
    )
    if window is None:
      y = jnp.where((positions < state["k"].shape[1])[..., None, None], y, jnp.nan)
  if segment_ids is not None:
    y = jnp.where((segment_ids != 0)[..., None, None], y, 0)
  return y, state


def attention_state(
  batch: int, capacity: int, key_shape: tuple[int, int], value_shape: tuple[int, int], dtype
) -> dict[str, jax.Array]:
  """An empty KV cache: [batch, capacity, *key_shape] and [batch, capacity, *value_shape] of dtype,
  and the tokens seen, [batch]."""
  return {
    "k": jnp.zeros((batch, capacity, *key_shape), dtype),
    "v": jnp.zeros((batch, capacity, *value_shape), dtype),
    "length": jnp.zeros(batch, jnp.int32),
  }


def _check(q, k, v, segment_ids, visibility, window, state) -> tuple[int, int, int, int]:
  if (
    q.ndim != 4
    or k.ndim != 4
    or v.ndim != 4
    or k.shape[:2] != q.shape[:2]
    or v.shape[:3] != k.shape[:3]
    or k.shape[3] != q.shape[3]
  ):
    raise ValueError(
      f"attention: q, k, v have shapes {q.shape}, {k.shape}, {v.shape}, expected [B, T, H, K], "
      "[B, T, G, K], [B, T, G, V]"
    )
  if q.shape[2] % k.shape[2]:
    raise ValueError(
      f"attention: {q.shape[2]} query heads do not share {k.shape[2]} key heads evenly; make the "
      "first a multiple of the second"
    )
  check_segment_ids("attention", segment_ids, *q.shape[:2])
  if visibility not in ("causal", "full"):
    raise ValueError(
      f'attention: visibility={visibility!r} is unknown; expected "causal" or "full"'
    )
  if visibility == "full" and (state is not None or window is not None):
    raise ValueError(
      'attention: visibility="full" sees the whole row at once, so it takes neither state nor '
      'window; use visibility="causal"'
    )
  if window is not None and window < 1:
    raise ValueError(
      f"attention: window={window}, expected at least 1 (the token itself), or None for all"
    )
  if state is not None and window is not None and state["k"].shape[1] < window:
    raise ValueError(
      f"attention: the cache has {state['k'].shape[1]} slots, window={window} needs as many; make "
      f"it with capacity={window}"
    )
  return q.shape


def _attend_row(q, k, v, documents, **options):
  """Every token against the keys of its own row. Where the mesh cuts the length, each device takes
  the queries of its part and the keys and values of all."""
  run = functools.partial(_attend, **options)
  length = q.shape[1]
  if not sharding.is_cut("length", length):
    return run(q, k, v, documents, None)

  def of_part(q, k, v, documents):
    k, v = (jax.lax.all_gather(x, parts.AXIS, axis=1, tiled=True) for x in (k, v))
    return run(q, k, v, documents, (jax.lax.axis_index(parts.AXIS), length // q.shape[1]))

  rows = ("batch", "length", "heads", None)
  return sharding.shard_kernel(of_part, (rows, rows, rows, DOCUMENTS), rows)(q, k, v, documents)


def _attend(q, k, v, documents, part, *, scale, causal, window, implementation):
  """Queries against the keys of their rows.

  Args:
    part: (index, count) where the queries are this one of so many equal parts of the rows; None
      where they are all.
  """
  length = k.shape[1]
  first, of_queries = 0, documents
  if part is not None:
    first = part[0] * q.shape[1]
    if documents is not None:
      of_queries = jax.lax.dynamic_slice_in_dim(documents, first, q.shape[1], axis=1)
  same = None if documents is None else of_queries[:, :, None] == documents[:, None, :]

  def visible():
    distance = first + jnp.arange(q.shape[1])[:, None] - jnp.arange(length)
    seen = (distance >= 0 if causal else True) & (distance < (window or length))
    seen = jnp.broadcast_to(seen, (q.shape[0], *distance.shape))
    return seen if same is None else seen & same

  def by_definition(q, k, v, documents):
    return reference.attention(q, k, v, visible(), scale=scale).astype(v.dtype)

  def by_xla(q, k, v, documents):
    if part is not None:
      return _dot_product(q, k, v, mask=visible()[:, None], scale=scale)
    mask = None if same is None else same[:, None]
    span = None if window is None else (window - 1, 0)
    return _dot_product(q, k, v, mask=mask, scale=scale, is_causal=causal, local_window_size=span)

  by_tpu = functools.partial(tpu.attention, scale=scale, causal=causal, window=window, part=part)
  refusal = tpu.refusal(length, 1 if part is None else part[1])
  return implementations.run(
    "attention",
    implementation,
    (q, k, v, documents),
    functions={
      "reference": by_definition,
      "xla": by_xla,
      "tpu": sharding.shard_kernel(by_tpu, (ROWS, ROWS, ROWS, DOCUMENTS), ROWS),
    },
    refusals={} if refusal is None else {"tpu": refusal},
  )


def _attend_cache(q, k, v, state, documents, positions, *, scale, window, implementation):
  """Tokens that go on where a cache ends, against the cache and one another."""
  length, slots = q.shape[1], state["k"].shape[1]
  cached = _slot_positions(state["length"], slots)[:, None]  # [B, 1, S]
  goes_on = jnp.ones_like(positions, bool) if documents is None else documents == 1
  newer = positions[:, :, None]
  sees_cache = (
    (cached >= 0) & goes_on[:, :, None] & (newer - cached < (window or jnp.iinfo(jnp.int32).max))
  )
  index = jnp.arange(length)
  sees_row = jnp.broadcast_to(index[:, None] >= index, (q.shape[0], length, length))
  sees_row = sees_row & (newer - positions[:, None] < (window or jnp.iinfo(jnp.int32).max))
  if documents is not None:
    sees_row = sees_row & (documents[:, :, None] == documents[:, None, :])
  after = _write(state, k, v, documents, positions)
  if length == 1:
    # One token: it overwrites only a slot that its window hides, so the cache itself is read and
    # nothing is copied.
    live = sees_row[:, :, 0] if documents is None else documents != 0
    own_slot = (positions % slots)[:, :, None] == jnp.arange(slots)
    visible = (sees_cache & ~own_slot) | (own_slot & live[:, :, None])
    keys, values = after["k"], after["v"]
  else:
    visible = jnp.concatenate([sees_cache, sees_row], axis=-1)
    keys, values = (
      jnp.concatenate([state["k"], k], axis=1),
      jnp.concatenate([state["v"], v], axis=1),
    )
  y = implementations.run(
    "attention with a cache",
    implementation,
    (q, keys, values, visible),
    functions={
      "reference": lambda q, k, v, visible: reference.attention(
        q, k, v, visible, scale=scale
      ).astype(v.dtype),
      "xla": lambda q, k, v, visible: _dot_product(q, k, v, mask=visible[:, None], scale=scale),
    },
    refusals={"tpu": "the TPU kernel reads no cache"},
  )
  return y, after


def _dot_product(q, k, v, **options):
  """jax.nn.dot_product_attention, which wants keys and values of one head size."""
  size = max(k.shape[-1], v.shape[-1])

  def fill(x):
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, size - x.shape[-1])))

  return jax.nn.dot_product_attention(fill(q), fill(k), fill(v), implementation="xla", **options)[
    ..., : v.shape[-1]
  ]


def _slot_positions(length: jax.Array, slots: int) -> jax.Array:
  """[B] -> [B, S]: the position that each slot holds after `length` tokens; negative where it holds
  none."""
  newest = length[:, None] - 1
  return newest - (newest - jnp.arange(slots)) % slots


def _write(state, k, v, documents, positions):
  """The cache after the row: of its last document, the newest tokens that have a slot."""
  batch, slots = k.shape[0], state["k"].shape[1]
  kept = jnp.ones(k.shape[:2], bool)
  went_on = jnp.ones(batch, bool)
  if documents is not None:
    last = documents.max(axis=1)
    kept = (documents == last[:, None]) & (documents != 0)
    went_on = last <= 1
  length = jnp.where(went_on, state["length"], 0) + kept.sum(axis=1, dtype=jnp.int32)
  kept = kept & (positions >= length[:, None] - slots)
  slot = jnp.where(kept, positions % slots, slots)  # slot S does not exist: the write is dropped
  rows = jnp.arange(batch)[:, None]

  def write(cache, x):
    return cache.at[rows, slot].set(x.astype(cache.dtype), mode="drop")

  return {"k": write(state["k"], k), "v": write(state["v"], v), "length": length}
