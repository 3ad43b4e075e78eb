"""Depthwise convolution with filters as long as the row: argument checks, and the state of a
stream. Rows are convolved in `jaxmix.ops.gated_convolution`.

A stream keeps what the next tokens get from those that it has seen, `pending`, made for a block of
tokens at once by one transform. A token adds what it gets from those of its block, directly: it
costs the root of the filter's length, not the length.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmix import sharding
from jaxmix.ops.circular import convolve
from jaxmix.ops.gated_convolution import gated, gated_convolution, with_skip
from jaxmix.ops.segments import (
  check_segment_ids,
  document_positions,
  last_token,
  newest_rows,
  take_rows,
)


@dataclasses.dataclass(frozen=True)
class LazyKernel:
  """Filters that are made where they are used: one token of a stream reads the first few lags only,
  but for the last of a block.

  Attributes:
    shape: (D, L).   first: a number of lags -> the filters as far, [D, lags].
  """

  shape: tuple[int, int]
  first: Callable[[int], jax.Array]


def long_convolution(
  u: jax.Array,
  kernel: jax.Array | LazyKernel,
  *,
  reverse_kernel: jax.Array | None = None,
  skip: jax.Array | None = None,
  pre_gate: jax.Array | None = None,
  post_gate: jax.Array | None = None,
  state: dict[str, jax.Array] | None = None,
  segment_ids: jax.Array | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
  """Gated depthwise convolution along the length, causal or to both sides.

      g_t = pre_gate_t * u_t
      y_t = post_gate_t * (  sum_{j=0}^{L-1} kernel[:, j] * g_{t-j}  +  skip * g_t
                           + sum_{j=0}^{L-1} reverse_kernel[:, j] * g_{t+1+j}  )

  within documents; a row may be shorter than the filters or longer.

  Args:
    u: [B, T, D], float32 or bfloat16; convolved in float32.
    kernel: [D, L], the filter of each channel by lag, or a `LazyKernel`.
    reverse_kernel: [D, L'], that of later tokens, the next one first; None is causal.   skip: [D].
    pre_gate, post_gate: [B, T, D]; None means ones.
    state: from `convolution_state` or an earlier call, of causal convolutions; None means nothing
      before the first token. It belongs to the document of the first token that is not padding.
    segment_ids: [B, T] int32; 0 marks padding, which nothing reads and whose output is 0. A mask
      of the tokens of a padded batch is such an array. The cost grows with the documents of a row.
    implementation: None, "reference", "xla", "tpu" (a kernel a direction, of rows without a state
      before them; rows longer than fit on the chip, 4,096 tokens in bfloat16 on v5e, are folded by
      two more) or "gpu" (the same rows, of any length; when named only).
  Returns:
    y: [B, T, D] in the dtype of u;   state: None with a reverse kernel, or a dict of memory
    [B, max(L - 1, 1), D], the last inputs g of the row's last document, a ring by position;
    length [B] int32, how many there were; pending [B, C, D], what the C tokens from position
    `pending_from` [B] int32 get from those before it.
  Raises:
    ValueError: shapes or options disagree, or `implementation` cannot run this call (the message
      says why).
  Source: Fu et al. 2023 (arXiv 2310.12109), sections 3 and 4; Poli et al. 2023 (arXiv 2302.10866).
    Causality: rows of at most `jaxmix.ops.circular.SHORT` tokens are summed directly, and no output
    changes with a later input. By transforms rounding reaches all outputs: of float32, about 2e-7
    of the row's largest values; by the kernels on bfloat16 rows 4e-6, of operands in two parts.
    Operands in one, plain bfloat16, would leak 3e-3 and are not offered. Those kernels transform
    two rows of a batch as one complex row: rounding, and NaN or infinity, of one reach the other.
    Cost O(T D log T) time, O(L D) state; of a token of a stream, O(D sqrt(L log L)).
  """
  _check(u, kernel, reverse_kernel, skip, pre_gate, post_gate, state, segment_ids)
  dtype = jnp.promote_types(u.dtype, jnp.float32)
  if not isinstance(kernel, LazyKernel):
    lags = kernel.astype(dtype)
    kernel = LazyKernel(lags.shape, lambda count: lags[:, :count])
  if reverse_kernel is not None:
    reverse_kernel = reverse_kernel.astype(dtype)
  if segment_ids is not None:
    segment_ids = sharding.constrain(segment_ids, "batch", None)  # of whole rows, as they are read
    live = (segment_ids != 0)[..., None]
    u, pre_gate, post_gate = (
      None if x is None else jnp.where(live, x, 0) for x in (u, pre_gate, post_gate)
    )
  g = gated(u, pre_gate)
  if u.shape[1] == 0:
    if state is None and reverse_kernel is None:
      state = convolution_state(u.shape[0], kernel.shape[1], u.shape[2], dtype)
    return u, state
  if state is not None and u.shape[1] == 1 and implementation is None:
    y, state = _step(g[:, 0], kernel, state, None if segment_ids is None else segment_ids[:, 0])
    y = with_skip(y, g, skip, post_gate).astype(u.dtype)
    return y if segment_ids is None else jnp.where(live, y, 0), state
  before = None if state is None else _in_time(state["memory"], state["length"])
  reached = u.shape[1] + (0 if before is None else before.shape[1])
  y = gated_convolution(
    u,
    kernel.first(min(reached, kernel.shape[1])),
    reverse_kernel,
    skip,
    pre_gate,
    post_gate,
    before,
    segment_ids,
    implementation,
  )
  return y, None if reverse_kernel is not None else _after(g, kernel, state, segment_ids)


def convolution_state(
  batch: int, length: int, channels: int, dtype=jnp.float32
) -> dict[str, jax.Array]:
  """The state of `batch` rows before the first token of a causal convolution with kernels
  [channels, length]; of float32, or of float64 for computing in it."""
  return {
    "memory": jnp.zeros((batch, max(length - 1, 1), channels), dtype),
    "length": jnp.zeros(batch, jnp.int32),
    "pending": jnp.zeros((batch, _block(length), channels), dtype),
    "pending_from": jnp.zeros(batch, jnp.int32),
  }


def _block(length: int) -> int:
  """Tokens whose pending part one transform makes: its cost, L log L, is then that of the direct
  sums of the block."""
  return 1 << round(math.log2(math.sqrt(length * max(math.log2(length), 1))))


def _check(u, kernel, reverse_kernel, skip, pre_gate, post_gate, state, segment_ids) -> None:
  name = "long_convolution"
  if u.ndim != 3 or len(kernel.shape) != 2 or kernel.shape[0] != u.shape[2] or kernel.shape[1] < 1:
    raise ValueError(
      f"{name}: u and kernel have shapes {u.shape}, {kernel.shape}, expected [B, T, D] and [D, L]; "
      "transpose kernel where its lags are in rows"
    )
  channels = u.shape[2]
  if reverse_kernel is not None:
    if reverse_kernel.ndim != 2 or reverse_kernel.shape[0] != channels:
      raise ValueError(
        f"{name}: reverse_kernel has shape {reverse_kernel.shape}, expected [{channels}, L]"
      )
    if state is not None:
      raise ValueError(
        f"{name}: a reverse kernel reads later tokens, which a stream does not have yet; use no "
        "state, or no reverse kernel"
      )
  if skip is not None and skip.shape != (channels,):
    raise ValueError(f"{name}: skip has shape {skip.shape}, expected ({channels},)")
  for which, gate in (("pre_gate", pre_gate), ("post_gate", post_gate)):
    if gate is not None and gate.shape != u.shape:
      raise ValueError(f"{name}: {which} has shape {gate.shape}, expected that of u, {u.shape}")
  if state is not None:
    expected = jax.eval_shape(lambda: convolution_state(u.shape[0], kernel.shape[1], channels))
    shapes = {key: array.shape for key, array in state.items()}
    if shapes != {key: array.shape for key, array in expected.items()}:
      raise ValueError(
        f"{name}: the state holds {shapes}, which is not of {u.shape[0]} rows and kernels "
        f"{list(kernel.shape)}; make it by convolution_state"
      )
  check_segment_ids(name, segment_ids, *u.shape[:2])


def _after(g, kernel, state, segment_ids):
  """The state behind a row of inputs g, and before it `state`, or None."""
  if state is None:
    state = convolution_state(g.shape[0], kernel.shape[1], g.shape[2], g.dtype)
  length = state["length"]
  newest = newest_rows(_in_time(state["memory"], length), g, segment_ids)
  if segment_ids is None:
    length = length + g.shape[1]
  else:
    length = last_token(segment_ids, document_positions(segment_ids, length) + 1, length)
  return _flushed(newest, length, kernel)


def _step(g, kernel, state, segment_ids):
  """y [B, 1, D] of one token g [B, D], and the state after it."""
  memory, length, pending = state["memory"], state["length"], state["pending"]
  live = jnp.ones(length.shape, bool) if segment_ids is None else segment_ids != 0
  block, size = pending.shape[1], memory.shape[1]
  since = (length - state["pending_from"])[:, None]  # tokens whose part is not in `pending`
  first = kernel.first(min(block, kernel.shape[1]))
  lags = jnp.arange(1, first.shape[1])
  recent = take_rows(memory, (length[:, None] - lags) % size)
  recent = jnp.where((lags <= since)[..., None], recent, 0)
  y = take_rows(pending, since)[:, 0] + first[:, 0] * g
  y = y + jnp.einsum("bjd,dj->bd", recent, first[:, 1:], precision="highest")
  rows = jnp.arange(g.shape[0])
  kept = memory[rows, length % size]
  memory = memory.at[rows, length % size].set(jnp.where(live[:, None], g, kept))
  length = length + live
  state = {**state, "memory": memory, "length": length}
  full = jnp.any(length - state["pending_from"] == block)
  return y[:, None], jax.lax.cond(
    full, lambda: _flushed(_in_time(memory, length), length, kernel), lambda: state
  )


def _in_time(memory, length):
  """The ring with its oldest input first."""
  size = memory.shape[1]
  return take_rows(memory, (length[:, None] + jnp.arange(size)) % size)


def _flushed(newest, length, kernel):
  """The state after `newest` [B, M, D], oldest first, and `length` inputs in all."""
  size, block = newest.shape[1], _block(kernel.shape[1])
  rows = jnp.pad(newest, ((0, 0), (0, block), (0, 0)))
  return {
    "memory": take_rows(newest, (jnp.arange(size) - length[:, None]) % size),
    "length": length,
    "pending": convolve(rows, kernel.first(kernel.shape[1]), None, None)[:, size:],
    "pending_from": length,
  }
