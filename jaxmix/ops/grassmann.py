"""Grassmann mixing: argument checks, the XLA form with its gradient, and where a kernel runs.

The mean over offsets of normalised wedge products is one wedge product. With the unit vector a of
z_t, and for each offset the rejection b_d of z_{t-d} from a,

    u ^ v / |u ^ v| = a ^ b_d / |b_d|        mean_d (a ^ b_d / |b_d|) = a ^ mean_d (b_d / |b_d|)

so that a token has one pair of vectors, `directions`, one vector of Plücker coordinates and one
projection, whatever the number of offsets. Rejections are made by Gram-Schmidt: the norm of a wedge
product by Lagrange's identity cancels where vectors are nearly parallel.

Partners are found by their distance in rows. Rows with padding inside a document are put in order
first; how far back the tokens of a document reach then says which partners exist.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmix.ops import implementation as implementations
from jaxmix.ops.products import product
from jaxmix.ops.segments import (
  check_segment_ids,
  document_positions,
  last_token,
  newest_rows,
  over_padding,
)
from pallas_kernels.grassmann import reference
from pallas_kernels.grassmann.reference import NORMALIZATIONS, RELATIVE_EPS, pairs_of

SHORTEST = 64  # tokens from which a kernel is chosen; fewer are not worth its start
TINY = 1e-36  # a squared norm below it is that of a zero vector


def grassmann_mix(
  z: jax.Array,
  weight: jax.Array,
  bias: jax.Array,
  *,
  offsets: Sequence[int],
  state: dict[str, jax.Array] | None = None,
  segment_ids: jax.Array | None = None,
  eps: float = 1e-8,
  normalization: str = "safe",
  implementation: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
  """Mean of the normalised wedge products of each token with earlier ones, projected.

      p_ij(u, v) = u_i v_j - u_j v_i,  i < j        p^(u, v) = p / N(p)
      y_t = (1 / n_t) sum_d p^(z_t, z_{t-d}) weight + bias,        0 where n_t = 0

  over the n_t offsets d whose token exists in the same document. N is |p|, kept from 0:

      "safe":  sqrt(|p|^2 + (1e-3 |u| |v|)^2 + eps^2)        "clamp":  max(|p|, eps)

  "safe" bounds the gradients of nearly parallel vectors, such as repeated tokens, by a thousand
  times those of others; with "clamp", as published, they reach 1 / eps. A zero vector gives 0 and
  gets no gradient.

  Args:
    z: [B, T, R] reduced states, or [B, T, H, R], groups with planes of their own; computed with in
      float32.
    weight: [H R (R - 1) / 2, D], float32 or bfloat16; pairs i < j in row-major order.
    bias: [D].
    offsets: whole numbers, counted in tokens of the document, padding not among them; one that
      comes twice counts twice. Below 0 they point to later tokens, and there is no state.
    state: from `grassmann_state` or an earlier call; None means no token before the first. It
      belongs to the document of the first token that is not padding.
    segment_ids: [B, T] int32; tokens pair within their document. 0 marks padding, whose output
      is 0.
    eps: see above.   normalization: "safe" or "clamp".
    implementation: None, "reference", "xla", "tpu" or "gpu" (kernels forward and backward).
  Returns:
    y: [B, T, D] in the dtype of weight;   state: the last tokens of the row's last document, a dict
    of z [B, max(offsets), H, R] float32 and count [B] int32, how many of them (the newest) exist;
    None where an offset is below 0.
  Raises:
    ValueError: shapes or options disagree, or `implementation` cannot run this call (the message
      says why).
  Source: Zhang 2025 (arXiv 2512.19428), section 3, with z_{t-d} for its z_{t+d}, which would show a
    token its successors. Cost O(T R (offsets + R D)) time, O(R max(offsets)) state.
  """
  offsets = tuple(offsets)
  _check(z, weight, bias, offsets, state, segment_ids, normalization)
  groups = z.astype(jnp.promote_types(z.dtype, jnp.float32)).reshape(*z.shape[:2], -1, z.shape[-1])
  streams = min(offsets) > 0
  if state is None:
    state = grassmann_state(z.shape[0], offsets, groups.shape[2:], groups.dtype)
  if z.shape[1] == 0:
    return jnp.zeros((*z.shape[:2], weight.shape[1]), weight.dtype), state if streams else None
  call = _Call(offsets, float(eps), normalization, implementation)
  y = _mix(groups, state["z"], weight, bias, state["count"], segment_ids, call)
  return y, _state_after(state, groups, segment_ids) if streams else None


def grassmann_state(
  batch: int, offsets: Sequence[int], shape: Sequence[int], dtype=jnp.float32
) -> dict[str, jax.Array]:
  """The state before the first token.

  Args:
    offsets: as given to `grassmann_mix`.   shape: (H, R), or (R,) for one group.
    dtype: of z; float64 for computing in it.
  """
  groups = (1, *shape)[-2:]
  rows = max(0, *offsets)
  return {
    "z": jnp.zeros((batch, rows, *groups), dtype),
    "count": jnp.zeros(batch, jnp.int32),
  }


def _check(z, weight, bias, offsets, state, segment_ids, normalization) -> None:
  if z.ndim not in (3, 4) or weight.ndim != 2 or bias.shape != weight.shape[1:]:
    raise ValueError(
      f"grassmann_mix: z, weight and bias have shapes {z.shape}, {weight.shape}, {bias.shape}, "
      "expected [B, T, R] or [B, T, H, R], [H R (R - 1) / 2, D] and [D]"
    )
  groups, rank = (1, *z.shape[2:])[-2:]
  if rank < 2 or weight.shape[0] != groups * math.comb(rank, 2):
    raise ValueError(
      f"grassmann_mix: weight has {weight.shape[0]} rows, expected {groups * math.comb(rank, 2)}, "
      f"one for each pair of the {rank} channels in each of {groups} groups"
    )
  if not offsets or any(not isinstance(d, int) or d == 0 for d in offsets):
    raise ValueError(
      f"grassmann_mix: offsets={offsets}, expected whole numbers other than 0: a token spans no "
      "plane with itself; give at least one, such as (1,)"
    )
  if state is not None:
    if min(offsets) < 0:
      raise ValueError(
        f"grassmann_mix: offsets={offsets} point to later tokens too, which a stream does not have "
        "yet; use offsets above 0, or no state"
      )
    shape = (z.shape[0], max(offsets), groups, rank)
    if state["z"].shape != shape or state["count"].shape != shape[:1]:
      raise ValueError(
        f"grassmann_mix: the state has z {list(state['z'].shape)} and count "
        f"{list(state['count'].shape)}, expected {list(shape)} and {list(shape[:1])}; make it by "
        "grassmann_state with these offsets"
      )
  if normalization not in NORMALIZATIONS:
    raise ValueError(
      f"grassmann_mix: normalization={normalization!r} is unknown; expected one of "
      f"{', '.join(NORMALIZATIONS)}"
    )
  check_segment_ids("grassmann_mix", segment_ids, *z.shape[:2])


def _state_after(state, z, segment_ids):
  length, most = z.shape[1], state["z"].shape[1]
  if segment_ids is None:
    count = state["count"] + length
  else:
    seen = document_positions(segment_ids, state["count"]) + 1
    count = last_token(segment_ids, seen, state["count"])
  return {"z": newest_rows(state["z"], z, segment_ids), "count": jnp.minimum(count, most)}


class _Call(NamedTuple):
  """What a call fixes besides its arrays."""

  offsets: tuple[int, ...]
  eps: float
  normalization: str
  implementation: str | None

  @property
  def options(self) -> dict[str, object]:
    """What every form is told."""
    return {"offsets": self.offsets, "eps": self.eps, "normalization": self.normalization}

  def run(self, functions, arrays):
    """The one of `functions` that the call names or its platform gets."""
    return implementations.run(
      "grassmann_mix", self.implementation, arrays, functions=functions, refusals={}
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _mix(z, before, weight, bias, count, segment_ids, call: _Call):
  functions = {
    "reference": functools.partial(_by_definition, call),
    "xla": functools.partial(_on_rows, functools.partial(_forward, **call.options)),
  }
  return call.run(functions, (z, before, weight, bias, count, segment_ids))


def _mix_forward(z, before, weight, bias, count, segment_ids, call: _Call):
  # Directions and coordinates are made again in the backward pass: they are more than the inputs.
  arrays = (z, before, weight, bias, count, segment_ids)
  return _mix(*arrays, call), arrays


def _mix_backward(call: _Call, arrays, dy):
  functions = {
    "reference": functools.partial(_gradient_of_definition, call),
    "xla": functools.partial(_on_rows, functools.partial(_backward, **call.options)),
  }
  return *call.run(functions, (*arrays, dy)), None, None


_mix.defvjp(_mix_forward, _mix_backward)


def _by_definition(call, z, before, weight, bias, count, segment_ids):
  ids = jnp.ones(z.shape[:2], jnp.int32) if segment_ids is None else segment_ids
  y = reference.grassmann_mix(z, weight, bias, before, count, ids, **call.options)
  return y.astype(weight.dtype)


def _gradient_of_definition(call, z, before, weight, bias, count, segment_ids, dy):
  def run(z, before, weight, bias):
    return _by_definition(call, z, before, weight, bias, count, segment_ids)

  return jax.vjp(run, z, before, weight, bias)[1](dy)


def _on_rows(form, z, before, weight, bias, count, segment_ids, *dy):
  """A form on rows whose tokens are neighbours, which is told how far back and ahead their document
  goes; what stands at padding is set to 0."""

  def run(segment_ids, z, *dy):
    if segment_ids is not None:
      z = jnp.where((segment_ids != 0)[..., None, None], z, 0)
    return form(z, before, weight, bias, _reach(segment_ids, count, z.shape[1]), *dy)

  return over_padding(run, segment_ids, z, *dy)


class Reach(NamedTuple):
  """How many tokens of its document stand before and behind each token: [B, T] int32, at padding
  -1."""

  back: jax.Array
  ahead: jax.Array

  def has(self, offset: int) -> jax.Array:
    """[B, T], whether the partner at an offset exists."""
    return self.back >= offset if offset > 0 else self.ahead >= -offset

  def partners(self, offsets: Sequence[int]) -> jax.Array:
    """[B, T] int32, how many there are."""
    return sum(self.has(offset).astype(jnp.int32) for offset in offsets)


def _reach(segment_ids, count, length: int) -> Reach:
  if segment_ids is None:
    index = jnp.arange(length, dtype=jnp.int32)
    back = count[:, None] + index
    return Reach(back, jnp.broadcast_to(index[::-1], back.shape))
  live, nothing = segment_ids != 0, jnp.zeros_like(count)
  back = document_positions(segment_ids, count)
  ahead = document_positions(segment_ids[:, ::-1], nothing)[:, ::-1]
  return Reach(*(jnp.where(live, distance, -1) for distance in (back, ahead)))


def _forward(z, before, weight, bias, reach: Reach, *, offsets, eps, normalization):
  a, b = directions(z, before, reach, offsets=offsets, eps=eps, normalization=normalization)
  p = wedge(a, b).astype(weight.dtype)
  y = product("tp,pd->td", weight.dtype, p, weight[None])
  exists = reach.partners(offsets) > 0
  return jnp.where(exists[..., None], y + bias.astype(y.dtype), 0).astype(weight.dtype)


def _backward(z, before, weight, bias, reach: Reach, dy, *, offsets, eps, normalization):
  """Gradients of `_forward` with respect to z, before, weight and bias."""
  make = functools.partial(directions, offsets=offsets, eps=eps, normalization=normalization)
  (a, b), pull = jax.vjp(lambda z, before: make(z, before, reach), z, before)
  dy = jnp.where((reach.partners(offsets) > 0)[..., None], dy, 0)
  da, db = _wedge_backward(a, b, weight, dy)
  p = wedge(a, b).astype(weight.dtype)
  dweight = product("tp,td->pd", weight.dtype, p, dy).sum(0)
  dbias = jnp.sum(dy.astype(a.dtype), (0, 1))
  return *pull((da, db)), dweight.astype(weight.dtype), dbias.astype(bias.dtype)


def wedge(a: jax.Array, b: jax.Array) -> jax.Array:
  """[B, T, H, R] twice -> [B, T, H R (R - 1) / 2], a_i b_j - a_j b_i for i < j of each group.

  Row by row of the triangle: gathers by channel take a CPU longer than all that follows.
  """
  rank = a.shape[-1]
  rows = [
    a[..., i : i + 1] * b[..., i + 1 :] - b[..., i : i + 1] * a[..., i + 1 :]
    for i in range(rank - 1)
  ]
  return jnp.concatenate(rows, -1).reshape(*a.shape[:2], -1)


def _wedge_backward(a, b, weight, dy):
  """Cotangents of a and b in `wedge(a, b) @ weight`: the cotangent of the coordinates as a skew
  matrix S of channels gives S b and -S a."""
  groups, rank = a.shape[2:]
  i, j = pairs_of(rank)
  pairs = weight.reshape(groups, len(i), -1)
  skew = jnp.zeros((groups, rank, rank, weight.shape[1]), weight.dtype)
  skew = skew.at[:, i, j].set(pairs).at[:, j, i].set(-pairs).reshape(-1, weight.shape[1])
  s = product("td,pd->tp", weight.dtype, dy, skew[None]).astype(a.dtype)
  s = s.reshape(*a.shape, rank)
  return jnp.sum(s * b[..., None, :], -1), -jnp.sum(s * a[..., None, :], -1)


@functools.partial(jax.checkpoint, static_argnums=(3, 4, 5))
def _directions(z, before, reach: Reach, offsets, eps, normalization):
  length, earlier = z.shape[1], before.shape[1]
  later = max(0, -min(offsets))
  rows = jnp.pad(jnp.concatenate([before, z], 1), ((0, 0), (0, later), (0, 0), (0, 0)))
  squares = jnp.sum(rows * rows, -1, keepdims=True)
  here = squares[:, earlier : earlier + length]
  inverse = jnp.where(here > TINY, jax.lax.rsqrt(jnp.maximum(here, TINY)), 0)
  a, floor = z * inverse, (eps * inverse) ** 2
  count = jnp.maximum(reach.partners(offsets), 1)[..., None, None].astype(z.dtype)
  b = jnp.zeros_like(a)
  for offset in offsets:
    partners = slice(earlier - offset, earlier - offset + length)
    v, v_square = rows[:, partners], squares[:, partners]
    rejection = v - jnp.sum(a * v, -1, keepdims=True) * a
    square = jnp.sum(rejection * rejection, -1, keepdims=True)
    if normalization == "clamp":
      square = jnp.maximum(square, floor)
    else:
      square = square + RELATIVE_EPS**2 * v_square + floor
    valid = reach.has(offset)[..., None, None] & (v_square > TINY)
    scale = jnp.where(valid, jax.lax.rsqrt(jnp.where(valid, square, 1)), 0)
    b = b + rejection * scale
  return a, b / count


def directions(z, before, reach: Reach, *, offsets, eps: float, normalization: str):
  """The unit vectors of tokens and the mean normalised rejections of their partners.

  Args:
    z: [B, T, H, R] float32.   before: [B, M, H, R], tokens before the first.
    reach: which partners exist.
    offsets, eps, normalization: see `grassmann_mix`.
  Returns:
    [B, T, H, R] twice, a and b: `wedge(a, b)` is the mean of the normalised wedge products.
  """
  return _directions(z, before, reach, tuple(offsets), eps, normalization)
