"""Depthwise causal convolution on TPU: one kernel a direction.

Grid (B, D / channels, T / tokens), the last axis in order; the backward kernel walks it from the
end. A block holds `tokens` rows of x and y (and dy, dx) of `channels` channels. On the chip stay,
between blocks, the last 8 rows of x (forward) or the first 8 rows of dz (backward), and the sums
that become dweight.

Bytes, a token and channel, at b bytes a number: forward 2 b; backward 3 b, and 16 rows of x before
each block. Flops: forward 2 W, backward 6 W, and some 8 for the activation.

Rows of a block are widened to float32 into a buffer of VMEM, [channels / 128, 8 + tokens, 128]: a
tap is then a load that begins j rows higher. With more than 128 channels beside one another such a
load would have to be put together from two. A tile of 128 channels is straight-line code: the
schedule needs it long to fill its slots.

Half of z is computed, by halved taps: silu(z) = h + h tanh(h) where h = z / 2.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

DTYPES = ("float32", "bfloat16")
LANES = 128
HALO = 8  # rows of float32 in a register: how far taps reach beyond a block
WIDEST = HALO
ROWS = 32  # worked on at a time: what they need fits the registers
TILES = 8  # of 128 channels in a block


def refusal(x, weight) -> str | None:
  """Why the kernels cannot run on x [B, T, D] and weight [D, W], or None."""
  if str(x.dtype) not in DTYPES:
    return f"x is {x.dtype}, expected float32 or bfloat16"
  if weight.shape[1] > WIDEST:
    return f"width {weight.shape[1]} is above {WIDEST}"
  return None


def forward(
  x,
  weight,
  bias,
  state,
  reach,
  *,
  activation: str | None,
  tokens: int | None = None,
  interpret=False,
):
  """Depthwise causal convolution.

      z_t = bias + sum_j weight[:, W-1-j] * x_{t-j} [j <= reach_t]        y_t = activation(z_t)

  Args:
    x: [B, T, D], float32 or bfloat16.   weight: [D, W].   bias: [D].
    state: [B, W - 1, D], the inputs before the first token.
    reach: [B, T] int32 or None: how many tokens back the taps of a token go, at most W - 1; below 0
      the token is padding, whose y is 0. None means W - 1.
    activation: None or "silu".
    tokens: rows of a block, a multiple of 128; None chooses.   interpret: run the kernel's program
      on the CPU.
  Returns:
    y: [B, T, D] in the dtype of x.
  """
  at = _Windows(x, weight.shape[1], tokens or _tokens(x), lambda n: n)
  reach = at.marks(reach)
  return pl.pallas_call(
    functools.partial(_forward_kernel, width=weight.shape[1], activation=activation),
    grid=at.grid,
    in_specs=[at.rows, at.weights, at.edge, None if reach is None else at.marks_spec],
    out_specs=at.rows,
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    scratch_shapes=[at.wide_rows, None if reach is None else at.masks],
    compiler_params=at.compiler_params,
    cost_estimate=pl.CostEstimate(
      flops=2 * weight.shape[1] * x.size,
      transcendentals=x.size if activation else 0,
      bytes_accessed=2 * x.size * x.dtype.itemsize,
    ),
    name="short_convolution_forward",
    interpret=interpret,
  )(x, _halved(weight, bias, activation), _as_edge(state), reach)


def backward(
  x,
  weight,
  bias,
  state,
  reach,
  dy,
  *,
  activation: str | None,
  tokens: int | None = None,
  interpret=False,
):
  """Gradients of `forward`, but for what the state adds to them.

  Args:
    x, weight, bias, state, reach, activation, tokens, interpret: as given to `forward`.
    dy: [B, T, D], the cotangent of y.
  Returns:
    dx: [B, T, D] in the dtype of x;   dweight: [B, D, W] and dbias: [B, D], float32, of each row,
    through x alone;   dz: [B, W - 1, D] float32, the cotangents of the first z, from which the
    gradients through the state follow.
  """
  batch, length, channels = x.shape
  width = weight.shape[1]
  tokens = tokens or _tokens(x)
  count = pl.cdiv(length, tokens)
  at = _Windows(x, width, tokens, lambda n: count - 1 - n)
  reach = at.marks(reach)
  dx, sums, dz = pl.pallas_call(
    functools.partial(_backward_kernel, width=width, activation=activation),
    grid=at.grid,
    in_specs=[
      at.rows,
      at.rows_before,
      at.weights,
      at.edge,
      None if reach is None else at.marks_spec,
      at.rows,
    ],
    out_specs=[at.rows, at.sums, at.edge],
    out_shape=[
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      jax.ShapeDtypeStruct((batch, 2 * HALO, channels), jnp.float32),
      jax.ShapeDtypeStruct((batch, HALO, channels), jnp.float32),
    ],
    scratch_shapes=[
      at.wide_rows,
      at.wide_rows,
      None if reach is None else at.masks,
      at.partial_sums,
    ],
    compiler_params=at.compiler_params,
    cost_estimate=pl.CostEstimate(
      flops=6 * width * x.size,
      transcendentals=x.size if activation else 0,
      bytes_accessed=3 * x.size * x.dtype.itemsize,
    ),
    name="short_convolution_backward",
    interpret=interpret,
  )(x, x, _halved(weight, bias, activation), _as_edge(state), reach, dy)
  half = 0.5 if activation else 1.0  # the kernel's cotangents are those of h, twice those of z
  sums = half * sums
  dweight = jnp.swapaxes(jnp.flip(sums[:, :width], 1), 1, 2)
  return dx, dweight, sums[:, width], half * dz[:, : width - 1]


def _tokens(x) -> int:
  """Rows of a block: its windows and buffers fill 11 MiB of VMEM, 15 with the masks of 8 taps."""
  most = 1024 // x.dtype.itemsize
  return min(most, pl.cdiv(x.shape[1], LANES) * LANES)


def _halved(weight, bias, activation: str | None):
  """[W + 1, D] float32: taps from the newest token to the oldest, then the bias."""
  rows = jnp.concatenate([jnp.flip(weight, 1).T, bias[None]]).astype(jnp.float32)
  return 0.5 * rows if activation else rows


def _as_edge(state):
  """[B, W - 1, D] -> [B, 8, D], at the end."""
  return jnp.pad(state, ((0, 0), (HALO - state.shape[1], 0), (0, 0)))


class _Windows:
  """Which part of each array a grid step sees; `block(n)` is the block that step n works on."""

  def __init__(self, x, width: int, tokens: int, block):
    batch, length, channels = x.shape
    self._length, self._width, self._tokens = length, width, tokens
    tiles = pl.cdiv(channels, LANES)
    blocks = pl.cdiv(tiles, TILES)
    self._tiles = pl.cdiv(tiles, blocks)
    lanes = self._tiles * LANES
    self.grid = (batch, blocks, pl.cdiv(length, tokens))
    self.rows = pl.BlockSpec((1, tokens, lanes), lambda b, d, n: (b, block(n), d))
    # Rows of bfloat16 come in tiles of 16.
    self.rows_before = pl.BlockSpec(
      (1, 16, lanes), lambda b, d, n: (b, jnp.maximum(block(n) * (tokens // 16) - 1, 0), d)
    )
    self.weights = pl.BlockSpec((width + 1, lanes), lambda b, d, n: (0, d))
    self.edge = pl.BlockSpec((1, HALO, lanes), lambda b, d, n: (b, 0, d))
    self.sums = pl.BlockSpec((1, 2 * HALO, lanes), lambda b, d, n: (b, 0, d))
    self.marks_spec = pl.BlockSpec((1, 1, tokens), lambda b, d, n: (b, 0, block(n)))
    # A block in float32, and the rows that its taps need beside it.
    self.wide_rows = pltpu.VMEM((self._tiles, tokens + HALO, LANES), jnp.float32)
    self.masks = pltpu.VMEM((width, tokens + HALO, LANES), jnp.int32)
    self.partial_sums = pltpu.VMEM((self._tiles, width + 1, HALO, LANES), jnp.float32)
    self.compiler_params = pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    )

  def marks(self, reach):
    """[B, 1, N * tokens], the reach of each token; None where every tap of every row of every block
    counts."""
    tail = -self._length % self._tokens
    if reach is None and tail == 0:
      return None
    if reach is None:
      reach = jnp.full((self.grid[0], self._length), self._width - 1, jnp.int32)
    return jnp.pad(reach, ((0, 0), (0, tail)), constant_values=-1)[:, None]


def _set_masks(masks_ref, reach_ref):
  """Masks of all bits or none, [W, tokens + 8, 128]: for each j the tokens whose taps go so far
  back, the same in all lanes. An `and` with a mask that is kept is half of what a comparison and a
  choice cost."""
  for first in range(0, reach_ref.shape[2], LANES):
    rows = pl.ds(first, LANES)
    reach = jnp.broadcast_to(reach_ref[0, :, rows], (LANES, LANES)).T
    for j in range(masks_ref.shape[0]):
      masks_ref[j, rows] = jnp.where(reach >= j, -1, 0)


def _put_edge(rows_ref, edge):
  """Sets the rows before a block, [8, channels], in the buffer of wide rows."""
  for tile in range(rows_ref.shape[0]):
    rows_ref[tile, :HALO] = edge[:, tile * LANES : (tile + 1) * LANES].astype(jnp.float32)


def _for_each_tile(count: int, body):
  """Runs body(tile, its lanes)."""

  def step(tile, _):
    body(tile, pl.ds(pl.multiple_of(tile * LANES, LANES), LANES))
    return _

  jax.lax.fori_loop(0, count, step, None)


def _masked(masks_ref, j: int, first: int, x):
  """x, [ROWS, 128], where the taps of the tokens from `first` on go back j tokens; elsewhere 0."""
  if masks_ref is None:
    return x
  mask = masks_ref[j, pl.ds(first, ROWS)]
  return pltpu.bitcast(pltpu.bitcast(x, jnp.int32) & mask, jnp.float32)


def _half(x, wide_ref, tile, first: int, weights, masks_ref):
  """h (z where there is no activation) of x, the ROWS rows from `first` on."""
  h = weights[-1] + weights[0] * x
  for j, weight in enumerate(weights[1:-1], 1):
    tap = wide_ref[tile, pl.ds(first + HALO - j, ROWS)]
    h = h + weight * _masked(masks_ref, j, first, tap)
  return h


def _forward_kernel(
  x_ref, weights_ref, state_ref, reach_ref, y_ref, wide_ref, masks_ref, *, width, activation
):
  """wide_ref holds x in float32, and before it the last rows of the block before."""
  tokens = x_ref.shape[1]

  @pl.when(pl.program_id(2) == 0)
  def _():
    _put_edge(wide_ref, state_ref[0])

  if reach_ref is not None:
    _set_masks(masks_ref, reach_ref)

  def convolve(tile, lanes):
    weights = [weights_ref[pl.ds(j, 1), lanes] for j in range(width + 1)]
    for first in range(0, tokens, ROWS):
      rows = pl.ds(first, ROWS)
      x = x_ref[0, rows, lanes].astype(jnp.float32)
      wide_ref[tile, pl.ds(first + HALO, ROWS)] = x
      h = _half(x, wide_ref, tile, first, weights, masks_ref)
      y = h + h * jnp.tanh(h) if activation else h
      y_ref[0, rows, lanes] = _masked(masks_ref, 0, first, y).astype(y_ref.dtype)

  _for_each_tile(wide_ref.shape[0], convolve)
  wide_ref[:, :HALO] = wide_ref[:, tokens:]


def _backward_kernel(
  x_ref,
  x_before_ref,
  weights_ref,
  state_ref,
  reach_ref,
  dy_ref,
  dx_ref,
  sums_ref,
  dz_edge_ref,
  wide_ref,
  dz_ref,
  masks_ref,
  partial_ref,
  *,
  width,
  activation,
):
  """dz_ref holds the cotangents of h, and behind them the first ones of the block behind;
  partial_ref [tiles, W + 1, 8, 128] the sums over every eighth row."""
  tokens = x_ref.shape[1]
  step, last = pl.program_id(2), pl.num_programs(2) - 1

  @pl.when(step == 0)
  def _():
    dz_ref[:, tokens:] = jnp.zeros_like(dz_ref[:, tokens:])
    partial_ref[...] = jnp.zeros_like(partial_ref)

  @pl.when(step != 0)
  def _():
    dz_ref[:, tokens:] = dz_ref[:, :HALO]

  @pl.when(step == last)
  def _():
    _put_edge(wide_ref, state_ref[0])

  @pl.when(step != last)
  def _():
    _put_edge(wide_ref, x_before_ref[0, HALO:])

  if reach_ref is not None:
    masks_ref[:, tokens:] = masks_ref[:, :HALO]  # at first anything: those dz are 0
    _set_masks(masks_ref, reach_ref)

  def convolve(tile, lanes):
    weights = [weights_ref[pl.ds(j, 1), lanes] for j in range(width + 1)]
    for first in range(0, tokens, ROWS):
      rows = pl.ds(first, ROWS)
      x = _masked(masks_ref, 0, first, x_ref[0, rows, lanes].astype(jnp.float32))
      wide_ref[tile, pl.ds(first + HALO, ROWS)] = x
      dz = dy_ref[0, rows, lanes].astype(jnp.float32)
      if activation:
        h = _half(x, wide_ref, tile, first, weights, masks_ref)
        t = jnp.tanh(h)
        dz = dz * ((1 + t) + h * (1 - t * t))
      dz_ref[tile, rows] = _masked(masks_ref, 0, first, dz)

    # dz_{s+j} meets weight_j in dx_s, and x_s in dweight_j.
    sums = [partial_ref[tile, j] for j in range(width + 1)]
    for first in range(0, tokens, ROWS):
      rows = pl.ds(first, ROWS)
      x, dz = wide_ref[tile, pl.ds(first + HALO, ROWS)], dz_ref[tile, rows]
      sums[width] = _add_rows(sums[width], dz)
      dx = 0.0
      for j in range(width):
        if j:
          dz = _masked(masks_ref, j, first + j, dz_ref[tile, pl.ds(first + j, ROWS)])
        dx = dx + weights[j] * dz
        sums[j] = _add_rows(sums[j], x * dz)
      dx_ref[0, rows, lanes] = dx.astype(dx_ref.dtype)
    for j, total in enumerate(sums):
      partial_ref[tile, j] = total

  _for_each_tile(wide_ref.shape[0], convolve)

  @pl.when(step == last)
  def _():
    sums_ref[...] = jnp.zeros_like(sums_ref)
    for tile in range(wide_ref.shape[0]):
      lanes = pl.ds(tile * LANES, LANES)
      dz_edge_ref[0, :, lanes] = dz_ref[tile, :HALO]
      for j in range(width + 1):
        sums_ref[0, pl.ds(j, 1), lanes] = jnp.sum(partial_ref[tile, j], axis=0, keepdims=True)


def _add_rows(total, x):
  """total [8, 128] and every eight rows of x."""
  return sum((x[first : first + HALO] for first in range(0, ROWS, HALO)), total)
