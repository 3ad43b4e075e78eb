"""Gated long convolution on TPU by Fourier transforms on the matrix units: one kernel a direction.

Grid (D / 128, residues, pairs of rows), the last axis in order: the spectrum of 128 channels'
filters stays on the chip while all rows are walked, and so does the sum that becomes its gradient.
Channels stand in lanes: a transform is products of constant matrices with rows of [tokens, 128],
and no array is transposed. Two rows of a batch are one complex row: their convolutions are its
real and imaginary part.

A row of T = rows * columns tokens is filled up with as many zeros, N = 2 T. With token n = n1
columns + n2 and frequency k = k1 + N1 k2, N1 = 2 rows, a transform is

    A[k1, n2] = sum_n1 w_N1^(k1 n1) x[n1, n2]     for each n2: rows that stand columns apart
    X[k1, k2] = sum_n2 w_columns^(n2 k2) w_N^(k1 n2) A[k1, n2]     for each k1

and back the same with conjugates. Half of the n1 are zeros and are left out both ways. Spectra stay
in the order [k1, k2]: nothing is put in order. Rows that `folded` has folded have no zeros, N1 =
rows, and frequencies of one residue r modulo R: k1 + r / R stands in the place of k1 above.

What a transform reads stands APART rows more than a multiple of 8 from one another: the chip loads
eight such rows at once, where multiples of 8 take it eight times as long.

Products are of bfloat16 parts of the operands: of two, high x high, high x low and low x high,
where rows are bfloat16, which leaves 4e-6 of the values, what a causal model may see of the future;
of three, six products, where they are float32, which leaves the rounding of float32. The parts
stand behind one another: one product adds them up.

Bytes, a token and channel, at b bytes a number: forward 4 b, backward 7 b; of the spectrum 8 N D.
Flops, a token and channel: forward 3 x 8 (N1 + 2 columns) / 2 or so, backward twice that.
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
COLUMNS = (16, 32, 64)  # the last with both parts of complex numbers as deep as a matrix unit
ROWS = 8  # of n1 in a register
APART = 4
BESIDE = 8  # transforms that are one product
UNROLLED = 2  # products whose latencies the schedule lays side by side


class Sizes(NamedTuple):
  """Of the transforms of a row.

  Attributes:
    rows, columns: n1 and n2 of a row, or of a folded one.
    parts: of an operand.
    residues: R of folded rows; 1 means that they are not.
  """

  rows: int
  columns: int
  parts: int
  residues: int = 1

  @classmethod
  def of(cls, length: int, dtype, residues: int = 1) -> Sizes:
    """For rows of that many tokens in a dtype."""
    tokens = -(-length // max(residues // 2, 1))
    columns = next((n for n in COLUMNS if n * ROWS >= tokens), COLUMNS[-1])
    rows = -(-tokens // (columns * ROWS)) * ROWS
    return cls(rows, columns, PARTS[jnp.dtype(dtype).name], residues)

  @property
  def shifts(self) -> np.ndarray:
    """r / R of each residue."""
    return np.arange(self.residues) / self.residues

  @property
  def tokens(self) -> int:
    """Of a row, or of a folded one, filled up."""
    return self.rows * self.columns

  @property
  def half(self) -> int:
    """N1, the number of k1."""
    return self.rows * (2 if self.residues == 1 else 1)

  @property
  def frequencies(self) -> int:
    """Of one residue."""
    return self.half * self.columns

  @property
  def points(self) -> int:
    """N."""
    return self.residues * self.frequencies


def vmem_bytes(sizes: Sizes, itemsize: int, gates: int, *, backward: bool) -> int:
  """What a kernel holds: windows twice, as the next are fetched while one is worked on; spectrum,
  its gradient and twiddles; a row of complex numbers and of tokens each way."""
  arrays = (3 + 2 * gates if backward else 2 + gates) if sizes.residues == 1 else 2 + 2 * backward
  windows = 2 * arrays * 2 * sizes.tokens * itemsize
  spectra = (min(sizes.residues, 2) + 2 * backward + 1) * 8 * sizes.frequencies
  scratch = 8 * (sizes.frequencies + APART * sizes.columns + sizes.tokens + APART * sizes.rows)
  return LANES * (windows + spectra + (1 + backward) * scratch) + 2**20


def spectrum(c, sizes: Sizes):
  """Filters c [D, N] float32 -> [R, k1, 2 columns, D], real parts above imaginary ones."""
  # Channels in lanes throughout, real products, and twiddles in the second matrices: of complex
  # products XLA makes three times as many, and programs that take minutes to compile.
  # Three products of bfloat16 parts, or six, as of rows.
  product = functools.partial(jnp.einsum, precision="highest" if sizes.parts == 3 else "high")
  residues, half = sizes.residues, sizes.half
  n1, n2, k2 = map(np.arange, (half, sizes.columns, sizes.columns))
  k1 = sizes.shifts[:, None] + np.arange(half)

  def matrices(i, j, points: int):
    """For each residue [part, i, part, j]."""
    of = [real_matrix(row, j, points) for row in i]
    return np.stack(of).reshape(residues, 2, -1, 2, len(j)).astype(np.float32)

  x = c.T.reshape(1, residues, half, sizes.columns, -1)  # an axis of parts, which is real alone
  if residues > 1:
    r = np.arange(residues)
    x = product("rqpf,pfijd->rqijd", matrices(r[:, None], r, residues)[:, :, 0, :1], x)
  first = matrices(k1, n1, half)[:, :, :, : x.shape[1]]
  x = product("rqkpi,rpijd->rkqjd", first, x).reshape(residues, half, 2 * sizes.columns, -1)
  twiddles = angles(k1, n2, sizes.frequencies).reshape(residues, half, 1, -1)
  (cosine, sine), (twiddle_cosine, twiddle_sine) = (
    jnp.float32([np.cos(turns), np.sin(turns)])
    for turns in (angles(k2, n2, sizes.columns), twiddles)
  )
  cosine, sine = (
    cosine * twiddle_cosine - sine * twiddle_sine,
    sine * twiddle_cosine + cosine * twiddle_sine,
  )
  second = jnp.block([[cosine, sine], [-sine, cosine]])
  return product("rkij,rkjd->rkid", second, x)


def forward(u, spectrum, skip, pre_gate, post_gate, sizes: Sizes, *, interpret=False):
  """y = post_gate * (c * g + skip * g), g = pre_gate * u, c * g the convolution of a row.

  Args:
    u: [B, T, D]; folded, [B, R tokens, D] with one residue behind another.
    spectrum: of the filters, see there.   skip: [D] float32.
    pre_gate, post_gate: as u, in its dtype, or None.
    interpret: run the kernel's program on the CPU.
  Returns:
    [B, R tokens, D] in the dtype of u, rows filled up.
  """
  (y,) = _call(
    functools.partial(_forward_kernel, sizes, pre_gate is not None, post_gate is not None),
    "forward",
    (u, pre_gate, post_gate),
    (skip, spectrum),
    sizes,
    outputs=1,
    in_place={0: 0},
    interpret=interpret,
  )
  return y


def backward(
  u, spectrum, skip, pre_gate, post_gate, dy, sizes: Sizes,
  *, output: bool = False, interpret=False,
):  # fmt: skip
  """Gradients of `forward`, but for skip: one more weight of lag 0, whose gradient it has.

  Args:
    dy: the cotangent of y, in the shape and dtype of u.   output: whether y is wanted, which no
      post_gate may then stand behind.   The rest: as given to `forward`.
  Returns:
    du, dspectrum [R, k1, 2 columns, D], those of the gates, None for None, and y or None. Rows are
    [B, R tokens, D] in the dtype of u; dspectrum is float32, summed over the rows.
  """
  has_pre, has_post = pre_gate is not None, post_gate is not None
  du, *others = _call(
    functools.partial(_backward_kernel, sizes, has_pre, has_post, output),
    "backward",
    (u, pre_gate, post_gate, dy),
    (skip, spectrum),
    sizes,
    outputs=1 + has_pre + (has_post or output),
    in_place={0: 1, 1: 0} if output else {1: 0},
    sums=True,
    interpret=interpret,
  )
  *gates, dspectrum = others
  dpre = gates.pop(0) if has_pre else None
  dpost = gates.pop(0) if has_post else None
  return du, dspectrum / sizes.points, dpre, dpost, gates.pop() if output else None


def _call(kernel, name: str, rows, filters, sizes, *, outputs, in_place, sums=False, interpret):
  """A kernel on all pairs of rows.

  Args:
    rows: arrays of rows, some of them None.   filters: skip and spectrum.
    outputs: how many arrays of rows it makes.   sums: whether it makes a spectrum too, the last.
    in_place: of folded rows, which are read nowhere else, the places of those whose memory results
      take, each with that of the result.
  """
  batch, given, channels = rows[0].shape
  dtype, length = rows[0].dtype, sizes.residues * sizes.tokens
  fill = (0, batch % 2), (0, length - given), (0, 0)
  rows = [jnp.pad(x, fill) for x in rows if x is not None]
  pairs = rows[0].shape[0] // 2
  skip, spectrum = filters
  tables, twiddles = _tables(sizes)
  twiddles = jnp.broadcast_to(twiddles, (*twiddles.shape[:2], LANES))
  ahead = pl.Buffered(min(sizes.residues, 2))
  row = pl.BlockSpec((2, sizes.tokens, LANES), lambda j, r, pair: (pair, r, j))
  of_spectrum = (None, sizes.half, 2 * sizes.columns, LANES), lambda j, r, pair: (r, 0, 0, j)

  def table(x):
    return pl.BlockSpec((None, *x.shape[1:]), lambda j, r, pair: (r, 0, 0), pipeline_mode=ahead)

  out_shape = [jax.ShapeDtypeStruct((2 * pairs, length, channels), dtype)] * outputs
  out_specs = [row] * outputs
  if sums:
    out_shape.append(jax.ShapeDtypeStruct(spectrum.shape, jnp.float32))
    out_specs.append(pl.BlockSpec(*of_spectrum))
  tokens = pltpu.VMEM((2 * sizes.rows * (sizes.columns + APART), LANES), jnp.float32)
  complex_rows = pltpu.VMEM((sizes.columns * (2 * sizes.half + APART), LANES), jnp.float32)
  vmem = vmem_bytes(sizes, dtype.itemsize, len(rows) - 1 - sums, backward=sums)
  moved = (len(rows) + outputs) * 2 * pairs * length * channels * dtype.itemsize
  results = pl.pallas_call(
    kernel,
    grid=(pl.cdiv(channels, LANES), sizes.residues, pairs),
    in_specs=[
      [row] * len(rows),
      pl.BlockSpec((1, LANES), lambda j, r, pair: (0, j)),
      pl.BlockSpec(*of_spectrum, pipeline_mode=ahead),
      [table(x) for x in tables],
      pl.BlockSpec(twiddles.shape, lambda j, r, pair: (0, 0, 0), pipeline_mode=pl.Buffered(1)),
    ],
    out_specs=out_specs,
    out_shape=out_shape,
    scratch_shapes=[[tokens] * (1 + sums), [complex_rows] * (1 + sums)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=max(vmem * 9 // 8, 2**24),
    ),
    input_output_aliases={} if sizes.residues == 1 else in_place,
    cost_estimate=pl.CostEstimate(
      flops=matmul_flops(sizes, batch, channels) * (1 + sums),
      transcendentals=0,
      bytes_accessed=moved + 8 * sizes.points * channels * (1 + sums),
    ),
    name=f"long_convolution_{name}",
    interpret=interpret,
  )(rows, skip[None], spectrum, tables, twiddles)
  return [*(x[:batch] for x in results[:outputs]), *results[outputs:]]


def matmul_flops(sizes: Sizes, batch: int, channels: int) -> int:
  """Of the products of a forward pass, multiply-adds counted as two. A pass backward takes twice as
  many."""
  first = sizes.columns * (2 * sizes.half) * (2 * sizes.rows)
  second = sizes.half * (2 * sizes.columns) ** 2
  transforms = sizes.residues * -(-batch // 2) * channels
  return 2 * len(_pairs(sizes.parts)) * 2 * (first + second) * transforms


@functools.lru_cache(maxsize=8)
def _tables(sizes: Sizes) -> tuple[list[np.ndarray], np.ndarray]:
  """Constant operands: of the four products, [R, M, pairs of parts x K] bfloat16, and twiddles [n2,
  2 N1, 1] with cosines above sines."""
  rows, columns, half, points = sizes.rows, sizes.columns, sizes.half, sizes.frequencies
  n1, n2, k1, k2 = map(np.arange, (rows, columns, half, columns))

  def beside(matrix) -> np.ndarray:
    split = in_parts(matrix, sizes.parts)
    return np.concatenate([split[i] for i, _ in _pairs(sizes.parts)], 1)

  residues = []
  for shift in sizes.shifts:
    # w_columns^(n2 k2) w_points^(shift n2): a twiddle of the shift alone.
    second = k2 + shift / half
    residues.append(
      [
        beside(real_matrix(k1 + shift, n1, half)),
        beside(real_matrix(second, n2, columns)),
        beside(real_matrix(n2, -second, columns) / sizes.points),
        beside(real_matrix(n1, -(k1 + shift), half)),
      ]
    )
  turns = angles(n2, k1, points)
  twiddles = np.concatenate([np.cos(turns), np.sin(turns)], 1).astype(np.float32)
  return [np.stack(table) for table in zip(*residues, strict=True)], twiddles[..., None]


def _pairs(parts: int) -> list[tuple[int, int]]:
  """The parts of two operands whose products matter, the smallest products first."""
  return [(i, total - i) for total in reversed(range(parts)) for i in range(total + 1)]


def _product(matrix_ref, columns):
  """A constant matrix, its parts beside one another, times each of `columns` [K, 128] float32."""
  x = jnp.concatenate(columns, 1)
  pairs = matrix_ref.shape[1] // x.shape[0]
  parts, split = math.isqrt(2 * pairs), []
  for _ in range(parts):
    split.append(x.astype(jnp.bfloat16))
    x = x - split[-1].astype(jnp.float32)
  x = jnp.concatenate([split[j] for _, j in _pairs(parts)], 0)
  product = jnp.dot(matrix_ref[...], x, preferred_element_type=jnp.float32)
  return [product[:, j * LANES : (j + 1) * LANES] for j in range(len(columns))]


def _loop(count: int, body):
  """`body` on all numbers below `count`, on BESIDE of them at once."""

  def step(index, carry):
    body([index * BESIDE + i for i in range(BESIDE)])
    return carry

  jax.lax.fori_loop(0, count // BESIDE, step, 0, unroll=UNROLLED)


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
  """The steps of a transform; complex numbers of [n2, k1] stand in `ref` n2 by n2, [2 N1, 128]."""

  def __init__(self, sizes: Sizes, table_refs, twiddle_ref):
    self.sizes, self.twiddles = sizes, twiddle_ref
    self.first, self.second, self.second_back, self.first_back = table_refs

  def begin(self, tokens_ref, ref):
    """Both rows of tokens -> A with its twiddles."""

    def at(n2s):
      columns = [_joined(*(tokens_ref[self._tokens(row, n2)] for row in range(2))) for n2 in n2s]
      for n2, x in zip(n2s, _product(self.first, columns), strict=True):
        ref[self._frequencies(n2)] = _times(self.twiddles[n2], x, conjugate=True)

    _loop(self.sizes.columns, at)

  def end(self, ref, tokens_ref):
    """What `begin` makes -> both rows of tokens."""

    def at(n2s):
      columns = [_times(self.twiddles[n2], ref[self._frequencies(n2)]) for n2 in n2s]
      for n2, x in zip(n2s, _product(self.first_back, columns), strict=True):
        for row, tokens in enumerate(_halves(x)):
          tokens_ref[self._tokens(row, n2)] = tokens

    _loop(self.sizes.columns, at)

  def values(self, ref, k1s):
    """X of all k2, for each k1."""
    return _product(self.second, [_joined(*(ref[at] for at in self._parts(k1))) for k1 in k1s])

  def put(self, ref, k1s, xs):
    """X of all k2, for each k1 -> what `end` takes."""
    for k1, x in zip(k1s, _product(self.second_back, xs), strict=True):
      for at, part in zip(self._parts(k1), _halves(x), strict=True):
        ref[at] = part

  def _tokens(self, row: int, n2):
    apart = self.sizes.columns + APART
    return pl.ds(row * self.sizes.rows * apart + n2, self.sizes.rows, stride=apart)

  def _frequencies(self, n2):
    return pl.ds(n2 * (2 * self.sizes.half + APART), 2 * self.sizes.half)

  def _parts(self, k1):
    half = self.sizes.half
    return [
      pl.ds(part * half + k1, self.sizes.columns, stride=2 * half + APART) for part in range(2)
    ]


def _each_window(sizes: Sizes, body):
  """`body` for each row and n1: the row, where its tokens stand in arrays of rows, and where they
  stand in the scratch."""
  columns = sizes.columns

  def of(n1s):
    for n1 in n1s:
      for row in range(2):
        at = pl.multiple_of(n1 * columns, columns)
        start = (row * sizes.rows + n1) * (columns + APART)
        body((row, pl.ds(at, columns)), pl.ds(start, columns))

  _loop(sizes.rows, of)


def _values(refs, at):
  """The product of some arrays there."""
  return functools.reduce(jnp.multiply, (ref[at].astype(jnp.float32) for ref in refs))


def _forward_kernel(
  sizes: Sizes, has_pre: bool, has_post: bool,
  row_refs, skip_ref, spectrum_ref, table_refs, twiddle_ref, y_ref, tokens_refs, complex_refs,
):  # fmt: skip
  transform = _Transform(sizes, table_refs, twiddle_ref)
  (tokens_ref,), (ref,) = tokens_refs, complex_refs
  factors = row_refs[: 1 + has_pre]

  def enter(at, tokens):
    tokens_ref[tokens] = _values(factors, at)

  def filtered(k1s):
    values = transform.values(ref, k1s)
    values = [_times(x, spectrum_ref[k1]) for k1, x in zip(k1s, values, strict=True)]
    transform.put(ref, k1s, values)

  def leave(at, tokens):
    y = tokens_ref[tokens] + skip_ref[...] * _values(factors, at)
    y = y * row_refs[-1][at].astype(jnp.float32) if has_post else y
    y_ref[at] = y.astype(y_ref.dtype)

  _each_window(sizes, enter)
  transform.begin(tokens_ref, ref)
  _loop(sizes.half, filtered)
  transform.end(ref, tokens_ref)
  _each_window(sizes, leave)


def _backward_kernel(
  sizes: Sizes, has_pre: bool, has_post: bool, has_output: bool,
  row_refs, skip_ref, spectrum_ref, table_refs, twiddle_ref, *refs,
):  # fmt: skip
  """Spectra G of g and W of post_gate * dy: y is of G K, dg of conj(K) W, dK is conj(G) W."""
  *out_refs, dspectrum_ref, tokens_refs, complex_refs = refs
  transform = _Transform(sizes, table_refs, twiddle_ref)
  factors, cotangents = row_refs[: 1 + has_pre], row_refs[1 + has_pre :]
  (of_g, of_dy), (du_ref, *more_refs) = complex_refs, out_refs

  @pl.when(pl.program_id(2) == 0)
  def _():
    dspectrum_ref[...] = jnp.zeros_like(dspectrum_ref)

  def enter(at, tokens):
    for tokens_ref, refs in zip(tokens_refs, (factors, cotangents), strict=True):
      tokens_ref[tokens] = _values(refs, at)

  def filtered(k1s):
    gs, dys = transform.values(of_g, k1s), transform.values(of_dy, k1s)
    ks = [spectrum_ref[k1] for k1 in k1s]
    for k1, g, dy in zip(k1s, gs, dys, strict=True):
      dspectrum_ref[k1] += _times(g, dy, conjugate=True)
    transform.put(of_g, k1s, list(map(_times, gs, ks)))
    transform.put(
      of_dy, k1s, [_times(k, dy, conjugate=True) for k, dy in zip(ks, dys, strict=True)]
    )

  def leave(at, tokens):
    def put(ref, x):
      ref[at] = x.astype(ref.dtype)

    if has_post or has_output:
      y = tokens_refs[0][tokens] + skip_ref[...] * _values(factors, at)
      put(more_refs[-1], y * cotangents[-1][at].astype(jnp.float32) if has_post else y)
    dg = tokens_refs[1][tokens] + skip_ref[...] * _values(cotangents, at)
    if has_pre:
      put(more_refs[0], dg * factors[0][at].astype(jnp.float32))
      dg = dg * factors[1][at].astype(jnp.float32)
    put(du_ref, dg)

  _each_window(sizes, enter)
  for tokens_ref, ref in zip(tokens_refs, complex_refs, strict=True):
    transform.begin(tokens_ref, ref)
  _loop(sizes.half, filtered)
  for tokens_ref, ref in zip(tokens_refs, complex_refs, strict=True):
    transform.end(ref, tokens_ref)
  _each_window(sizes, leave)
