"""Grassmann mixing on GPU.

The coordinates of a token with all of its partners collapse to those of one plane: of the unit
vector u of the token, and the mean q of what its partners have across u, normalised.

  directions  u and q of a few tokens a program.
  forward     grid D / columns x tokens / rows. A program makes the coordinates of (u, q) in its
              registers, a few at a time, and multiplies them by the weight.
  backward    weight: grid D / columns x coordinates / height x parts. A program sums, over a part
              of the tokens, their coordinates, made again, times dy; XLA adds the parts.
              planes: grid halves of squares x tokens / rows. A program sums dy times the weight
              over D, and contracts the cotangents of its coordinates with u and q at once.
              tokens: dz of a few tokens a program, as tokens and as partners of later ones.

Pairs of channels stand in squares, GROUP channels along each side: coordinates are then products of
a column and a row, and what becomes of their cotangents are sums of rows and of columns; nothing is
gathered or shifted. A square holds the pairs between two groups, or those within two groups, one
above its diagonal and one below. For R = 32 these are 512 coordinates for 496 pairs, for R = 128
8192 for 8128; below R = 16 more are idle than not.

No coordinates and no cotangents of them are in HBM. Bytes, a token at b bytes a number of y:
forward b D + 20 R; backward 2 b D + 52 R + 1.5 R (R + 16), and for the parts at most 64 MiB or
twice dweight. (At R = 32 XLA's kernels have 6 times as many bytes of operands forward, 4 times for
both directions.) Flops: R^2 D, backward 2 R^2 D; the coordinates 2.5 R^2 for each block of D.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.chunks_gpu import dot, load, store, tile_size
from pallas_kernels.grassmann.reference import RELATIVE_EPS

DTYPES = ("float32", "bfloat16")
WIDEST = 128
TINY = 1e-36  # a squared length not above it is that of a zero vector, which gets no gradient
GROUP = 16  # channels along a side of a square
SQUARE = GROUP * GROUP
AT_ONCE = 2  # rows of a square whose coordinates are one operand of `forward`
STEP = AT_ONCE * GROUP
TILE = 1024  # numbers of a tile of the kernels that know no coordinates
PARTS = 256  # programs that sum the gradient of the weight; more would only add parts to add


def refusal(z, weight, offsets) -> str | None:
  """Why the kernels cannot run on z [B, T, H, R] and weight [H R (R - 1) / 2, D], or None."""
  if z.dtype != jnp.float32:
    return f"z is {z.dtype}, expected float32"
  if str(weight.dtype) not in DTYPES:
    return f"weight is {weight.dtype}, expected float32 or bfloat16"
  if z.shape[-1] > WIDEST:
    return f"rank {z.shape[-1]} is above {WIDEST}"
  if not offsets:
    return "there are no offsets"
  if min(offsets) < 1:
    return f"offset {min(offsets)} points to a later token"
  return None


@dataclasses.dataclass(frozen=True)
class Plan:
  """The sizes of a call.

  Attributes:
    batch, length, heads, rank, channels: B, T, H, R, D.   earlier: M, tokens before the first.
    exact: whether the operands of products are float32.
    offsets, eps, normalization: see `forward`.
  """

  batch: int
  length: int
  earlier: int
  heads: int
  rank: int
  channels: int
  exact: bool
  offsets: tuple[int, ...]
  eps: float
  normalization: str

  @property
  def tokens(self) -> int:
    """Of all rows of the batch, with those that fill the last block."""
    return pl.cdiv(self.batch * self.length, 128) * 128

  @property
  def groups(self) -> int:
    """Groups of channels of a head."""
    return pl.cdiv(self.rank, GROUP)

  @property
  def lanes(self) -> int:
    """Channels of a tile that holds all of a head."""
    return tile_size(self.rank)

  @property
  def rows(self) -> int:
    """Heads of tokens in such a tile."""
    return TILE // self.lanes

  @property
  def apart(self) -> int:
    """Squares of two groups; the squares of pairs within groups stand behind them."""
    return self.heads * self.groups * (self.groups - 1) // 2

  @property
  def squares(self) -> tuple[tuple[int, int], ...]:
    """The two groups of each square."""
    first, second = np.triu_indices(self.groups, 1)
    heads, every = self.groups * np.arange(self.heads)[:, None], self.heads * self.groups
    across = zip((heads + first).flat, (heads + second).flat, strict=True)
    within = ((group, min(group + 1, every - 1)) for group in range(0, every, 2))
    return tuple((int(left), int(right)) for left, right in (*across, *within))

  @property
  def coordinates(self) -> int:
    """Numbers of all squares."""
    return SQUARE * len(self.squares)

  @property
  def columns(self) -> int:
    """Channels of y of a program."""
    return min(64 if self.exact else 256, tile_size(self.channels))

  @property
  def blocks(self) -> int:
    """Of so many channels."""
    return pl.cdiv(self.channels, self.columns)

  def order(self) -> tuple[np.ndarray, np.ndarray]:
    """Of each coordinate in squares: its row of the weight, H R (R - 1) / 2 where it has none, and
    its sign."""
    left, right = (np.array(side)[:, None, None] for side in zip(*self.squares, strict=True))
    row, column = np.arange(GROUP)[:, None], np.arange(GROUP)
    within = (np.arange(len(self.squares)) >= self.apart)[:, None, None]
    lower = within & (row >= column)
    of_row, of_column = np.where(lower, right, left), np.where(within & ~lower, left, right)
    first, second = of_row % self.groups * GROUP + row, of_column % self.groups * GROUP + column
    there = (np.maximum(first, second) < self.rank) & (first != second) & ~(lower & (left == right))
    low, high = np.minimum(first, second), np.maximum(first, second)
    pair = low * self.rank - low * (low + 1) // 2 + high - low - 1
    pairs = math.comb(self.rank, 2)
    pair = np.where(there, pair + of_row // self.groups * pairs, self.heads * pairs)
    return pair.reshape(-1), np.where(first < second, 1, -1).reshape(-1)

  def call(self, kernel, grid, out_shape, *, name: str, interpret, multiplies: bool = False):
    """A `pallas_call` of `kernel(*refs, plan=plan)`, which multiplies all coordinates by all
    channels, or knows no coordinates."""
    flops = 2 * self.tokens * self.coordinates * self.channels if multiplies else 0
    warps, stages = 8 if multiplies and not self.exact else 4, 3 if multiplies else 2

    def run(*arrays):
      moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((arrays, out_shape)))
      return pl.pallas_call(
        functools.partial(kernel, plan=self),
        grid=grid,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved),
        name=f"grassmann_{name}",
        interpret=interpret,
      )(*arrays)

    return run


def forward(
  z, before, weight, bias, reach, *, offsets, eps: float, normalization: str, interpret=False
):
  """Means of normalised Plücker coordinates, projected.

      y_t = (1 / n_t) sum_d plucker(z_t, z_{t-d}) weight + bias,    0 where n_t = 0

  over the n_t offsets d <= reach_t.

  Args:
    z: [B, T, R] or [B, T, H, R] float32.   before: [B, M, R] or [B, M, H, R] float32, the tokens
      before the first one, oldest first, at least as many as the largest offset.
    weight: [H R (R - 1) / 2, D], float32 or bfloat16.   bias: [D].
    reach: [B, T] int32, how many tokens back partners may stand; what is further is not looked at,
      nor is a token without partners.
    offsets: whole numbers from 1 on.   eps, normalization: see `reference.plucker`.
    interpret: run the kernels' programs on the CPU.
  Returns:
    y: [B, T, D] in the dtype of weight.
  """
  plan = _plan(z, before, weight, offsets, eps, normalization)
  u, q = _directions(plan, z, before, reach, interpret)
  rows = 64 if plan.exact else 128
  y = plan.call(
    functools.partial(_forward_kernel, rows=rows),
    (plan.tokens // rows * plan.blocks,),
    jax.ShapeDtypeStruct((z.shape[0] * z.shape[1], plan.channels), weight.dtype),
    name="forward",
    multiplies=True,
    interpret=interpret,
  )(np.array(plan.squares, np.int32), u, q, _in_squares(plan, weight), bias, reach.reshape(-1))
  return y.reshape(*z.shape[:2], -1)


def backward(
  z, before, weight, reach, dy, *, offsets, eps: float, normalization: str, interpret=False
):
  """Gradients of `forward`.

  Args:
    z, before, weight, reach, offsets, eps, normalization, interpret: as given to `forward`.
    dy: [B, T, D], the cotangent of y.
  Returns:
    dz, dbefore, dweight, dbias: in the shapes of z, before, weight and bias, float32.
  """
  plan = _plan(z, before, weight, offsets, eps, normalization)
  u, q = _directions(plan, z, before, reach, interpret)
  dy = dy.reshape(-1, plan.channels).astype(weight.dtype)
  dweight, dbias = _weight_gradients(plan, u, q, reach, dy, interpret)
  dplanes = _plane_cotangents(plan, u, q, weight, dy, interpret)
  rows = plan.batch * (plan.earlier + plan.length) * plan.heads
  dtokens = plan.call(
    _tokens_kernel,
    (pl.cdiv(rows, plan.rows),),
    jax.ShapeDtypeStruct((rows, plan.rank), jnp.float32),
    name="backward_tokens",
    interpret=interpret,
  )(_in_line(plan, z, before), *dplanes, reach.reshape(-1))
  dtokens = dtokens.reshape(plan.batch, -1, *z.shape[2:])
  return dtokens[:, plan.earlier :], dtokens[:, : plan.earlier], dweight, dbias


def _plan(z, before, weight, offsets, eps, normalization) -> Plan:
  exact = weight.dtype == jnp.float32
  heads, rank = math.prod(z.shape[2:-1]), z.shape[-1]
  sizes = (*z.shape[:2], before.shape[1], heads, rank, weight.shape[1])
  return Plan(*sizes, exact, tuple(offsets), eps, normalization)


def _in_line(plan: Plan, z, before):
  """[B (M + T) H, R], the tokens of each row behind those before them."""
  return jnp.concatenate([before, z], axis=1).reshape(-1, plan.rank)


def _in_squares(plan: Plan, weight):
  """The weights of the coordinates in squares, zeros where there is no pair or channel."""
  pair, sign = plan.order()
  weight = jnp.pad(weight, ((0, 1), (0, -plan.channels % plan.columns)))
  return weight[pair] * sign[:, None].astype(weight.dtype)


def _directions(plan: Plan, z, before, reach, interpret):
  """u and q, [tokens, H * GROUP * groups] float32; zeros where a token has no partner, and behind
  the tokens."""
  shape = jax.ShapeDtypeStruct((plan.tokens * plan.heads, GROUP * plan.groups), jnp.float32)
  u, q = plan.call(
    _directions_kernel,
    (plan.tokens * plan.heads // plan.rows,),
    [shape, shape],
    name="directions",
    interpret=interpret,
  )(_in_line(plan, z, before), reach.reshape(-1))
  return u.reshape(plan.tokens, -1), q.reshape(plan.tokens, -1)


def _directions_kernel(tokens_ref, reach_ref, u_ref, q_ref, *, plan: Plan):
  start = pl.program_id(0) * plan.rows
  head = start + jnp.arange(plan.rows)
  token, _ = _divide(head, plan.heads)
  row, _ = _divide(token, plan.length)
  place = head + (row + 1) * plan.earlier * plan.heads
  reach = _load_entries(reach_ref, token, token < plan.batch * plan.length)
  found = _found(plan, reach)
  u, inverse = _unit(_load_tokens(plan, tokens_ref, place, found > 0))
  q = jnp.zeros_like(u)
  for offset in plan.offsets:
    v = _load_tokens(plan, tokens_ref, place - offset * plan.heads, offset <= reach)
    q += _across(plan, u, inverse, v).q
  q /= jnp.maximum(found, 1).astype(jnp.float32)[:, None]
  index = (pl.ds(start, plan.rows), pl.ds(jnp.int32(0), plan.lanes))
  inside = jnp.arange(plan.lanes) < u_ref.shape[1]
  store(u_ref, index, u, None, inside)
  store(q_ref, index, q, None, inside)


def _divide(x, by: int):
  """x // by and x % by of x >= 0."""
  quotient = jax.lax.div(x, jnp.full_like(x, by))
  return quotient, x - quotient * by


