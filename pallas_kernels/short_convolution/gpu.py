"""The backward pass of the depthwise causal convolution on GPU: one kernel.

Grid (T / chunk, D / channels, B). A program walks STEPS tokens in order, one row of `channels`
channels at a time. In its registers are the last W - 1 rows of x, as many rows of dx that are not
complete yet, and the sums that become dweight. A row of dx is complete W - 1 tokens later, so the
last W - 1 steps of a chunk read the first rows of the next.

Bytes, a token and channel, at b bytes a number: 3 b, and of the rows that two chunks read
2 b (2 W - 2) / STEPS, mostly from the cache; for sums 4 (W + 1) / STEPS. (XLA's own kernels for the
same, which keep dz and read x again for each tap of dweight, move 16 b.) Flops: 6 W and some 12 for
the activation. The forward pass has no kernel: XLA makes one of its shifts, which moves 2 b.

Rows need not be neighbours: the kernel is given the place of each, and so passes over padding.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

DTYPES = ("float32", "bfloat16")
WIDEST = 8
STEPS = 128
AT_ONCE = 4  # steps whose rows are on their way at a time


def refusal(x, weight) -> str | None:
  """Why the kernel cannot run on x [B, T, D] and weight [D, W], or None."""
  if str(x.dtype) not in DTYPES:
    return f"x is {x.dtype}, expected float32 or bfloat16"
  if weight.shape[1] > WIDEST:
    return f"width {weight.shape[1]} is above {WIDEST}"
  return None


def backward(
  x, weight, bias, state, rows, reach, dy, *, activation: str | None, interpret: bool = False
):
  """Gradients of the convolution, but for what the state adds to them.

      z_t = bias + sum_j weight[:, W-1-j] * x_{t-j} [j <= reach_t]        y_t = activation(z_t)

  Args:
    x: [B, T, D], float32 or bfloat16.   weight: [D, W].   bias: [D].
    state: [B, W - 1, D], the inputs before the first token.
    rows: [B, T] int32, the row of x of each token, every row once; None where they stand in order.
    reach: [B, T] int32, how many tokens back the taps of a token go, at most W - 1; below 0 it is
      padding, which has to stand behind all tokens in the order of `rows`. None means W - 1.
    dy: [B, T, D], the cotangent of y.
    activation: None or "silu".   interpret: run the kernel's program on the CPU.
  Returns:
    dx: [B, T, D] in the dtype of x;   dweight: [B, D, W] and dbias: [B, D], float32, of each row,
    through x alone;   dz: [B, W - 1, D] float32, the cotangents of the first z, from which the
    gradients through the state follow.
  """
  batch, length, channels = x.shape
  width = weight.shape[1]
  chunk = STEPS - (width - 1)
  chunks = pl.cdiv(length, chunk)
  lanes = 128 if width <= 4 else 64  # of one warp; what they need fits its registers
  whole = channels + -channels % lanes
  taps = jnp.concatenate([jnp.flip(weight, 1).T, bias[None]]).astype(jnp.float32)
  taps = jnp.pad(taps, ((0, 0), (0, whole - channels)))
  dx, sums, dz = pl.pallas_call(
    functools.partial(_kernel, chunk=chunk, lanes=lanes, activation=activation),
    grid=(chunks, pl.cdiv(channels, lanes), batch),
    out_shape=[
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      jax.ShapeDtypeStruct((batch, chunks, width + 1, whole), jnp.float32),
      jax.ShapeDtypeStruct((batch, max(width - 1, 1), channels), jnp.float32),
    ],
    compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
    cost_estimate=pl.CostEstimate(
      flops=6 * width * x.size,
      transcendentals=x.size if activation else 0,
      bytes_accessed=3 * x.size * x.dtype.itemsize,
    ),
    name="short_convolution_backward",
    interpret=interpret,
  )(x, taps, jnp.pad(state, ((0, 0), (0, width == 1), (0, 0))), rows, reach, dy)
  sums = sums.sum(1)[..., :channels]
  first = jnp.arange(width - 1)[:, None] < length  # of fewer tokens the kernel wrote fewer
  dweight = jnp.swapaxes(jnp.flip(sums[:, :width], 1), 1, 2)
  return dx, dweight, sums[:, width], jnp.where(first, dz[:, : width - 1], 0)


def _kernel(
  x_ref,
  taps_ref,
  state_ref,
  rows_ref,
  reach_ref,
  dy_ref,
  dx_ref,
  sums_ref,
  dz_ref,
  *,
  chunk: int,
  lanes: int,
  activation: str | None,
):
  chunk_index, block, b = (pl.program_id(axis) for axis in range(3))
  start, length = chunk_index * chunk, x_ref.shape[1]
  reaching = taps_ref.shape[0] - 2  # W - 1
  channels = pl.ds(block * lanes, lanes)
  exists = block * lanes + jnp.arange(lanes) < x_ref.shape[2]

  def load(ref, row, mask):
    found = plgpu.load(ref.at[b, row, channels], mask=exists & mask, other=0)
    return found.astype(jnp.float32)

  def store(ref, row, values, mask):
    plgpu.store(ref.at[b, row, channels], values.astype(ref.dtype), mask=exists & mask)

  def row(token):
    token = jnp.clip(token, 0, length - 1)
    return token if rows_ref is None else rows_ref[b, token]

  weights = [taps_ref[j, channels] for j in range(reaching + 2)]

  def before(j):  # the input j tokens before the chunk
    token = start - j
    of_state = load(state_ref, jnp.clip(reaching + token, 0, reaching - 1), token < 0)
    return of_state + load(x_ref, row(token), token >= 0)

  def step(token, x, dy, carry):
    earlier, pending, sums = carry
    there = token < length
    reach = None if reach_ref is None else reach_ref[b, jnp.clip(token, 0, length - 1)]
    reaches = [there if reach is None else there & (reach >= j) for j in range(reaching + 1)]
    taps = [jnp.where(far, tap, 0) for far, tap in zip(reaches, [x, *earlier], strict=True)]
    dz = dy
    if activation:
      z = weights[-1]
      for weight, tap in zip(weights[:-1], taps, strict=True):
        z = z + weight * tap
      s = jax.nn.sigmoid(z)
      dz = dy * (s + z * s * (1 - s))
    dz = jnp.where(reaches[0], dz, 0)
    store(dz_ref, jnp.clip(token, 0, max(reaching - 1, 0)), dz, there & (token < reaching))

    counted = jnp.where(token < start + chunk, dz, 0)
    of_x = [tap * jnp.where(token >= j, counted, 0) for j, tap in enumerate(taps)]
    sums = [total + term for total, term in zip(sums, [*of_x, counted], strict=True)]

    pending = [jnp.zeros_like(dz), *pending]
    pending = [
      total + jnp.where(far, weight * dz, 0)
      for total, weight, far in zip(pending, weights[:-1], reaches, strict=True)
    ]
    complete = token - reaching
    inside = (complete >= start) & (complete < length)
    store(dx_ref, row(complete), pending.pop(), inside)
    return [x, *earlier][:reaching], pending, sums

  def steps(group, carry):
    tokens = [start + group * AT_ONCE + i for i in range(AT_ONCE)]
    places = [row(token) for token in tokens]
    inputs = [
      (load(x_ref, place, token < length), load(dy_ref, place, token < length))
      for place, token in zip(places, tokens, strict=True)
    ]
    for token, (x, dy) in zip(tokens, inputs, strict=True):
      carry = step(token, x, dy, carry)
    return carry

  nothing = jnp.zeros(lanes, jnp.float32)
  earlier = [before(j) for j in range(1, reaching + 1)]
  carry = (earlier, [nothing] * reaching, [nothing] * (reaching + 2))
  *_, sums = jax.lax.fori_loop(0, STEPS // AT_ONCE, steps, carry)
  for j, total in enumerate(sums):
    sums_ref[b, chunk_index, j, channels] = total
