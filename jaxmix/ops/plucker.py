"""Plücker coordinates of tokens and their partners, and their projection: the form of Grassmann
mixing that XLA compiles, and its gradient.

The mean over offsets of normalised wedge products is one wedge product. With the unit vector a of
z_t, and for each offset the rejection b_d of z_{t-d} from a,

    u ^ v / |u ^ v| = a ^ b_d / |b_d|        mean_d (a ^ b_d / |b_d|) = a ^ mean_d (b_d / |b_d|)

so that a token has one pair of vectors, `Pairs.directions`, one vector of coordinates and one
projection, whatever the number of offsets. Rejections are made by Gram-Schmidt: the norm of a wedge
product by Lagrange's identity cancels where vectors are nearly parallel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmix.ops.products import product
from jaxmix.ops.segments import document_positions
from pallas_kernels.grassmann.reference import RELATIVE_EPS, pairs_of

TINY = 1e-36  # a squared norm below it is that of a zero vector


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


def reach_of(segment_ids, first, length: int) -> Reach:
  """Of a row of `length` tokens, `first` [B] of whose first document stand before it."""
  if segment_ids is None:
    index = jnp.arange(length, dtype=jnp.int32)
    back = first[:, None] + index
    return Reach(back, jnp.broadcast_to(index[::-1], back.shape))
  back = document_positions(segment_ids, first)
  ahead = document_positions(segment_ids[:, ::-1], jnp.zeros_like(first))[:, ::-1]
  return Reach(*(jnp.where(segment_ids != 0, distance, -1) for distance in (back, ahead)))


def forward(z, before, weight, bias, reach: Reach, **options):
  pairs = Pairs(z, before, reach, **options)
  p = wedge(*pairs.directions()).astype(weight.dtype)
  y = product("tp,pd->td", weight.dtype, p, weight[None])
  exists = reach.partners(pairs.offsets) > 0
  return jnp.where(exists[..., None], y + bias.astype(y.dtype), 0).astype(weight.dtype)


def backward(z, before, weight, bias, reach: Reach, dy, **options):
  """Gradients of `forward` with respect to z, before, weight and bias."""
  pairs = Pairs(z, before, reach, **options)
  a, b = pairs.directions()
  dy = jnp.where((reach.partners(pairs.offsets) > 0)[..., None], dy, 0)
  da, db = wedge_gradients(a, b, weight, dy)
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


def wedge_gradients(a, b, weight, dy):
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
  """What every partner of a token meets: its unit vector and the inverse of its norm, 0 for a zero
  vector, and (eps / norm)^2, the square that keeps those of rejections from 0."""

  unit: jax.Array
  inverse: jax.Array
  floor: jax.Array


class _Partner(NamedTuple):
  """A partner v and its part along the token; its rejection, normalised, and the scale that it was
  multiplied by, 0 where there is no partner; the share of the floor in the square that was."""

  v: jax.Array
  along: jax.Array
  direction: jax.Array
  scale: jax.Array
  share: jax.Array


class Pairs:
  """Tokens and their partners, at one offset at a time: memory does not grow with their number.

  Args:
    z: [B, T, H, R].   before: [B, M, H, R], tokens before the first.   reach: which partners exist.
    offsets, eps, normalization: see `grassmann_mix`.
  """

  def __init__(self, z, before, reach: Reach, *, offsets, eps: float, normalization: str):
    self._z, self._reach, self._eps = z, reach, eps
    self.offsets, self._clamp = offsets, normalization == "clamp"
    self._relative = RELATIVE_EPS if normalization == "safe" else 0.0
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
      share = (square < token.floor).astype(square.dtype)
      square = jnp.maximum(square, token.floor)
    else:
      square = square + self._relative**2 * v_square + token.floor
      share = token.floor / jnp.maximum(square, TINY)
    valid = self._reach.has(offset)[..., None, None] & (v_square > TINY) & (square > 0)
    scale = jnp.where(valid, jax.lax.rsqrt(jnp.where(valid, square, 1)), 0)
    return _Partner(v, along, scale * rejection, scale, share)

  def directions(self) -> tuple[jax.Array, jax.Array]:
    """[B, T, H, R] twice, a and b: `wedge(a, b)` is the mean of the normalised wedge products."""
    token = self.token()

    def add(total, offset):
      return total + self.partner(token, offset).direction

    return token.unit, self._for_each_offset(add, jnp.zeros_like(self._z)) / self.count

  def gradients(self, da, db) -> tuple[jax.Array, jax.Array]:
    """Cotangents of z and before, from those of the directions.

    In terms that stay small: of a direction b = s r of length at most 1, where r is the rejection,
    the cotangent through s is - s (db . b) b, whatever the size of s.
    """
    token, db = self.token(), db / self.count

    def add(sums, offset):
      da, held, drows = sums
      pair = self.partner(token, offset)
      along_b = _dot(db, pair.direction)
      turned = along_b * (1 - pair.share) if self._clamp else along_b
      drejection = pair.scale * (db - turned * pair.direction)
      dalong = -_dot(token.unit, drejection)
      dv = drejection + dalong * token.unit
      dv = dv - (self._relative * pair.scale) ** 2 * along_b * pair.v
      da = da + dalong * pair.v - pair.along * drejection
      dv = dv + self._at(drows, offset)
      start = self._earlier - offset
      drows = jax.lax.dynamic_update_slice_in_dim(drows, dv, start, axis=1)
      return da, held + pair.share * along_b, drows

    start = da, jnp.zeros_like(token.floor), jnp.zeros_like(self._rows)
    da, held, drows = self._for_each_offset(add, start)
    dz = token.inverse * (da + (held - _dot(token.unit, da)) * token.unit)
    return dz + self._at(drows, 0), drows[:, : self._earlier]


def _dot(x, y):
  return jnp.sum(x * y, -1, keepdims=True)