def _load_entries(ref, index, mask):
  """Entries of a vector; zeros where the mask does not hold."""
  return plgpu.load(ref.at[jnp.where(mask, index, 0)], mask=mask, other=0)


def _load_tokens(plan: Plan, ref, place, mask):
  """Rows of R channels of an array, as tiles of all lanes; zeros where the mask does not hold."""
  lane = jnp.arange(plan.lanes)
  mask = mask[:, None] & (lane < plan.rank)[None, :]
  place, lane = jnp.where(mask, place[:, None], 0), jnp.where(mask, lane[None, :], 0)
  return plgpu.load(ref.at[place, lane], mask=mask, other=0)


def _found(plan: Plan, reach):
  """How many partners a token has."""
  return functools.reduce(jnp.add, [(d <= reach).astype(jnp.int32) for d in plan.offsets])


def _unit(u):
  """u / |u| and 1 / |u|; zeros where u is zero."""
  inverse = _inverse_root(jnp.sum(u * u, axis=1, keepdims=True), TINY)
  return u * inverse, inverse


def _inverse_root(x, above):
  """1 / sqrt(x), 0 where x is not above `above`."""
  return jnp.where(x > above, jax.lax.rsqrt(jnp.where(x > above, x, 1)), 0)


@dataclasses.dataclass(frozen=True)
class _Across:
  """What a partner v has across a token, normalised: q = across / N, with the N of the reference
  over the length of the token. It is 0 where v is.

  Attributes:
    q: [tokens, R].   along: [tokens, 1], what v has along the token.   inverse: [tokens, 1], 1 / N.
    of_area: [tokens, 1], the derivative of N^2 by |across|^2.
    of_floor: [tokens, 1], which part of N^2 the term (eps / length)^2 is.
  """

  q: jax.Array
  along: jax.Array
  inverse: jax.Array
  of_area: jax.Array | float
  of_floor: jax.Array


