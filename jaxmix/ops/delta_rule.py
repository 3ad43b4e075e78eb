"""The delta rule with any decay: DeltaNet, Gated DeltaNet, Kimi Delta Attention."""

from __future__ import annotations

import jax

from jaxmix.ops.recurrence import Op, Rows, check_rows, recurrence
from pallas_kernels.delta_rule import gpu, reference, tpu

OP = Op("delta_rule", reference.delta_rule, (("tpu", tpu), ("gpu", gpu)))


def delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  *,
  g: jax.Array | None = None,
  scale: float | None = None,
  state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  chunk_size: int | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The delta rule: a memory that is corrected at a key towards a value, rather than added to.

      S~  = exp(g_t) * S_{t-1}
      S_t = S~ + beta_t k_t (v_t - S~^T k_t)^T        y_t = scale * S_t^T q_t

  Args:
    q, k: [B, T, heads, K].   v: [B, T, heads, V].   float32 or bfloat16; heads as in
      `linear_attention`. Keys of length one keep the state bounded for beta up to 2.
    beta: [B, T, H], write strength after its activation: from 0 to 1, or to 2, where a state may
      change its sign.
    g: natural log of the decay, as in `linear_attention`.
    scale, state, segment_ids, chunk_size, implementation: as in `linear_attention`.
  Returns:
    y: [B, T, heads, V] in the dtype of v;   state: S_T [B, H, K, V], float32.
  Raises:
    ValueError: shapes disagree, or `implementation` cannot run this call (the message says why).
  Source: without decay Yang et al. 2024 (arXiv 2406.06484), section 3; with one a head Yang et al.
    2024 (arXiv 2412.06464), section 3; with one a key channel Kimi Team 2025 (arXiv 2510.26692),
    section 3. Cost O(T (C + V) K) time, O(K V) state.
  """
  rows = Rows(q, k, v, beta, g)
  check_rows("delta_rule", rows, state, segment_ids)
  return recurrence(
    OP,
    rows,
    scale=scale,
    state=state,
    segment_ids=segment_ids,
    chunk_size=chunk_size,
    implementation=implementation,
  )
