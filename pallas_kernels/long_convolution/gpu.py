"""Gated long convolution on GPU by Fourier transforms on tensor cores, for rows of any length.

A row of T = rows * columns tokens is filled up with as many zeros, N = 2 T; two rows of a batch are
one complex row. With token n = n1 columns + n2 and frequency k = k1 + N1 k2, N1 = 2 rows, a
transform is

    A[k1, n2] = sum_n1 w_N1^(k1 n1) x[n1, n2]                    w_n = exp(-2 pi i / n)
    X[k1, k2] = sum_n2 w_columns^(n2 k2) w_N^(k1 n2) A[k1, n2]

and back the same with conjugates. No multiprocessor holds a row, so there are three kernels:

  transform       A of one n2, a tile of k1 and a tile of channels a program: the product of a
                  constant matrix with tokens that stand `columns` apart.
  filter          X of one k1 and a few channels a program, times the spectrum of the filters, and
                  back, in its registers; over 256 columns in two steps of 16.
  transform_back  the tokens again, with what stands around the convolution.

The backward pass is made of the same, with a filter kernel that also sums the gradient of the
spectrum: a program walks the pairs of rows in order. Channels stand in the last axis of all: no
array is transposed, and neighbours are loaded together.

Rows and channels are taken in groups, one after another, whose A (complex float32) has GROUP_BYTES
at most, or is of one pair of rows and one tile of channels: about what a second-level cache holds,
and all that memory has to hold beside the arrays.

Products are of bfloat16 parts of the operands, as on TPU: three for two parts, six for three.

Bytes, a token and channel, at b bytes a number and with both gates: of rows forward 6 b, backward
14 b; of A, to the cache, forward 32, backward 64; of the spectrum 8 N D, or 24 N D backward, for
each group of rows. Flops, for each of those products: forward 8 N1 + 256, or 512 of 256 columns;
backward twice that.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.chunks_gpu import add, split, tile_size
from pallas_kernels.long_convolution.fourier import (
  PARTS,
  angles,
  in_parts,
  mixed_dtypes,
  real_matrix,
)

refusal = mixed_dtypes

GROUP_BYTES = 2**25  # caches of A100, H100 and RTX 4090 hold 40, 50 and 72 MiB
LANES = 64  # channels of a program that multiplies by a matrix of N1
TALL, DEPTH = 64, 32  # rows of that matrix of a program, columns of a step
POINTS = 2048  # complex numbers of a program that multiplies by the spectrum
RADIX = 16  # of a transform over columns
COLUMNS = {RADIX: 1, RADIX**2: 2}  # -> how many such transforms
MULTIPLE = 8  # of rows
MOVED = 256  # multiply-adds that are thought to take as long as moving a number through all kernels
FAR = np.int32(2**31 - 1)  # no row of an array


class Sizes(NamedTuple):
  """Of the transform of a row: n1 of tokens, and n2."""

  rows: int
  columns: int

  @classmethod
  def of(cls, length: int) -> Sizes:
    """The cheapest for rows of that many tokens."""
    sizes = (cls(pl.cdiv(length, MULTIPLE * n) * MULTIPLE, n) for n in COLUMNS)
    return min(sizes, key=lambda sizes: sizes.points * (sizes.products + MOVED))

  @property
  def tokens(self) -> int:
    """T, filled up."""
    return self.rows * self.columns

  @property
  def half(self) -> int:
    """N1, the number of k1."""
    return 2 * self.rows

  @property
  def points(self) -> int:
    """N."""
    return 2 * self.tokens

  @property
  def products(self) -> int:
    """Multiply-adds forward, for each of the N."""
    return 4 * self.half + 8 * RADIX * COLUMNS[self.columns]


@dataclasses.dataclass(frozen=True)
class Plan:
  """The sizes of a call.

  Attributes:
    batch, length, channels: B, T, D.   dtype: of the rows.   sizes: of the transform.
    pairs: of rows in a group.   width: channels in a group, whole tiles.
  """

  batch: int
  length: int
  channels: int
  dtype: jnp.dtype
  sizes: Sizes
  pairs: int
  width: int

  @classmethod
  def of(cls, u, sizes: Sizes, spectra: int) -> Plan:
    """For rows u [B, T, D] of which a group has so many arrays A."""
    batch, _, channels = u.shape
    lanes = min(LANES, tile_size(channels))
    room = max(GROUP_BYTES // (8 * sizes.points * lanes * spectra), 1)  # tiles of one pair
    tiles, pairs = pl.cdiv(channels, lanes), pl.cdiv(batch, 2)
    wide = pl.cdiv(tiles, pl.cdiv(tiles, room))  # groups of about one size
    pairs = pl.cdiv(pairs, pl.cdiv(pairs, room // wide))
    return cls(*u.shape, u.dtype, sizes, pairs, wide * lanes)

  @property
  def lanes(self) -> int:
    """Channels of a tile."""
    return min(LANES, tile_size(self.channels))

  @property
  def groups(self) -> tuple[int, int]:
    """Of channels, and of pairs."""
    return pl.cdiv(self.channels, self.width), pl.cdiv(pl.cdiv(self.batch, 2), self.pairs)

  def walk(self, step, results):
    """`step(group, results)` for each group, `group` [2] being its number among those of pairs and
    among those of channels; the results of the last."""
    count = math.prod(self.groups)
    if count == 1:
      return step(jnp.zeros(2, jnp.int32), results)
    pairs = np.int32(self.groups[1])

    def body(number, results):
      return step(jnp.stack([jax.lax.rem(number, pairs), jax.lax.div(number, pairs)]), results)

    return jax.lax.fori_loop(0, count, body, results)

  def call(
    self, kernel, grid, out_shape, *, name: str, products: int, rows=0, of_a=1, spectra=0,
    aliases=None, warps=4, interpret,
  ):  # fmt: skip
    """A `pallas_call` of `kernel(*refs, plan=plan)`, which sees whole arrays.

    Args:
      products: multiply-adds for each point.
      rows, of_a, spectra: how many arrays of rows, A and spectra the kernel reads and writes, of
        its group.
      aliases: number of an argument -> of the result that takes its place.
    """
    points = self.pairs * self.sizes.points * self.width
    tokens = 2 * self.pairs * self.length * self.width

    def run(*arrays):
      return pl.pallas_call(
        functools.partial(kernel, plan=self),
        grid=grid,
        out_shape=out_shape,
        input_output_aliases=aliases or {},
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        cost_estimate=pl.CostEstimate(
          flops=2 * points * products * _count(self.dtype),
          transcendentals=0,
          bytes_accessed=rows * tokens * self.dtype.itemsize
          + 8 * (of_a * points + spectra * self.sizes.points * self.width),
        ),
        name=f"long_convolution_{name}",
        interpret=interpret,
      )(*arrays)

    return run

  def _grid(self, rows: int) -> tuple[int, int, int]:
    """Of a kernel that multiplies by a matrix of so many rows."""
    tiles = rows // math.gcd(rows, TALL) * (self.width // self.lanes)
    return tiles, self.sizes.columns, self.pairs

  def transform(self, group, arrays, interpret):
    """A of the product of arrays, some of which may be None: rows [pairs, 2 N1, columns] of `width`
    channels, real parts above imaginary ones."""
    sizes, of_rows = self.sizes, [self.flat(x) for x in arrays if x is not None]
    return self.call(
      _transform_kernel,
      self._grid(2 * sizes.half),
      jax.ShapeDtypeStruct((self.pairs * 2 * sizes.points, self.width), jnp.float32),
      name="transform",
      products=2 * sizes.half,
      rows=len(of_rows),
      interpret=interpret,
    )(group, _tables(sizes, PARTS[str(self.dtype)]).first, of_rows)

  def transform_back(self, group, of_a, arrays, skip, factors, results, interpret):
    """Writes tokens + skip * s, s the product of arrays, times each of the factors, to results."""
    sizes = self.sizes
    arrays, factors = (
      [None if x is None else self.flat(x) for x in of] for of in (arrays, factors)
    )
    arrays = [x for x in arrays if x is not None]
    results = [self.flat(x) for x in results]
    before = 4 + len(arrays) + sum(x is not None for x in factors)
    found = self.call(
      _transform_back_kernel,
      self._grid(2 * sizes.rows),
      [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
      name="transform_back",
      products=2 * sizes.half,
      rows=before - 4 + len(results),
      aliases={before + i: i for i in range(len(results))},
      interpret=interpret,
    )(
      group, _tables(sizes, PARTS[str(self.dtype)]).first_back, skip, of_a, arrays, factors, results
    )
    return [x.reshape(self.batch, self.length, self.channels) for x in found]

  def filter(self, kernel, name: str, group, spectrum, carried, interpret):
    """What `kernel` makes of `carried`, in its place: arrays A, and a gradient."""
    sizes = self.sizes
    tables = _tables(sizes, PARTS[str(self.dtype)])
    lanes = min(POINTS // sizes.columns, self.lanes)
    # Of a thread, in whose registers three parts of float32 leave no room at 16 warps.
    points = 8 if self.dtype == jnp.float32 else 4
    gradient = len(carried) > 1
    constants = [x for x in (tables.second, tables.twiddles, tables.inner) if x is not None]
    return self.call(
      functools.partial(kernel, lanes=lanes),
      (sizes.half, self.width // lanes),
      [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in carried],
      name=name,
      products=8 * RADIX * COLUMNS[sizes.columns] * (1 + gradient),
      of_a=2 * (1 + gradient),
      spectra=1 + 2 * gradient,
      aliases={2 + len(constants) + i: i for i in range(len(carried))},
      warps=max(4, sizes.columns * lanes // (32 * points)),
      interpret=interpret,
    )(group, spectrum, constants, carried)

  def flat(self, x):
    """[B, T, D] as rows of channels."""
    return x.reshape(-1, self.channels)


def _count(dtype) -> int:
  parts = PARTS[str(dtype)]
  return parts * (parts + 1) // 2


def spectra(c, sizes: Sizes) -> tuple[jax.Array]:
  """The one of filters c [D, N], lags from 0 on in front and later tokens at the end: [N1, 2,
  columns, D] float32, over N, real parts above imaginary ones, in the order [k1, k2]."""
  x = jnp.fft.fft(c) / sizes.points
  x = x.reshape(-1, sizes.columns, sizes.half).transpose(2, 1, 0)
  return (jnp.stack([x.real, x.imag], 1),)


def forward(u, spectra, skip, pre_gate, post_gate, sizes: Sizes, *, interpret=False):
  """y = post_gate * (c * g + skip * g), g = pre_gate * u, c * g the convolution.

  Args:
    u: [B, T, D].   spectra: of the filters, see there.   skip: [D] float32.
    pre_gate, post_gate: [B, T, D] in the dtype of u, or None.
    sizes: of T.   interpret: run the kernels' programs on the CPU.
  Returns:
    [B, T, D] in the dtype of u.
  """
  plan, spectrum = Plan.of(u, sizes, 1), _flat(spectra)

  def step(group, results):
    of_g = plan.transform(group, (u, pre_gate), interpret)
    (of_g,) = plan.filter(_filter_kernel, "filter", group, spectrum, (of_g,), interpret)
    around = (skip, (post_gate,), results)
    return plan.transform_back(group, of_g, (u, pre_gate), *around, interpret)

  (y,) = plan.walk(step, [jnp.zeros_like(u)])
  return y


def backward(u, spectra, skip, pre_gate, post_gate, dy, sizes: Sizes, *, interpret=False):
  """Gradients of `forward`, but for skip: one more weight of lag 0, whose gradient it has.

  Args:
    dy: [B, T, D], the cotangent of y.   The rest: as given to `forward`.
  Returns:
    du, dspectra, and those of the gates, None for None. Rows are in the dtype of u, dspectra
    float32, summed over the rows.
  """
  plan, spectrum = Plan.of(u, sizes, 2), _flat(spectra)
  g, of_y = (u, pre_gate), (dy, post_gate)
  factors = (pre_gate,) if pre_gate is None else (pre_gate, u)

  def step(group, results):
    dspectrum, dg, dpost = results
    of_g, of_dy = (plan.transform(group, x, interpret) for x in (g, of_y))
    carried = (of_g, of_dy, dspectrum)
    of_g, of_dy, dspectrum = plan.filter(
      _filter_backward_kernel, "filter_backward", group, spectrum, carried, interpret
    )
    dg = plan.transform_back(group, of_dy, of_y, skip, factors, dg, interpret)
    if post_gate is not None:
      dpost = plan.transform_back(group, of_g, g, skip, (dy,), dpost, interpret)
    return dspectrum, dg, dpost

  rows = [jnp.zeros_like(u)]
  start = (jnp.zeros_like(spectrum), rows * len(factors), rows * (post_gate is not None))
  dspectrum, (du, *dpre), dpost = plan.walk(step, start)
  dspectrum = dspectrum.reshape(spectra[0].shape)
  return du, (dspectrum,), *(x[0] if x else None for x in (dpre, dpost))


def _flat(spectra):
  (spectrum,) = spectra
  return spectrum.reshape(-1, spectrum.shape[-1])


class _Tables(NamedTuple):
  """Constants: matrices [parts, ...] in bfloat16, the second's cosines and sines apart; twiddles
  [2, N1, columns] of w_N^(k1 n2), and [2, n, n] between two transforms of n, or None."""

  first: np.ndarray
  first_back: np.ndarray
  second: np.ndarray
  twiddles: np.ndarray
  inner: np.ndarray | None


@functools.lru_cache(maxsize=8)
def _tables(sizes: Sizes, parts: int) -> _Tables:
  half, n1, k1, n2 = sizes.half, *(np.arange(n) for n in (sizes.rows, sizes.half, sizes.columns))
  n = np.arange(RADIX)
  second = np.stack([np.cos(turns := angles(n, n, RADIX)), np.sin(turns)])
  return _Tables(
    in_parts(real_matrix(k1, n1, half), parts),
    in_parts(real_matrix(n1, -k1, half), parts),
    in_parts(second, parts),
    _turns(angles(k1, n2, sizes.points)),
    _turns(angles(n, n, sizes.columns)) if COLUMNS[sizes.columns] > 1 else None,
  )


def _turns(turns: np.ndarray) -> np.ndarray:
  return np.stack([np.cos(turns), np.sin(turns)]).astype(np.float32)


def _product(matrix: list, x, dtype):
  """A matrix in parts times x float32: the products of parts that matter, the small ones first."""
  parts, x = len(matrix), split(x, dtype)
  pairs = sorted(((i, j) for i in range(parts) for j in range(parts - i)), key=sum)
  return add(
    jnp.dot(matrix[i], x[j], preferred_element_type=jnp.float32) for i, j in reversed(pairs)
  )


class _Product:
  """A tile of a matrix [parts, M, K] times rows of channels: what a program's first index is of.

  Attributes:
    at, rows: first row of the tile, and how many.   channel: first channel in the group.
  """

  def __init__(self, plan: Plan, table_ref):
    self.plan, self.table_ref = plan, table_ref
    _, height, _ = table_ref.shape
    self.rows = math.gcd(height, TALL)
    index, tiles = pl.program_id(0), np.int32(height // self.rows)
    self.at = jax.lax.rem(index, tiles) * self.rows  # not // and %, which ask for signs
    self.channel = jax.lax.div(index, tiles) * plan.lanes

  def times(self, load_x):
    """[rows, lanes] of the product with x [K, lanes], of which load_x(k, count) gives rows."""
    parts, _, width = self.table_ref.shape
    depth = math.gcd(width, DEPTH)

    def step(number, total):
      k = number * depth
      matrix = [
        self.table_ref[part, pl.ds(self.at, self.rows), pl.ds(k, depth)] for part in range(parts)
      ]
      return total + _product(matrix, load_x(k, depth), self.plan.dtype)

    total = jnp.zeros((self.rows, self.plan.lanes), jnp.float32)
    return jax.lax.fori_loop(0, width // depth, step, total)


class _Tokens:
  """Where tokens n1 of a pair of rows stand, for one n2 and a tile of channels."""

  def __init__(self, plan: Plan, group_ref, channel):
    self.plan, self.n2 = plan, pl.program_id(1)
    self.pair = group_ref[0] * plan.pairs + pl.program_id(2)
    self.channels = group_ref[1] * plan.width + channel + jnp.arange(plan.lanes)

  def at(self, n1, count: int):
    """Index and mask of `count` n1 of both rows, those of the second behind those of the first."""
    plan, n1 = self.plan, n1 + jnp.arange(count)
    second = n1 >= plan.sizes.rows
    row = 2 * self.pair + second.astype(jnp.int32)
    token = (n1 - jnp.where(second, plan.sizes.rows, 0)) * plan.sizes.columns + self.n2
    exist = (row < plan.batch) & (token < plan.length)
    return _places(row * plan.length + token, exist, self.channels, self.channels < plan.channels)


def _places(rows, rows_exist, channels, channels_exist):
  """Index and mask of a tile. Rows that do not exist are far outside, as channels are: a program
  that is interpreted writes what the mask keeps from changing, and would write it over another.
  Neighbours stay neighbours, for loads of several at once."""
  mask = rows_exist[:, None] & channels_exist[None, :]
  rows, channels = jnp.where(rows_exist, rows, FAR)[:, None], channels[None, :]
  return tuple(jnp.broadcast_to(x, mask.shape) for x in (rows, channels)), mask


def _load(ref, place):
  index, mask = place
  return plgpu.load(ref.at[index], mask=mask, other=0).astype(jnp.float32)


def _store(ref, place, x):
  index, mask = place
  plgpu.store(ref.at[index], x.astype(ref.dtype), mask=mask)


def _load_product(refs, place):
  return functools.reduce(jnp.multiply, [_load(ref, place) for ref in refs])


def _transform_kernel(group_ref, table_ref, row_refs, out_ref, *, plan: Plan):
  product = _Product(plan, table_ref)
  tokens = _Tokens(plan, group_ref, product.channel)
  column = _column(plan, product.channel)
  found = product.times(lambda n1, count: _load_product(row_refs, tokens.at(n1, count)))
  out_ref[column(product.at, product.rows)] = found


def _column(plan: Plan, channel):
  """Of A the rows k1, real ones and imaginary ones, for one n2 and a tile of channels: a function
  of the first and how many that gives their index."""
  sizes, n2 = plan.sizes, pl.program_id(1)
  start = pl.program_id(2) * 2 * sizes.half

  def at(k1, count: int):
    rows = pl.Slice((start + k1) * sizes.columns + n2, count, sizes.columns)
    return rows, pl.ds(channel, plan.lanes)

  return at


def _transform_back_kernel(
  group_ref, table_ref, skip_ref, a_ref, row_refs, factor_refs, _, *out_refs, plan: Plan
):
  product = _Product(plan, table_ref)
  tokens = _Tokens(plan, group_ref, product.channel)
  column = _column(plan, product.channel)
  found = product.times(lambda k1, count: a_ref[column(k1, count)])
  place = tokens.at(product.at, product.rows)
  exist = tokens.channels < plan.channels
  skip = plgpu.load(skip_ref.at[jnp.where(exist, tokens.channels, 0)], mask=exist, other=0)
  found += skip[None, :] * _load_product(row_refs, place)
  for factor_ref, out_ref in zip(factor_refs, out_refs, strict=True):
    factor = 1 if factor_ref is None else _load(factor_ref, place)
    _store(out_ref, place, found * factor)


def _times(x, y, conjugate: bool = False):
  """x y, or conj(x) y, of complex numbers."""
  (a, b), (c, d) = x, y
  if conjugate:
    return a * c + b * d, a * d - b * c
  return a * c - b * d, a * d + b * c


class _Columns:
  """The numbers of one k1 and a tile of channels, and their transform over n2.

  Complex numbers are two arrays [n, m, lanes], n2 (or k2) being n m-tuples; m is n or 1.
  """

  def __init__(self, plan: Plan, group_ref, constant_refs, lanes: int):
    self.plan, self.shape = plan, (RADIX, plan.sizes.columns // RADIX, lanes)
    self.second_ref, self.twiddles_ref, *self.inner_ref = constant_refs
    self.k1, self.channel = pl.program_id(0), pl.program_id(1) * lanes
    self._first_channel = group_ref[1] * plan.width

  def load(self, ref, pair):
    """A, with its twiddles."""
    x = tuple(ref[index] for index in self._places(pair))
    return _times(self._twiddles(), x, conjugate=True)

  def store(self, ref, pair, x) -> None:
    """Back, from what `transform(back=True)` gives."""
    for index, part in zip(self._places(pair), _times(self._twiddles(), x), strict=True):
      ref[index] = part

  def load_spectrum(self, ref):
    return tuple(_load(ref, place) for place in self._spectrum())

  def store_spectrum(self, ref, x) -> None:
    for place, part in zip(self._spectrum(), x, strict=True):
      _store(ref, place, part)

  def transform(self, x, back: bool = False):
    """Over n2, or back over k2."""
    x = self._by_radix(x, back)
    if not self.inner_ref:
      return x
    row, column, _ = self._axes()
    turns = tuple(self.inner_ref[0][part, row, column] for part in range(2))
    x = _times(turns, x, conjugate=not back)
    return self._by_radix(tuple(part.transpose(1, 0, 2) for part in x), back)

  def _by_radix(self, x, back: bool):
    flat = self.shape[0], -1
    of_cosines, of_sines = (
      tuple(_product(matrix, part.reshape(flat), self.plan.dtype) for part in x)
      for matrix in (self._matrix(0), self._matrix(1))
    )
    sign = -1 if back else 1
    x = of_cosines[0] + sign * of_sines[1], of_cosines[1] - sign * of_sines[0]
    return tuple(part.reshape(self.shape) for part in x)

  def _matrix(self, which: int) -> list:
    return [self.second_ref[part, which] for part in range(PARTS[str(self.plan.dtype)])]

  def _axes(self):
    n, m, lanes = self.shape
    return (
      jnp.arange(n)[:, None, None],
      jnp.arange(m)[None, :, None],
      jnp.arange(lanes)[None, None, :],
    )

  def _places(self, pair):
    sizes = self.plan.sizes
    row, column, lane = self._axes()
    for part in range(2):
      first = ((pair * 2 + part) * sizes.half + self.k1) * sizes.columns
      yield first + row * self.shape[1] + column, self.channel + lane

  def _spectrum(self):
    row, column, lane = self._axes()
    channel = self._first_channel + self.channel + lane
    exists = jnp.broadcast_to(channel < self.plan.channels, self.shape)
    for part in range(2):
      k2 = (self.k1 * 2 + part) * self.plan.sizes.columns + row * self.shape[1] + column
      yield tuple(jnp.broadcast_to(x, self.shape) for x in (k2, channel)), exists

  def _twiddles(self):
    row, column, _ = self._axes()
    number = row * self.shape[1] + column
    return tuple(self.twiddles_ref[part, self.k1, number] for part in range(2))


def _filter_kernel(group_ref, spectrum_ref, constant_refs, _, *out_refs, plan: Plan, lanes: int):
  columns, (ref,) = _Columns(plan, group_ref, constant_refs, lanes), out_refs
  spectrum = columns.load_spectrum(spectrum_ref)

  def of_pair(pair, done):
    x = columns.transform(columns.load(ref, pair))
    columns.store(ref, pair, columns.transform(_times(x, spectrum), back=True))
    return done

  jax.lax.fori_loop(0, plan.pairs, of_pair, 0)


def _filter_backward_kernel(
  group_ref, spectrum_ref, constant_refs, _, *out_refs, plan: Plan, lanes: int
):
  """Spectra G of g and W of post_gate * dy: y is of G K, dg of conj(K) W, dK is conj(G) W."""
  columns = _Columns(plan, group_ref, constant_refs, lanes)
  of_g, of_dy, dspectrum_ref = out_refs

  def of_pair(pair, total):
    g, dy = (columns.transform(columns.load(ref, pair)) for ref in (of_g, of_dy))
    total = tuple(map(jnp.add, total, _times(g, dy, conjugate=True)))
    spectrum = columns.load_spectrum(spectrum_ref)
    columns.store(of_g, pair, columns.transform(_times(g, spectrum), back=True))
    dy = _times(spectrum, dy, conjugate=True)
    columns.store(of_dy, pair, columns.transform(dy, back=True))
    return total

  total = columns.load_spectrum(dspectrum_ref)
  columns.store_spectrum(dspectrum_ref, jax.lax.fori_loop(0, plan.pairs, of_pair, total))