def _across(plan: Plan, u, inverse_length, v) -> _Across:
  """u: [tokens, R], unit vectors, with the inverse of their lengths before.   v: [tokens, R]. By
  Gram-Schmidt: where u and v are nearly parallel, Lagrange's identity would cancel."""
  along, length = (jnp.sum(x * v, axis=1, keepdims=True) for x in (u, v))
  across = v - along * u
  area, floor = jnp.sum(across * across, axis=1, keepdims=True), (plan.eps * inverse_length) ** 2
  clamps = plan.normalization == "clamp"
  of_area = jnp.where(area > floor, 1.0, 0.0) if clamps else 1.0
  square = jnp.maximum(area, floor) if clamps else area + RELATIVE_EPS**2 * length + floor
  inverse = jnp.where(length > TINY, _inverse_root(square, 0), 0)
  of_floor = 1 - of_area if clamps else floor * inverse * inverse
  return _Across(across * inverse, along, inverse, of_area, of_floor)


def _pull_across(plan: Plan, u, inverse_length, v, dq):
  """The cotangents of v, of u, and of |u| times |u|, from that of q."""
  of = _across(plan, u, inverse_length, v)
  turn = jnp.sum(of.q * dq, axis=1, keepdims=True)
  dacross = (dq - of.of_area * turn * of.q) * of.inverse
  lean = jnp.sum(u * dacross, axis=1, keepdims=True)
  dv = dacross - lean * u
  if plan.normalization == "safe":
    dv -= RELATIVE_EPS**2 * turn * of.inverse * of.inverse * v
  return dv, -of.along * dacross - lean * v, of.of_floor * turn


