"""Grassmann mixing on TPU: one kernel a direction.

Grid (D / columns, B, T / tokens), the last axis in order; the backward kernel walks it from the
end. `columns` of the weight stay on the chip while all rows are walked. Between blocks stay the
tokens that the next ones pair with (forward), or what earlier tokens are still to receive of dz
(backward), and the sums that become dweight.

The normalised Plücker coordinates of u = z_t and v = z_{t-d} are those of two vectors: with
û = u / |u| and w = v - (û.v) û they are û ^ w / N', and their mean over offsets is one wedge
product û ^ q of the mean q of the w / N'. So there is one wedge and one product with the weight,
however many offsets.

Bytes, a token, at b bytes a number: forward 4 R + D b; backward 8 R for each `columns` + D b.
Flops: forward R^2 D in the product, 3/2 R^2 for the wedge and 12 R an offset; backward 2 R^2 D,
11/2 R^2 and 28 R.

Channels stand in sublanes and tokens in lanes: an offset is a rotation of lanes, a norm a sum of
registers. Pairs come as blocks k = 1 .. R / 2 of R rows, (i, i + k mod R): block k of û ^ q is
û * roll(q, -k) - roll(û, -k) * q, and a roll is a load that begins k rows lower. The last block
holds every pair twice; its second half meets zeros of the weight, but for rows of the bias, which
hold 1 where a token has partners. All groups of tokens of a block are straight-line code: the
schedule lays the vector work of one under the products of another.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chunks_tpu import dot
from pallas_kernels.grassmann.blocks import LANES, ROWS, Blocks, Sizes, choose_blocks, vmem_limit
from pallas_kernels.grassmann.reference import RELATIVE_EPS, pairs_of

TINY = 1e-36  # a squared norm below it is that of a zero vector


@dataclasses.dataclass(frozen=True)
class _Mean:
  """How the mean over partners is formed."""

  offsets: tuple[int, ...]
  eps: float
  normalization: str


def forward(z, before, weight, bias, reach, *, offsets, eps, normalization, tokens=None,
            interpret=False):
  sizes = Sizes.of(z, weight, offsets)
  blocks = choose_blocks(sizes, tokens)
  tokens, columns, rank, batch = blocks.tokens, blocks.columns, sizes.channels, z.shape[0]
  at = _Windows(sizes, blocks, batch, lambda n: n)
  per_row = at.grid[2]
  total = batch * per_row
  now = lambda s: divmod_(jnp.minimum(s, total - 1), per_row)
  past = lambda s: divmod_(jnp.maximum(s - 1, 0), per_row)
  count = tokens // LANES
  return pl.pallas_call(
    functools.partial(_forward_kernel, mean=_Mean(tuple(offsets), eps, normalization), blocks=blocks, per_row=per_row),
    grid=(at.grid[0], total + 1),
    in_specs=[
      pl.BlockSpec((1, rank, tokens), lambda j, s: (now(s)[0], 0, now(s)[1])),
      pl.BlockSpec((1, 1, tokens), lambda j, s: (now(s)[0], 0, now(s)[1])),
      pl.BlockSpec((1, rank, sizes.halo), lambda j, s: (now(s)[0], 0, 0)),
      pl.BlockSpec((sizes.pairs, columns), lambda j, s: (0, j)),
      ],
    out_specs=pl.BlockSpec((1, tokens, columns), lambda j, s: (*past(s), j)),
    out_shape=jax.ShapeDtypeStruct((*z.shape[:2], weight.shape[1]), weight.dtype),
    scratch_shapes=[
      pltpu.VMEM((rank, sizes.halo + blocks.tokens), jnp.float32),
      [pltpu.VMEM((2 * rank, LANES), jnp.float32)] * count, 
      [pltpu.VMEM((2 * rank + ROWS, LANES), jnp.float32)] * count, at.per_chunk(sizes.pairs),
      pltpu.VMEM((blocks.tokens, sizes.pairs), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=vmem_limit(blocks, sizes)),
    cost_estimate=pl.CostEstimate(flops=1, transcendentals=0, bytes_accessed=1),
    name="grassmann_forward",
    interpret=interpret,
  )(at.padded(z), at.padded_reach(reach), at.padded_before(before), _circulant(weight, bias, sizes))


def divmod_(a, b):
  return a // b, a % b


def backward(z, before, weight, reach, dy, *, offsets, eps, normalization, tokens=None,
             interpret=False):
  sizes = Sizes.of(z, weight, offsets)
  blocks = choose_blocks(sizes, tokens)
  batch, length, rank = z.shape
  at = _Windows(sizes, blocks, batch, lambda n: n)
  at = _Windows(sizes, blocks, batch, lambda n: at.grid[2] - 1 - n)
  ch, group = sizes.channels, blocks.group
  tall = (ch + ROWS) * (ch // 2)
  f32 = jnp.float32
  bias = jnp.zeros(weight.shape[1], weight.dtype)
  zt = at.padded(z)
  dz, dbefore, dw = pl.pallas_call(
    functools.partial(_backward_kernel, mean=_Mean(tuple(offsets), eps, normalization),
      blocks=blocks, length=length, width=weight.shape[1]),
    grid=at.grid,
    in_specs=[at.z, at.z_before, at.reach, at.before, at.weight, at.y],
    out_specs=[at.dz, at.dbefore, at.dweight],
    out_shape=[
      jax.ShapeDtypeStruct((at.grid[0], batch, ch, at.grid[2] * blocks.tokens), f32),
      jax.ShapeDtypeStruct((at.grid[0], batch, ch, sizes.halo), f32),
      jax.ShapeDtypeStruct((sizes.pairs, at.grid[0] * blocks.columns), f32),
    ],
    scratch_shapes=[
      pltpu.VMEM((ch, sizes.halo + blocks.tokens), f32),  # z
      pltpu.VMEM((ch, sizes.halo + blocks.tokens), f32),  # pending
      at.per_chunk(2 * ch), at.per_chunk(2 * ch + ROWS), at.per_chunk(sizes.pairs),
      at.per_chunk(len(offsets) * ch),
      pltpu.VMEM((sizes.pairs, blocks.tokens), weight.dtype),
      pltpu.VMEM((blocks.tokens, blocks.columns), weight.dtype),
      [pltpu.VMEM((tall, LANES), f32)] * (2 * group // LANES),
    ],
    compiler_params=at.compiler_params("arbitrary"),
    cost_estimate=pl.CostEstimate(flops=1, transcendentals=0, bytes_accessed=1),
    name="grassmann_backward",
    interpret=interpret,
  )(zt, [zt] * len(at.z_before), at.padded_reach(reach), at.padded_before(before), _circulant(weight, bias, sizes), dy)
  dz, dbefore = (jnp.swapaxes(x.sum(0), 1, 2)[:, :, :rank] for x in (dz, dbefore))
  dbefore = dbefore[:, sizes.halo - before.shape[1]:]
  dweight, dbias = _of_circulant(dw[:, : weight.shape[1]], sizes)
  return dz[:, :length], dbefore, dweight, dbias


def _window_before(block, step, back, j, b, n):
  return b, 0, jnp.maximum(block(n) * step - back, 0)


class _Windows:
  """Which part of each array a grid step sees; `block(n)` is the block that step n works on."""

  def __init__(self, sizes: Sizes, blocks: Blocks, batch: int, block):
    self._sizes, self._blocks, self._block = sizes, blocks, block
    tokens, columns, rank, halo = blocks.tokens, blocks.columns, sizes.channels, sizes.halo
    self.grid = (pl.cdiv(sizes.width, columns), batch, pl.cdiv(sizes.length, tokens))
    self.z = pl.BlockSpec((1, rank, tokens), lambda j, b, n: (b, 0, block(n)))
    # The tokens before a block, as wide windows as both divide into.
    wide = math.gcd(tokens, halo)
    self.z_before = [
      pl.BlockSpec((1, rank, wide), functools.partial(_window_before, block, tokens // wide, i))
      for i in range(halo // wide, 0, -1)
    ]
    self.reach = pl.BlockSpec((1, 1, tokens), lambda j, b, n: (b, 0, block(n)))
    self.before = pl.BlockSpec((1, rank, halo), lambda j, b, n: (b, 0, 0))
    self.weight = pl.BlockSpec((sizes.pairs, columns), lambda j, b, n: (0, j))
    self.y = pl.BlockSpec((1, tokens, columns), lambda j, b, n: (b, block(n), j))
    self.dz = pl.BlockSpec((1, 1, rank, tokens), lambda j, b, n: (j, b, 0, block(n)))
    self.dbefore = pl.BlockSpec((1, 1, rank, halo), lambda j, b, n: (j, b, 0, 0))
    self.dweight = pl.BlockSpec((sizes.pairs, columns), lambda j, b, n: (0, j))

  def per_chunk(self, rows):
    return [pltpu.VMEM((rows, LANES), jnp.float32)] * min(2, self._blocks.tokens // LANES)

  def compiler_params(self, rows):
    return pltpu.CompilerParams(
      dimension_semantics=("parallel", rows, "arbitrary"),
      vmem_limit_bytes=vmem_limit(self._blocks, self._sizes))

  def padded(self, z):
    s = self._sizes
    length = max(self.grid[2] * self._blocks.tokens, s.halo)
    return jnp.pad(jnp.swapaxes(z, 1, 2), ((0, 0), (0, s.channels - s.rank), (0, length - s.length)))

  def padded_before(self, before):
    s = self._sizes
    return jnp.pad(jnp.swapaxes(before, 1, 2),
      ((0, 0), (0, s.channels - s.rank), (s.halo - before.shape[1], 0)))

  def padded_reach(self, reach):
    tail = self.grid[2] * self._blocks.tokens - self._sizes.length
    return jnp.pad(reach, ((0, 0), (0, tail)))[:, None]


@functools.cache
def _places(channels: int, rank: int):
  """(row of the weight or P, sign) of each circulant row; (circulant row, sign) of each pair."""
  first, second = pairs_of(rank)
  rows = np.full((channels // 2, channels), len(first))
  signs = np.ones(rows.shape)
  number = np.full((channels, channels), len(first))
  number[first, second] = np.arange(len(first))
  i = np.arange(channels)
  for k in range(1, channels // 2 + 1):
    j = (i + k) % channels
    rows[k - 1] = number[np.minimum(i, j), np.maximum(i, j)]
    signs[k - 1] = np.where(i < j, 1, -1)
  rows[-1, channels // 2 :] = len(first)
  rows, signs = rows.ravel(), signs.ravel()
  inverse = np.zeros(len(first), int)
  kept = np.flatnonzero(rows < len(first))
  inverse[rows[kept]] = kept
  return rows, signs, inverse


def _bias_rows(sizes):
  first = sizes.channels * sizes.channels // 2 - sizes.channels // 2
  return slice(first, first + 3)


def _circulant(weight, bias, sizes):
  rows, signs, _ = _places(sizes.channels, sizes.rank)
  padded = jnp.pad(weight, ((0, 1), (0, 0)))
  w = padded[rows] * jnp.asarray(signs, weight.dtype)[:, None]
  parts, rest = [], bias.astype(jnp.float32)
  for _ in range(3):
    parts.append(rest.astype(weight.dtype))
    rest = rest - parts[-1].astype(jnp.float32)
  w = w.at[_bias_rows(sizes)].set(jnp.stack(parts))
  return jnp.pad(w, ((0, sizes.pairs - len(rows)), (0, -w.shape[1] % LANES)))


def _of_circulant(dw, sizes):
  _, signs, inverse = _places(sizes.channels, sizes.rank)
  return dw[inverse] * jnp.asarray(signs[inverse], dw.dtype)[:, None], dw[_bias_rows(sizes).start]


def _partners(z_ref, first, offset: int):
  """The tokens `offset` before those of the chunk at lane `first`."""
  whole, offset = divmod(offset, LANES)
  here = z_ref[:, pl.ds(first - whole * LANES, LANES)]
  if offset == 0:
    return here
  before = z_ref[:, pl.ds(first - (whole + 1) * LANES, LANES)]
  lane = jax.lax.broadcasted_iota(jnp.int32, here.shape, 1)
  return pltpu.roll(jnp.where(lane >= LANES - offset, before, here), offset, 1)


def _sum_rows(x):
  return jnp.sum(x, axis=0, keepdims=True)


class _Directions:
  """Of 128 tokens."""

  def __init__(self, z_ref, first, reach, mean, keep_ref=None):
    u = z_ref[:, pl.ds(first, LANES)]
    square = _sum_rows(u * u)
    self.inverse = jnp.where(square > TINY, jax.lax.rsqrt(square), 0)
    floor = (mean.eps * self.inverse) ** 2
    count = sum((reach >= d).astype(jnp.float32) for d in mean.offsets)
    self.live, self.share = count > 0, 1 / jnp.maximum(count, 1)
    self.u = u * self.inverse
    self.terms = []
    total = 0.0
    for number, d in enumerate(mean.offsets):
      v = _partners(z_ref, first, d)
      along = _sum_rows(self.u * v)
      w = v - along * self.u
      area, v_square = _sum_rows(w * w), _sum_rows(v * v)
      if mean.normalization == "clamp":
        norm = jnp.maximum(area, floor)
      else:
        norm = area + RELATIVE_EPS**2 * v_square + floor
      scale = jnp.where((reach >= d) & (v_square > TINY), jax.lax.rsqrt(norm), 0)
      total = total + scale * w
      if keep_ref is not None:
        rows = u.shape[0]
        keep_ref[pl.ds(number * rows, rows)] = w
        self.terms.append((along, scale, area > floor))
    self.q = total * self.share
    self.floor = floor


def _keep_twice(x, u_ref, q_ref):
  rows = x.u.shape[0]
  for ref, value in ((u_ref, x.u), (q_ref, x.q)):
    ref[:rows] = value
    ref[rows : 2 * rows] = value
  q_ref[2 * rows :] = jnp.broadcast_to(x.live.astype(jnp.float32), (ROWS, LANES))


def _wedge(u_ref, q_ref, p_ref):
  """Writes û ^ q."""
  rows = u_ref.shape[0] // 2
  u, q = u_ref[:rows], q_ref[:rows]
  for k in range(1, rows // 2 + 1):
    p = u * q_ref[pl.ds(k, rows)] - u_ref[pl.ds(k, rows)] * q
    if k == rows // 2:
      row = jax.lax.broadcasted_iota(jnp.int32, p.shape, 0)
      live = jnp.concatenate([q_ref[2 * rows :]] * (rows // ROWS))
      p = jnp.where(row < rows // 2, p, live)
    p_ref[pl.ds((k - 1) * rows, rows)] = p


def _forward_kernel(z_ref, reach_ref, before_ref, w_ref, y_ref, rows_ref, u_refs, q_refs, p_refs,
                    t_ref, *, mean, blocks, per_row):
  """Projects the pairs of the block before, of which u_refs and q_refs tell, and then makes those
  of this block."""
  halo, pairs, ch = before_ref.shape[2], w_ref.shape[0], z_ref.shape[1]

  @pl.when(pl.program_id(1) % per_row == 0)
  def _():
    rows_ref[:, :halo] = before_ref[0]
    for p_ref in p_refs:
      if ch * ch // 2 < pairs:
        p_ref[pl.ds(ch * ch // 2, pairs - ch * ch // 2)] = jnp.zeros((pairs - ch * ch // 2, LANES), jnp.float32)

  for first in range(0, blocks.tokens, LANES):
    here = pl.ds(first, LANES)
    number = first // LANES
    u_ref, q_ref, p_ref = u_refs[number], q_refs[number], p_refs[number % len(p_refs)]
    _wedge(u_ref, q_ref, p_ref)
    for row in range(0, pairs, LANES):
      t_ref[here, pl.ds(row, LANES)] = p_ref[pl.ds(row, LANES)].T
    done = first + LANES
    if done % blocks.group == 0:
      group = pl.ds(done - blocks.group, blocks.group)
      step = min(256, blocks.columns)
      x = t_ref[group].astype(w_ref.dtype)
      for column in range(0, blocks.columns, step):
        cols = pl.ds(column, step)
        y_ref[0, group, cols] = dot(x, w_ref[:, cols], (1, 0)).astype(y_ref.dtype)

  rows_ref[:, halo:] = z_ref[0]
  for first in range(0, blocks.tokens, LANES):
    here = pl.ds(first, LANES)
    x = _Directions(rows_ref, halo + first, reach_ref[0, :, here], mean)
    _keep_twice(x, u_refs[first // LANES], q_refs[first // LANES])
  rows_ref[:, :halo] = rows_ref[:, blocks.tokens :]


def _backward_kernel(z_ref, z_before_refs, reach_ref, before_ref, w_ref, dy_ref, dz_ref, dbefore_ref,
                     dw_ref, rows_ref, pending_ref, u_refs, q_refs, p_refs, keep_refs, pt_ref, dym_ref, dp_refs, *,
                     mean, blocks, length, width):
  halo, pairs = before_ref.shape[2], w_ref.shape[0]
  ch = z_ref.shape[1]
  tokens, columns, group = blocks.tokens, blocks.columns, blocks.group
  step, last = pl.program_id(2), pl.num_programs(2) - 1

  @pl.when((pl.program_id(1) == 0) & (step == 0))
  def _():
    dw_ref[...] = jnp.zeros_like(dw_ref)

  @pl.when(step == 0)
  def _():
    pending_ref[:, tokens:] = jnp.zeros_like(pending_ref[:, tokens:])
    for p_ref in p_refs:
      p_ref[...] = jnp.zeros_like(p_ref)

  @pl.when(step != 0)
  def _():
    for lane in range(halo - LANES, -1, -LANES):
      pending_ref[:, pl.ds(lane + tokens, LANES)] = pending_ref[:, pl.ds(lane, LANES)]
  pending_ref[:, :tokens] = jnp.zeros_like(pending_ref[:, :tokens])

  rows_ref[:, halo:] = z_ref[0]

  wide = z_before_refs[0].shape[2]
  for place, window_ref in enumerate(z_before_refs):
    lanes = pl.ds(place * wide, wide)
    token = (last - step) * tokens - halo + place * wide

    @pl.when(token < 0)
    def _(lanes=lanes, token=token):
      rows_ref[:, lanes] = before_ref[0, :, pl.ds(pl.multiple_of(token + halo, LANES), wide)]

    @pl.when(token >= 0)
    def _(lanes=lanes, window_ref=window_ref):
      rows_ref[:, lanes] = window_ref[0]

  for gfirst in range(tokens - group, -1, -group):
    here = pl.ds(gfirst, group)
    xs = {}
    for first in range(gfirst + group - LANES, gfirst - 1, -LANES):
      turn = first // LANES % 2
      reach = reach_ref[0, :, pl.ds(first, LANES)]
      x = xs[first] = _Directions(rows_ref, halo + first, reach, mean, keep_refs[turn])
      _keep_twice(x, u_refs[turn], q_refs[turn])
      _wedge(u_refs[turn], q_refs[turn], p_refs[turn])
      pt_ref[:, pl.ds(first, LANES)] = p_refs[turn][...].astype(pt_ref.dtype)
      mask = jnp.broadcast_to(x.live.astype(jnp.int32), (LANES, LANES)).T != 0
      for column in range(0, columns, LANES):
        cols = pl.ds(column, LANES)
        dy = dy_ref[0, pl.ds(first, LANES), cols]
        keep = mask
        if width % LANES and column + LANES == columns:
          lane = jax.lax.broadcasted_iota(jnp.int32, mask.shape, 1)
          keep = mask & (lane + column + pl.program_id(0) * columns < width)
        dym_ref[pl.ds(first, LANES), cols] = jnp.where(keep, dy, jnp.zeros_like(dy))
    dp = dot(w_ref[...], dym_ref[here], (1, 1))
    for first in xs:
      dp_ref = dp_refs[first // LANES % len(dp_refs)]
      of = slice(first - gfirst, first - gfirst + LANES)
      for k in range(ch // 2):
        dp_ref[pl.ds(k * (ch + ROWS), ch)] = dp[k * ch : k * ch + ch, of]
        dp_ref[pl.ds(k * (ch + ROWS) + ch, ROWS)] = dp[k * ch : k * ch + ROWS, of]
    for column in range(0, columns, 256):
      cols = pl.ds(column, min(256, columns - column))
      dw_ref[:, cols] += dot(pt_ref[:, here], dym_ref[here, cols], (1, 0))
    for first, x in xs.items():
      turn = first // LANES % 2
      du, dq = _unwedge(x, u_refs[turn], q_refs[turn], dp_refs[first // LANES % len(dp_refs)])
      _pull(x, du, dq, keep_refs[turn], pending_ref, halo + first, mean)

  dz_ref[0, 0] = pending_ref[:, halo:]

  @pl.when(step == last)
  def _():
    dbefore_ref[0, 0] = pending_ref[:, :halo]


def _unwedge(x, u_ref, q_ref, dp_ref):
  ch = x.u.shape[0]
  du = dq = 0.0
  row = jax.lax.broadcasted_iota(jnp.int32, x.u.shape, 0)
  for k in range(1, ch // 2 + 1):
    base = (k - 1) * (ch + ROWS)
    dp = dp_ref[pl.ds(base, ch)]
    back = jnp.concatenate(
      [dp_ref[pl.ds(base + (first - k) % ch, ROWS)] for first in range(0, ch, ROWS)])
    if k == ch // 2:
      dp = jnp.where(row < k, dp, 0)
      back = jnp.where(row >= k, back, 0)
    up, down = pl.ds(k, ch), pl.ds(ch - k, ch)
    du = du + (dp * q_ref[up] - back * q_ref[down])
    dq = dq + (back * u_ref[down] - dp * u_ref[up])
  return du, dq


def _pull(x, du, dq, keep_ref, pending_ref, first, mean):
  ch = du.shape[0]
  g = jnp.where(x.live, dq * x.share, 0)
  lane = jax.lax.broadcasted_iota(jnp.int32, du.shape, 1)
  received = {}

  def receive(place, value):
    received[place] = received[place] + value if place in received else value

  mixed, across, radial = 0.0, 0.0, 0.0
  for number, (d, (along, scale, free)) in enumerate(zip(mean.offsets, x.terms, strict=True)):
    w = keep_ref[pl.ds(number * ch, ch)]
    meets = scale * _sum_rows(w * g)
    e = scale * scale * meets
    if mean.normalization == "clamp":
      radial = radial + jnp.where(free, 0, meets)
      e = jnp.where(free, e, 0)
      dv = scale * g - e * w
    else:
      radial = radial + e
      dv = scale * g - (e * (1 + RELATIVE_EPS**2)) * w - (e * along * RELATIVE_EPS**2) * x.u
    mixed = mixed + along * scale
    across = across + (along * e) * w
    whole, part = divmod(d, LANES)
    if part:
      dv = pltpu.roll(dv, LANES - part, 1)
      receive(whole, jnp.where(lane < LANES - part, dv, 0))
      receive(whole + 1, jnp.where(lane >= LANES - part, dv, 0))
    else:
      receive(whole, dv)
  radial = radial * (x.inverse if mean.normalization == "clamp" else x.floor * x.inverse)
  du = du - mixed * g + across
  dz = x.inverse * (du - x.u * _sum_rows(x.u * du)) + radial * x.u
  receive(0, dz)
  for place, value in received.items():
    lanes = pl.ds(first - place * LANES, LANES)
    pending_ref[:, lanes] = pending_ref[:, lanes] + value
