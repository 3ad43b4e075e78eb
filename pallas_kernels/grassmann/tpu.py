"""Grassmann mixing on TPU: one kernel a direction.

Grid forward (D / columns, B T / tokens + 1), backward (D / columns, B, T / tokens); the last axis
is in order and backward from the end of a row. `columns` of the weight stay on the chip while all
rows are walked. Between blocks stay the tokens that the next ones pair with (forward), or what
earlier tokens are still to receive of dz (backward), and the sums that become dweight.

The normalised Plücker coordinates of u = z_t and v = z_{t-d} are those of two vectors: with
û = u / |u| and w = v - (û.v) û they are û ^ w / N'. Their mean over offsets is one wedge product,
û ^ q with the mean q of the w / N'. So there is one wedge and one product with the weight, however
many offsets.

Bytes, a token, at b bytes a number: forward 4 R for each `columns`, and D b; backward 8 R for each
`columns`, and D b. Flops: forward R^2 D in the product, 3/2 R^2 for the wedge and 12 R an offset;
backward 2 R^2 D, 11/2 R^2 and 28 R.

Channels stand in sublanes and tokens in lanes: an offset is a rotation of lanes, a norm a sum of
registers. Pairs come as blocks k = 1 .. R / 2 of R rows, (i, i + k mod R): block k of û ^ q is
û * roll(q, -k) - roll(û, -k) * q, and a roll is a load that begins k rows lower. The last block
holds every pair twice; its second half meets zeros of the weight, but for rows of the bias, which
hold 1 where a token has partners. A block is straight-line code: vector work of some tokens stands
beside products of others.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chunks_tpu import dot
from pallas_kernels.grassmann.blocks import (
  LANES,
  ROWS,
  Blocks,
  Sizes,
  choose_blocks,
  circulant,
  from_circulant,
  shortage,
  vmem_limit,
)
from pallas_kernels.grassmann.reference import RELATIVE_EPS

DTYPES = ("float32", "bfloat16")
LARGEST_RANK = 128
TINY = 1e-36  # a squared norm below it is that of a zero vector


def refusal(z, weight, offsets: Sequence[int]) -> str | None:
  """Why the kernels cannot run on z [B, T, R] or [B, T, H, R] and weight [P, D], or None."""
  heads, rank = (1, *z.shape[2:])[-2:]
  if str(z.dtype) != "float32":
    return f"z is {z.dtype}, expected float32"
  if str(weight.dtype) not in DTYPES:
    return f"weight is {weight.dtype}, expected float32 or bfloat16"
  if heads != 1:
    return f"z has {heads} heads, expected one"
  if rank > LARGEST_RANK:
    return f"rank {rank} is above {LARGEST_RANK}"
  if min(offsets) < 1:
    return f"offset {min(offsets)} points to a later token"
  return shortage(Sizes.of(z, weight, offsets))


class _Mean(NamedTuple):
  """How the mean over partners is formed."""

  offsets: tuple[int, ...]
  eps: float
  normalization: str

  @property
  def clamps(self) -> bool:
    """Whether N' is a maximum; otherwise it is the root of a sum."""
    return self.normalization == "clamp"

  @property
  def relative(self) -> float:
    """The part that |v|^2 has in that sum."""
    return RELATIVE_EPS**2 if self.normalization == "safe" else 0.0


