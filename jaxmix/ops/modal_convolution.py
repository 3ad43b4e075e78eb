"""Convolution with filters that are sums of decaying waves, their modes. A stream keeps one number
a mode, however long the filters are.

Whole rows are convolved by `jaxmix.ops.long_convolution` with the filters written out. What a state
gives to a row, and a row to a state, takes powers of the poles up to the length of the row: each is
the product of one of about sqrt(T) low powers and one of as many high ones, and no table has more.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxmix.ops.gated_convolution import gated, with_skip
from jaxmix.ops.long_convolution import long_convolution
from jaxmix.ops.segments import (
  check_segment_ids,
  document_indices,
  document_positions,
  order,
  take_rows,
)


def modal_convolution(
  u: jax.Array,
  log_poles: jax.Array,
  residues: jax.Array,
  *,
  skip: jax.Array | None = None,
  pre_gate: jax.Array | None = None,
  post_gate: jax.Array | None = None,
  state: dict[str, jax.Array] | None = None,
  segment_ids: jax.Array | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Gated causal convolution with the filters of `modal_filters`, as a recurrence.

      g_t = pre_gate_t * u_t        x_t = exp(log_poles) x_{t-1} + g_t
      y_t = post_gate_t * (Re sum_m residues[:, m] x_t[:, m] + skip * g_t)

  within documents.

  Args:
    u: [B, T, D], float32 or bfloat16; summed in float32.
    log_poles: [D, S] complex64, of S modes a channel: log-decay, below 0, and i times the angle.
    residues: [D, S] complex64.
    skip, pre_gate, post_gate, segment_ids: as in `jaxmix.ops.long_convolution`.
    state: from `modal_state` or an earlier call; None means nothing before the first token. It
      belongs to the document of the first token that is not padding.
    implementation: of the convolution of whole rows, see `jaxmix.ops.long_convolution`.
  Returns:
    y: [B, T, D] in the dtype of u;   state: a dict of modes [B, D, S] complex64, x of the row's
    last document.
  Raises:
    ValueError: shapes disagree, or `implementation` cannot run this call (the message says why).
  Source: Massaroli et al. 2023 (arXiv 2310.18780), section 3. The power n of a pole is rounded by
    about 1e-7 n of its value. Cost O(T D (log T + S)) time, O(S D) state; of a token of a stream,
    O(S D).
  """
  _check(u, log_poles, residues, state, segment_ids)
  x = None if state is None else state["modes"]
  batch, length, channels = u.shape
  if length == 0:
    modes = log_poles.shape[1]
    return u, modal_state(batch, channels, modes, log_poles.real.dtype) if x is None else state
  g = gated(u, pre_gate)
  if segment_ids is not None:
    g = jnp.where((segment_ids != 0)[..., None], g, 0)
  if x is not None and length == 1 and implementation is None:
    y, x = _step(g, log_poles, residues, x, segment_ids)
    return with_skip(y, g, skip, post_gate).astype(u.dtype), {"modes": x}
  y, _ = long_convolution(
    u,
    modal_filters(log_poles, residues, length),
    skip=skip,
    pre_gate=pre_gate,
    post_gate=post_gate,
    segment_ids=segment_ids,
    implementation=implementation,
  )
  after = _added(g, log_poles, segment_ids)
  if x is not None:
    read, kept = _from_before(x, log_poles, residues, length, segment_ids)
    y = (y.astype(read.dtype) + gated(read, post_gate)).astype(u.dtype)
    after = after + kept
  return y, {"modes": after}


def modal_filters(log_poles: jax.Array, residues: jax.Array, length: int) -> jax.Array:
  """The filters k[n] = Re sum_m residues[:, m] exp(n log_poles[:, m]) of n < length.

  Args:
    log_poles, residues: [D, S] complex.   length: at least 1.
  Returns:
    [D, length], real.   Cost O(length D S).
  """
  return _waves(residues, log_poles, length)


def modal_state(batch: int, channels: int, modes: int, dtype=jnp.float32) -> dict[str, jax.Array]:
  """The state of `batch` rows before the first token, of so many modes a channel; `dtype` is that
  of its real parts."""
  return {"modes": jnp.zeros((batch, channels, modes), jnp.result_type(dtype, jnp.complex64))}


