"""What the ops with a matrix state share: checks of their arguments, the rule of their gradient,
and the choice between the matrix products of `chunks` and the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmix import sharding
from jaxmix.ops import chunks, parts
from jaxmix.ops import implementation as implementations
from jaxmix.ops.chunks import Rows
from jaxmix.ops.segments import check_segment_ids, document_indices

SHORTEST = 64  # tokens from which a kernel is chosen; fewer are one chunk, with no state to pass on
CHUNK_SIZE = 64


class Op(NamedTuple):
  """An op with a matrix state.

  Attributes:
    name: for messages.
    reference: the definition, of (*rows, state, segment_ids, scale=).
    kernels: implementation -> the module with `forward`, `backward` and `refusal`.
  """

  name: str
  reference: Callable
  kernels: tuple[tuple[str, ModuleType], ...]


class _Call(NamedTuple):
  """What a call fixes besides its arrays; `dtype` is that of y."""

  op: Op
  scale: float
  chunk_size: int
  dtype: jnp.dtype
  implementation: str | None

  def run(self, functions, arrays):
    """The one of `functions` that the call names or its platform gets; arrays begin with rows."""
    return implementations.run(
      self.op.name,
      self.implementation,
      arrays,
      functions=functions,
      refusals=self.refusals(arrays[0]),
    )

  def refusals(self, rows: Rows) -> dict[str, str]:
    """Kernel -> why it cannot run, or is not chosen unless it is named."""
    length, refusals = rows.q.shape[1], {}
    for name, kernel in self.op.kernels:
      refusal = kernel.refusal(*_given(rows))
      if refusal is None and self.implementation is None:
        if length < SHORTEST:
          refusal = f"length {length} is below {SHORTEST}, one chunk of matmuls"
        elif name == "gpu":
          refusal = "not yet timed against the matmuls on a GPU; it runs when named"
      if refusal is not None:
        refusals[name] = refusal
    return refusals


def recurrence(
  op: Op,
  rows: Rows,
  *,
  scale: float | None,
  state: jax.Array | None,
  segment_ids: jax.Array | None,
  chunk_size: int | None,
  implementation: str | None,
  dtype=None,
) -> tuple[jax.Array, jax.Array]:
  """Runs an op on rows whose shapes are checked.

  Args:
    op: which.   rows: q, k, v, beta and g.   dtype: of y; None is that of v.
    scale, state, segment_ids, chunk_size, implementation: as given to the op.
  Returns:
    y [B, T, heads, V] and S_T [B, H, K, V], float32.
  """
  batch, length, _, key_dim = rows.q.shape
  rows = _inert_at_padding(rows, segment_ids)
  call = _Call(
    op=op,
    scale=key_dim**-0.5 if scale is None else scale,
    chunk_size=_power_of_two(min(chunk_size or CHUNK_SIZE, max(length, 1))),
    dtype=jnp.dtype(dtype or rows.v.dtype),
    implementation=implementation,
  )
  if length == 0:
    heads = max(x.shape[2] for x in (rows.q, rows.k, rows.v))
    return jnp.zeros((batch, 0, heads, rows.v.shape[3]), call.dtype), _first_state(rows, state)
  if not sharding.is_cut("length", length):
    return _attend(rows, state, segment_ids, call)
  run = sharding.shard_kernel(
    lambda *arrays: _attend_part(Rows(*arrays[:5]), *arrays[5:], call),
    (*(None if x is None else _axes(x, "length") for x in rows), STATE, ("batch", "length")),
    (("batch", "length", "heads", None), STATE),
  )
  return run(*rows, state, segment_ids)


def check_rows(op: str, rows: Rows, state, segment_ids, *, columns: str = "V]") -> None:
  """Raises ValueError unless the shapes of q, k, v, beta, g, state and segment_ids agree.

  Args:
    columns: what the columns of the state are called, and what is said of them.
  """
  q, k, v, beta, g = rows
  if not (
    q.ndim == k.ndim == v.ndim == 4
    and q.shape[:2] == k.shape[:2] == v.shape[:2]
    and q.shape[3] == k.shape[3]
  ):
    raise ValueError(
      f"{op}: q, k, v have shapes {q.shape}, {k.shape}, {v.shape}, expected [B, T, heads, K], "
      "[B, T, heads, K], [B, T, heads, V]; give all three the same B and T, and q and k the same K"
    )
  heads = [x.shape[2] for x in (q, k, v)]
  most, fewest = max(heads), min(heads)
  if set(heads) > {most, fewest} or most % fewest:
    raise ValueError(
      f"{op}: q, k, v have {', '.join(map(str, heads))} heads, expected two numbers at most, one a "
      "multiple of the other, so that neighbours share a head; repeat the heads of one of them"
    )
  batch, length = q.shape[:2]
  states = rows.state_shape
  if g is not None:
    allowed = ((states[1],), (batch, length, states[1]), (batch, length, states[1], q.shape[3]))
    if g.shape not in allowed:
      raise ValueError(
        f"{op}: g has shape {g.shape}, expected {allowed[0]}, {allowed[1]} or {allowed[2]}: one "
        "log-decay a head, a token and head, or a token, head and key channel"
      )
  if beta is not None and beta.shape != (batch, length, states[1]):
    raise ValueError(
      f"{op}: beta has shape {beta.shape}, expected {(batch, length, states[1])}, one write "
      "strength a token and head of the state"
    )
  if state is not None and state.shape != states:
    raise ValueError(
      f"{op}: state has shape {state.shape}, expected {states}, that is [B, H, K, {columns}"
    )
  check_segment_ids(op, segment_ids, batch, length)


def _inert_at_padding(rows: Rows, segment_ids) -> Rows:
  """Rows that neither write, decay nor are read at padding; beta and g in float32, g one a token at
  least."""
  q, k, v, beta, g = rows
  accumulator = jnp.promote_types(v.dtype, jnp.float32)
  beta, g = (None if x is None else x.astype(accumulator) for x in (beta, g))
  if g is not None and g.ndim == 1:
    g = jnp.broadcast_to(g, (*q.shape[:2], g.shape[0]))
  if segment_ids is None:
    return Rows(q, k, v, beta, g)

  def clear(x):
    live = (segment_ids != 0).reshape(*segment_ids.shape, *(1,) * (x.ndim - 2))
    return jnp.where(live, x, 0)

  return jax.tree.map(clear, Rows(q, k, v, beta, g))


def _power_of_two(size: int) -> int:
  """The least that is not below size."""
  return 1 << (size - 1).bit_length()


def _attend_part(rows: Rows, state, segment_ids, call: _Call):
  """`_attend` of this device's part of the rows, and the state after the last; `state` comes before
  the first."""
  if rows.beta is None:
    keep, added = chunks.summary(rows, _documents(segment_ids))
    apply = compose = _scaled
  else:
    keep, added = _delta_summary(rows, segment_ids, call)
    apply = compose = functools.partial(jnp.matmul, precision="highest")
  part = parts.Part(added, keep, parts.Documents.of(segment_ids))
  before = parts.state_before(part, state, apply=apply, compose=compose)
  y, after = _attend(rows, before, segment_ids, call)
  return y, parts.of_last(after)


def _scaled(keep, state):
  """The state, or what another part keeps, times what this one keeps; None keeps all."""
  return state if keep is None else keep * state


def _delta_summary(rows: Rows, segment_ids, call: _Call):
  """keep [B, H, K, K] and added [B, H, K, V], S_T = keep S_0 + added. Each column of a state goes
  its own way: those of the identity, to which nothing is written, become `keep`."""
  *lead, key_dim, value_dim = rows.state_shape
  no_values = jnp.zeros((*rows.v.shape[:3], key_dim), rows.v.dtype)
  zeros = _first_state(rows, None)
  identity = jnp.broadcast_to(jnp.eye(key_dim, dtype=zeros.dtype), (*lead, key_dim, key_dim))
  rows = rows._replace(v=jnp.concatenate([rows.v, no_values], axis=-1))
  _, after = _attend(rows, jnp.concatenate([zeros, identity], axis=-1), segment_ids, call)
  added, keep = jnp.split(after, [value_dim], axis=-1)
  return keep, added


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(rows: Rows, state, segment_ids, call: _Call):
  """Rows, [B, H, K, V] or None, [B, T] or None -> y, S_T."""
  functions = {
    "reference": functools.partial(_by_definition, call),
    "xla": lambda *arrays: _chunked_forward(call, *arrays)[:2],
    **{name: _kernel_forward(call, kernel, save=False) for name, kernel in call.op.kernels},
  }
  return call.run(functions, (rows, state, segment_ids))


def _attend_forward(rows, state, segment_ids, call: _Call):
  # Kept for the backward pass: the inputs, and the state before each chunk. Recomputing the states
  # would read k and v once more and repeat the sequential part; keeping them costs K * V / C
  # numbers a token and head.
  arrays = (rows, state, segment_ids)
  functions = {"xla": functools.partial(_chunked_forward, call)}
  for name, kernel in call.op.kernels:
    functions[name] = _kernel_forward(call, kernel, save=True, name=name)
  if call.implementation is None:
    functions = _of_one_result(functions, arrays, call.refusals(rows))
  functions["reference"] = lambda *arrays: (*_by_definition(call, *arrays), {})
  y, state, starts = call.run(functions, arrays)
  return (y, state), (*arrays, starts)


def _of_one_result(functions, arrays, refusals):
  """Functions that a platform chooses among return the same arrays: of the states kept for the
  backward pass, each fills in what the others keep, with zeros that nothing reads."""
  shapes = {}
  for name in implementations.candidates(functions, refusals):
    shapes |= jax.eval_shape(functions[name], *arrays)[2]

  def fill(function, *arrays):
    y, state, starts = function(*arrays)
    missing = {name: tree for name, tree in shapes.items() if name not in starts}
    return y, state, starts | jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), missing)

  return {name: functools.partial(fill, function) for name, function in functions.items()}


def _attend_backward(call: _Call, residuals, cotangents):
  rows, state, segment_ids, starts = residuals
  functions = {
    "reference": functools.partial(_gradient_of_definition, call),
    "xla": functools.partial(_chunked_backward, call),
  }
  for name, kernel in call.op.kernels:
    functions[name] = _kernel_backward(call, kernel, name)
  drows, dstate = call.run(functions, (rows, state, segment_ids, starts, *cotangents))
  return drows, None if state is None else dstate, None


_attend.defvjp(_attend_forward, _attend_backward)


def _first_state(rows: Rows, state):
  """S_0: zeros where no state is given."""
  if state is not None:
    return state
  return jnp.zeros(rows.state_shape, jnp.promote_types(rows.v.dtype, jnp.float32))


def _documents(segment_ids):
  return None if segment_ids is None else document_indices(segment_ids)


def _given(rows: Rows) -> tuple:
  """Rows as kernels and definitions take them: without beta for an op that has none."""
  q, k, v, beta, g = rows
  return (q, k, v, g) if beta is None else (q, k, v, beta, g)


def _by_definition(call: _Call, rows, state, segment_ids):
  ids = jnp.ones(rows.q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
  state = _first_state(rows, state)
  y, state = call.op.reference(*_given(rows), state, ids, scale=call.scale)
  return y.astype(call.dtype), state


def _gradient_of_definition(call: _Call, rows, state, segment_ids, starts, dy, dstate):
  def run(rows, state):
    return _by_definition(call, rows, state, segment_ids)

  return jax.vjp(run, rows, _first_state(rows, state))[1]((dy, dstate))


def _chunked_forward(call: _Call, rows, state, segment_ids):
  y, state, starts = chunks.forward(
    rows,
    _first_state(rows, state),
    _documents(segment_ids),
    scale=call.scale,
    chunk_size=call.chunk_size,
  )
  return y.astype(call.dtype), state, {"xla": starts}


def _chunked_backward(call: _Call, rows, state, segment_ids, starts, dy, dstate):
  return chunks.backward(
    rows,
    starts["xla"],
    _documents(segment_ids),
    dy,
    dstate,
    scale=call.scale,
    chunk_size=call.chunk_size,
  )


def _axes(x, length: str | None = None) -> tuple:
  """Logical axes of q, k, v, beta or g, [B, T, heads, ...]; `length` is that of T."""
  return ("batch", length, "heads", *(None,) * (x.ndim - 3))


ROWS = ("batch", None, "heads", None)
DOCUMENTS = ("batch", None)
STATE = ("batch", "heads", None, None)


@functools.cache
def _traced_once(kernel: Callable, **options) -> Callable:
  """A kernel that is traced once for arrays of the same shapes: its program is long, and a model
  asks for it in every differentiation and rematerialisation, also where another one runs."""
  return jax.jit(functools.partial(kernel, **options))


def _kernel_forward(call: _Call, kernel: ModuleType, *, save: bool, name: str = ""):
  """What runs a kernel on each device's part; with `save` it returns what the backward wants under
  the kernel's name."""
  run_kernel = _traced_once(kernel.forward, scale=call.scale, dtype=call.dtype, save=save)

  def run(rows, state, segment_ids):
    arrays = (*_given(rows), state, _documents(segment_ids))
    _, _, *saved = jax.eval_shape(run_kernel, *arrays)
    saved, tree = jax.tree.flatten(saved)
    sharded = sharding.shard_kernel(
      lambda *arrays: tuple(jax.tree.leaves(run_kernel(*arrays))),
      (*_axes_of(rows), STATE, DOCUMENTS),
      (ROWS, STATE, *map(_axes_of_saved, saved)),
    )
    y, state, *saved = sharded(*arrays)
    return (y, state, {name: jax.tree.unflatten(tree, saved)[0]}) if save else (y, state)

  return run


