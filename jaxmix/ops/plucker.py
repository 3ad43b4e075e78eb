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
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmix.ops.products import product
from jaxmix.ops.segments import document_positions
from pallas_kernels.grassmann.reference import RELATIVE_EPS, pairs_of

TINY = 1e-36  # a squared norm below it is that of a zero vector


Offsets = tuple[tuple[int, ...], ...]  # of each head, as many of each


class Reach(NamedTuple):
  """How many tokens of its document stand before and behind each token: [B, T] int32, at padding
  -1."""

  back: jax.Array
  ahead: jax.Array

  def has(self, offsets) -> jax.Array:
    """[B, T, H], whether the partner at an offset, one a head, exists."""
    back, ahead = self.back[..., None], self.ahead[..., None]
    return jnp.where(offsets > 0, back >= offsets, ahead >= -offsets)

  def partners(self, offsets: Offsets) -> jax.Array:
    """[B, T, H] int32, how many there are."""
    return sum(self.has(each).astype(jnp.int32) for each in jnp.asarray(offsets, jnp.int32).T)


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
  """[B, T, D], see `grassmann_mix`."""
  pairs = Pairs(z, before, reach, **options)
  y = project(*pairs.directions(), weight)
  return with_bias(y, bias, reach.partners(pairs.offsets).any(-1))


def backward(z, before, weight, bias, reach: Reach, dy, **options):
  """Gradients of `forward` with respect to z, before, weight and bias."""
  pairs = Pairs(z, before, reach, **options)
  dy = jnp.where(reach.partners(pairs.offsets).any(-1)[..., None], dy, 0)
  da, db, dweight = _project_backward((*pairs.directions(), weight), dy)
  dbias = jnp.sum(dy.astype(da.dtype), (0, 1)).astype(bias.dtype)
  return *pairs.gradients(da, db), dweight, dbias


def with_bias(y, bias, exists):
  """y [B, T, D] and the bias where partners exist, else 0."""
  return jnp.where(exists[..., None], y + bias.astype(y.dtype), 0)


@jax.custom_vjp
def project(a: jax.Array, b: jax.Array, weight: jax.Array) -> jax.Array:
  """wedge(a, b) weight, [B, T, H, R] twice -> [B, T, D] in the dtype of weight."""
  p = wedge(a, b).astype(weight.dtype)
  return product("tp,pd->td", weight.dtype, p, weight[None]).astype(weight.dtype)


def _project_forward(a, b, weight):
  return project(a, b, weight), (a, b, weight)


def _project_backward(residuals, dy):
  """The cotangent of the coordinates as a skew matrix S of channels gives S b and -S a."""
  a, b, weight = residuals
  groups, rank = a.shape[2:]
  i, j = pairs_of(rank)
  pairs = weight.reshape(groups, len(i), -1)
  skew = jnp.zeros((groups, rank, rank, weight.shape[1]), weight.dtype)
  skew = skew.at[:, i, j].set(pairs).at[:, j, i].set(-pairs).reshape(-1, weight.shape[1])
  s = product("td,pd->tp", weight.dtype, dy, skew[None]).astype(a.dtype)
  s = s.reshape(*a.shape, rank)
  # As products: a CPU takes forty times as long for the sums of a product written out.
  times = functools.partial(jnp.einsum, "bthij,bthj->bthi", s, precision="highest")
  dweight = product("tp,td->pd", weight.dtype, wedge(a, b).astype(weight.dtype), dy).sum(0)
  return times(b), -times(a), dweight.astype(weight.dtype)


project.defvjp(_project_forward, _project_backward)


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


class Token(NamedTuple):
  """What every partner of a token meets: its unit vector and the inverse of its norm, 0 for a zero
  vector, and (eps / norm)^2, the square that keeps those of rejections from 0."""

  unit: jax.Array
  inverse: jax.Array
  floor: jax.Array


class Partner(NamedTuple):
  """A partner v and its part along the token; its rejection, normalised, and the scale that it was
  multiplied by, 0 where there is no partner; the share of the floor in the square that was."""

  v: jax.Array
  along: jax.Array
  direction: jax.Array
  scale: jax.Array
  share: jax.Array


