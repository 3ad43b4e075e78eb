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
                  back; all n2 are in its registers. Of 256 it takes the transform in two of 16.
  transform_back  the tokens again, with what stands around the convolution.

Channels stand in the last axis of all: no array is transposed, and every load is of neighbours.
Rows and channels are taken in groups whose A, complex float32, are GROUP_BYTES at most (or one pair
of rows and one tile): a second-level cache holds about as many, and memory no more of them. The
backward pass is made of the same kernels, with a filter kernel that also sums the gradient of the
spectrum; it walks the pairs of its group in order.

Products are of bfloat16 parts of the operands, as on TPU (`fourier.PARTS`).

Bytes, a token and channel, at b bytes a number: of rows forward 6 b with both gates, backward 12 b;
of A, 32 forward and 64 backward, to the cache or to memory; of the spectrum 8 N D for each group.
Flops of `products` a token, channel and pair of rows: 4 (2 N1 + 8 (columns, or 32 for 256)).
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

from pallas_kernels.chunks_gpu import split, tile_size
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
WARPS = 8
POINTS = 2048  # complex numbers of a program that multiplies by the spectrum
RADICES = {16: (16,), 32: (32,), 64: (64,), 256: (16, 16)}  # of the columns
MULTIPLE = 16  # of rows
FAR = np.int32(2**31 - 1)
MOVED = 256  # multiply-adds in whose time a complex number goes through all kernels