def _check(u, log_poles, residues, state, segment_ids) -> None:
  name = "modal_convolution"
  shapes = log_poles.shape, residues.shape
  if u.ndim != 3 or len({*shapes}) != 1 or log_poles.ndim != 2 or shapes[0][0] != u.shape[2]:
    raise ValueError(
      f"{name}: u, log_poles and residues have shapes {u.shape}, {shapes[0]}, {shapes[1]}, "
      "expected [B, T, D], [D, S], [D, S]; give every channel as many modes"
    )
  if not jnp.iscomplexobj(log_poles) or not jnp.iscomplexobj(residues):
    raise ValueError(
      f"{name}: log_poles and residues are {log_poles.dtype} and {residues.dtype}, expected "
      "complex numbers; a real pole r > 0 has the logarithm log(r) + 0j"
    )
  expected = (u.shape[0], *log_poles.shape)
  if state is not None and state["modes"].shape != expected:
    raise ValueError(
      f"{name}: the state has modes {state['modes'].shape}, expected {expected}; make it by "
      "modal_state"
    )
  check_segment_ids(name, segment_ids, *u.shape[:2])


def _step(g, log_poles, residues, x, segment_ids):
  """y [B, 1, D] of one token g [B, 1, D], and the modes after it."""
  after = jnp.exp(log_poles) * x + g[:, 0, :, None]
  y = jnp.sum(residues * after, axis=-1).real[:, None]
  if segment_ids is None:
    return y, after
  live = (segment_ids != 0)[..., None]
  return jnp.where(live, y, 0), jnp.where(live, after, x)


def _added(g, log_poles, segment_ids):
  """The modes [B, D, S] after rows g [B, T, D] with nothing before them: powers of the poles by how
  many tokens of the last document stand behind each of its own."""
  newest_first = g[:, ::-1]
  if segment_ids is not None:
    documents = document_indices(segment_ids)
    last = (segment_ids != 0) & (documents == documents[:, -1:])
    newest_first = jnp.where(last[..., None], g, 0)[:, ::-1]
    rows, _ = order(last[:, ::-1].astype(jnp.int32))
    newest_first = take_rows(newest_first, rows)
  high, low = _powers(log_poles, g.shape[1])
  count, size = high.shape[-1], low.shape[-1]
  blocks = jnp.pad(newest_first, ((0, 0), (0, count * size - g.shape[1]), (0, 0)))
  blocks = blocks.reshape(g.shape[0], count, size, g.shape[2])
  return jnp.einsum("bijd,dsj,dsi->bds", blocks, low, high, precision="highest")


def _from_before(x, log_poles, residues, length: int, segment_ids):
  """What the modes x [B, D, S] before a row give to its tokens, [B, T, D], and leave behind it."""
  waves = _waves(residues * jnp.exp(log_poles) * x, log_poles, length).swapaxes(1, 2)
  if segment_ids is None:
    return waves, jnp.exp(length * log_poles) * x
  live, documents = segment_ids != 0, document_indices(segment_ids)
  first = live & (documents == 0)
  positions = document_positions(segment_ids, jnp.zeros(len(x), jnp.int32))
  read = jnp.where(first[..., None], take_rows(waves, positions), 0)
  count = jnp.sum(first, axis=1)[:, None, None]
  goes_on = (documents[:, -1] == 0)[:, None, None]
  return read, jnp.where(goes_on, jnp.exp(count * log_poles) * x, 0)


def _waves(sizes, log_poles, length: int):
  """Re sum_m sizes[..., m] exp(n log_poles[:, m]) of sizes [..., D, S] -> [..., D, length]."""
  high, low = _powers(log_poles, length)
  waves = jnp.einsum("...ds,dsi,dsj->...dij", sizes, high, low, precision="highest").real
  return waves.reshape(*sizes.shape[:-1], -1)[..., :length]


def _powers(log_poles, length: int):
  """[D, S, I] and [D, S, J], whose products, the first at i and the second at j, are the powers i J
  + j of the poles, those below `length` among them."""
  size = math.isqrt(length - 1) + 1
  exponents = size * jnp.arange(-(-length // size)), jnp.arange(size)
  return tuple(jnp.exp(log_poles[..., None] * each) for each in exponents)
