"""The delta rule on TPU: one fused kernel a direction.

Grid (B, H / heads, T / tokens, 1), the last blocks of tokens in order; the backward kernel walks
them from the end. A block holds rows of q, k, v, y (and dy, dq, dk, dv) of `heads` heads in tiles
of L tokens, two chunks of C = 64: their matrices of pairs fill the 128 lanes side by side. The
state [K, V] of each head, float32, stays in the window of the state that a kernel returns. With
T = (I + M)^-1 diag(beta), M and A the weights of pairs under decay, S the state before a chunk:

    written = T (V - e^b K S)             y = scale * (e^b Q S + A written)
    S' = e^b_C S + (e^(b_C - b) K)^T written

What does not need S (M, A, the inverse) is prepared a tile ahead. Each step of a head waits for the
MXU to answer the one before, some 100 cycles, so the tasks of all heads are written in turns, and
those of the next tile among them: `_interleave`. Where each channel decays, M and A take so many
vector operations that the compiler, were it free to begin them all at once, would put most of what
they compute to memory and back: the forward kernel makes them in a loop over heads, `weigh`.

Bytes, a token and head, at b bytes a number, without those of g and beta: forward b (2 K + 2 V);
for the backward also b (C + V + K V / tokens): the inverses, `written`, and the state before each
block. The inverses save the backward their sequential part, `written` two products and a walk of
three steps in a row for each chunk: it then knows all states of a block from products that wait
for nothing. Their 3 b * 64 bytes are moved while the matrix and vector units are the limit, here
and there. The states between are computed again: kept, they would be as much again as q, k, v.
Flops: forward 2 C (2 K + 2 V) + 6 K V and the inverse, backward 2 C (6 K + 4 V) + 14 K V.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chunks import mixed_dtypes
from pallas_kernels.chunks_tpu import (
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
from pallas_kernels.delta_rule.blocks import (
  Blocks,
  choose_blocks,
  forward_blocks,
  heads_together,
  vmem_limit,
)
from pallas_kernels.delta_rule.tiles_tpu import (
  Gates,
  Room,
  fold,
  place_in,
  rooms,
  spread,
  unfold,
  unit_lower_inverses,
)


def refusal(q, k, v, beta, g) -> str | None:
  """Why the kernels cannot run on these arrays, as given to `forward`, or None."""
  if (mixed := mixed_dtypes(q=q, k=k, v=v)) is not None:
    return mixed
  states = max(k.shape[2], v.shape[2])
  if q.shape[2] > states:
    return f"q has {q.shape[2]} heads and there are {states} states, expected at most as many"
  try:
    _blocks(q, k, v, g)
  except ValueError as error:
    return str(error)
  return None


def forward(
  q,
  k,
  v,
  beta,
  g,
  state,
  documents,
  *,
  scale: float,
  dtype,
  save: bool = False,
  blocks: Blocks | None = None,
  interpret=False,
):
  """The delta rule.

      S~  = exp(g_t) * S_{t-1}
      S_t = S~ + beta_t k_t (v_t - S~^T k_t)^T        y_t = scale * S_t^T q_t

  Args:
    q, k: [B, T, heads, K].   v: [B, T, heads, V].   All float32 or all bfloat16. There are H
      states; arrays of fewer heads, dividing H, are shared by neighbours.
    beta: [B, T, H] float32.   g: None, [B, T, H] or [B, T, H, K], float32.
    state: [B, H, K, V] float32, S_0; None means zeros.
    documents: [B, T] int32 or None: the number of each token's document in its row, from 0 and
      never falling; S is cleared where it changes, and S_0 belongs to document 0.
    scale: multiplies q.   dtype: of y.
    save: also return what `backward` wants.
    blocks: None chooses.   interpret: run the kernel's program on the CPU.
  Returns:
    y: [B, T, H, V];   S_T: [B, H, K, V] float32;   with `save` three arrays in the dtype of q: of
    N blocks the inverses [B, H, N, tiles * C, L], the states before them [B, H, N, K, V], and what
    each token wrote [B, H, T, V].
  Raises:
    ValueError: the heads do not fit VMEM (see `choose_blocks`).
  Source: Yang et al. 2024 (arXiv 2406.06484), section 3; with decay Yang et al. 2024 (arXiv
    2412.06464), section 3, and Kimi Team 2025 (arXiv 2510.26692), section 3.
  """
  batch, length, heads = beta.shape
  key_dim, value_dim = k.shape[-1], v.shape[-1]
  blocks = blocks or forward_blocks(
    _blocks(q, k, v, g), heads, key_dim, value_dim, q.dtype, _kind(g)
  )
  at = _windows(blocks, q, k, v, beta)
  rows, states = batch * heads * length, batch * heads * key_dim * value_dim
  size, itemsize = blocks.chunk, q.dtype.itemsize
  kept = (
    (blocks.chunk * blocks.tiles, blocks.tile),  # the inverses of a block
    (key_dim, value_dim),
  )
  y, state, *starts = pl.pallas_call(
    functools.partial(_forward_kernel, blocks=blocks, length=length, scale=scale),
    grid=at.grid_of(batch),
    in_specs=[
      *_inputs(at, q, k, v, beta, g),
      None if state is None else at.states(heads, key_dim, value_dim),
      None if documents is None else at.documents(),
    ],
    out_specs=[
      at.rows(heads, value_dim),
      at.states(heads, key_dim, value_dim),
      *(at.starts(heads, *shape) if save else None for shape in kept),
      at.rows(heads, value_dim) if save else None,
    ],
    out_shape=[
      jax.ShapeDtypeStruct((batch, heads, length, value_dim), dtype),
      jax.ShapeDtypeStruct((batch, heads, key_dim, value_dim), jnp.float32),
      *(
        jax.ShapeDtypeStruct((batch, heads, at.count, *shape), q.dtype) if save else None
        for shape in kept
      ),
      jax.ShapeDtypeStruct((batch, heads, length, value_dim), q.dtype) if save else None,
    ],
    scratch_shapes=rooms(blocks, key_dim, q.dtype) if _kind(g) == "channel" else [],
    compiler_params=compiler_params(vmem_limit(blocks, key_dim, value_dim, q.dtype, _kind(g))),
    cost_estimate=pl.CostEstimate(
      flops=rows * (4 * size * (key_dim + value_dim) + 6 * key_dim * value_dim),
      transcendentals=0 if g is None else rows * size,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in (q, k, v, beta))
      + (0 if g is None else 4 * g.size)
      + rows * value_dim * jnp.dtype(dtype).itemsize
      + states * (4 + 4 * (state is not None) + itemsize * at.count * save)
      + rows * (size + value_dim) * itemsize * save,
    ),
    name="delta_rule_forward",
    interpret=interpret,
  )(*_head_major(blocks, at, q, k, v, beta, g), state, cut_documents(documents, blocks))
  (y,) = head_major(y)
  return (y, state, tuple(starts)) if save else (y, state)


def backward(
  q,
  k,
  v,
  beta,
  g,
  starts,
  documents,
  dy,
  dstate,
  *,
  scale: float,
  blocks: Blocks | None = None,
  interpret=False,
):
  """Gradients of `forward`.

  Args:
    q, k, v, beta, g, documents, scale, blocks, interpret: as given to `forward`.
    starts: what it saved.
    dy: [B, T, H, V], any float dtype.   dstate: [B, H, K, V] float32: cotangents of y and S_T.
  Returns:
    dq, dk, dv in the dtype of q; dbeta; dg, None where g is; dS_0; each in the shape of its array.
  """
  batch, length, heads = beta.shape
  key_dim, value_dim = k.shape[-1], v.shape[-1]
  blocks = blocks or _blocks(q, k, v, g)
  at = _windows(blocks, q, k, v, beta, reverse=True)
  tokens, states = batch * heads * length, batch * heads * key_dim * value_dim
  size, itemsize = blocks.chunk, q.dtype.itemsize
  rows = _head_major(blocks, at, q, k, v, beta, g)
  *gradients, dbeta, dg, dstate = pl.pallas_call(
    functools.partial(_backward_kernel, blocks=blocks, length=length, scale=scale),
    grid=at.grid_of(batch),
    in_specs=[
      *_inputs(at, q, k, v, beta, g),
      *(at.starts(heads, *x.shape[3:]) for x in starts[:2]),
      at.rows(heads, value_dim),
      None if documents is None else at.documents(),
      at.rows(heads, value_dim),
      at.states(heads, key_dim, value_dim),
    ],
    out_specs=[*_inputs(at, q, k, v, beta, g), at.states(heads, key_dim, value_dim)],
    out_shape=[
      *(None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in rows),
      jax.ShapeDtypeStruct(dstate.shape, jnp.float32),
    ],
    scratch_shapes=[pltpu.VMEM((blocks.heads, blocks.chunks + 1, key_dim, value_dim), q.dtype)],
    compiler_params=compiler_params(vmem_limit(blocks, key_dim, value_dim, q.dtype, _kind(g))),
    cost_estimate=pl.CostEstimate(
      flops=tokens * (4 * size * (3 * key_dim + 2 * value_dim) + 14 * key_dim * value_dim),
      transcendentals=0 if g is None else tokens * size,
      bytes_accessed=2 * sum(x.size * x.dtype.itemsize for x in (q, k, v, beta))
      + (0 if g is None else 8 * g.size)
      + tokens * (size + 2 * value_dim) * itemsize
      + states * (8 + itemsize * at.count),
    ),
    name="delta_rule_backward",
    interpret=interpret,
  )(*rows, *starts, cut_documents(documents, blocks), *head_major(dy.astype(q.dtype)), dstate)
  dbeta = join_scalars(dbeta, blocks.by_tile, length)
  if g is not None:
    dg = join_scalars(dg, blocks.by_tile, length) if g.ndim == 3 else head_major(dg)[0]
  return *head_major(*gradients), dbeta, dg, dstate


def _blocks(q, k, v, g) -> Blocks:
  heads = max(k.shape[2], v.shape[2])
  group = heads // min(x.shape[2] for x in (q, k, v))
  return choose_blocks(q.shape[1], heads, group, k.shape[3], v.shape[3], k.dtype, _kind(g))


def _kind(g) -> str | None:
  return {4: "channel", 3: "row"}[g.ndim] if g is not None else None


def _windows(blocks: Blocks, q, k, v, beta, *, reverse: bool = False) -> Windows:
  fewest = min(x.shape[2] for x in (q, k, v))
  return Windows(blocks.by_tile, beta.shape[2], fewest, beta.shape[1], reverse=reverse)


def _inputs(at: Windows, q, k, v, beta, g):
  """The windows of q, k, v, beta and g."""
  heads = beta.shape[2]
  of_g = None
  if g is not None:
    of_g = at.scalars(heads) if g.ndim == 3 else at.rows(heads, g.shape[-1])
  return [*(at.rows(*x.shape[2:]) for x in (q, k, v)), at.scalars(heads), of_g]


def _head_major(blocks: Blocks, at: Windows, q, k, v, beta, g):
  """The arrays as the kernels see them."""
  cut = functools.partial(cut_scalars, blocks=blocks.by_tile, held=blocks.heads)
  if g is not None:
    g = cut(g) if g.ndim == 3 else head_major(g)[0]
  return *head_major(q, k, v), cut(beta), g


def _interleave(tasks: Iterable[Generator]) -> None:
  """Carries out tasks in turn, a step each. The schedule follows the order of the program, so that
  what stands between two steps of a task is done while the second waits for the first."""
  tasks = list(tasks)
  while tasks:
    tasks = [task for task in tasks if next(task, tasks) is not tasks]


def _times(weight, x):
  return x if weight is None else weight * x


def _before(weight, x):
  """x, an operand of a product: weighted here if each channel has a weight of its own ..."""
  if weight is None or weight.shape[1] == 1:
    return x
  return (weight * x.astype(jnp.float32)).astype(x.dtype)


def _behind(weight, x):
  """... and here, behind the product, if each row has."""
  return x if weight is None or weight.shape[1] > 1 else weight * x


def _loader(block, blocks: Blocks, length: int):
  """load(ref, h, first, count): rows of what head h uses; zeros beyond the length, where memory
  holds anything."""

  def load(ref, h, first, count):
    shared = blocks.heads // ref.shape[1]
    of_h = h // shared if isinstance(h, int) else jax.lax.div(h, jnp.int32(shared))
    rows = ref[0, of_h, pl.ds(first, count), :]
    if length % blocks.tokens == 0:
      return rows
    left = length - block * blocks.tokens - first
    return where(jax.lax.broadcasted_iota(jnp.int32, (count, 1), 0) < left, rows)

  return load


def _forward_kernel(
  q_ref,
  k_ref,
  v_ref,
  beta_ref,
  g_ref,
  state_ref,
  documents_ref,
  y_ref,
  carry_ref,
  inverses_ref,
  states_ref,
  values_ref,
  *room_refs,
  blocks: Blocks,
  length: int,
  scale: float,
):
  block = pl.program_id(2)

  @pl.when(block == 0)
  def _():
    carry_ref[...] = jnp.zeros_like(carry_ref) if state_ref is None else state_ref[...]

  if states_ref is not None:
    states_ref[0, :, 0] = carry_ref[0].astype(states_ref.dtype)
  dtype, size, width = q_ref.dtype, blocks.chunk, blocks.tile
  exact = dtype == jnp.float32
  load = _loader(block, blocks, length)
  gates = Gates(beta_ref, g_ref, documents_ref, load, blocks=blocks, exact=exact, by_key=False)
  prepared = {}

  def room_of(h):
    return Room(*(ref.at[h] for ref in room_refs))

  def weigh(t):
    """The weights of pairs where each channel decays: of some heads the products, while the
    operands of the next are made."""
    some = heads_together(blocks)

    def begin(first):
      for h in range(some):
        q, k = (load(ref, first + h, t * width, width) for ref in (q_ref, k_ref))
        yield gates.decay(first + h, t).stage(q, k, room_of(first + h))

    def end(first):
      for h in range(some):
        yield gates.decay(first + h, t).meet(room_of(first + h))

    _interleave(begin(0))

    @pl.loop(1, blocks.heads // some)
    def _(i):
      _interleave([*end(some * (i - 1)), *begin(some * i)])

    _interleave(end(blocks.heads - some))

  def prepare(h, t):
    """What does not need the state: the weights of pairs, and the inverses."""
    row, column = gates.beta(h, t)
    if room_refs:
      decay, (scores, coupling) = None, room_of(h).weights[...]
    else:
      q, k = (load(ref, h, t * width, width) for ref in (q_ref, k_ref))
      decay = gates.decay(h, t)
      scores, coupling = yield from decay.weights((q, k), k)
    of_row, of_column = (
      jax.lax.broadcasted_iota(jnp.int32, coupling.shape, axis) for axis in (0, 1)
    )
    coupling = where(of_row != place_in(of_column, size), coupling * spread(column, size))
    scores = unfold(scale * scores).astype(dtype)
    yield
    inverse = yield from unit_lower_inverses(coupling, exact=exact)
    if inverses_ref is not None:
      inverses_ref[0, h, 0, pl.ds(t * size, size)] = inverse.astype(dtype)
    inverse = inverse * row
    inverses = [inverse[:, i : i + size].astype(dtype) for i in range(0, width, size)]
    prepared[h, t] = decay, scores, inverses

  def walk(h, t):
    """What does, chunk by chunk."""
    decay, scores, inverses = prepared.pop((h, t))
    written, read = [], []
    for m in range(width // size):
      first, inside = t * width + m * size, slice(m * size, (m + 1) * size)
      v = load(v_ref, h, first, size)
      since = until = None
      if room_refs:
        ks, qs, keys, whole = room_of(h).chunk(m, size)
        whole = where(gates.masks[t].keeps[m], whole)
      else:
        since, until = (None if x is None else x[inside] for x in (decay.since, decay.until))
        ks, qs, keys = (load(ref, h, first, size) for ref in (k_ref, q_ref, k_ref))
        whole = decay.whole[m]
      before = dot(jnp.concatenate([ks, qs]), carry_ref[0, h].astype(dtype), (1, 0))
      yield
      errors = (v.astype(jnp.float32) - _behind(since, before[:size])).astype(dtype)
      read.append(_behind(since, before[size:]))
      yield
      values = dot(inverses[m], errors, (1, 0))
      yield
      written.append(values.astype(dtype))
      added = dot(keys, _behind(until, values).astype(dtype), (0, 0))
      carry_ref[0, h] = _times(whole, carry_ref[0, h]) + added
      yield
    written = jnp.concatenate(written)
    rows = pl.ds(t * width, width)
    if values_ref is not None:
      values_ref[0, h, rows, :] = written
    y = dot(scores, written, (1, 0)) + scale * jnp.concatenate(read)
    yield
    y_ref[0, h, rows, :] = y.astype(y_ref.dtype)

  heads = range(blocks.heads)
  if room_refs:
    for t in range(blocks.tiles):
      weigh(t)
      _interleave(prepare(h, t) for h in heads)
      _interleave(walk(h, t) for h in heads)
    return
  _interleave(prepare(h, 0) for h in heads)
  for t in range(blocks.tiles):
    ahead = [prepare(h, t + 1) for h in heads] if t + 1 < blocks.tiles else []
    _interleave([walk(h, t) for h in heads] + ahead)


def _backward_kernel(
  q_ref,
  k_ref,
  v_ref,
  beta_ref,
  g_ref,
  inverses_ref,
  states_ref,
  values_ref,
  documents_ref,
  dy_ref,
  dstate_ref,
  dq_ref,
  dk_ref,
  dv_ref,
  dbeta_ref,
  dg_ref,
  dcarry_ref,
  within_ref,
  *,
  blocks: Blocks,
  length: int,
  scale: float,
):
  step = pl.program_id(2)

  @pl.when(step == 0)
  def _():
    dcarry_ref[...] = dstate_ref[...]

  block = pl.num_programs(2) - 1 - step
  dtype, size, width = q_ref.dtype, blocks.chunk, blocks.tile
  exact = dtype == jnp.float32
  load = _loader(block, blocks, length)
  gates = Gates(beta_ref, g_ref, documents_ref, load, blocks=blocks, exact=exact, by_key=True)
  count = width // size
  prepared, walked, summed = {}, {}, {}
  kept = blocks.heads * blocks.tiles
  rows_of = max(kept, 8)  # Mosaic lowers no product of a bfloat16 matrix and a single row
  lane = jax.lax.broadcasted_iota(jnp.int32, (width, rows_of), 1)
  sums = {name: jnp.zeros((width, rows_of), jnp.float32) for name in ("beta", "g")}

  def emit(ref, h, t, x):
    """Writes a gradient; of rows that heads share, the sum."""
    shared = blocks.heads // ref.shape[1]
    of_all = summed.setdefault((id(ref), h // shared, t), [])
    of_all.append(x)
    if len(of_all) == shared:
      ref[0, h // shared, pl.ds(t * width, width), :] = sum(of_all).astype(ref.dtype)

  def restate(h):
    """The states before and behind each chunk."""
    state = states_ref[0, h, 0].astype(jnp.float32)
    within_ref[h, 0] = states_ref[0, h, 0]
    for t in range(blocks.tiles):
      decay = gates.decay(h, t)
      for m in range(count):
        first, inside = t * width + m * size, slice(m * size, (m + 1) * size)
        k, values = load(k_ref, h, first, size), load(values_ref, h, first, size)
        until = None if decay.until is None else decay.until[inside]
        added = dot(_before(until, k), _behind(until, values).astype(dtype), (0, 0))
        yield
        state = _times(decay.whole[m], state) + added
        within_ref[h, t * count + m + 1] = state.astype(dtype)

  def prepare(h, t):
    """What does not need the cotangent of the state."""
    q, k, dy = (load(ref, h, t * width, width) for ref in (q_ref, k_ref, dy_ref))
    inverse = inverses_ref[0, h, 0, pl.ds(t * size, size)].T
    decay = gates.decay(h, t)
    (scores,) = yield from decay.weights((k,), q)
    scores = unfold((scale * scores).astype(dtype))
    yield
    prepared[h, t] = decay, inverse, dot(scores, dy, (1, 0))

  def walk(h, t):
    """What does, chunk by chunk."""
    decay, inverse, written = prepared.pop((h, t))
    _, beta = gates.beta(h, t)
    errors, after, dstates = [None] * count, [None] * count, [None] * count
    for m in reversed(range(count)):
      first, inside = t * width + m * size, slice(m * size, (m + 1) * size)
      since, until = (None if x is None else x[inside] for x in (decay.since, decay.until))
      dstate = dcarry_ref[0, h]
      after[m] = dstate.astype(dtype)
      if g_ref is not None:
        dstates[m] = dstate * within_ref[h, t * count + m + 1].astype(jnp.float32)
      dvalues = dot(_before(until, load(k_ref, h, first, size)), after[m], (1, 0))
      yield
      dvalues = (written[inside] + _behind(until, dvalues)).astype(dtype)
      yield
      errors[m] = dot(inverse[inside], dvalues, (1, 0))
      yield
      q, k, dy = (load(ref, h, first, size) for ref in (q_ref, k_ref, dy_ref))
      moved = [scale * dy.astype(jnp.float32), -beta[inside] * errors[m]]
      moved = jnp.concatenate([_behind(since, x) for x in moved]).astype(dtype)
      added = dot(jnp.concatenate([_before(since, x) for x in (q, k)]), moved, (0, 0))
      dcarry_ref[0, h] = _times(decay.whole[m], dcarry_ref[0, h]) + added
      yield
    walked[h, t] = decay, jnp.concatenate(errors), after, dstates

  def finish(h, t):
    """The gradients."""
    decay, errors, after, dstates = walked.pop((h, t))
    first = t * width
    row, column = gates.beta(h, t)
    rounded = errors.astype(dtype)
    dy, values = load(dy_ref, h, first, width), load(values_ref, h, first, width)
    dscores, dcoupling = dot(values, dy, (1, 1)), dot(values, rounded, (1, 1))
    yield
    dq, drows, dk = [], [], []
    for m in range(count):
      inside = slice(m * size, (m + 1) * size)
      both = jnp.concatenate([dy[inside], rounded[inside]])
      both = dot(both, within_ref[h, t * count + m], (1, 1))
      dq.append(scale * both[:size])
      drows.append(-both[size:])
      dk.append(dot(values[inside], after[m], (1, 1)))
    yield
    dscores, dcoupling = scale * fold(dscores, size), -fold(dcoupling, size)
    dq, drows = (_times(decay.since, jnp.concatenate(x)) for x in (dq, drows))
    dk = _times(decay.until, jnp.concatenate(dk))
    yield
    q, k, v = (load(ref, h, first, width) for ref in (q_ref, k_ref, v_ref))
    added = yield from decay.pull(q, k, dscores, dcoupling, row)
    dq, drows, dk = (x + y for x, y in zip((dq, drows, dk), added, strict=True))
    emit(dv_ref, h, t, column * errors)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    dbeta = sum(jnp.sum(x, axis=1, keepdims=True) for x in (errors * v, drows * k))
    sums["beta"] = jnp.where(lane == h * blocks.tiles + t, dbeta, sums["beta"])
    drows = column * drows
    yield
    if g_ref is not None:
      dg = decay.gradient(q * dq + k * (drows - dk), dstates, gates.triangle)
      if len(g_ref.shape) == 4:
        emit(dg_ref, h, t, dg)
      else:
        sums["g"] = jnp.where(lane == h * blocks.tiles + t, dg, sums["g"])
    emit(dq_ref, h, t, dq)
    emit(dk_ref, h, t, dk + drows)

  heads, tiles = range(blocks.heads), blocks.tiles
  _interleave([restate(h) for h in heads] + [prepare(h, tiles - 1) for h in heads])
  for t in reversed(range(tiles)):
    ahead = [prepare(h, t - 1) for h in heads] if t else []
    behind = [finish(h, t + 1) for h in heads] if t + 1 < tiles else []
    _interleave([walk(h, t) for h in heads] + ahead + behind)
  _interleave(finish(h, 0) for h in heads)
  dbeta_ref[0, 0, 0] = sums["beta"].T[:kept]
  if dg_ref is not None and len(dg_ref.shape) == 5:
    dg = sum(dot(p, gates.triangle, (0, 0)) for p in parts_of(sums["g"]))
    dg_ref[0, 0, 0] = dg[:kept]
