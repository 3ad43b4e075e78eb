"""Gated long convolution on TPU by Fourier transforms on the matrix units: one kernel a direction.

Grid (D / 128, pairs of rows and their blocks), the last axis in order: the spectrum of 128
channels' filters stays on the chip while all rows are walked, and so does the sum that becomes its
gradient. Channels stand in lanes: a transform is products of constant matrices with rows of
[tokens, 128], and no array is transposed. Two rows of a batch are one complex row: their
convolutions are its real and imaginary part.

A row of T = rows * COLUMNS tokens is filled up with as many zeros, N = 2 T. With token n = n1
COLUMNS + n2 and frequency k = k1 + N1 k2, N1 = 2 rows, a transform is

    A[k1, n2] = sum_n1 w_N1^(k1 n1) x[n1, n2]     for each n2: rows that stand COLUMNS apart
    X[k1, k2] = sum_n2 w_C^(n2 k2) w_N^(k1 n2) A[k1, n2]     for each k1

and back the same with conjugates. Half of the n1 are zeros and are left out both ways. Spectra stay
in the order [k1, k2]: nothing is put in order.

Products are of bfloat16 parts of the operands: of two, high x high, high x low and low x high,
where rows are bfloat16, which leaves 4e-6 of the values, what a causal model may see of the future;
of three, six products, where they are float32, which leaves the rounding of float32.

Bytes, a token and channel, at b bytes a number: forward 4 b, backward 7 b; of the spectrum 8 N D.
Flops, a token and channel: forward 3 x 8 (N1 + 2 COLUMNS) / 2 or so, backward twice that.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.long_convolution.fourier import PARTS, angles, in_parts, real_matrix

LANES = 128
COLUMNS = 64  # with both parts of a complex number as deep as a matrix unit
MULTIPLE = 8 * COLUMNS  # of tokens: n1 in whole registers
UNROLLED = 4  # products whose latencies the schedule lays side by side


class Sizes(NamedTuple):
  """Of the transform of a row: n1 of tokens, and k1."""

  rows: int

  @classmethod
  def of(cls, length: int) -> Sizes:
    """For rows of that many tokens."""
    return cls(-(-length // MULTIPLE) * MULTIPLE // COLUMNS)

  @property
  def tokens(self) -> int:
    """T, filled up."""
    return self.rows * COLUMNS

  @property
  def half(self) -> int:
    """N1, the number of k1."""
    return 2 * self.rows

  @property
  def points(self) -> int:
    """N."""
    return 2 * self.tokens


def vmem_bytes(sizes: Sizes, itemsize: int, gates: int) -> int:
  """Of the backward kernel, which holds more: windows twice, as the next are fetched while one is
  worked on; spectrum, its gradient twice, twiddles; two rows of complex numbers and of tokens."""
  windows = 2 * (3 + 2 * gates) * 2 * sizes.tokens * itemsize
  spectra = (1 + 2 + 1) * 8 * sizes.points  # the gradient twice
  return LANES * (windows + spectra + 2 * 8 * sizes.points + 2 * 8 * sizes.tokens) + 2**20


def spectrum(c, sizes: Sizes):
  """Filters c [D, N] float32 -> [k1, 2 COLUMNS, D], real parts above imaginary ones."""
  # Channels in lanes throughout, real matrices, and the twiddles in the second: of complex products
  # XLA makes three times as many, and programs that take minutes to compile.
  half, product = sizes.half, functools.partial(jnp.einsum, precision="highest")
  first = real_matrix(np.arange(half), np.arange(half), half)[:, :half]  # of real rows
  first = first.reshape(2, half, half).swapaxes(0, 1).astype(c.dtype)
  frequencies = np.arange(sizes.points).reshape(COLUMNS, half)  # [k2, k1]
  second = np.stack(
    [real_matrix(k, np.arange(COLUMNS), sizes.points) for k in frequencies.T]
  ).astype(c.dtype)
  x = product("kpi,ijd->kpjd", first, c.T.reshape(half, COLUMNS, -1))
  return product("klj,kjd->kld", second, x.reshape(half, 2 * COLUMNS, -1))


class Span(NamedTuple):
  """Blocks of rows, each as long as the transform: `count` from `source` on give to as many from
  `target` on, one to one."""

  source: int
  target: int
  count: int


def forward(u, spectrum, skip, pre_gate, post_gate, span: Span, *, interpret=False):
  """y = post_gate * (c * g + skip * g), g = pre_gate * u, c * g the convolution of a block.

  Args:
    u: [B, T, D].   spectrum: of the filters, see there.   skip: [D] float32.
    pre_gate, post_gate: [B, T, D] in the dtype of u, or None.
    span: the blocks; u and pre_gate are read at the sources, post_gate at the targets.
    interpret: run the kernel's program on the CPU.
  Returns:
    [B, tokens, D] in the dtype of u, those of the targets, the last block filled up.
  """
  at = _Windows(u, pre_gate, post_gate, spectrum, span)
  (y,) = at.call(
    functools.partial(_forward_kernel, at.sizes, *at.gated),
    "forward",
    ((u, pre_gate), (post_gate,)),
    (skip, spectrum),
    outputs=1,
    interpret=interpret,
  )
  return y


def backward(u, spectrum, skip, pre_gate, post_gate, dy, span: Span, *, interpret=False):
  """Gradients of `forward`, but for skip: one more weight of lag 0, whose gradient it has.

  Args:
    dy: [B, T, D], the cotangent of y, read at the targets.   The rest: as given to `forward`.
  Returns:
    du, dspectrum [k1, 2 COLUMNS, D], and those of the gates, None for None. Rows are
    [B, tokens, D] in the dtype of u, of the sources and, dpost, of the targets; dspectrum is
    float32, summed over the rows.
  """
  at = _Windows(u, pre_gate, post_gate, spectrum, span)
  du, *others = at.call(
    functools.partial(_backward_kernel, at.sizes, *at.gated),
    "backward",
    ((u, pre_gate), (post_gate, dy)),
    (skip, spectrum),
    outputs=1 + sum(at.gated),
    sums=True,
    interpret=interpret,
  )
  *gates, dspectrum = others
  dpre = gates.pop(0) if at.gated[0] else None
  dpost = gates.pop(0) if at.gated[1] else None
  return du, dspectrum / at.sizes.points, dpre, dpost


class _Windows:
  """How arrays are laid out for the kernels."""

  def __init__(self, u, pre_gate, post_gate, spectrum, span: Span):
    self.batch, self.length, self.channels = u.shape
    self.dtype, self.sizes, self.span = u.dtype, Sizes(spectrum.shape[0] // 2), span
    self.gated = (pre_gate is not None, post_gate is not None)
    self.vmem = vmem_bytes(self.sizes, u.dtype.itemsize, sum(self.gated))

  def _row(self, start: int) -> pl.BlockSpec:
    """A block of a pair of rows, from the block `start` on."""
    count = np.int32(self.span.count)

    def at(j, step):
      # Not // and %, which ask for signs.
      return jax.lax.div(step, count), start + jax.lax.rem(step, count), j

    return pl.BlockSpec((2, self.sizes.tokens, LANES), at)

  def call(self, kernel, name: str, rows, filters, *, outputs: int, sums=False, interpret):
    """The kernel on all blocks and pairs of rows, with `outputs` arrays of rows and, where it has
    them, the sums.

    Args:
      rows: arrays read at the sources, and those at the targets, some of them None.
    """
    starts = (self.span.source, self.span.target)
    row_specs = [
      self._row(start)
      for arrays, start in zip(rows, starts, strict=True)
      for x in arrays
      if x is not None
    ]
    # Whole pairs of rows of whole blocks.
    fill = (0, self.batch % 2), (0, -self.length % self.sizes.tokens), (0, 0)
    rows = [jnp.pad(x, fill) for arrays in rows for x in arrays if x is not None]
    pairs = rows[0].shape[0] // 2
    skip, spectrum = filters
    sizes, tables = self.sizes, _tables(self.sizes, PARTS[str(self.dtype)])
    of_channels = pl.BlockSpec((1, LANES), lambda j, b: (0, j))
    spectrum_spec = pl.BlockSpec(
      (sizes.half, 2 * COLUMNS, LANES), lambda j, b: (0, 0, j), pipeline_mode=pl.Buffered(1)
    )

    def whole(x):
      return pl.BlockSpec(x.shape, lambda j, b: (0,) * x.ndim, pipeline_mode=pl.Buffered(1))

    shape = (2 * pairs, self.span.count * sizes.tokens, self.channels)
    out_shape = [jax.ShapeDtypeStruct(shape, self.dtype)] * outputs
    out_specs = [self._row(0)] * outputs
    if sums:
      out_shape.append(jax.ShapeDtypeStruct(spectrum.shape, jnp.float32))
      out_specs.append(pl.BlockSpec((sizes.half, 2 * COLUMNS, LANES), lambda j, b: (0, 0, j)))
    complex_rows = pltpu.VMEM((2 * sizes.points, LANES), jnp.float32)
    tokens = pltpu.VMEM((2 * sizes.tokens, LANES), jnp.float32)
    results = pl.pallas_call(
      kernel,
      grid=(pl.cdiv(self.channels, LANES), pairs * self.span.count),
      in_specs=[row_specs, of_channels, spectrum_spec, [whole(x) for x in tables]],
      out_specs=out_specs,
      out_shape=out_shape,
      scratch_shapes=[[tokens] * (1 + sums), [complex_rows] * (1 + sums)],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"),
        vmem_limit_bytes=max(self.vmem * 9 // 8, 2**24),
      ),
      cost_estimate=self._cost(len(rows) + outputs, 2 if sums else 1),
      name=f"long_convolution_{name}",
      interpret=interpret,
    )(rows, skip[None], spectrum, list(tables))
    return [*(x[: self.batch] for x in results[:outputs]), *results[outputs:]]

  def _cost(self, arrays: int, times: int) -> pl.CostEstimate:
    shape = (self.span.count * self.batch, self.sizes.tokens, self.channels)
    return pl.CostEstimate(
      flops=matmul_flops(shape, self.dtype) * times,
      transcendentals=0,
      bytes_accessed=arrays * math.prod(shape) * self.dtype.itemsize
      + 8 * self.sizes.points * self.channels * times,
    )


def matmul_flops(shape: tuple[int, int, int], dtype) -> int:
  """Of the products of a forward pass over rows [B, T, D], multiply-adds counted as two. A pass
  backward takes twice as many."""
  batch, length, channels = shape
  sizes, parts = Sizes.of(length), PARTS[str(dtype)]
  first = COLUMNS * (2 * sizes.half) * (2 * sizes.rows)
  second = sizes.half * (2 * COLUMNS) ** 2
  return parts * (parts + 1) * 2 * (first + second) * -(-batch // 2) * channels


@functools.lru_cache(maxsize=8)
def _tables(sizes: Sizes, parts: int) -> tuple[np.ndarray, ...]:
  """Constant operands: of the four products, [parts, ...] bfloat16, and twiddles [n2, 2 N1, 128]
  with cosines above sines."""
  rows, half, points = sizes.rows, sizes.half, sizes.points
  first = real_matrix(np.arange(half), np.arange(rows), half)
  second = real_matrix(np.arange(COLUMNS), np.arange(COLUMNS), COLUMNS)
  second_back = real_matrix(np.arange(COLUMNS), -np.arange(COLUMNS), COLUMNS) / points
  first_back = real_matrix(np.arange(rows), -np.arange(half), half)
  turns = angles(np.arange(COLUMNS), np.arange(half), points)
  twiddles = np.concatenate([np.cos(turns), np.sin(turns)], 1).astype(np.float32)
  twiddles = np.repeat(twiddles[..., None], LANES, -1)
  matrices = (first, second, second_back, first_back)
  return *(in_parts(matrix, parts) for matrix in matrices), twiddles


def _product(matrix_ref, x):
  """A constant matrix in parts times x [K, 128] float32: the products of parts that matter, those
  with one part of the matrix at once."""
  parts, split = matrix_ref.shape[0], []
  for _ in range(parts):
    split.append(x.astype(jnp.bfloat16))
    x = x - split[-1].astype(jnp.float32)
  total = []
  for i in reversed(range(parts)):
    beside = jnp.concatenate(split[: parts - i], 1)
    product = jnp.dot(matrix_ref[i], beside, preferred_element_type=jnp.float32)
    total += [product[:, j * LANES : (j + 1) * LANES] for j in reversed(range(parts - i))]
  return functools.reduce(jnp.add, total)


def _loop(count: int, body):
  def step(index, carry):
    body(index)
    return carry

  jax.lax.fori_loop(0, count, step, 0, unroll=UNROLLED)


def _halves(x):
  return x[: x.shape[0] // 2], x[x.shape[0] // 2 :]


def _joined(real, imaginary):
  return jnp.concatenate([real, imaginary], 0)


def _times(x, y, conjugate: bool = False):
  """x y, or conj(x) y, of complex numbers as real parts above imaginary ones."""
  (a, b), (c, d) = _halves(x), _halves(y)
  if conjugate:
    return _joined(a * c + b * d, a * d - b * c)
  return _joined(a * c - b * d, a * d + b * c)


class _Transform:
  """The steps of a transform; complex numbers of [n2, k1] stand in `ref` as [n2, 2 N1, 128]."""

  def __init__(self, sizes: Sizes, table_refs):
    self.sizes = sizes
    self.first, self.second, self.second_back, self.first_back, self.twiddles = table_refs

  def begin(self, tokens_ref, ref):
    """Both rows of tokens -> A with its twiddles."""

    def at(n2):
      x = _joined(*(tokens_ref[self._tokens(row, n2)] for row in range(2)))
      x = _product(self.first, x)
      ref[self._frequencies(n2)] = _times(self.twiddles[n2], x, conjugate=True)

    _loop(COLUMNS, at)

  def end(self, ref, tokens_ref):
    """What `begin` makes -> both rows of tokens."""

    def at(n2):
      x = _times(self.twiddles[n2], ref[self._frequencies(n2)])
      for row, tokens in enumerate(_halves(_product(self.first_back, x))):
        tokens_ref[self._tokens(row, n2)] = tokens

    _loop(COLUMNS, at)

  def values(self, ref, k1):
    """X of all k2."""
    return _product(self.second, _joined(*(ref[at] for at in self._parts(k1))))

  def put(self, ref, k1, x):
    """X of all k2 -> what `end` takes."""
    for at, part in zip(self._parts(k1), _halves(_product(self.second_back, x)), strict=True):
      ref[at] = part

  def _tokens(self, row: int, n2):
    return pl.ds(row * self.sizes.tokens + n2, self.sizes.rows, stride=COLUMNS)

  def _frequencies(self, n2):
    return pl.ds(n2 * 2 * self.sizes.half, 2 * self.sizes.half)

  def _parts(self, k1):
    half = self.sizes.half
    return [pl.ds(part * half + k1, COLUMNS, stride=2 * half) for part in range(2)]


def _rows(ref, row: int):
  return ref[row].astype(jnp.float32)


def _put_tokens(sizes: Sizes, tokens_ref, *refs):
  """The product of both rows of some arrays."""
  for row in range(2):
    x = _rows(refs[0], row)
    for ref in refs[1:]:
      x = x * _rows(ref, row)
    tokens_ref[pl.ds(row * sizes.tokens, sizes.tokens)] = x


def _forward_kernel(
  sizes: Sizes, has_pre: bool, has_post: bool,
  row_refs, skip_ref, spectrum_ref, table_refs, y_ref, tokens_refs, complex_refs,
):  # fmt: skip
  transform, (tokens_ref,), (ref,) = _Transform(sizes, table_refs), tokens_refs, complex_refs
  factors = row_refs[: 1 + has_pre]
  _put_tokens(sizes, tokens_ref, *factors)
  transform.begin(tokens_ref, ref)

  def at(k1):
    transform.put(ref, k1, _times(transform.values(ref, k1), spectrum_ref[k1]))

  _loop(sizes.half, at)
  transform.end(ref, tokens_ref)
  for row in range(2):
    g = functools.reduce(jnp.multiply, (_rows(factor, row) for factor in factors))
    y = tokens_ref[pl.ds(row * sizes.tokens, sizes.tokens)] + skip_ref[...] * g
    y = y * _rows(row_refs[-1], row) if has_post else y
    y_ref[row] = y.astype(y_ref.dtype)


def _backward_kernel(
  sizes: Sizes, has_pre: bool, has_post: bool,
  row_refs, skip_ref, spectrum_ref, table_refs, *refs,
):  # fmt: skip
  """Spectra G of g and W of post_gate * dy: y is of G K, dg of conj(K) W, dK is conj(G) W."""
  *out_refs, dspectrum_ref, tokens_refs, complex_refs = refs
  transform, dy_ref = _Transform(sizes, table_refs), row_refs[-1]
  factors, post_refs = row_refs[: 1 + has_pre], row_refs[1 + has_pre : -1]

  @pl.when(pl.program_id(1) == 0)
  def _():
    dspectrum_ref[...] = jnp.zeros_like(dspectrum_ref)

  for tokens_ref, ref, arrays in zip(
    tokens_refs, complex_refs, (factors, (dy_ref, *post_refs)), strict=True
  ):
    _put_tokens(sizes, tokens_ref, *arrays)
    transform.begin(tokens_ref, ref)
  of_g, of_dy = complex_refs

  def at(k1):
    g, dy, k = transform.values(of_g, k1), transform.values(of_dy, k1), spectrum_ref[k1]
    dspectrum_ref[k1] += _times(g, dy, conjugate=True)
    transform.put(of_g, k1, _times(g, k))
    transform.put(of_dy, k1, _times(k, dy, conjugate=True))

  _loop(sizes.half, at)
  for tokens_ref, ref in zip(tokens_refs, complex_refs, strict=True):
    transform.end(ref, tokens_ref)
  du_ref, *gate_refs = out_refs
  for row in range(2):
    here = pl.ds(row * sizes.tokens, sizes.tokens)
    dy = _rows(dy_ref, row)
    if has_post:
      g = functools.reduce(jnp.multiply, (_rows(factor, row) for factor in factors))
      y = tokens_refs[0][here] + skip_ref[...] * g
      gate_refs[-1][row] = (y * dy).astype(gate_refs[-1].dtype)
      dy = dy * _rows(post_refs[0], row)
    dg = tokens_refs[1][here] + skip_ref[...] * dy
    if has_pre:
      gate_refs[0][row] = (dg * _rows(factors[0], row)).astype(gate_refs[0].dtype)
      dg = dg * _rows(factors[1], row)
    du_ref[row] = dg.astype(du_ref.dtype)