class Norm:
  """How wedge products are normalised: see `grassmann_mix` for `eps` and `normalization`."""

  def __init__(self, *, eps: float, normalization: str):
    self._eps, self.clamps = eps, normalization == "clamp"
    self.relative = RELATIVE_EPS if normalization == "safe" else 0.0

  def token(self, z) -> Token:
    """Of z [..., R]."""
    square = _dot(z, z)
    inverse = jnp.where(square > TINY, jax.lax.rsqrt(jnp.maximum(square, TINY)), 0)
    return Token(z * inverse, inverse, (self._eps * inverse) ** 2)

  def partner(self, token: Token, v, exists) -> Partner:
    """Of v [..., R], where it exists [..., 1]."""
    v_square, along = _dot(v, v), _dot(token.unit, v)
    rejection = v - along * token.unit
    square = _dot(rejection, rejection)
    if self.clamps:
      share = (square < token.floor).astype(square.dtype)
      square = jnp.maximum(square, token.floor)
    else:
      square = square + self.relative**2 * v_square + token.floor
      share = token.floor / jnp.maximum(square, TINY)
    exists = exists & (v_square > TINY) & (square > 0)
    scale = jnp.where(exists, jax.lax.rsqrt(jnp.where(exists, square, 1)), 0)
    return Partner(v, along, scale * rejection, scale, share)


class Pairs:
  """Tokens and their partners, at one offset at a time: memory does not grow with their number.

  Args:
    z: [B, T, H, R].   before: [B, M, H, R], tokens before the first.   reach: which partners exist.
    offsets: of each head.   eps, normalization: see `grassmann_mix`.
  """

  def __init__(self, z, before, reach: Reach, *, offsets: Offsets, eps: float, normalization: str):
    self._z, self._reach, self.offsets = z, reach, offsets
    self._norm = Norm(eps=eps, normalization=normalization)
    self._earlier, later = before.shape[1], max(0, -min(map(min, offsets)))
    self._rows = jnp.pad(jnp.concatenate([before, z], 1), ((0, 0), (0, later), (0, 0), (0, 0)))
    self.count = jnp.maximum(reach.partners(offsets), 1)[..., None].astype(z.dtype)

  def _shift(self, rows, offsets, update=None):
    """The rows that stand `offsets` [H] before the tokens; or all rows with these replaced."""
    alike = len(set(self.offsets)) == 1
    parts = []
    for head in range(1 if alike else len(self.offsets)):
      mine = slice(None) if alike else slice(head, head + 1)
      start, of = self._earlier - offsets[head], rows[:, :, mine]
      if update is None:
        parts.append(jax.lax.dynamic_slice_in_dim(of, start, self._z.shape[1], axis=1))
      else:
        parts.append(jax.lax.dynamic_update_slice_in_dim(of, update[:, :, mine], start, axis=1))
    return jnp.concatenate(parts, 2)

  def _partner(self, token: Token, offsets) -> Partner:
    exists = self._reach.has(offsets)[..., None]
    return self._norm.partner(token, self._shift(self._rows, offsets), exists)

  def _for_each_offset(self, step, start):
    """step(carry, offsets) -> carry, with one offset a head, one after the other: of an unrolled
    loop a compiler keeps what it makes of each until the last."""
    each = jnp.array(self.offsets, jnp.int32).T
    return jax.lax.scan(lambda carry, offsets: (step(carry, offsets), None), start, each)[0]

  def directions(self) -> tuple[jax.Array, jax.Array]:
    """[B, T, H, R] twice, a and b: `wedge(a, b)` is the mean of the normalised wedge products."""
    token = self._norm.token(self._z)

    def add(total, offsets):
      return total + self._partner(token, offsets).direction

    return token.unit, self._for_each_offset(add, jnp.zeros_like(self._z)) / self.count

  def gradients(self, da, db) -> tuple[jax.Array, jax.Array]:
    """Cotangents of z and before, from those of the directions.

    In terms that stay small: of a direction b = s r of length at most 1, where r is the rejection,
    the cotangent through s is - s (db . b) b, whatever the size of s.
    """
    token, db = self._norm.token(self._z), db / self.count

    def add(sums, offsets):
      da, held, drows = sums
      pair = self._partner(token, offsets)
      along_b = _dot(db, pair.direction)
      turned = along_b * (1 - pair.share) if self._norm.clamps else along_b
      drejection = pair.scale * (db - turned * pair.direction)
      dalong = -_dot(token.unit, drejection)
      dv = drejection + dalong * token.unit
      dv = dv - (self._norm.relative * pair.scale) ** 2 * along_b * pair.v
      da = da + dalong * pair.v - pair.along * drejection
      drows = self._shift(drows, offsets, self._shift(drows, offsets) + dv)
      return da, held + pair.share * along_b, drows

    start = da, jnp.zeros_like(token.floor), jnp.zeros_like(self._rows)
    da, held, drows = self._for_each_offset(add, start)
    dz = token.inverse * (da + (held - _dot(token.unit, da)) * token.unit)
    return dz + drows[:, self._earlier :][:, : self._z.shape[1]], drows[:, : self._earlier]


def _dot(x, y):
  return jnp.sum(x * y, -1, keepdims=True)
