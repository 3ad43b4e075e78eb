"""The delta rule on TPU: one fused kernel a direction.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chunks_tpu import (
  GRAIN,
  LOG2_E,
  STRONGEST,
  Windows,
  compiler_params,
  cut_documents,
  cut_scalars,
  dot,
  head_major,
  join_scalars,
  parts_of,
  where,
)
from pallas_kernels.delta_rule.blocks import Blocks, choose_blocks, vmem_limit
from pallas_kernels.delta_rule.inverse_tpu import unit_lower_inverses

DTYPES = ("float32", "bfloat16")
MASKED = -1e9  # an exponent whose power of two is 0


def forward(
  q, k, v, beta, g, state, documents, *, scale: float, dtype, save: bool = False,
  blocks: Blocks | None = None, interpret=False,
):
  batch, length, heads, value_dim = v.shape
  shared, key_dim = k.shape[2:]
  blocks = blocks or _blocks(k, v, g)
  at = Windows(blocks.by_tile, heads, shared, length)
  held = at.held(heads)
  y, state, *starts = pl.pallas_call(
    functools.partial(_forward_kernel, blocks=blocks, length=length, scale=scale, at=at),
    grid=at.grid_of(batch),
    in_specs=[
      at.rows(shared, key_dim),
      at.rows(shared, key_dim),
      at.rows(heads, value_dim),
      at.scalars(heads),
      None if g is None else at.scalars(heads),
      None if state is None else at.states(heads, key_dim, value_dim),
      None if documents is None else at.documents(),
    ],
    out_specs=[
      at.rows(heads, value_dim),
      at.states(heads, key_dim, value_dim),
      at.starts(heads, key_dim, value_dim) if save else None,
      at.starts(heads, blocks.chunk * blocks.tiles, blocks.tile) if save else None,
      at.rows(heads, value_dim) if save else None,
    ],
    out_shape=[
      jax.ShapeDtypeStruct((batch, heads, length, value_dim), dtype),
      jax.ShapeDtypeStruct((batch, heads, key_dim, value_dim), jnp.float32),
      *(_starts(q, v, blocks, at.count) if save else (None, None, None)),
    ],
    compiler_params=compiler_params(vmem_limit(blocks, key_dim, value_dim, q.dtype)),
    name="delta_rule_forward",
    interpret=interpret,
  )(
    *head_major(q, k, v),
    cut_scalars(beta, blocks.by_tile, held),
    None if g is None else cut_scalars(g, blocks.by_tile, held),
    state,
    cut_documents(documents, blocks),
  )
  (y,) = head_major(y)
  return (y, state, tuple(starts)) if save else (y, state)


def _starts(q, v, blocks: Blocks, count: int):
  """What the backward keeps: states before blocks, inverses, and pseudo-values."""
  batch, length, heads, value_dim = v.shape
  shapes = (
    (batch, heads, count, q.shape[-1], value_dim),
    (batch, heads, count, blocks.chunk * blocks.tiles, blocks.tile),
    (batch, heads, length, value_dim),
  )
  return [jax.ShapeDtypeStruct(shape, q.dtype) for shape in shapes]


def backward(
  q, k, v, beta, g, starts, documents, dy, dstate, *, scale: float,
  blocks: Blocks | None = None, interpret=False,
):
  batch, length, heads, value_dim = v.shape
  shared, key_dim = k.shape[2:]
  blocks = blocks or _blocks(k, v, g)
  at = Windows(blocks.by_tile, heads, shared, length, reverse=True)
  held = at.held(heads)
  q, k, v, dy = head_major(q, k, v, dy.astype(q.dtype))
  states, inverses, values = starts
  cut_beta = cut_scalars(beta, blocks.by_tile, held)
  dq, dk, dv, dbeta, dg, dstate = pl.pallas_call(
    functools.partial(_backward_kernel, blocks=blocks, length=length, scale=scale, at=at),
    grid=at.grid_of(batch),
    in_specs=[
      at.rows(shared, key_dim),
      at.rows(shared, key_dim),
      at.rows(heads, value_dim),
      at.scalars(heads),
      None if g is None else at.scalars(heads),
      at.starts(heads, key_dim, value_dim),
      at.starts(heads, blocks.chunk * blocks.tiles, blocks.tile),
      at.rows(heads, value_dim),
      None if documents is None else at.documents(),
      at.rows(heads, value_dim),
      at.states(heads, key_dim, value_dim),
    ],
    out_specs=[
      at.rows(shared, key_dim),
      at.rows(shared, key_dim),
      at.rows(heads, value_dim),
      at.scalars(heads),
      None if g is None else at.scalars(heads),
      at.states(heads, key_dim, value_dim),
    ],
    out_shape=[
      *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)),
      jax.ShapeDtypeStruct(cut_beta.shape, jnp.float32),
      None if g is None else jax.ShapeDtypeStruct(cut_beta.shape, jnp.float32),
      jax.ShapeDtypeStruct(dstate.shape, jnp.float32),
    ],
    scratch_shapes=[
      pltpu.VMEM((blocks.heads, blocks.chunks + 1, key_dim, value_dim), q.dtype)
    ],
    compiler_params=compiler_params(vmem_limit(blocks, key_dim, value_dim, q.dtype)),
    name="delta_rule_backward",
    interpret=interpret,
  )(
    q, k, v, cut_beta, None if g is None else cut_scalars(g, blocks.by_tile, held),
    states, inverses, values, cut_documents(documents, blocks), dy, dstate,
  )
  dbeta = join_scalars(dbeta, blocks.by_tile, length)
  dg = None if g is None else join_scalars(dg, blocks.by_tile, length)
  return *head_major(dq, dk, dv), dbeta, dg, dstate


def _blocks(k, v, g) -> Blocks:
  group = v.shape[2] // k.shape[2]
  return choose_blocks(*v.shape[1:3], group, k.shape[-1], v.shape[-1], k.dtype, g)


def _interleave(tasks: Iterable[Generator]) -> None:
  """Carries out tasks step by step in turn: the schedule follows the order of the program, and what
  is written between two steps of a task is done while the second waits for the first."""
  tasks = list(tasks)
  while tasks:
    tasks = [task for task in tasks if next(task, tasks) is not tasks]


def _fold(x, size: int):
  """The blocks [C, C] on the diagonal of [L, L], side by side: [C, L]."""
  lane = jax.lax.broadcasted_iota(jnp.int32, (size, x.shape[1]), 1)
  folded = x[:size]
  for i in range(1, x.shape[0] // size):
    folded = jnp.where(lane // size == i, x[i * size : (i + 1) * size], folded)
  return folded


def _unfold(x):
  """The inverse of `_fold`, zeros off the diagonal."""
  size, width = x.shape
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  return jnp.concatenate([where(lane // size == i, x) for i in range(width // size)])


def _times(weight, x):
  return x if weight is None else weight * x


def _project(weight, x, matrix):
  """weight * x @ matrix; a weight of each row is applied to the fewer numbers, behind the product."""
  return _times(weight, dot(x, matrix, (1, 0)))


class _Tile:
  """Tokens of one head whose matrices of pairs stand side by side."""

  def __init__(self, gates, h, t):
    i = gates.blocks.tiles * h + t
    self._gates, self._head, self._index = gates, h, t
    self.beta = gates.beta[i : i + 1]
    self.beta_column = gates.beta_columns[:, i : i + 1]
    self.reads, self.writes = (x and x[t] for x in (gates.reads, gates.writes))
    self._row, self._column = ([x[..., s] for x in xs] for xs, s in ())


class _Gates:
  """Write strengths, decays and documents of a block, for all of its heads and tiles."""

  def __init__(self, beta_ref, g_ref, documents_ref, *, blocks: Blocks, exact: bool, by_key: bool):
    size, width = blocks.chunk, blocks.tile
    self.blocks = blocks
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (width, width), axis) for axis in (0, 1))
    one = jnp.where(row == column, 1.0, 0.0).astype(jnp.bfloat16)
    self.triangle = jnp.where((row >= column) & (row // size == column // size), 1.0, 0.0)
    self.triangle = self.triangle.astype(jnp.bfloat16)
    self.beta = beta_ref[0, 0, 0]
    self.beta_columns = sum(dot(one, p, (1, 1)) for p in parts_of(self.beta))
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, width), axis) for axis in (0, 1))
    column = column % size
    self.visible = row <= column if by_key else row >= column
    self.strict = row != column
    self.by_key = by_key
    self._rows = None
    if g_ref is not None:
      g = jnp.maximum(g_ref[0, 0, 0], STRONGEST) * LOG2_E
      summed = [g]
      if exact:  # multiples of the grain add up exactly, and the rest stays small
        coarse = jnp.round(g * GRAIN) / GRAIN
        summed = [coarse, g - coarse]
      self._rows = [sum(dot(p, self.triangle, (1, 1)) for p in parts_of(x)) for x in summed]
      self._columns = [sum(dot(self.triangle, p, (1, 1)) for p in parts_of(x)) for x in summed]
      self._since = jnp.exp2(sum(self._columns))
      self._until = jnp.exp2(sum(_last(x, size) - x for x in self._columns))
    self._documents = documents_ref
    self._of_tile = {}

  def _masks(self, t: int):
    """visible [C, L], reads, writes [L, 1], keeps: for each chunk [1, 1]."""
    if t not in self._of_tile:
      self._of_tile[t] = self._masks_of(t)
    return self._of_tile[t]

  def _masks_of(self, t: int):
    size, width = self.blocks.chunk, self.blocks.tile
    ref = self._documents
    if ref is None:
      return self.visible, None, None, [None] * (width // size)
    of_column = jnp.broadcast_to(ref[0, 0, :1, pl.ds(t * width, width)], (width, width))
    of_row = of_column.T
    visible = self.visible & (_fold(of_row, size) == of_column[:size])
    reads, writes, keeps = [], [], []
    for first in range(0, width, size):
      own = of_row[first : first + size, :1]
      last = ref[0, 0, :1, pl.ds(t * width + first + size - 1, 1)]
      before = ref[0, 0, 1:, pl.ds(t * width + first, 1)]
      reads.append(own == before)
      writes.append(own == last)
      keeps.append(before == last)
    return visible, jnp.concatenate(reads), jnp.concatenate(writes), keeps

  def pairs(self, h: int, t: int):
    """[C, L]"""
    visible, *_ = self._masks(t)
    if self._rows is None:
      return jnp.where(visible, 1.0, 0.0)
    i = h * self.blocks.tiles + t
    width = self.blocks.tile
    exponent = sum(
      _fold(jnp.broadcast_to(c[:, i : i + 1], (width, width)), self.blocks.chunk) - r[i : i + 1]
      for c, r in zip(self._columns, self._rows, strict=True)
    )
    exponent = -exponent if self.by_key else exponent
    return jnp.exp2(jnp.where(visible, exponent, MASKED))

  def weights(self, h: int, t: int):
    """since, until [L, 1]; whole: of each chunk [1, 1]"""
    _, reads, writes, keeps = self._masks(t)
    if self._rows is None:
      return *(None if x is None else jnp.where(x, 1.0, 0.0) for x in (reads, writes)), [
        None if x is None else jnp.where(x, 1.0, 0.0) for x in keeps]
    i = h * self.blocks.tiles + t
    size = self.blocks.chunk
    since, until = self._since[:, i : i + 1], self._until[:, i : i + 1]
    whole = [
      where(keep, since[(m + 1) * size - 1 : (m + 1) * size]) for m, keep in enumerate(keeps)
    ]
    return where(reads, since), where(writes, until), whole


def _last(x, size: int):
  """The last row of each chunk, on all of its rows."""
  rows = [x[i + size - 1 : i + size] for i in range(0, x.shape[0], size)]
  return jnp.concatenate([jnp.broadcast_to(r, (size, x.shape[1])) for r in rows])


def _forward_kernel(
  q_ref, k_ref, v_ref, beta_ref, g_ref, state_ref, documents_ref,
  y_ref, carry_ref, states_ref, inverses_ref, values_ref,
  *, blocks: Blocks, length: int, scale: float, at: Windows,
):
  block = pl.program_id(2)

  @pl.when(block == 0)
  def _():
    carry_ref[...] = jnp.zeros_like(carry_ref) if state_ref is None else state_ref[...]

  if states_ref is not None:
    states_ref[0, :, 0] = carry_ref[0].astype(states_ref.dtype)
  dtype = q_ref.dtype
  exact = dtype == jnp.float32
  gates = _Gates(beta_ref, g_ref, documents_ref, blocks=blocks, exact=exact, by_key=False)
  load = _loader(block, blocks, length)
  size, width = blocks.chunk, blocks.tile
  prepared = {}
  own = functools.partial(at.local, heads=k_ref.shape[1] * (at._most // at._most))
  def key_head(h):
    return h * k_ref.shape[1] // blocks.heads

  def prepare(h, t):
    q, k = (load(ref, key_head(h), t * width, width) for ref in (q_ref, k_ref))
    scores, grams = dot(q, k, (1, 1)), dot(k, k, (1, 1))
    yield
    pairs = gates.pairs(h, t)
    i = h * blocks.tiles + t
    beta = _fold(jnp.broadcast_to(gates.beta_columns[:, i : i + 1], (width, width)), size)
    coupling = where(gates.strict, _fold(grams, size) * (pairs * beta))
    scores = (_fold(scores, size) * (scale * pairs)).astype(dtype)
    yield
    inverse = yield from unit_lower_inverses(coupling, exact=exact)
    if inverses_ref is not None:
      inverses_ref[0, h, 0, pl.ds(t * size, size)] = inverse.astype(dtype)
    prepared[h, t] = scores, (inverse * gates.beta[i : i + 1]).astype(dtype)

  def walk(h, t):
    scores, inverse = prepared.pop((h, t))
    since, until, whole = gates.weights(h, t)
    errors = [jnp.zeros((size, v_ref.shape[-1]), dtype)] * (width // size)
    written, read = [], []
    lane = jax.lax.broadcasted_iota(jnp.int32, inverse.shape, 1)
    for m in range(width // size):
      first = t * width + m * size
      inside = slice(m * size, (m + 1) * size)
      q, k, v = (
        load(ref, head, first, size)
        for ref, head in ((q_ref, key_head(h)), (k_ref, key_head(h)), (v_ref, h))
      )
      state = carry_ref[0, h]
      before = dot(jnp.concatenate([k, q]), state.astype(dtype), (1, 0))
      yield
      of_keys, of_queries = before[:size], before[size:]
      weight = None if since is None else since[inside]
      errors[m] = (v.astype(jnp.float32) - _times(weight, of_keys)).astype(dtype)
      read.append(_times(weight, of_queries))
      yield
      values = dot(where(lane // size == m, inverse), jnp.concatenate(errors), (1, 0))
      yield
      written.append(values.astype(dtype))
      k = load(k_ref, key_head(h), first, size)
      weight = None if until is None else until[inside]
      added = dot(k, _times(weight, values).astype(dtype), (0, 0))
      carry_ref[0, h] = _times(whole[m], carry_ref[0, h]) + added
      yield
    written = jnp.concatenate(written)
    rows = pl.ds(t * width, width)
    if values_ref is not None:
      values_ref[0, h, rows, :] = written
    y = dot(_unfold(scores), written, (1, 0)) + scale * jnp.concatenate(read)
    yield
    y_ref[0, h, rows, :] = y.astype(y_ref.dtype)

  heads = range(blocks.heads)
  _interleave(prepare(h, 0) for h in heads)
  for t in range(blocks.tiles):
    ahead = [prepare(h, t + 1) for h in heads] if t + 1 < blocks.tiles else []
    _interleave([walk(h, t) for h in heads] + ahead)


def _loader(block, blocks: Blocks, length: int):
  """load(ref, head, first, count): rows of a block; beyond the length, where memory holds anything,
  zeros."""

  def load(ref, head, first, count):
    rows = ref[0, head, pl.ds(first, count), :]
    if length % blocks.tokens == 0:
      return rows
    left = length - block * blocks.tokens - first
    return where(jax.lax.broadcasted_iota(jnp.int32, (count, 1), 0) < left, rows)

  return load


def _backward_kernel(
  q_ref, k_ref, v_ref, beta_ref, g_ref, states_ref, inverses_ref, values_ref, documents_ref,
  dy_ref, dstate_ref,
  dq_ref, dk_ref, dv_ref, dbeta_ref, dg_ref, dcarry_ref, within_ref,
  *, blocks: Blocks, length: int, scale: float, at: Windows,
):
  step = pl.program_id(2)

  @pl.when(step == 0)
  def _():
    dcarry_ref[...] = dstate_ref[...]

  block = pl.num_programs(2) - 1 - step
  dtype = q_ref.dtype
  exact = dtype == jnp.float32
  gates = _Gates(beta_ref, g_ref, documents_ref, blocks=blocks, exact=exact, by_key=True)
  load = _loader(block, blocks, length)
  size, width = blocks.chunk, blocks.tile
  count = width // size
  group = blocks.heads // k_ref.shape[1]
  prepared, walked, shared = {}, {}, {}
  n = blocks.heads * blocks.tiles
  lane = jax.lax.broadcasted_iota(jnp.int32, (width, n), 1)
  sums = {"beta": jnp.zeros((width, n)), "g": jnp.zeros((width, n))}

  def restate(h):
    state = states_ref[0, h, 0].astype(jnp.float32)
    within_ref[h, 0] = states_ref[0, h, 0]
    for t in range(blocks.tiles):
      _, until, whole = gates.weights(h, t)
      for m in range(count):
        first = t * width + m * size
        k, values = load(k_ref, h // group, first, size), load(values_ref, h, first, size)
        if until is not None:
          values = (until[m * size : (m + 1) * size] * values.astype(jnp.float32)).astype(dtype)
        added = dot(k, values, (0, 0))
        yield
        state = _times(whole[m], state) + added
        within_ref[h, t * count + m + 1] = state.astype(dtype)

  def prepare(h, t):
    first = t * width
    q, k = (load(ref, h // group, first, width) for ref in (q_ref, k_ref))
    scores = dot(k, q, (1, 1))
    inverse = inverses_ref[0, h, 0, pl.ds(t * size, size)].T
    yield
    pairs = gates.pairs(h, t)
    scores = (_fold(scores, size) * (scale * pairs)).astype(dtype)
    yield
    written = dot(_unfold(scores), load(dy_ref, h, first, width), (1, 0))
    yield
    prepared[h, t] = pairs, inverse, written

  def walk(h, t):
    pairs, inverse, written = prepared.pop((h, t))
    since, until, whole = gates.weights(h, t)
    i = h * blocks.tiles + t
    dreads = scale if since is None else scale * since
    dkeys = -gates.beta_columns[:, i : i + 1] * (1.0 if since is None else since)
    errors, after, carried = [None] * count, [None] * count, [None] * count
    for m in reversed(range(count)):
      first, inside = t * width + m * size, slice(m * size, (m + 1) * size)
      k = load(k_ref, h // group, first, size)
      dstate = dcarry_ref[0, h]
      after[m] = dstate.astype(dtype)
      if g_ref is not None:
        carried[m] = jnp.sum(dstate * within_ref[h, t * count + m + 1].astype(jnp.float32), keepdims=True)
      dvalues = dot(k, after[m], (1, 0))
      yield
      dvalues = written[inside] + _times(None if until is None else until[inside], dvalues)
      dvalues = dvalues.astype(dtype)
      yield
      errors[m] = dot(inverse[inside], dvalues, (1, 0))
      yield
      dy = load(dy_ref, h, first, size).astype(jnp.float32)
      dreads_m = dreads if since is None else dreads[inside]
      operand = jnp.concatenate([dreads_m * dy, dkeys[inside] * errors[m]]).astype(dtype)
      q, k = (load(ref, h // group, first, size) for ref in (q_ref, k_ref))
      dcarry_ref[0, h] = _times(whole[m], dcarry_ref[0, h]) + dot(
        jnp.concatenate([q, k]), operand, (0, 0))
      yield
    walked[h, t] = pairs, errors, after, carried

  def finish(h, t):
    pairs, errors, after, carried = walked.pop((h, t))
    since, until, whole = gates.weights(h, t)
    i = h * blocks.tiles + t
    first, rows = t * width, pl.ds(t * width, width)
    beta, beta_column = gates.beta[i : i + 1], gates.beta_columns[:, i : i + 1]
    derrors = jnp.concatenate(errors)
    rounded = derrors.astype(dtype)
    dy, values = load(dy_ref, h, first, width), load(values_ref, h, first, width)
    dscores = dot(values, dy, (1, 1))
    dcoupling = dot(values, rounded, (1, 1))
    yield
    reads, dkept = [], []
    for m in range(count):
      inside = slice(m * size, (m + 1) * size)
      state = within_ref[h, t * count + m]
      both = dot(jnp.concatenate([dy[inside], rounded[inside]]), state, (1, 1))
      reads.append((both[:size], both[size:]))
      dkept.append(dot(values[inside], after[m], (1, 1)))
    yield
    dq, dkeys = (jnp.concatenate(x) for x in zip(*reads, strict=True))
    dscores = _fold(dscores, size) * (scale * pairs)
    dcoupling = where(gates.strict, _fold(dcoupling, size) * -pairs)
    dk = _times(until, jnp.concatenate(dkept))
    yield
    q, k = (load(ref, h // group, first, width) for ref in (q_ref, k_ref))
    dk += dot(_unfold(dscores.astype(dtype)), q, (1, 0))
    dk += dot(_unfold((dcoupling * beta).astype(dtype)), k, (1, 0))
    turned = jnp.concatenate([dscores, dcoupling]).T.astype(dtype)
    yield
    inner = [[], []]
    for m in range(count):
      inside = slice(m * size, (m + 1) * size)
      inner[0].append(dot(turned[inside, :size], k[inside], (1, 0)))
      inner[1].append(dot(turned[inside, size:], k[inside], (1, 0)))
    yield
    dq = _times(since, scale * dq) + jnp.concatenate(inner[0])
    drows = jnp.concatenate(inner[1]) - _times(since, dkeys)
    v = load(v_ref, h, first, width).astype(jnp.float32)
    q, k = (load(ref, h // group, first, width).astype(jnp.float32) for ref in (q_ref, k_ref))
    dv_ref[0, h, rows, :] = (beta_column * derrors).astype(dtype)
    dbeta = jnp.sum(derrors * v, axis=1, keepdims=True) + jnp.sum(drows * k, axis=1, keepdims=True)
    sums["beta"] = jnp.where(lane == i, dbeta, sums["beta"])
    drows = beta_column * drows
    yield
    if g_ref is not None:
      dg = jnp.sum(q * dq + k * (drows - dk), axis=1, keepdims=True)
      last = jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0) == size - 1
      dg += jnp.concatenate([where(last, jnp.broadcast_to(x, (size, 1))) for x in carried])
      sums["g"] = jnp.where(lane == i, dg, sums["g"])
    dk += drows
    yield
    for name, x, ref in (("q", dq, dq_ref), ("k", dk, dk_ref)):
      of_group = shared.setdefault((name, h // group, t), [])
      of_group.append(x)
      if len(of_group) == group:
        ref[0, h // group, rows, :] = sum(of_group).astype(dtype)

  heads, tiles = range(blocks.heads), blocks.tiles
  _interleave([restate(h) for h in heads] + [prepare(h, tiles - 1) for h in heads])
  for t in reversed(range(tiles)):
    ahead = [prepare(h, t - 1) for h in heads] if t else []
    behind = [finish(h, t + 1) for h in heads] if t + 1 < tiles else []
    _interleave([walk(h, t) for h in heads] + ahead + behind)
  _interleave(finish(h, 0) for h in heads)
  dbeta_ref[0, 0, 0] = sums["beta"].T
  if g_ref is not None:
    dg_ref[0, 0, 0] = sum(dot(p, gates.triangle, (0, 0)) for p in parts_of(sums["g"]))
