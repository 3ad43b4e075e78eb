"""Rows of any length by the kernels for TPU: longer ones than fit on the chip are folded.

A row of T = P M tokens, filled up with as many zeros, is folded R = 2 P times,

    x_r[n] = sum_p w_R^(r p) x[n + M p],        w_R = exp(-2 pi i / R),  r < R

and frequencies of residue r modulo R are a transform of x_r alone, which fits. Folded rows go
through HBM, complex float32, a group of pairs of rows at a time; two kernels fold and unfold, by
sums and differences in registers.

Bytes, a token and channel, at b bytes a number, with both gates: forward 8 + 2 b to fold, 16 for
the convolution, 8 + 2 b to unfold; backward 16 + 4 b, 32 and 16 + 6 b.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.long_convolution import tpu
from pallas_kernels.long_convolution.fourier import mixed_dtypes

SMALLEST_VMEM = 16 * 2**20  # of the smallest chip: what a program without a mesh is made for
RESIDUES = (1, 4, 8, 16, 32, 64, 128)  # folding holds all of them in registers or near them
# Tokens: products that are deeper than a matrix unit cost more than another fold.
LONGEST_FOLDED = 4096
GROUP_BYTES = 2**31  # of folded rows
WINDOW_BYTES = 2**21  # of those in a step
TILE = 16  # tokens at a time: a register of bfloat16 numbers


class Sizes(NamedTuple):
  """Of the kernels of both directions, of which forward may hold longer rows."""

  forward: tpu.Sizes
  backward: tpu.Sizes

  @classmethod
  def of(cls, length: int, dtype, gates: int, vmem: int | None = None) -> Sizes:
    """For rows of that many tokens with so many gates, on a chip with so many bytes of VMEM; None
    means that which the program is for."""
    vmem = _chip_vmem() if vmem is None else vmem
    return cls(*(_sizes(length, dtype, gates, vmem, backward) for backward in (False, True)))

  @property
  def points(self) -> int:
    """N of the filters that `spectra` takes."""
    return self.backward.points


def _chip_vmem() -> int:
  return pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else SMALLEST_VMEM


def _sizes(length: int, dtype, gates: int, vmem: int, backward: bool) -> tpu.Sizes:
  """Those of the fewest residues that fit on the chip."""
  for residues in RESIDUES:
    sizes = tpu.Sizes.of(length, dtype, residues)
    shallow = residues == 1 or sizes.tokens <= LONGEST_FOLDED
    if shallow and _shortage(sizes, dtype, gates, vmem, backward) is None:
      break
  return sizes


def _shortage(sizes: tpu.Sizes, dtype, gates: int, vmem: int, backward: bool) -> str | None:
  """Why a call does not fit on the chip, or None."""
  itemsize = 4 if sizes.residues > 1 else jnp.dtype(dtype).itemsize
  needed = tpu.vmem_bytes(sizes, itemsize, gates, backward=backward)
  if needed <= vmem * 3 // 4:  # the compiler's own buffers take the rest
    return None
  return f"{sizes.tokens} tokens need {needed >> 20} MiB of VMEM, and {vmem >> 20} are there"


def refusal(u, *gates) -> str | None:
  """Why the kernels cannot run on u [B, T, D] with gates, some of which may be None; or None."""
  if (reason := mixed_dtypes(u, *gates)) is not None:
    return reason
  gates = sum(gate is not None for gate in gates)
  sizes = Sizes.of(u.shape[1], u.dtype, gates).backward
  return _shortage(sizes, u.dtype, gates, _chip_vmem(), True)


def matmul_flops(shape: tuple[int, int, int], dtype, vmem: int) -> int:
  """Of the products of a forward pass over rows [B, T, D] with both gates."""
  batch, length, channels = shape
  sizes = Sizes.of(length, dtype, 2, vmem)
  return tpu.matmul_flops(sizes.forward, batch, channels)


def spectra(c, sizes: tpu.Sizes) -> tuple[jax.Array]:
  """That of filters c [D, N], lags from 0 on in front and later tokens at the end, N being that of
  either direction."""
  count = min(c.shape[1], sizes.points)
  zeros = jnp.zeros((c.shape[0], sizes.points - count), c.dtype)
  c = jnp.concatenate([c[:, : count // 2], zeros, c[:, c.shape[1] - count // 2 :]], 1)
  return (tpu.spectrum(c, sizes),)


def forward(u, spectra, skip, pre_gate, post_gate, sizes: tpu.Sizes):
  """y [B, T, D] of `tpu.forward`, with the `spectra` of `sizes`."""
  (spectrum,) = spectra
  if sizes.residues == 1:
    y = tpu.forward(u, spectrum, skip, pre_gate, post_gate, sizes)
    return y[:, : u.shape[1]]
  rows, skip = _Rows(u, sizes), skip / sizes.residues  # which unfolding adds up

  def group(start, ys):
    x = fold(rows.of(u, pre_gate), start, rows.group, sizes)
    x = tpu.forward(x, spectrum, skip, None, None, sizes)
    return unfold(x, rows.of(post_gate), ys, start, sizes)

  (y,) = rows.in_groups(group, 1)
  return y


def backward(u, spectra, skip, pre_gate, post_gate, dy, sizes: tpu.Sizes):
  """The gradients of `tpu.backward`; for the spectrum there are those of `spectra`."""
  (spectrum,) = spectra
  if sizes.residues == 1:
    du, dspectrum, *gates, _ = tpu.backward(u, spectrum, skip, pre_gate, post_gate, dy, sizes)
    length = u.shape[1]
    return du[:, :length], (dspectrum,), *(x if x is None else x[:, :length] for x in gates)
  rows, skip = _Rows(u, sizes), skip / sizes.residues
  has_pre, has_post = pre_gate is not None, post_gate is not None

  def group(start, carry):
    dspectrum, *results = carry
    x = fold(rows.of(u, pre_gate), start, rows.group, sizes)
    dx = fold(rows.of(dy, post_gate), start, rows.group, sizes)
    dx, added, _, _, y = tpu.backward(x, spectrum, skip, None, None, dx, sizes, output=has_post)
    mine, post = results[: 1 + has_pre], results[1 + has_pre :]
    mine = unfold(dx, rows.of(pre_gate, u) if has_pre else [], mine, start, sizes)
    if has_post:
      post = unfold(y, rows.of(dy), post, start, sizes)
    return dspectrum + added, *mine, *post

  dspectrum, du, *gates = rows.in_groups(group, 1 + has_pre + has_post, jnp.zeros_like(spectrum))
  dpre = gates.pop(0) if has_pre else None
  return du, (dspectrum,), dpre, gates.pop() if has_post else None


class _Rows:
  """Arrays of rows as the kernels take them, and their groups."""

  def __init__(self, u, sizes: tpu.Sizes):
    (self.batch, self.length, channels), self.dtype = u.shape, u.dtype
    self.sizes = sizes
    pairs = -(-self.batch // 2)
    self.shape = (2 * pairs, sizes.residues // 2, sizes.tokens, channels)
    most = max(GROUP_BYTES // (8 * sizes.points * channels), 1)
    self.group = max(size for size in range(1, min(most, pairs) + 1) if pairs % size == 0)

  def of(self, *arrays) -> list:
    """[2 pairs, P, M, D], of those that are not None; None alone gives nothing."""
    filled = self.shape[1] * self.shape[2]
    fill = (0, self.shape[0] - self.batch), (0, filled - self.length), (0, 0)
    return [jnp.pad(x, fill).reshape(self.shape) for x in arrays if x is not None]

  def in_groups(self, body, count: int, *carry):
    """`carry`, and `count` arrays [B, T, D], of which each call of `body(start, carry)` makes those
    of a group of pairs, from pair `start` on."""
    empty = [jax.lax.empty(self.shape, self.dtype)] * count
    groups = self.shape[0] // 2 // self.group
    results = jax.lax.fori_loop(
      0, groups, lambda i, carry: body(i * self.group, carry), (*carry, *empty)
    )
    rows = (
      x.reshape(self.shape[0], -1, self.shape[3])[: self.batch, : self.length]
      for x in results[len(carry) :]
    )
    return *results[: len(carry)], *rows


def fold(factors: Sequence, start, group: int, sizes: tpu.Sizes, *, interpret=False):
  """The product of some rows [2 pairs, P, M, D], folded.

  Args:
    start, group: the first pair of rows, and how many are folded.
  Returns:
    [2 group, R M, D] float32: of a pair the real parts, then the imaginary ones, one residue behind
    another.
  """
  channels = factors[0].shape[-1]
  shape = (2 * group, sizes.residues, sizes.tokens, channels)
  grid, of_rows, of_folded = _windows(channels, group, sizes)

  def kernel(_, factor_refs, folded_ref):
    def at(tile):
      rows = [
        [_product([ref[row, p, tile] for ref in factor_refs]) for row in range(2)]
        for p in range(sizes.residues // 2)
      ]
      for r, parts in enumerate(_fourier([*rows, *[None] * len(rows)], 1)):
        for part in range(2):
          folded_ref[part, r, tile] = parts[part]

    _each_tile(folded_ref.shape[2], at)

  folded = pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1, grid=grid, in_specs=[[of_rows] * len(factors)], out_specs=of_folded
    ),
    out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
    compiler_params=_PARALLEL,
    cost_estimate=_cost(channels, group, sizes, len(factors) * factors[0].dtype.itemsize),
    name="long_convolution_fold",
    interpret=interpret,
  )(_scalar(start), list(factors))
  return folded.reshape(2 * group, -1, channels)


def unfold(
  folded, multipliers: Sequence, results: Sequence, start, sizes: tpu.Sizes, *, interpret=False
) -> list:
  """`results`, rows [2 pairs, P, M, D], with those from pair `start` on made of folded ones, each
  times one of the multipliers, arrays like these; without any, one result that is not multiplied.
  """
  group, channels = folded.shape[0] // 2, folded.shape[-1]
  grid, of_rows, of_folded = _windows(channels, group, sizes)

  def kernel(_, folded_ref, multiplier_refs, _before, *result_refs):
    def at(tile):
      parts = [[folded_ref[part, r, tile] for part in range(2)] for r in range(sizes.residues)]
      for p, rows in enumerate(_fourier(parts, -1)[: sizes.residues // 2]):
        for row in range(2):
          for index, ref in enumerate(result_refs):
            more = [multiplier_refs[index][row, p, tile]] if multiplier_refs else []
            ref[row, p, tile] = _product([rows[row], *more]).astype(ref.dtype)

    _each_tile(folded_ref.shape[2], at)

  first = 2 + len(multipliers)  # behind the scalar, folded rows and multipliers
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=grid,
      in_specs=[
        of_folded,
        [of_rows] * len(multipliers),
        [pl.BlockSpec(memory_space=pl.ANY)] * len(results),
      ],
      out_specs=[of_rows] * len(results),
    ),
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
    input_output_aliases={first + index: index for index in range(len(results))},
    compiler_params=_PARALLEL,
    cost_estimate=_cost(
      channels, group, sizes, (len(multipliers) + len(results)) * results[0].dtype.itemsize
    ),
    name="long_convolution_unfold",
    interpret=interpret,
  )(
    _scalar(start),
    folded.reshape(2 * group, sizes.residues, sizes.tokens, channels),
    list(multipliers),
    list(results),
  )


_PARALLEL = pltpu.CompilerParams(
  dimension_semantics=("parallel",) * 3, vmem_limit_bytes=SMALLEST_VMEM
)


def _scalar(start):
  return jnp.full(1, start, jnp.int32)


def _windows(channels: int, group: int, sizes: tpu.Sizes):
  """The grid (pairs, D / 128, tokens), and the windows of rows and of folded rows."""
  lanes = min(channels, tpu.LANES)
  tokens = max(min(WINDOW_BYTES // (8 * tpu.LANES * sizes.residues), sizes.tokens), TILE)
  grid = (group, pl.cdiv(channels, lanes), sizes.tokens // tokens)
  of_rows = pl.BlockSpec(
    (2, sizes.residues // 2, tokens, lanes), lambda i, j, n, start: (start[0] + i, 0, n, j)
  )
  of_folded = pl.BlockSpec((2, sizes.residues, tokens, lanes), lambda i, j, n, start: (i, 0, n, j))
  return grid, of_rows, of_folded


def _cost(channels: int, group: int, sizes: tpu.Sizes, row_bytes: int) -> pl.CostEstimate:
  points = group * channels * sizes.points
  return pl.CostEstimate(
    flops=round(5 * points * math.log2(sizes.residues)),
    transcendentals=0,
    bytes_accessed=points * (8 + row_bytes),  # half as many tokens, of two rows
  )


def _each_tile(tokens: int, body) -> None:
  def at(index, carry):
    body(pl.ds(pl.multiple_of(index * TILE, TILE), TILE))
    return carry

  jax.lax.fori_loop(0, tokens // TILE, at, 0)


def _product(factors):
  return functools.reduce(jnp.multiply, (x.astype(jnp.float32) for x in factors))


def _fourier(x: list, sign: int) -> list:
  """sum_p exp(-sign 2 pi i r p / R) x_p for each r, of complex numbers as pairs; None is zero."""
  count = len(x)
  if count == 1:
    return x
  even, odd = _fourier(x[::2], sign), _fourier(x[1::2], sign)
  if odd[0] is None:
    return even + even
  odd = [_turned(number, sign * r, count) for r, number in enumerate(odd)]
  pairs = list(zip(even, odd, strict=True))
  return [
    *([a + b for a, b in zip(*pair, strict=True)] for pair in pairs),
    *([a - b for a, b in zip(*pair, strict=True)] for pair in pairs),
  ]


def _turned(number, turns: int, count: int):
  """exp(-2 pi i turns / count) times a complex number."""
  real, imaginary = number
  if turns == 0:
    return number
  if 4 * turns == count:
    return [imaginary, -real]
  if 4 * turns == -count:
    return [-imaginary, real]
  angle = 2 * math.pi * turns / count
  cosine, sine = math.cos(angle), math.sin(angle)
  return [cosine * real + sine * imaginary, cosine * imaginary - sine * real]