def forward(
  z,
  before,
  weight,
  bias,
  reach,
  *, offsets: Sequence[int], eps: float, normalization: str,
  tokens: int | None = None, columns: int | None = None, interpret=False,
):  # fmt: skip
  """Means of normalised Plücker coordinates, projected.

      y_t = (1 / n_t) sum_d plucker(z_t, z_{t-d}) weight + bias,    0 where n_t = 0

  over the n_t offsets d <= reach_t, with `plucker` of reference.py.

  Args:
    z: [B, T, R] float32, finite.   before: [B, M, R] float32, finite, the tokens before the first,
      oldest first; M is at least the largest offset.
    weight: [R (R - 1) / 2, D], float32 or bfloat16.   bias: [D].
    reach: [B, T] int32: how many tokens back the partners of a token stand at most, those of
      `before` included; below 1 it has none.
    offsets: whole numbers above 0.   eps, normalization: see reference.py.
    tokens, columns: of a block, multiples of 128; None chooses.   interpret: run the kernel's
      program on the CPU.
  Returns:
    y: [B, T, D] in the dtype of weight.
  """
  sizes = Sizes.of(z, weight, offsets)
  blocks = choose_blocks(sizes, "forward", tokens=tokens, columns=columns)
  at = _Windows(sizes, blocks)
  steps = z.shape[0] * at.count

  def block(s):
    s = jnp.clip(s, 0, steps - 1)
    return jax.lax.div(s, at.count), jax.lax.rem(s, at.count)

  return pl.pallas_call(
    functools.partial(
      _forward_kernel, mean=_Mean(tuple(offsets), eps, normalization), blocks=blocks, count=at.count
    ),
    grid=(at.parts, steps + 1),
    in_specs=[
      pl.BlockSpec((1, sizes.channels, blocks.tokens), lambda j, s: (block(s)[0], 0, block(s)[1])),
      pl.BlockSpec((1, 1, blocks.tokens), lambda j, s: (block(s)[0], 0, block(s)[1])),
      pl.BlockSpec((1, sizes.channels, sizes.halo), lambda j, s: (block(s)[0], 0, 0)),
      pl.BlockSpec((sizes.pairs, blocks.columns), lambda j, s: (0, j)),
    ],
    out_specs=pl.BlockSpec((1, blocks.tokens, blocks.columns), lambda j, s: (*block(s - 1), j)),
    out_shape=jax.ShapeDtypeStruct((*z.shape[:2], weight.shape[1]), weight.dtype),
    scratch_shapes=[
      at.rows,
      at.squares,
      at.rolled(blocks.chunks),
      at.rolled(blocks.chunks),
      at.coordinates,
      pltpu.VMEM((blocks.tokens, sizes.pairs), jnp.float32),
    ],
    compiler_params=at.compiler_params("forward", ("parallel", "arbitrary")),
    cost_estimate=pl.CostEstimate(
      flops=2 * z.shape[0] * sizes.length * sizes.pairs * sizes.width,
      transcendentals=at.parts * z.shape[0] * sizes.length * len(offsets),
      bytes_accessed=at.parts * z.size * 4
      + (z.shape[0] * sizes.length + sizes.pairs) * sizes.width * weight.dtype.itemsize,
    ),
    name="grassmann_forward",
    interpret=interpret,
  )(at.channels_first(z), at.marks(reach), at.edge(before), circulant(weight, bias, sizes))