class Sizes(NamedTuple):
  """Of the transform of a row: n1 of tokens, and n2."""

  rows: int
  columns: int

  @classmethod
  def of(cls, length: int) -> Sizes:
    """The cheapest for rows of that many tokens."""
    sizes = (cls(pl.cdiv(length, MULTIPLE * n) * MULTIPLE, n) for n in RADICES)
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
    return 4 * self.half + 8 * sum(RADICES[self.columns])


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
    room = max(GROUP_BYTES // (8 * sizes.points * lanes * spectra), 1)  # pairs of one tile
    tiles, pairs = pl.cdiv(channels, lanes), pl.cdiv(batch, 2)
    wide = pl.cdiv(tiles, pl.cdiv(tiles, room))  # groups of about one size
    return cls(*u.shape, u.dtype, sizes, min(pairs, room // wide), wide * lanes)

  @property
  def lanes(self) -> int:
    """Channels of a tile."""
    return min(LANES, tile_size(self.channels))

  @property
  def groups(self) -> tuple[int, int]:
    """Of channels, and of pairs."""
    return pl.cdiv(self.channels, self.width), pl.cdiv(pl.cdiv(self.batch, 2), self.pairs)

  def walk(self, step, results):
    """`step(first, results)` for each group, `first` [2] being its first pair and channel; the
    results of the last."""
    count = math.prod(self.groups)
    if count == 1:
      return step(jnp.zeros(2, jnp.int32), results)
    pairs = np.int32(self.groups[1])

    def body(group, results):
      channel = jax.lax.div(group, pairs) * self.width
      return step(jnp.stack([jax.lax.rem(group, pairs) * self.pairs, channel]), results)

    return jax.lax.fori_loop(0, count, body, results)

  def call(self, kernel, grid, out_shape, *, name, products, aliases, warps, interpret):
    """A `pallas_call` of `kernel(*refs, plan=plan)`, which sees whole arrays.

    Args:
      products: multiply-adds for each point.   aliases: results that stand where an argument stood.
    """
    points = self.pairs * self.sizes.points * self.width

    def run(*arrays):
      return pl.pallas_call(
        functools.partial(kernel, plan=self),
        grid=grid,
        out_shape=out_shape,
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        cost_estimate=pl.CostEstimate(
          flops=2 * points * products * _count(self.dtype),
          transcendentals=0,
          bytes_accessed=16 * points,
        ),
        name=f"long_convolution_{name}",
        interpret=interpret,
      )(*arrays)

    return run

  def transform(self, first, arrays, interpret):
    """A [pairs, 2 N1, columns, width] of the product of arrays, real parts above imaginary ones."""
    sizes, of_rows = self.sizes, [self.flat(x) for x in arrays if x is not None]
    grid = (2 * sizes.half // TALL * self.width // self.lanes, sizes.columns, self.pairs)
    return self.call(
      _transform_kernel,
      grid,
      jax.ShapeDtypeStruct((self.pairs * 2 * sizes.half * sizes.columns, self.width), jnp.float32),
      name="transform",
      products=2 * sizes.half,
      aliases={},
      warps=4,
      interpret=interpret,
    )(first, _tables(sizes, PARTS[str(self.dtype)]).first, of_rows)

  def transform_back(self, first, of_a, arrays, skip, factors, results, interpret):
    """Writes tokens + skip * s, s the product of arrays, times each of the factors, to results."""
    sizes = self.sizes
    tall = TALL if 2 * sizes.rows % TALL == 0 else TALL // 2
    grid = (2 * sizes.rows // tall * self.width // self.lanes, sizes.columns, self.pairs)
    arrays, factors = ([None if x is None else self.flat(x) for x in of] for of in (arrays, factors))
    arrays = [x for x in arrays if x is not None]
    results = [self.flat(x) for x in results]
    before = 4 + len(arrays) + sum(x is not None for x in factors)
    found = self.call(
      functools.partial(_transform_back_kernel, tall=tall),
      grid,
      [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
      name="transform_back",
      products=2 * sizes.half,
      aliases={before + i: i for i in range(len(results))},
      warps=4,
      interpret=interpret,
    )(first, _tables(sizes, PARTS[str(self.dtype)]).first_back, skip, of_a, arrays, factors, results)
    return [x.reshape(self.batch, self.length, self.channels) for x in found]

  def filter(self, kernel, first, spectrum, carried, interpret):
    """What `kernel` makes of `carried`, in its place."""
    sizes = self.sizes
    tables = _tables(sizes, PARTS[str(self.dtype)])
    lanes = min(POINTS // sizes.columns, self.lanes)
    constants = [x for x in (tables.second, tables.twiddles, tables.inner) if x is not None]
    return self.call(
      functools.partial(kernel, lanes=lanes),
      (sizes.half, self.width // lanes),
      [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in carried],
      name=kernel.__name__.strip("_").removesuffix("_kernel"),
      products=8 * sum(RADICES[sizes.columns]) * (2 if len(carried) > 1 else 1),
      aliases={2 + len(constants) + i: i for i in range(len(carried))},
      warps=WARPS,
      interpret=interpret,
    )(first, spectrum, constants, carried)

  def flat(self, x):
    """[B, T, D] as rows of channels."""
    return x.reshape(-1, self.channels)


TALL = 64  # rows of a matrix of N1 of a program


def _count(dtype) -> int:
  parts = PARTS[str(dtype)]
  return parts * (parts + 1) // 2


def spectrum(c, sizes: Sizes):
  """Of filters c [D, N], lags from 0 on in front and later tokens at the end -> [N1, 2, columns, D]
  float32 over N, real parts above imaginary ones, in the order [k1, k2]."""
  x = jnp.fft.fft(c.astype(jnp.float32)) / sizes.points
  x = x.reshape(-1, sizes.columns, sizes.half).transpose(2, 1, 0)
  return jnp.stack([x.real, x.imag], 1)


def forward(u, spectrum, skip, pre_gate, post_gate, *, interpret=False):
  """y = post_gate * (c * g + skip * g), g = pre_gate * u, c * g the convolution.

  Args:
    u: [B, T, D].   spectrum: of the filters, see there.   skip: [D] float32.
    pre_gate, post_gate: [B, T, D] in the dtype of u, or None.
    interpret: run the kernels' programs on the CPU.
  Returns:
    [B, T, D] in the dtype of u.
  """
  plan = Plan.of(u, _sizes_of(spectrum), 1)
  flat = _flat(spectrum)

  def step(first, results):
    of_g = plan.transform(first, (u, pre_gate), interpret)
    (of_g,) = plan.filter(_filter_kernel, first, flat, (of_g,), interpret)
    around = (skip, (post_gate,), results)
    return plan.transform_back(first, of_g, (u, pre_gate), *around, interpret)

  (y,) = plan.walk(step, [jnp.zeros_like(u)])
  return y


def backward(u, spectrum, skip, pre_gate, post_gate, dy, *, interpret=False):
  """Gradients of `forward`, but for that of skip, which is that of lag 0 of the filters.

  Args:
    dy: [B, T, D], the cotangent of y.   The rest: as given to `forward`.
  Returns:
    du, dspectrum in the shape of spectrum, and those of the gates, None for None. Rows are in the
    dtype of u; dspectrum is float32, summed over the rows.
  """
  plan = Plan.of(u, _sizes_of(spectrum), 2)
  flat = _flat(spectrum)
  g, dy_behind = (u, pre_gate), (dy, post_gate)
  of_dg = [(pre_gate, True), (u, pre_gate is not None)]
  factors = [x for x, wanted in of_dg if wanted]

  def step(first, results):
    dspectrum, dg, dpost = results
    of_g, of_dy = (plan.transform(first, x, interpret) for x in (g, dy_behind))
    carried = (of_g, of_dy, dspectrum)
    of_g, of_dy, dspectrum = plan.filter(
      _filter_backward_kernel, first, flat, carried, interpret
    )
    dg = plan.transform_back(first, of_dy, dy_behind, skip, factors, dg, interpret)
    if post_gate is not None:
      dpost = plan.transform_back(first, of_g, g, skip, (dy,), dpost, interpret)
    return dspectrum, dg, dpost

  rows = jnp.zeros_like(u)
  start = (jnp.zeros_like(flat), [rows] * len(factors), [] if post_gate is None else [rows])
  dspectrum, dg, dpost = plan.walk(step, start)
  du, dpre = dg if pre_gate is not None else (*dg, None)
  return du, dspectrum.reshape(spectrum.shape), dpre, dpost[0] if dpost else None


def _sizes_of(spectrum) -> Sizes:
  return Sizes(spectrum.shape[0] // 2, spectrum.shape[2])


def _flat(spectrum):
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
  radix, *more = RADICES[sizes.columns]
  n = np.arange(radix)
  second = np.stack([np.cos(turns := angles(n, n, radix)), np.sin(turns)])
  return _Tables(
    in_parts(real_matrix(k1, n1, half), parts),
    in_parts(real_matrix(n1, -k1, half), parts),
    in_parts(second, parts),
    _turns(angles(k1, n2, sizes.points)),
    _turns(angles(n, n, sizes.columns)) if more else None,
  )


def _turns(turns: np.ndarray) -> np.ndarray:
  return np.stack([np.cos(turns), np.sin(turns)]).astype(np.float32)


def _product(matrix: list, x, dtype):
  """A matrix in parts times x float32: the products of parts that matter, the small ones first."""
  x = split(x, dtype)
  pairs = sorted(((i, j) for i in range(len(x)) for j in range(len(x) - i)), key=sum)
  total = None
  for i, j in reversed(pairs):
    product = jnp.dot(matrix[i], x[j], preferred_element_type=jnp.float32)
    total = product if total is None else total + product
  return total


def _multiply(table_ref, at, tall: int, load_x, depth: int, lanes: int, dtype):
  """`tall` rows from `at` of a matrix [parts, M, K] times x [K, lanes], of which load_x(k) gives
  `depth` rows."""

  def step(number, total):
    k = number * depth
    matrix = [
      table_ref[part, pl.ds(at, tall), pl.ds(k, depth)] for part in range(table_ref.shape[0])
    ]
    return total + _product(matrix, load_x(k), dtype)

  total = jnp.zeros((tall, lanes), jnp.float32)
  return jax.lax.fori_loop(0, table_ref.shape[2] // depth, step, total)


def _tile(plan: Plan, tiles: int):
  """Of a program's first index: which of so many tiles of a matrix, and first channel in the
  group."""
  channel, tile = _divide(pl.program_id(0), tiles)
  return tile, channel * plan.lanes


def _divide(x, by: int):
  """x // by and x % by of x >= 0."""
  quotient = jax.lax.div(x, jnp.full_like(x, by))
  return quotient, x - quotient * by


class _Tokens:
  """Where tokens n1 of a pair of rows stand, for one n2 and a tile of channels."""

  def __init__(self, plan: Plan, first_ref, channel):
    self.plan, self.n2, self.pair = plan, pl.program_id(1), first_ref[0] + pl.program_id(2)
    self.channels = first_ref[1] + channel + jnp.arange(plan.lanes)

  def at(self, n1, count: int):
    """Index and mask of `count` n1 of both rows, those of the second behind those of the first."""
    plan, n1 = self.plan, n1 + jnp.arange(count)
    second = n1 >= plan.sizes.rows
    row = 2 * self.pair + second.astype(jnp.int32)
    token = (n1 - jnp.where(second, plan.sizes.rows, 0)) * plan.sizes.columns + self.n2
    exist = (row < plan.batch) & (token < plan.length)
    return _places(row * plan.length + token, exist, self.channels, self.channels < plan.channels)


def _places(rows, rows_exist, channels, channels_exist):
  """Index and mask of a tile. What does not exist is far outside: a program that is interpreted
  writes what the mask keeps from changing, and would write it over something else."""
  mask = rows_exist[:, None] & channels_exist[None, :]
  row, channel = jnp.where(mask, rows[:, None], FAR), jnp.where(mask, channels[None, :], 0)
  return (row, channel), mask


def _load(ref, place):
  index, mask = place
  return plgpu.load(ref.at[index], mask=mask, other=0).astype(jnp.float32)


def _store(ref, place, x):
  index, mask = place
  plgpu.store(ref.at[index], x.astype(ref.dtype), mask=mask)


def _load_product(refs, place):
  return functools.reduce(jnp.multiply, [_load(ref, place) for ref in refs])


def _transform_kernel(first_ref, table_ref, row_refs, out_ref, *, plan: Plan):
  sizes = plan.sizes
  tile, channel = _tile(plan, 2 * sizes.half // TALL)
  tokens = _Tokens(plan, first_ref, channel)
  depth = TALL if 2 * sizes.rows % TALL == 0 else TALL // 2

  def load_x(n1):
    return _load_product(row_refs, tokens.at(n1, depth))

  found = _multiply(table_ref, tile * TALL, TALL, load_x, depth, plan.lanes, plan.dtype)
  out_ref[_column(plan, channel)(tile * TALL, TALL)] = found


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
  first_ref, table_ref, skip_ref, a_ref, row_refs, factor_refs, _, *out_refs, plan: Plan, tall: int
):
  tile, channel = _tile(plan, 2 * plan.sizes.rows // tall)

  column = _column(plan, channel)

  def load_x(k1):
    return a_ref[column(k1, TALL)]

  found = _multiply(table_ref, tile * tall, tall, load_x, TALL, plan.lanes, plan.dtype)
  tokens = _Tokens(plan, first_ref, channel)
  place = tokens.at(tile * tall, tall)
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

  Complex numbers are two arrays. Of columns in two radices, [n, n * lanes], the first n being the
  slower one of n2 or of k2.
  """

  def __init__(self, plan: Plan, first_ref, constant_refs, lanes: int):
    self.plan, self.lanes = plan, lanes
    self.second_ref, self.twiddles_ref, *self.inner_ref = constant_refs
    self.k1, self.channel = pl.program_id(0), pl.program_id(1) * lanes
    self._first_channel = first_ref[1]
    self.radix = RADICES[plan.sizes.columns][0]

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
    n, lanes = self.radix, self.lanes
    row, column = self._grid()
    turns = tuple(self.inner_ref[0][part, row, column] for part in range(2))
    x = _times(turns, x, conjugate=not back)
    x = (
      part.reshape(n, n, lanes).transpose(1, 0, 2).reshape(n, n * lanes) for part in x
    )
    return self._by_radix(tuple(x), back)

  def _by_radix(self, x, back: bool):
    of_cosines, of_sines = (
      tuple(_product(matrix, part, self.plan.dtype) for part in x)
      for matrix in (self._matrix(0), self._matrix(1))
    )
    sign = -1 if back else 1
    return of_cosines[0] + sign * of_sines[1], of_cosines[1] - sign * of_sines[0]

  def _matrix(self, which: int) -> list:
    return [
      self.second_ref[part, which] for part in range(PARTS[str(self.plan.dtype)])
    ]

  def _grid(self):
    """Row and group of lanes of each number, [n, columns / n * lanes]."""
    columns = self.plan.sizes.columns
    shape = (self.radix, columns // self.radix * self.lanes)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
    return row, _divide(column, self.lanes)[0]

  def _numbers(self):
    """n2 or k2, and channel, of each number."""
    columns = self.plan.sizes.columns
    row, column = self._grid()
    shape = row.shape
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1) - column * self.lanes
    return row * (columns // self.radix) + column, lane

  def _places(self, pair):
    sizes = self.plan.sizes
    number, lane = self._numbers()
    for part in range(2):
      row = ((pair * 2 + part) * sizes.half + self.k1) * sizes.columns
      yield row + number, self.channel + lane

  def _spectrum(self):
    columns = self.plan.sizes.columns
    number, lane = self._numbers()
    channel = self._first_channel + self.channel + lane
    mask = channel < self.plan.channels
    for part in range(2):
      row = (self.k1 * 2 + part) * columns + number
      yield (jnp.where(mask, row, FAR), channel), mask

  def _twiddles(self):
    number, _ = self._numbers()
    return tuple(self.twiddles_ref[part, self.k1, number] for part in range(2))


def _filter_kernel(
  first_ref, spectrum_ref, constant_refs, _, *out_refs, plan: Plan, lanes: int
):
  columns, (ref,) = _Columns(plan, first_ref, constant_refs, lanes), out_refs
  spectrum = columns.load_spectrum(spectrum_ref)

  def of_pair(pair, done):
    x = columns.transform(columns.load(ref, pair))
    columns.store(ref, pair, columns.transform(_times(x, spectrum), back=True))
    return done

  jax.lax.fori_loop(0, plan.pairs, of_pair, 0)


def _filter_backward_kernel(
  first_ref, spectrum_ref, constant_refs, _, *out_refs, plan: Plan, lanes: int
):
  """Spectra G of g and W of post_gate * dy: y is of G K, dg of conj(K) W, dK is conj(G) W."""
  columns = _Columns(plan, first_ref, constant_refs, lanes)
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
