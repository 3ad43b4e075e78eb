"""Grassmann mixing at offsets that are learnt: partners between tokens.

A partner is a weighted sum of earlier tokens around a centre, and the weights are smooth in it:
dilated convolution with learnable spacings (Khalfaoui-Hassani et al. 2023, arXiv 2112.03740; other
windows, arXiv 2306.00817). Only reduced states are interpolated; what follows is as in
`jaxmix.ops.grassmann_mix`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxmix.ops import plucker
from jaxmix.ops.grassmann import along_rows, check_arrays, grassmann_state
from jaxmix.ops.segments import over_padding

WINDOWS = ("triangle", "gauss")


def offset_taps(
  centers: jax.Array, reach: int, *, window: str = "triangle", width: float | jax.Array = 1.0
) -> jax.Array:
  """How much of each of the last `reach` tokens is in a partner of z [B, T, R].

      w_mk = window(k - centers_m) / (sum_k window + 1e-7),        k = 1, ..., reach
      "triangle":  max(0, width - |x|)        "gauss":  exp(-(x / width)^2 / 2)

  A triangle of width 1 interpolates between two tokens.

  Args:
    centers: [m] float32, offsets.   width: a number, or [m].
  Returns:
    [m, reach].
  """
  if window not in WINDOWS:
    raise ValueError(
      f"offset_taps: window={window!r} is unknown; expected one of {', '.join(WINDOWS)}"
    )
  distance = jnp.arange(1, reach + 1, dtype=centers.dtype) - centers[:, None]
  width = jnp.broadcast_to(jnp.asarray(width, centers.dtype), centers.shape)[:, None]
  if window == "triangle":
    taps = jax.nn.relu(width - jnp.abs(distance))
  else:
    taps = jnp.exp(-0.5 * (distance / width) ** 2)
  return taps / (jnp.sum(taps, 1, keepdims=True) + 1e-7)


def fractional_grassmann_mix(
  z: jax.Array,
  weight: jax.Array,
  bias: jax.Array,
  taps: jax.Array,
  *,
  state: dict[str, jax.Array] | None = None,
  segment_ids: jax.Array | None = None,
  eps: float = 1e-8,
  normalization: str = "safe",
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """`grassmann_mix` with partners v_m = sum_k taps_mk z_{t-k} over the tokens that exist.

  A partner exists where the token of its largest tap does. Taps of single tokens give
  `grassmann_mix` at their offsets. Plain XLA on every platform.

  Args:
    taps: [m, K], such as of `offset_taps`; differentiable.
    state: from `grassmann_state` with offsets=(K,), or an earlier call.
    The rest: see `grassmann_mix`.
  Returns:
    y: [B, T, D] in the dtype of weight, and the state.
  Raises:
    ValueError: shapes or options disagree.
  """
  count = taps.shape[-1]
  check_arrays(z, weight, bias, ((count,),), state, segment_ids, normalization)
  groups = z.astype(jnp.promote_types(z.dtype, jnp.float32))
  groups = groups if z.ndim == 4 else groups[:, :, None]
  if state is None:
    state = grassmann_state(z.shape[0], (count,), groups.shape[2:], groups.dtype)
  if z.shape[1] == 0:
    return jnp.zeros((*z.shape[:2], weight.shape[1]), weight.dtype), state

  def mix(z, state, segment_ids, weight, bias, taps):
    run = functools.partial(_mix, state, weight, bias, taps, eps=eps, normalization=normalization)
    return over_padding(run, segment_ids, z)

  return along_rows(mix, groups, state, segment_ids, weight, bias, taps)


def _mix(state, weight, bias, taps, segment_ids, z, *, eps, normalization):
  batch, length, *_ = z.shape
  if segment_ids is not None:
    z = jnp.where((segment_ids != 0)[..., None, None], z, 0)
  back = plucker.reach_of(segment_ids, state["length"], length).back
  rows, count = jnp.concatenate([state["memory"], z], 1), taps.shape[1]
  earlier = jnp.stack([rows[:, count - k : count - k + length] for k in range(1, count + 1)], 2)
  reached = back[..., None] >= jnp.arange(1, count + 1)
  earlier = jnp.where(reached[..., None, None], earlier, 0)
  v = jnp.einsum("mk,btkhr->btmhr", taps.astype(z.dtype), earlier, precision="highest")
  exists = back[..., None] > jnp.argmax(taps, 1)  # [B, T, m]

  norm = plucker.Norm(eps=eps, normalization=normalization)
  token = jax.tree.map(lambda x: x[:, :, None], norm.token(z))
  directions = norm.partner(token, v, exists[..., None, None]).direction
  found = jnp.maximum(jnp.sum(exists, 2), 1).reshape(batch, length, 1, 1)
  mean = jnp.sum(directions, 2) / found.astype(z.dtype)
  y = plucker.project(token.unit[:, :, 0], mean, weight)
  return plucker.with_bias(y, bias, exists.any(2))