def _kernel_backward(call: _Call, kernel: ModuleType, name: str):
  backward = _traced_once(kernel.backward, scale=call.scale)

  def run(rows, state, segment_ids, starts, dy, dstate):
    given = _given(rows)
    saved, tree = jax.tree.flatten(starts[name])

    def run_kernel(*arrays):
      given_, saved_, rest = _split(arrays, len(given), len(saved))
      return backward(*given_, jax.tree.unflatten(tree, saved_), *rest)

    sharded = sharding.shard_kernel(
      run_kernel,
      (*_axes_of(rows), *map(_axes_of_saved, saved), DOCUMENTS, ROWS, STATE),
      (*_axes_of(rows), STATE),
    )
    *gradients, dstate = sharded(*given, *saved, _documents(segment_ids), dy, dstate)
    q, k, v, *beta, g = gradients
    return Rows(q, k, v, beta[0] if beta else None, g), dstate

  return run


def _split(arrays, *counts):
  """The first arrays, so many a part, and the rest."""
  parts = []
  for count in counts:
    parts.append(arrays[:count])
    arrays = arrays[count:]
  return *parts, arrays


def _axes_of(rows: Rows) -> tuple:
  return tuple(None if x is None else _axes(x) for x in _given(rows))


def _axes_of_saved(x) -> tuple:
  """Batch first and heads second, whatever a kernel keeps for its backward."""
  return ("batch", "heads", *(None,) * (x.ndim - 2))
