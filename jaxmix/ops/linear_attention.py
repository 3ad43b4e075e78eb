"""Causal linear attention with any decay."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmix.ops.recurrence import Op, Rows, check_rows, recurrence
from pallas_kernels.linear_attention import gpu, reference, tpu

OP = Op("linear_attention", reference.linear_attention, (("tpu", tpu), ("gpu", gpu)))
NORMALIZER_EPS = (
  1e-10  # added to the sum of weights; as in the published implementations of the normalised form
)


def linear_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  g: jax.Array | None = None,
  scale: float | None = None,
  state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  normalize: bool = False,
  chunk_size: int | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Causal linear attention with decay and carried state.

      S_t = exp(g_t) * S_{t-1} + k_t v_t^T        y_t = scale * S_t^T q_t

  With `normalize`, y_t is divided by scale * q_t . z_t + 1e-10, where z_t = exp(g_t) * z_{t-1} +
  k_t; z is then the last column of the state, as if v had a last channel of ones.

  Args:
    q, k: [B, T, heads, K], after their feature map.   v: [B, T, heads, V].   float32 or bfloat16.
      Each has as many heads as the others, or all that have fewer have the same, a divisor:
      neighbours then share a head. The state has H heads, the more of those of k and v; y has the
      most of the three.
    g: natural log of the decay, finite and <= 0: [H], one a head; [B, T, H], one a token and head;
      or [B, T, H, K], one a token and row of the state. None means no decay. Very negative values
      clear the state.
    scale: multiplies q; None means K ** -0.5.
    state: [B, H, K, V] float32 ([B, H, K, V + 1] with `normalize`), S_0; None means zeros. It
      belongs to the document of the first token that is not padding.
    segment_ids: [B, T] int32; the state is cleared where the id changes. 0 marks padding, whose
      output is 0.
    normalize: divide by the sum of weights; q and k should then not be negative.
    chunk_size: tokens a chunk of the matmul form, rounded up to a power of two; None chooses. The
      result does not depend on it but for rounding.
    implementation: None, "reference", "xla", "tpu" (a fused kernel a direction) or "gpu" (kernels
      that no GPU has timed yet; by name alone).
  Returns:
    y: [B, T, heads, V] in the dtype of v;   state: S_T, float32.
  Raises:
    ValueError: shapes disagree, or `implementation` cannot run this call (the message says why).
  Source: Katharopoulos et al. 2020 (arXiv 2006.16236), section 3.3; with decay, and chunked, Yang
    et al. 2024 (arXiv 2312.06635), sections 3 and 4. Cost O(T (C + V) K) time, O(K V) state.
  """
  dtype = v.dtype
  if normalize:
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
  rows = Rows(q, k, v, None, g)
  columns = "V + 1] with normalize=True, the sum of keys its last column" if normalize else "V]"
  check_rows("linear_attention", rows, state, segment_ids, columns=columns)
  y, state = recurrence(
    OP,
    rows,
    scale=scale,
    state=state,
    segment_ids=segment_ids,
    chunk_size=chunk_size,
    implementation=implementation,
    dtype=jnp.promote_types(dtype, jnp.float32) if normalize else dtype,
  )
  if normalize:
    y = (y[..., :-1] / (y[..., -1:] + NORMALIZER_EPS)).astype(dtype)
  return y, state
