"""Higher-order linear attention, as linear attention of linear attention.

With LA(q, k, v)_t = sum_{s<=t} (q_t . k_s) v_s and W its matrix of weights:

    second       ((W W^T) * L) V    = LA(q, u, v),  u = LA(q, k, k)
    asymmetric   W W V              = LA(q, k, r),  r = LA(q, k, v)
    third        ((W W^T) * L) W V  = LA(q, u, r)

for L the lower triangle. Since u_t = S_t q_t with S_t = sum k_s k_s^T, the second order is linear
attention whose key is the query seen through the covariance of the keys. So the chunks, the
kernels, decay, packing and states are those of linear attention.

Zhang et al. 2025 (arXiv 2510.27258) define the operators. Their recurrences with decay and of third
order compute other ones than their masked forms, and their segment maps for decay are not
associative; these are the masked forms, with decays of the inner and of the outer attention.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmix.ops.linear_attention import NORMALIZER_EPS, linear_attention

ORDERS = ("second", "asymmetric", "third")


def higher_order_linear_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  order: str = "second",
  g: jax.Array | None = None,
  g_inner: jax.Array | None = None,
  scale: float = 1.0,
  state: dict[str, jax.Array] | None = None,
  segment_ids: jax.Array | None = None,
  normalize: bool = False,
  chunk_size: int | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Higher-order linear attention; the equations stand at the head of this file.

      second:  S_t = exp(g_inner_t) S_{t-1} + k_t k_t^T,  F_t = exp(g_t) F_{t-1} + (S_t q_t) v_t^T,
               y_t = scale * F_t^T q_t

  Args:
    q, k: [B, T, H, K].   v: [B, T, H, V].   float32 or bfloat16. The weights are of fourth degree
      in q and k: give both the length of one.
    order: "second", "asymmetric" or "third".
    g: natural log of the decay of the outer memory, g_inner of the inner ones; each as in
      `linear_attention`, at most one number a token and head.
    scale: multiplies y.
    state: from an earlier call; None means zeros. "outer": F; "covariance": S [B, H, K, K] for the
      second and third order; "values": sum k v^T [B, H, K, V] for the asymmetric and third. All
      float32.
    normalize: divide by the sum of weights plus 1e-10, with q and k not negative; the memories of
      values then have a last column of it, V + 1.
    segment_ids, chunk_size, implementation: as in `linear_attention`.
  Returns:
    y: [B, T, H, V] in the dtype of v;   state: of the last token.
  Raises:
    ValueError: the order is unknown, shapes disagree, or `implementation` cannot run this call.
  Source: Zhang et al. 2025 (arXiv 2510.27258), as corrected above. Cost of two linear attentions,
    three for the third order.
  """
  if order not in ORDERS:
    raise ValueError(
      f"higher_order_linear_attention: order={order!r} is unknown; expected one of "
      f"{', '.join(ORDERS)}"
    )
  before, after = state or {}, {}
  dtype = v.dtype
  if normalize:
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)

  def attend(name: str, keys, values, g, scale=1.0):
    y, after[name] = linear_attention(
      q,
      keys,
      values,
      g=g,
      scale=scale,
      state=before.get(name),
      segment_ids=segment_ids,
      chunk_size=chunk_size,
      implementation=implementation,
    )
    return y

  keys = k if order == "asymmetric" else attend("covariance", k, k, g_inner)
  values = v if order == "second" else attend("values", k, v, g_inner)
  y = attend("outer", keys, values, g, scale)
  if normalize:
    y = y.astype(jnp.promote_types(dtype, jnp.float32))
    y = (scale * y[..., :-1] / (y[..., -1:] + scale * NORMALIZER_EPS)).astype(dtype)
  return y, after