def backward(
  z,
  before,
  weight,
  reach,
  dy,
  *, offsets: Sequence[int], eps: float, normalization: str,
  tokens: int | None = None, columns: int | None = None, interpret=False,
):  # fmt: skip
  """Gradients of `forward`.

  Args:
    z, before, weight, reach, offsets, eps, normalization, tokens, columns, interpret: as given to
      `forward`.
    dy: [B, T, D], the cotangent of y; where a token has no partners it may hold anything.
  Returns:
    dz: [B, T, R];   dbefore: [B, M, R];   dweight: [R (R - 1) / 2, D];   dbias: [D]; float32.
  """
  sizes = Sizes.of(z, weight, offsets)
  blocks = choose_blocks(sizes, "backward", tokens=tokens, columns=columns)
  at = _Windows(sizes, blocks)
  batch, length, rank = z.shape
  channels, halo, last = sizes.channels, sizes.halo, at.count - 1
  rows = at.channels_first(z)
  # The tokens before a block, in windows as wide as both divide into.
  wide = math.gcd(blocks.tokens, halo)
  step = blocks.tokens // wide

  def window(back):
    place = lambda n: jnp.maximum((last - n) * step - back, 0)  # noqa: E731
    return pl.BlockSpec((1, channels, wide), lambda j, b, n: (b, 0, place(n)))

  windows = [window(back) for back in range(halo // wide, 0, -1)]
  dz, dbefore, dweight = pl.pallas_call(
    functools.partial(
      _backward_kernel, mean=_Mean(tuple(offsets), eps, normalization), blocks=blocks, sizes=sizes
    ),
    grid=(at.parts, batch, at.count),
    in_specs=[
      pl.BlockSpec((1, channels, blocks.tokens), lambda j, b, n: (b, 0, last - n)),
      windows,
      pl.BlockSpec((1, 1, blocks.tokens), lambda j, b, n: (b, 0, last - n)),
      pl.BlockSpec((1, channels, halo), lambda j, b, n: (b, 0, 0)),
      pl.BlockSpec((sizes.pairs, blocks.columns), lambda j, b, n: (0, j)),
      pl.BlockSpec((1, blocks.tokens, blocks.columns), lambda j, b, n: (b, last - n, j)),
    ],
    out_specs=[
      pl.BlockSpec((1, 1, channels, blocks.tokens), lambda j, b, n: (j, b, 0, last - n)),
      pl.BlockSpec((1, 1, channels, halo), lambda j, b, n: (j, b, 0, 0)),
      pl.BlockSpec((sizes.pairs, blocks.columns), lambda j, b, n: (0, j)),
    ],
    out_shape=[
      jax.ShapeDtypeStruct((at.parts, batch, channels, at.count * blocks.tokens), jnp.float32),
      jax.ShapeDtypeStruct((at.parts, batch, channels, halo), jnp.float32),
      jax.ShapeDtypeStruct((sizes.pairs, at.parts * blocks.columns), jnp.float32),
    ],
    scratch_shapes=[
      at.rows,
      at.squares,
      at.rows,
      at.rolled(2),
      at.rolled(2),
      at.coordinates,
      [pltpu.VMEM((len(offsets) * channels, LANES), jnp.float32)] * 2,
      pltpu.VMEM((sizes.pairs, blocks.tokens), weight.dtype),
      pltpu.VMEM((blocks.tokens, blocks.columns), weight.dtype),
      [pltpu.VMEM(((channels + ROWS) * channels // 2, LANES), jnp.float32)]
      * (2 * blocks.group // LANES),
    ],
    compiler_params=at.compiler_params("backward", ("parallel", "arbitrary", "arbitrary")),
    cost_estimate=pl.CostEstimate(
      flops=4 * batch * length * sizes.pairs * sizes.width,
      transcendentals=at.parts * batch * length * len(offsets),
      bytes_accessed=2 * at.parts * z.size * 4
      + batch * length * sizes.width * dy.dtype.itemsize
      + sizes.pairs * sizes.width * (4 + weight.dtype.itemsize),
    ),
    name="grassmann_backward",
    interpret=interpret,
  )(
    rows,
    [rows] * len(windows),
    at.marks(reach),
    at.edge(before),
    circulant(weight, jnp.zeros(sizes.width, weight.dtype), sizes),
    dy.astype(weight.dtype),
  )
  dz, dbefore = (jnp.swapaxes(x.sum(0), 1, 2)[..., :rank] for x in (dz, dbefore))
  dweight, dbias = from_circulant(dweight[:, : sizes.width], sizes)
  return dz[:, :length], dbefore[:, halo - before.shape[1] :], dweight, dbias


class _Windows:
  """How arrays are laid out for the kernels, and what these keep.

  Attributes:
    parts: of the columns.   count: blocks of a row.
    rows: a block of z in VMEM behind the tokens before it, [channels, halo + tokens].
    squares: |z|^2 of those.
    coordinates: of 128 tokens, twice, so that one can be made while the other is read.
  """

  def __init__(self, sizes: Sizes, blocks: Blocks):
    self._sizes, self._blocks = sizes, blocks
    self.parts = pl.cdiv(sizes.width, blocks.columns)
    self.count = pl.cdiv(sizes.length, blocks.tokens)
    self.rows = pltpu.VMEM((sizes.channels, sizes.halo + blocks.tokens), jnp.float32)
    self.squares = pltpu.VMEM((ROWS, sizes.halo + blocks.tokens), jnp.float32)
    self.coordinates = [pltpu.VMEM((sizes.pairs, LANES), jnp.float32)] * 2

  def rolled(self, count: int):
    """Vectors of 128 tokens, one below another, and below them where tokens have partners."""
    return [pltpu.VMEM((2 * self._sizes.channels + ROWS, LANES), jnp.float32)] * count

  def compiler_params(self, direction: str, semantics: tuple[str, ...]) -> pltpu.CompilerParams:
    """Those of a kernel."""
    limit = vmem_limit(self._blocks, self._sizes, direction)
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=limit)

  def channels_first(self, z):
    """[B, T, R] -> [B, channels, tokens of all blocks], filled up with zeros."""
    tail = self.count * self._blocks.tokens - self._sizes.length
    return jnp.pad(jnp.swapaxes(z, 1, 2), ((0, 0), (0, self._filling), (0, tail)))

  def edge(self, before):
    """[B, M, R] -> [B, channels, halo], at the end."""
    front = self._sizes.halo - before.shape[1]
    return jnp.pad(jnp.swapaxes(before, 1, 2), ((0, 0), (0, self._filling), (front, 0)))

  def marks(self, reach):
    """[B, T] -> [B, 1, tokens of all blocks]; those that are not there have no partners."""
    tail = self.count * self._blocks.tokens - self._sizes.length
    return jnp.pad(reach, ((0, 0), (0, tail)))[:, None]

  @property
  def _filling(self) -> int:
    return self._sizes.channels - self._sizes.rank


# Vectors of 128 tokens are [R / 8, 8, 128]; a number for each token is [8, 128], eight times the
# same, so that it meets vectors without being spread over sublanes.


def _sum_channels(x):
  x = jnp.sum(x, axis=0)
  for shift in (4, 2, 1):
    x = x + pltpu.roll(x, shift, 0)
  return x


def _as_vectors(x):
  return x.reshape(-1, ROWS, LANES)


def _put_squares(z_ref, squares_ref, start: int, end: int):
  """|z|^2 of the tokens in these lanes, once for all that they are partners of."""
  for first in range(start, end, LANES):
    z = _as_vectors(z_ref[:, pl.ds(first, LANES)])
    squares_ref[:, pl.ds(first, LANES)] = _sum_channels(z * z)


def _partners(z_ref, first: int, offset: int):
  """The tokens `offset` before those from lane `first` on."""
  whole, offset = divmod(offset, LANES)
  x = z_ref[:, pl.ds(first - whole * LANES, LANES)]
  if offset:
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    further = z_ref[:, pl.ds(first - (whole + 1) * LANES, LANES)]
    x = pltpu.roll(jnp.where(lane >= LANES - offset, further, x), offset, 1)
  return x


class _Directions(NamedTuple):
  """The vectors of 128 tokens, and what their gradients need.

  Attributes:
    u: û.   q: the mean.   inverse: 1 / |z_t|.
    share: 1 / n_t.   live: whether there are partners.
    terms: of each offset û.v, 1 / N' (0 where there is no partner), and the share of the floor in
      N'^2.
  """

  u: jax.Array
  q: jax.Array
  inverse: jax.Array
  share: jax.Array
  live: jax.Array
  terms: list


def _directions(z_ref, squares_ref, first: int, reach, mean: _Mean, terms_ref=None) -> _Directions:
  """Of the tokens from lane `first` on. The w / N' of all offsets are put into terms_ref."""
  z = _as_vectors(z_ref[:, pl.ds(first, LANES)])
  square = squares_ref[:, pl.ds(first, LANES)]
  inverse = jnp.where(square > TINY, jax.lax.rsqrt(square), 0)
  u, floor = z * inverse, (mean.eps * inverse) ** 2
  reach = jnp.broadcast_to(reach, (ROWS, LANES))
  count = sum((reach >= offset).astype(jnp.float32) for offset in mean.offsets)
  total, terms = 0.0, []
  for number, offset in enumerate(mean.offsets):
    v = _as_vectors(_partners(z_ref, first, offset))
    v_square = _partners(squares_ref, first, offset)
    along = _sum_channels(u * v)
    w = v - along * u
    area = _sum_channels(w * w)
    norm = jnp.maximum(area, floor) if mean.clamps else area + mean.relative * v_square + floor
    valid = (reach >= offset) & (v_square > TINY) & (norm > 0)
    scale = jnp.where(valid, jax.lax.rsqrt(norm), 0)
    term = scale * w
    total = total + term
    if terms_ref is not None:
      channels = z_ref.shape[0]
      terms_ref[pl.ds(number * channels, channels)] = term.reshape(channels, LANES)
      part = (area < floor).astype(jnp.float32) if mean.clamps else floor * scale * scale
      terms.append((along, scale, part))
  share = 1 / jnp.maximum(count, 1)
  return _Directions(u, total * share, inverse, share, count > 0, terms)


def _keep(x: _Directions, u_ref, q_ref):
  """Puts û and q one below another, where loads can roll them, and below q where tokens have
  partners."""
  channels = (u_ref.shape[0] - ROWS) // 2
  for ref, value in ((u_ref, x.u), (q_ref, x.q)):
    value = value.reshape(channels, LANES)
    ref[:channels] = value
    ref[channels : 2 * channels] = value
  q_ref[2 * channels :] = x.live.astype(jnp.float32)


def _wedge(u_ref, q_ref, p_ref):
  """Puts û ^ q of 128 tokens into p_ref, in circulant order."""
  channels = (u_ref.shape[0] - ROWS) // 2
  u, q = u_ref[:channels], q_ref[:channels]
  for k in range(1, channels // 2 + 1):
    p = u * q_ref[pl.ds(k, channels)] - u_ref[pl.ds(k, channels)] * q
    if k == channels // 2:
      row = jax.lax.broadcasted_iota(jnp.int32, p.shape, 0)
      live = jnp.concatenate([q_ref[2 * channels :]] * (channels // ROWS))
      p = jnp.where(row < k, p, live)
    p_ref[pl.ds((k - 1) * channels, channels)] = p
  filling = p_ref.shape[0] - channels * channels // 2
  if filling:
    p_ref[pl.ds(channels * channels // 2, filling)] = jnp.zeros((filling, LANES), jnp.float32)


def _forward_kernel(
  z_ref, reach_ref, before_ref, w_ref, y_ref, rows_ref, squares_ref, u_refs, q_refs, p_refs, t_ref,
  *, mean: _Mean, blocks: Blocks, count: int,
):  # fmt: skip
  """Projects the block before, whose vectors are kept, and makes the vectors of this one: the
  products of the one hide the vector work of the other. t_ref is p with its tokens in rows."""
  halo, pairs = before_ref.shape[2], w_ref.shape[0]

  @pl.when(pl.program_id(1) % count == 0)
  def _():
    rows_ref[:, :halo] = before_ref[0]
    _put_squares(rows_ref, squares_ref, 0, halo)

  rows_ref[:, halo:] = z_ref[0]
  _put_squares(rows_ref, squares_ref, halo, halo + blocks.tokens)
  for first in range(0, blocks.tokens, LANES):
    chunk = first // LANES
    p_ref = p_refs[chunk % 2]
    _wedge(u_refs[chunk], q_refs[chunk], p_ref)
    for row in range(0, pairs, LANES):
      t_ref[pl.ds(first, LANES), pl.ds(row, LANES)] = p_ref[pl.ds(row, LANES)].T
    if (behind := first + LANES) % blocks.group == 0:
      group = pl.ds(behind - blocks.group, blocks.group)
      t = t_ref[group].astype(w_ref.dtype)
      for columns in itertools.starmap(pl.ds, blocks.column_groups):
        y_ref[0, group, columns] = dot(t, w_ref[:, columns], (1, 0)).astype(y_ref.dtype)
  for first in range(0, blocks.tokens, LANES):
    chunk, here, place = first // LANES, pl.ds(first, LANES), halo + first
    x = _directions(rows_ref, squares_ref, place, reach_ref[0, :, here], mean)
    _keep(x, u_refs[chunk], q_refs[chunk])
  for ref in (rows_ref, squares_ref):
    ref[:, :halo] = ref[:, blocks.tokens :]


def _backward_kernel(
  z_ref, z_before_refs, reach_ref, before_ref, w_ref, dy_ref, dz_ref, dbefore_ref, dweight_ref,
  rows_ref, squares_ref, pending_ref, u_refs, q_refs, p_refs, terms_refs, operand_ref, clean_ref,
  dp_refs,
  *, mean: _Mean, blocks: Blocks, sizes: Sizes,
):  # fmt: skip
  """pending_ref holds what is known of dz of this block's tokens and of those before it, clean_ref
  dy without what stands where tokens have no partners."""
  halo, tokens, step = sizes.halo, blocks.tokens, pl.program_id(2)
  _start(pending_ref, dweight_ref, halo, tokens)
  _put_rows(rows_ref, z_ref, z_before_refs, before_ref, tokens)
  _put_squares(rows_ref, squares_ref, 0, halo + tokens)

  for start in range(tokens - blocks.group, -1, -blocks.group):
    group = pl.ds(start, blocks.group)
    chunks = range(start + blocks.group - LANES, start - 1, -LANES)
    found = {}
    for first in chunks:
      turn, here, place = first // LANES % 2, pl.ds(first, LANES), halo + first
      at = rows_ref, squares_ref, place, reach_ref[0, :, here]
      x = found[first] = _directions(*at, mean, terms_refs[turn])
      _keep(x, u_refs[turn], q_refs[turn])
      _wedge(u_refs[turn], q_refs[turn], p_refs[turn])
      operand_ref[:, here] = p_refs[turn][...].astype(operand_ref.dtype)
      _put_clean(clean_ref, dy_ref, here, x.live, sizes.width)
    dp = dot(w_ref[...], clean_ref[group], (1, 1))
    for columns in itertools.starmap(pl.ds, blocks.column_groups):
      dweight_ref[:, columns] += dot(operand_ref[:, group], clean_ref[group, columns], (1, 0))
    for first in chunks:
      turn, dp_ref = first // LANES % 2, dp_refs[first // LANES % len(dp_refs)]
      _put_rolled(dp_ref, dp[:, first - start : first - start + LANES], sizes.channels)
      du, dq = _unwedge(u_refs[turn], q_refs[turn], dp_ref)
      _pull(found[first], du, dq, terms_refs[turn], pending_ref, halo + first, mean)

  dz_ref[0, 0] = pending_ref[:, halo:]

  @pl.when(step == pl.num_programs(2) - 1)
  def _():
    dbefore_ref[0, 0] = pending_ref[:, :halo]


def _start(pending_ref, dweight_ref, halo: int, tokens: int):
  """Clears the sums, and moves what is pending on by a block."""
  row, step = pl.program_id(1), pl.program_id(2)

  @pl.when((row == 0) & (step == 0))
  def _():
    dweight_ref[...] = jnp.zeros_like(dweight_ref)

  @pl.when(step == 0)
  def _():
    pending_ref[:, tokens:] = jnp.zeros_like(pending_ref[:, tokens:])

  @pl.when(step != 0)
  def _():
    for lane in range(halo - LANES, -1, -LANES):
      pending_ref[:, pl.ds(lane + tokens, LANES)] = pending_ref[:, pl.ds(lane, LANES)]

  pending_ref[:, :tokens] = jnp.zeros_like(pending_ref[:, :tokens])


def _put_rows(rows_ref, z_ref, z_before_refs, before_ref, tokens: int):
  """The block and the tokens before it, which may stand before the row."""
  halo, wide = before_ref.shape[2], z_before_refs[0].shape[2]
  block = pl.num_programs(2) - 1 - pl.program_id(2)
  rows_ref[:, halo:] = z_ref[0]
  for place, z_before_ref in enumerate(z_before_refs):
    lanes, token = pl.ds(place * wide, wide), block * tokens - halo + place * wide

    @pl.when(token < 0)
    def _(lanes=lanes, token=token):
      rows_ref[:, lanes] = before_ref[0, :, pl.ds(pl.multiple_of(halo + token, LANES), wide)]

    @pl.when(token >= 0)
    def _(lanes=lanes, z_before_ref=z_before_ref):
      rows_ref[:, lanes] = z_before_ref[0]


def _put_clean(clean_ref, dy_ref, rows, live, width: int):
  """128 rows of dy, with 0 where a token has no partners and beyond the width."""
  live = jnp.broadcast_to(live[:1].astype(jnp.int32), (LANES, LANES)).T != 0
  columns = clean_ref.shape[1]
  for column in range(0, columns, LANES):
    lanes, there = pl.ds(column, LANES), live
    if width % LANES and column + LANES == columns:
      lane = jax.lax.broadcasted_iota(jnp.int32, live.shape, 1)
      there = live & (pl.program_id(0) * columns + column + lane < width)
    dy = dy_ref[0, rows, lanes]
    clean_ref[rows, lanes] = jnp.where(there, dy, jnp.zeros_like(dy))


def _put_rolled(dp_ref, dp, channels: int):
  """Each block of dp and behind it its first rows, where loads can roll it."""
  for k in range(channels // 2):
    first = k * (channels + ROWS)
    dp_ref[pl.ds(first, channels)] = dp[k * channels : (k + 1) * channels]
    dp_ref[pl.ds(first + channels, ROWS)] = dp[k * channels : k * channels + ROWS]


def _unwedge(u_ref, q_ref, dp_ref):
  """Cotangents of û and q: block k is met by row i as the first of a pair, and as the second of the
  pair k rows before."""
  channels = (u_ref.shape[0] - ROWS) // 2
  du = dq = 0.0
  for k in range(1, channels // 2 + 1):
    first = (k - 1) * (channels + ROWS)
    dp = dp_ref[pl.ds(first, channels)]
    starts = [first + (row - k) % channels for row in range(0, channels, ROWS)]
    behind = jnp.concatenate([dp_ref[pl.ds(start, ROWS)] for start in starts])
    if k == channels // 2:
      row = jax.lax.broadcasted_iota(jnp.int32, dp.shape, 0)
      dp, behind = jnp.where(row < k, dp, 0), jnp.where(row >= k, behind, 0)
    up, down = pl.ds(k, channels), pl.ds(channels - k, channels)
    du = du + (dp * q_ref[up] - behind * q_ref[down])
    dq = dq + (behind * u_ref[down] - dp * u_ref[up])
  return _as_vectors(du), _as_vectors(dq)


def _pull(x: _Directions, du, dq, terms_ref, pending_ref, first: int, mean: _Mean):
  """Adds to dz, of the tokens from lane `first` on and of their partners.

  With g = dq / n, and r = w / N' of an offset, v gets (g - (r.g) r) / N' and û gets -(û.v) times
  that, all by r of length at most 1, whatever N' is; N' has its part in |v| and, by the floor, in
  |z_t|. û.g is 0 but for rounding, which 1 / N' may be large for.
  """
  channels, received = terms_ref.shape[0] // len(mean.offsets), {}
  g = (dq - _sum_channels(x.u * dq) * x.u) * x.share

  def receive(place, value):
    received[place] = received[place] + value if place in received else value

  mixed, across, radial = 0.0, 0.0, 0.0
  for number, (offset, term) in enumerate(zip(mean.offsets, x.terms, strict=True)):
    along, scale, part = term
    r = _as_vectors(terms_ref[pl.ds(number * channels, channels)])
    met = _sum_channels(r * g)
    radial = radial + part * met
    turned = (1 - part) * met if mean.clamps else met
    dv = scale * (g - (turned + mean.relative * met) * r)
    if mean.relative:
      dv = dv - (mean.relative * scale * scale * along * met) * x.u
    mixed = mixed + along * scale
    across = across + (along * scale * turned) * r
    _send(receive, dv.reshape(channels, LANES), offset)
  du = du - mixed * g + across
  dz = x.inverse * (du + (radial - _sum_channels(x.u * du)) * x.u)
  receive(0, dz.reshape(channels, LANES))
  for place, value in received.items():
    lanes = pl.ds(first - place * LANES, LANES)
    pending_ref[:, lanes] = pending_ref[:, lanes] + value


def _send(receive: Callable, dv, offset: int):
  """dv to the tokens `offset` before, which stand in one or two blocks of 128."""
  whole, offset = divmod(offset, LANES)
  if not offset:
    return receive(whole, dv)
  lane = jax.lax.broadcasted_iota(jnp.int32, dv.shape, 1)
  dv = pltpu.roll(dv, LANES - offset, 1)
  receive(whole, jnp.where(lane < LANES - offset, dv, 0))
  return receive(whole + 1, jnp.where(lane >= LANES - offset, dv, 0))
