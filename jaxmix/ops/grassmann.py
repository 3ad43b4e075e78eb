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
    of memory [B, max(offsets), H, R] float32 and length [B] int32, how many tokens that document
    has so far; None where an offset is below 0.
  Raises:
    ValueError: shapes or options disagree, or `implementation` cannot run this call (the message
      says why).
  Source: Zhang 2025 (arXiv 2512.19428), section 3, with z_{t-d} for its z_{t+d}, which would show a
    token its successors. Cost O(T R (offsets + R D)) time, O(R max(offsets)) state.
  """
  offsets = tuple(offsets)
  _check(z, weight, bias, offsets, state, segment_ids, normalization)
  groups = z.astype(jnp.promote_types(z.dtype, jnp.float32))
  groups = groups if z.ndim == 4 else groups[:, :, None]
  streams = min(offsets) > 0
  if state is None:
    state = grassmann_state(z.shape[0], offsets, groups.shape[2:], groups.dtype)
  if z.shape[1] == 0:
    return jnp.zeros((*z.shape[:2], weight.shape[1]), weight.dtype), state if streams else None
  call = _Call(offsets, float(eps), normalization, implementation)
  y = _mix(groups, state["memory"], weight, bias, state["length"], segment_ids, call)
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
    "memory": jnp.zeros((batch, rows, *groups), dtype),
    "length": jnp.zeros(batch, jnp.int32),
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
    if state["memory"].shape != shape or state["length"].shape != shape[:1]:
      raise ValueError(
        f"grassmann_mix: the state has memory {list(state['memory'].shape)} and length "
        f"{list(state['length'].shape)}, expected {list(shape)} and {list(shape[:1])}; make it by "
        "grassmann_state with these offsets"
      )
  if normalization not in NORMALIZATIONS:
    raise ValueError(
      f"grassmann_mix: normalization={normalization!r} is unknown; expected one of "
      f"{', '.join(NORMALIZATIONS)}"
    )
  check_segment_ids("grassmann_mix", segment_ids, *z.shape[:2])


def _state_after(state, z, segment_ids):
  length = state["length"]
  if segment_ids is None:
    after = length + z.shape[1]
  else:
    after = last_token(segment_ids, document_positions(segment_ids, length) + 1, length)
  return {"memory": newest_rows(state["memory"], z, segment_ids), "length": after}


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
def _mix(z, before, weight, bias, length, segment_ids, call: _Call):
  functions = {
    "reference": functools.partial(_by_definition, call),
    "xla": functools.partial(_on_rows, functools.partial(_forward, **call.options)),
  }
  return call.run(functions, (z, before, weight, bias, length, segment_ids))


def _mix_forward(z, before, weight, bias, length, segment_ids, call: _Call):
  # Directions and coordinates are made again in the backward pass: they are more than the inputs.
  arrays = (z, before, weight, bias, length, segment_ids)
  return _mix(*arrays, call), arrays


def _mix_backward(call: _Call, arrays, dy):
  functions = {
    "reference": functools.partial(_gradient_of_definition, call),
    "xla": functools.partial(_on_rows, functools.partial(_backward, **call.options)),
  }
  return *call.run(functions, (*arrays, dy)), None, None


_mix.defvjp(_mix_forward, _mix_backward)


def _by_definition(call, z, before, weight, bias, length, segment_ids):
  count = jnp.minimum(length, before.shape[1])
  ids = jnp.ones(z.shape[:2], jnp.int32) if segment_ids is None else segment_ids
  y = reference.grassmann_mix(z, weight, bias, before, count, ids, **call.options)
  return y.astype(weight.dtype)


def _gradient_of_definition(call, z, before, weight, bias, length, segment_ids, dy):
  def run(z, before, weight, bias):
    return _by_definition(call, z, before, weight, bias, length, segment_ids)

  return jax.vjp(run, z, before, weight, bias)[1](dy)


def _on_rows(form, z, before, weight, bias, length, segment_ids, *dy):
  """A form on rows whose tokens are neighbours, which is told how far back and ahead their document
  goes; what stands at padding is set to 0."""

  def run(segment_ids, z, *dy):
    if segment_ids is not None:
      z = jnp.where((segment_ids != 0)[..., None, None], z, 0)
    return form(z, before, weight, bias, _reach(segment_ids, length, z.shape[1]), *dy)

  return over_padding(run, segment_ids, z, *dy)


class Reach(NamedTuple):
  """How many tokens of its document stand before and behind each token: [B, T] int32, at padding
  -1."""

  back: jax.Array
  ahead: jax.Array

  def has(self, offset) -> jax.Array:
    """[B, T], whether the partner at an offset exists."""
    return jnp.where(offset > 0, self.back >= offset, self.ahead >= -offset)

  def partners(self, offsets: Sequence[int]) -> jax.Array:
    """[B, T] int32, how many there are."""
    return sum(self.has(offset).astype(jnp.int32) for offset in offsets)


def _reach(segment_ids, first, length: int) -> Reach:
  """Of a row of `length` tokens, `first` [B] of whose first document stand before it."""
  if segment_ids is None:
    index = jnp.arange(length, dtype=jnp.int32)
    back = first[:, None] + index
    return Reach(back, jnp.broadcast_to(index[::-1], back.shape))
  back = document_positions(segment_ids, first)
  ahead = document_positions(segment_ids[:, ::-1], jnp.zeros_like(first))[:, ::-1]
  return Reach(*(jnp.where(segment_ids != 0, distance, -1) for distance in (back, ahead)))


def _forward(z, before, weight, bias, reach: Reach, **options):
  pairs = _Pairs(z, before, reach, **options)
  p = wedge(*pairs.directions()).astype(weight.dtype)
  y = product("tp,pd->td", weight.dtype, p, weight[None])
  exists = reach.partners(pairs.offsets) > 0
  return jnp.where(exists[..., None], y + bias.astype(y.dtype), 0).astype(weight.dtype)


def _backward(z, before, weight, bias, reach: Reach, dy, **options):
  """Gradients of `_forward` with respect to z, before, weight and bias."""
  pairs = _Pairs(z, before, reach, **options)
  a, b = pairs.directions()
  dy = jnp.where((reach.partners(pairs.offsets) > 0)[..., None], dy, 0)
  da, db = _wedge_backward(a, b, weight, dy)
  dz, dbefore = pairs.gradients(da, db)
  p = wedge(a, b).astype(weight.dtype)
  dweight = product("tp,td->pd", weight.dtype, p, dy).sum(0)
  dbias = jnp.sum(dy.astype(a.dtype), (0, 1))
  return dz, dbefore, dweight.astype(weight.dtype), dbias.astype(bias.dtype)


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
  # As products: a CPU takes forty times as long for the sums of a product written out.
  times = functools.partial(jnp.einsum, "bthij,bthj->bthi", s, precision="highest")
  return times(b), -times(a)


class _Token(NamedTuple):
  """What every partner of a token meets: its unit vector, the inverse of its norm (0 for a zero
  vector), and the smallest square that a rejection is divided by the root of."""

  unit: jax.Array
  inverse: jax.Array
  floor: jax.Array


class _Partner(NamedTuple):
  """A partner v, its part along the token, its rejection, the square whose inverse root scales it,
  and that scale, 0 where there is no partner."""

  v: jax.Array
  along: jax.Array
  rejection: jax.Array
  square: jax.Array
  scale: jax.Array


class _Pairs:
  """Tokens and their partners, at one offset at a time: memory does not grow with their number.

  Args:
    z: [B, T, H, R].   before: [B, M, H, R], tokens before the first.   reach: which partners exist.
    offsets, eps, normalization: see `grassmann_mix`.
  """

  def __init__(self, z, before, reach: Reach, *, offsets, eps: float, normalization: str):
    self._z, self._reach, self._eps = z, reach, eps
    self.offsets, self._clamp = offsets, normalization == "clamp"
    self._earlier, self._later = before.shape[1], max(0, -min(offsets))
    behind = ((0, 0), (0, self._later), (0, 0), (0, 0))
    self._rows = jnp.pad(jnp.concatenate([before, z], 1), behind)
    self._squares = jnp.sum(self._rows * self._rows, -1, keepdims=True)
    self.count = jnp.maximum(reach.partners(offsets), 1)[..., None, None].astype(z.dtype)

  def _at(self, x, offset) -> jax.Array:
    """The rows of x that stand `offset` before the tokens."""
    return jax.lax.dynamic_slice_in_dim(x, self._earlier - offset, self._z.shape[1], axis=1)

  def _for_each_offset(self, step, start):
    """step(carry, offset) -> carry, one after the other: of an unrolled loop a compiler keeps what
    it makes of each offset until the last."""
    offsets = jnp.array(self.offsets, jnp.int32)
    return jax.lax.scan(lambda carry, offset: (step(carry, offset), None), start, offsets)[0]

  def token(self) -> _Token:
    square = self._at(self._squares, 0)
    inverse = jnp.where(square > TINY, jax.lax.rsqrt(jnp.maximum(square, TINY)), 0)
    return _Token(self._z * inverse, inverse, (self._eps * inverse) ** 2)

  def partner(self, token: _Token, offset) -> _Partner:
    v, v_square = self._at(self._rows, offset), self._at(self._squares, offset)
    along = _dot(token.unit, v)
    rejection = v - along * token.unit
    square = _dot(rejection, rejection)
    if self._clamp:
      square = jnp.maximum(square, token.floor)
    else:
      square = square + RELATIVE_EPS**2 * v_square + token.floor
    valid = self._reach.has(offset)[..., None, None] & (v_square > TINY) & (square > 0)
    scale = jnp.where(valid, jax.lax.rsqrt(jnp.where(valid, square, 1)), 0)
    return _Partner(v, along, rejection, square, scale)

  def directions(self) -> tuple[jax.Array, jax.Array]:
    """[B, T, H, R] twice, a and b: `wedge(a, b)` is the mean of the normalised wedge products."""
    token = self.token()

    def add(total, offset):
      pair = self.partner(token, offset)
      return total + pair.scale * pair.rejection

    return token.unit, self._for_each_offset(add, jnp.zeros_like(self._z)) / self.count

  def gradients(self, da, db) -> tuple[jax.Array, jax.Array]:
    """Cotangents of z and before, from those of the directions ."""
    token, db = self.token(), db / self.count

    def add(sums, offset):
      da, dfloor, drows = sums
      pair = self.partner(token, offset)
      dsquare = -0.5 * pair.scale**3 * _dot(db, pair.rejection)
      above = pair.square > token.floor if self._clamp else False
      dfloor = dfloor + jnp.where(above, 0, dsquare)
      if self._clamp:
        dsquare = jnp.where(above, dsquare, 0)
      drejection = pair.scale * db + 2 * dsquare * pair.rejection
      dalong = -_dot(token.unit, drejection)
      dv = drejection + dalong * token.unit
      if not self._clamp:
        dv = dv + 2 * RELATIVE_EPS**2 * dsquare * pair.v
      da = da + dalong * pair.v - pair.along * drejection
      rows = self._earlier - offset
      dv = dv + self._at(drows, offset)
      return da, dfloor, jax.lax.dynamic_update_slice_in_dim(drows, dv, rows, axis=1)

    start = da, jnp.zeros_like(token.floor), jnp.zeros_like(self._rows)
    da, dfloor, drows = self._for_each_offset(add, start)
    # inverse = |z|^-1, unit = z inverse, floor = (eps inverse)^2
    dinverse = _dot(self._z, da) + 2 * self._eps**2 * token.inverse * dfloor
    dz = token.inverse * da - token.inverse**3 * dinverse * self._z
    return dz + self._at(drows, 0), drows[:, : self._earlier]


def _dot(x, y):
  return jnp.sum(x * y, -1, keepdims=True)