def _wedge(u_ref, q_ref, tokens, few: int, first, left, right):
  """Coordinates [tokens, few, GROUP] of channels of the group `left`, `few` from `first` on, with
  those of the group `right`."""
  rows, columns = pl.ds(GROUP * left + first, few), pl.ds(GROUP * right, GROUP)
  u, q = (ref[tokens, rows][:, :, None] for ref in (u_ref, q_ref))
  return u * q_ref[tokens, columns][:, None, :] - q * u_ref[tokens, columns][:, None, :]


def _lines(few: int, first):
  """The numbers of rows of a square, `few` from `first` on, and of its columns, to be compared."""
  return first + jnp.arange(few)[None, :, None], jnp.arange(GROUP)[None, None, :]


def _forward_kernel(
  squares_ref, u_ref, q_ref, weight_ref, bias_ref, reach_ref, y_ref, *, plan: Plan, rows: int
):
  tile, block = _divide(pl.program_id(0), plan.blocks)
  tokens = pl.ds(tile * rows, rows)
  columns = pl.ds(block * plan.columns, plan.columns)

  def step(within, number, total):
    square, part = _divide(number, GROUP // AT_ONCE)
    first = part * AT_ONCE
    left, right = squares_ref[square, 0], squares_ref[square, 1]
    wedge = functools.partial(_wedge, u_ref, q_ref, tokens, AT_ONCE, first)
    p = wedge(left, left if within else right)
    if within:
      row, column = _lines(AT_ONCE, first)
      p = jnp.where(row < column, p, wedge(right, right))
    p = p.reshape(rows, STEP).astype(weight_ref.dtype)
    return total + dot(p, weight_ref[pl.ds(number * STEP, STEP), columns])

  steps = SQUARE // STEP
  total = jnp.zeros((rows, plan.columns), jnp.float32)
  for within, squares in ((False, (0, plan.apart)), (True, (plan.apart, len(plan.squares)))):
    start, stop = (steps * square for square in squares)
    if start < stop:
      total = jax.lax.fori_loop(start, stop, functools.partial(step, within), total)
  token, column = tile * rows + jnp.arange(rows), block * plan.columns + jnp.arange(plan.columns)
  exists, inside = token < plan.batch * plan.length, column < plan.channels
  live = _load_entries(reach_ref, token, exists) >= min(plan.offsets)
  total += _load_entries(bias_ref, column, inside).astype(jnp.float32)[None, :]
  y = jnp.where(live[:, None], total, 0)
  _store_tile(y_ref, token, column, y, exists, inside)


def _store_tile(ref, rows, columns, tile, exists, inside):
  mask = exists[:, None] & inside[None, :]
  plgpu.store(ref.at[rows[:, None], columns[None, :]], tile.astype(ref.dtype), mask=mask)


def _plane_cotangents(plan: Plan, u, q, weight, dy, interpret):
  """The cotangents of u and q, [tokens * H, GROUP * groups]."""
  rows = 32 if plan.exact else 128
  slots = _slot(plan, len(plan.squares))
  of_rows, of_columns = plan.call(
    functools.partial(_planes_kernel, rows=rows),
    (plan.tokens // rows * 2 * len(plan.squares),),
    [
      jax.ShapeDtypeStruct((slots, plan.tokens, GROUP), jnp.float32),
      jax.ShapeDtypeStruct((2, slots, plan.tokens, GROUP), jnp.float32),
    ],
    name="backward_planes",
    multiplies=True,
    interpret=interpret,
  )(np.array(plan.squares, np.int32), u, q, _in_squares(plan, weight), dy)
  of_rows, of_columns = [of_rows], list(of_columns)
  sums = [[0.0] * plan.heads * plan.groups for _ in range(2)]
  for square, (left, right) in enumerate(plan.squares):
    slot = _slot(plan, square)
    found = [(left, slot, of_rows), (right, slot, of_columns)]
    if square >= plan.apart:
      both = of_rows + of_columns
      found = [(left, slot, both), (right, slot + 2, both)][: 1 + (left != right)]
    for group, slot, arrays in found:
      for which, of_groups in enumerate(sums):
        of_groups[group] += sum(array[slot + which] for array in arrays)
  shape = plan.tokens * plan.heads, plan.groups * GROUP
  return [jnp.concatenate(of_groups, axis=1).reshape(shape) for of_groups in sums]


def _slot(plan: Plan, square):
  """Where the cotangents of u by a square stand; those of q, and of a second group, follow."""
  return 2 * square + 2 * max(square - plan.apart, 0)


def _planes_kernel(
  squares_ref, u_ref, q_ref, weight_ref, dy_ref, rows_ref, columns_ref, *, plan: Plan, rows: int
):
  """For half of a square: the products of a whole one would overfill the registers."""
  tile, number = _divide(pl.program_id(0), 2 * len(plan.squares))
  square, half = _divide(number, 2)
  left, right = squares_ref[square, 0], squares_ref[square, 1]
  depth, few = min(32 if plan.exact else 64, tile_size(plan.channels)), GROUP // 2
  tokens, token = pl.ds(tile * rows, rows), tile * rows + jnp.arange(rows)
  exists = (token < plan.batch * plan.length) if plan.batch * plan.length % rows else None

  def step(block, total):
    column = block * depth + jnp.arange(depth)
    inside = column < plan.channels if plan.channels % depth else None
    columns = pl.ds(jnp.int32(block * depth), depth)
    dy = load(dy_ref, (pl.ds(jnp.int32(tile * rows), rows), columns), exists, inside)
    weight = weight_ref[pl.ds(number * few * GROUP, few * GROUP), columns]
    return total + dot(dy, weight, (1, 1))

  dp = jnp.zeros((rows, few * GROUP), jnp.float32)
  dp = jax.lax.fori_loop(0, pl.cdiv(plan.channels, depth), step, dp)
  dp = dp.reshape(rows, few, GROUP)

  def contract(dp, left, right, slot):
    """The cotangents of u, dp q, and of q, -dp u; those of columns have the other sign."""
    for which, (ref, sign) in enumerate(((q_ref, 1), (u_ref, -1))):
      row = ref[tokens, pl.ds(GROUP * left + few * half, few)][:, :, None]
      column = ref[tokens, pl.ds(GROUP * right, GROUP)][:, None, :]
      lines = pl.ds(few * half, few)
      rows_ref[slot + which, tokens, lines] = sign * jnp.sum(dp * column, axis=2)
      columns_ref[half, slot + which, tokens, :] = -sign * jnp.sum(dp * row, axis=1)

  @pl.when(square < plan.apart)
  def _():
    contract(dp, left, right, 2 * square)  # its slot, see `_slot`

  @pl.when(square >= plan.apart)
  def _():
    slot = 4 * square - 2 * plan.apart
    row, column = _lines(few, few * half)
    contract(jnp.where(row < column, dp, 0), left, left, slot)
    contract(jnp.where(row > column, dp, 0), right, right, slot + 2)


def _weight_gradients(plan: Plan, u, q, reach, dy, interpret):
  """dweight and dbias."""
  height, rows = 64 if plan.exact else 128, 32
  programs = plan.coordinates // height * plan.blocks
  parts = max(1, min(PARTS // programs, plan.tokens // 128))
  sums = plan.call(
    functools.partial(_weight_kernel, height=height, rows=rows),
    (programs * parts,),
    jax.ShapeDtypeStruct((parts, plan.coordinates, plan.blocks * plan.columns), jnp.float32),
    name="backward_weight",
    multiplies=True,
    interpret=interpret,
  )(np.array(plan.squares, np.int32), u, q, reach.reshape(-1), dy)
  sums = sums.sum(0)[:, : plan.channels]
  pair, sign = plan.order()
  place = np.zeros(pair.max() + 1, np.int32)
  place[pair] = np.arange(plan.coordinates)
  place = place[:-1]  # of what is no pair
  return sums[place] * sign[place, None], sums[plan.apart * SQUARE]


def _weight_kernel(
  squares_ref, u_ref, q_ref, reach_ref, dy_ref, sums_ref, *, plan: Plan, height: int, rows: int
):
  """On the diagonals of the squares, where no pair is, stands the gradient of the bias."""
  number, block = _divide(pl.program_id(0), plan.blocks)
  part, tile = _divide(number, plan.coordinates // height)
  square, first = _divide(tile * (height // GROUP), GROUP)
  left, right = squares_ref[square, 0], squares_ref[square, 1]
  columns = pl.ds(jnp.int32(block * plan.columns), plan.columns)
  column = block * plan.columns + jnp.arange(plan.columns)
  inside = column < plan.channels if plan.channels % plan.columns else None
  steps = pl.cdiv(plan.tokens // rows, sums_ref.shape[0])

  def step(within, number, total):
    start = (part * steps + number) * rows
    tokens, token = pl.ds(start, rows), start + jnp.arange(rows)
    reach = _load_entries(reach_ref, token, token < plan.batch * plan.length)
    live = reach >= min(plan.offsets)
    wedge = functools.partial(_wedge, u_ref, q_ref, tokens, height // GROUP, first)
    p = wedge(left, left if within else right)
    if within:
      row, column = _lines(height // GROUP, first)
      p = jnp.where(row < column, p, wedge(right, right))
      p = jnp.where(row == column, live.astype(jnp.float32)[:, None, None], p)
    p = p.reshape(rows, height).astype(dy_ref.dtype)
    dy = load(dy_ref, (pl.ds(jnp.int32(start), rows), columns), live, inside)
    return total + dot(p, dy, (0, 0))

  steps_here = jnp.clip(plan.tokens // rows - part * steps, 0, steps)
  total = jnp.zeros((height, plan.columns), jnp.float32)

  def sum_tokens(within, total):
    return jax.lax.fori_loop(0, steps_here, functools.partial(step, within), total)

  kinds = [functools.partial(sum_tokens, within) for within in (False, True)]
  total = jax.lax.cond(square < plan.apart, *kinds, total) if plan.apart else kinds[1](total)
  sums_ref[part, pl.ds(tile * height, height), columns] = total


def _tokens_kernel(tokens_ref, du_ref, dq_ref, reach_ref, dtokens_ref, *, plan: Plan):
  place = pl.program_id(0) * plan.rows + jnp.arange(plan.rows)
  wide = (plan.earlier + plan.length) * plan.heads
  row, time = _divide(place, wide)
  exists = place < plan.batch * wide

  def at(offset):
    """The head of the token so much later: where it is, how far it reaches."""
    later = time + (offset - plan.earlier) * plan.heads
    there = exists & (later >= 0) & (later < plan.length * plan.heads)
    head = row * plan.length * plan.heads + later
    token, _ = _divide(jnp.where(there, head, 0), plan.heads)
    return head, _load_entries(reach_ref, token, there)

  def cotangent(token, reach, mask):
    """Of q_d of a token."""
    dq = _load_tokens(plan, dq_ref, token, mask)
    return dq / jnp.maximum(_found(plan, reach), 1).astype(jnp.float32)[:, None]

  token, reach = at(0)
  live = _found(plan, reach) > 0
  u, inverse = _unit(_load_tokens(plan, tokens_ref, place, live))
  du, dlength = _load_tokens(plan, du_ref, token, live), jnp.zeros_like(inverse)
  dq = cotangent(token, reach, live)
  for offset in plan.offsets:
    valid = offset <= reach
    v = _load_tokens(plan, tokens_ref, place - offset * plan.heads, valid)
    _, more, longer = _pull_across(plan, u, inverse, v, jnp.where(valid[:, None], dq, 0))
    du += more
    dlength += longer
  dtokens = (du - u * (jnp.sum(u * du, axis=1, keepdims=True) - dlength)) * inverse

  for offset in plan.offsets:
    token, reach = at(offset)
    valid = offset <= reach
    u, inverse = _unit(_load_tokens(plan, tokens_ref, place + offset * plan.heads, valid))
    v = _load_tokens(plan, tokens_ref, place, valid)
    dv, _, _ = _pull_across(plan, u, inverse, v, cotangent(token, reach, valid))
    dtokens += dv
  lane = jnp.arange(plan.lanes)
  _store_tile(dtokens_ref, place, lane, dtokens, exists, lane < plan.rank)
