"""Depthwise causal convolution over a few tokens: argument checks, the form by shifted additions,
and where a kernel runs.

In packed rows a tap goes back over the tokens of its own document, however much padding stands
between them. The forms know rows in which none does: there the tokens that a tap meets are
neighbours, and `reach` says how far the taps of each go. Padding inside a document is rare and is
asked for when the program runs; a row that has some is put in order first. A GPU would have to wait
for its host to ask: its kernel is told the place of each token instead, and its forward pass
gathers.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmix import sharding
from jaxmix.ops import implementation as implementations
from jaxmix.ops import parts
from jaxmix.ops.segments import (
  check_segment_ids,
  document_indices,
  document_positions,
  in_order,
  newest_rows,
  order,
  over_padding,
  take_rows,
)
from pallas_kernels.short_convolution import gpu, reference, tpu

ACTIVATIONS = (None, "silu")
# Logical axes: rows [B, T, D], and of what the forms return backward.
ROWS = ("batch", None, "heads")
ARRAYS = (ROWS, ("heads", None), ("heads",), ROWS, ("batch", None))
GRADIENTS = (ROWS, ("batch", "heads", None), ("batch", "heads"), ROWS)
SHORTEST = 64  # tokens from which a kernel is chosen; fewer are not worth its start


def short_convolution(
  x: jax.Array,
  weight: jax.Array,
  *,
  bias: jax.Array | None = None,
  activation: str | None = None,
  state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Depthwise causal convolution with carried state.

      z_t = bias + sum_{j=0}^{W-1} weight[:, W-1-j] * x_{t-j}        y_t = activation(z_t)

  Args:
    x: [B, T, D], float32 or bfloat16; summed in float32.
    weight: [D, W], the taps of each channel from the oldest token to the newest.   bias: [D]; None
      means zeros.
    activation: None, or "silu": z * sigmoid(z).
    state: [B, W - 1, D] in the dtype of x, the inputs before the first token, oldest first; None
      means zeros. It belongs to the document of the first token that is not padding. It holds
      inputs as they were and no sums, so float32 would add nothing to it.
    segment_ids: [B, T] int32; no tap reaches into another document. 0 marks padding, whose output
      is 0 and which taps pass over.
    implementation: None, "reference", "xla", "tpu" (a kernel a direction) or "gpu" (a kernel for
      the backward pass; the forward pass is one of XLA's own).
  Returns:
    y: [B, T, D] in the dtype of x;   state: [B, W - 1, D] in the dtype of x, the last inputs of the
    row's last document, zeros where it has fewer.
  Raises:
    ValueError: shapes or options disagree, or `implementation` cannot run this call (the message
      says why).
  Source: the short convolution of Mamba, Gu & Dao 2023 (arXiv 2312.00752), section 3.4. Cost
    O(T W D) time, O(W D) state.
  """
  _check(x, weight, bias, activation, state, segment_ids)
  batch, length, channels = x.shape
  if state is None:
    state = jnp.zeros((batch, weight.shape[1] - 1, channels), x.dtype)
  if bias is None:
    bias = jnp.zeros(channels, weight.dtype)
  if length == 0:
    return x, state
  call = _Call(activation, implementation)
  if not sharding.is_cut("length", length):
    return _convolve(x, weight, bias, state, segment_ids, call)
  rows, ids = ("batch", "length", "heads"), ("batch", "length")
  run = sharding.shard_kernel(
    functools.partial(_convolve_part, call=call), (rows, *ARRAYS[1:4], ids), (rows, ROWS)
  )
  return run(x, weight, bias, state, segment_ids)


def _check(x, weight, bias, activation, state, segment_ids) -> None:
  if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
    raise ValueError(
      f"short_convolution: x and weight have shapes {x.shape}, {weight.shape}, expected [B, T, D] "
      "and [D, W], a tap in each column; transpose weight where its taps are in rows"
    )
  batch, _, channels = x.shape
  if bias is not None and bias.shape != (channels,):
    raise ValueError(
      f"short_convolution: bias has shape {bias.shape}, expected ({channels},), one a channel of x"
    )
  if activation not in ACTIVATIONS:
    raise ValueError(
      f'short_convolution: activation={activation!r} is unknown; expected None or "silu"'
    )
  shape = (batch, weight.shape[1] - 1, channels)
  if state is not None and (state.shape != shape or state.dtype != x.dtype):
    raise ValueError(
      f"short_convolution: state is {state.dtype}{list(state.shape)}, expected "
      f"{x.dtype}{list(shape)}, that is [B, W - 1, D] in the dtype of x; cast or make it so"
    )
  check_segment_ids("short_convolution", segment_ids, *x.shape[:2])


class _Call(NamedTuple):
  """What a call fixes besides its arrays."""

  activation: str | None
  implementation: str | None

  def run(self, functions, arrays):
    """The one of `functions` that the call names or its platform gets."""
    x, weight = arrays[:2]
    refusals = {"tpu": tpu.refusal(x, weight), "gpu": gpu.refusal(x, weight)}
    if self.implementation is None and x.shape[1] < SHORTEST:
      refusals["tpu"] = refusals["tpu"] or f"length {x.shape[1]} is below {SHORTEST}"
    return implementations.run(
      "short_convolution",
      self.implementation,
      arrays,
      functions=functions,
      refusals={name: refusal for name, refusal in refusals.items() if refusal is not None},
    )


def _convolve_part(x, weight, bias, state, segment_ids, call: _Call):
  """`_convolve` of this device's part of the rows, and the state after the last; `state` comes
  before the first."""
  added = newest_rows(jnp.zeros_like(state), x, segment_ids)
  count = parts.count_tokens(x, segment_ids)
  before = parts.state_before(
    parts.Part(added, count, parts.Documents.of(segment_ids)),
    state,
    apply=parts.moved_up,
    compose=jnp.add,
    reach=-(-state.shape[1] // x.shape[1]),
  )
  y, after = _convolve(x, weight, bias, before, segment_ids, call)
  return y, parts.of_last(after)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _convolve(x, weight, bias, state, segment_ids, call: _Call):
  """y, and the state after the row."""
  form = functools.partial(_forward, activation=call.activation)
  kernel = functools.partial(tpu.forward, activation=call.activation)
  functions = {
    "xla": functools.partial(_on_rows, over_padding, form),
    "tpu": sharding.shard_kernel(functools.partial(_on_rows, over_padding, kernel), ARRAYS, ROWS),
    "gpu": functools.partial(_on_rows, in_order, form),
  }
  functions = {name: functools.partial(_with_last_inputs, f) for name, f in functions.items()}
  functions["reference"] = functools.partial(_by_definition, call.activation)
  return call.run(functions, (x, weight, bias, state, segment_ids))


def _convolve_forward(x, weight, bias, state, segment_ids, call: _Call):
  # z is computed again in the backward pass: keeping it would cost half as many bytes again.
  arrays = (x, weight, bias, state, segment_ids)
  return _convolve(*arrays, call), arrays


def _convolve_backward(call: _Call, arrays, cotangents):
  form = functools.partial(_backward, activation=call.activation)
  by_tpu = functools.partial(tpu.backward, activation=call.activation)
  by_gpu = functools.partial(gpu.backward, activation=call.activation)
  axes = (*ARRAYS, ROWS), GRADIENTS
  functions = {
    "xla": functools.partial(_on_rows, over_padding, form),
    "tpu": sharding.shard_kernel(functools.partial(_on_rows, over_padding, by_tpu), *axes),
    "gpu": sharding.shard_kernel(functools.partial(_backward_by_gpu, by_gpu), *axes),
  }
  functions = {name: functools.partial(_with_state, f) for name, f in functions.items()}
  functions["reference"] = functools.partial(_gradient_of_definition, call.activation)
  return *call.run(functions, (*arrays, *cotangents)), None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _by_definition(activation, x, weight, bias, state, segment_ids):
  ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
  y, last = reference.short_convolution(x, weight, bias, state, ids, activation=activation)
  return y.astype(x.dtype), last.astype(x.dtype)


def _gradient_of_definition(activation, x, weight, bias, state, segment_ids, dy, dlast):
  def run(*arrays):
    return _by_definition(activation, *arrays, segment_ids)

  return jax.vjp(run, x, weight, bias, state)[1]((dy, dlast))


# The forms below give y; backward they give dx, dweight [B, D, W] and dbias [B, D] of each row
# through x alone, and dz [B, W - 1, D] of the first tokens. What the state has to do with it is the
# same for all of them: it adds to the first z, and is made of the last inputs.


def _with_last_inputs(form, x, weight, bias, state, segment_ids):
  return form(x, weight, bias, state, segment_ids), newest_rows(state, x, segment_ids)


def _with_state(form, x, weight, bias, state, segment_ids, dy, dlast):
  dx, dweight, dbias, dz = form(x, weight, bias, state, segment_ids, dy)
  if segment_ids is not None:
    in_first = (segment_ids != 0) & (document_indices(segment_ids) == 0)
    first = jnp.sum(in_first, axis=1)[:, None, None]
    dz = jnp.where(jnp.arange(dz.shape[1])[:, None] < first, dz, 0)
  _, pull = jax.vjp(_from_state, _wide(state), weight.astype(dz.dtype))
  dstate, dweight_of_state = pull(dz)

  newest = functools.partial(newest_rows, segment_ids=segment_ids)
  dkept, dx_of_newest = jax.vjp(newest, state, x)[1](dlast)
  gradients = (
    dx + dx_of_newest,
    dweight.sum(0) + dweight_of_state,
    dbias.sum(0),
    dstate + _wide(dkept),
  )
  return tuple(
    d.astype(of.dtype) for d, of in zip(gradients, (x, weight, bias, state), strict=True)
  )


def _from_state(state, weight):
  """What the inputs before a row add to the z of its first tokens, [B, W - 1, D]."""
  count = state.shape[1]
  padded = jnp.pad(state, ((0, 0), (0, count), (0, 0)))
  return sum((padded[:, i : i + count] * weight[:, i] for i in range(count)), jnp.zeros_like(state))


def _wide(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _shift(x, j: int, fill):
  """x_{t-j} along axis 1, `fill` where there is none; j may be below 0."""
  before, after = max(j, 0), max(-j, 0)
  ends = ((0, 0), (before, after), *((0, 0),) * (x.ndim - 2))
  x = jnp.pad(x, ends, constant_values=fill)
  return x[:, after : x.shape[1] - before]


def _within(reach, j: int, z):
  """z of the tokens whose taps go back j tokens, elsewhere 0."""
  return z if reach is None else jnp.where((reach >= j)[..., None], z, 0)


def _before_activation(x, weight, bias, state, reach):
  length, count = x.shape[1], state.shape[1]
  x, state = _wide(x), _wide(state)
  weight, bias = weight.astype(x.dtype), bias.astype(x.dtype)
  first = _from_state(state, weight)[:, :length]
  first = jnp.pad(first, ((0, 0), (0, length - first.shape[1]), (0, 0)))
  if reach is not None:
    first = jnp.where((reach > jnp.arange(length))[..., None], first, 0)
  z = bias + first
  for j in range(count + 1):
    z = z + weight[:, count - j] * _within(reach, j, _shift(x, j, 0))
  return z


def _forward(x, weight, bias, state, reach, *, activation):
  """y, by shifted additions."""
  z = _within(reach, 0, _before_activation(x, weight, bias, state, reach))
  return (z if activation is None else jax.nn.silu(z)).astype(x.dtype)


def _backward(x, weight, bias, state, reach, dy, *, activation):
  dz, count = _wide(dy), state.shape[1]
  if activation is not None:
    _, pull = jax.vjp(jax.nn.silu, _before_activation(x, weight, bias, state, reach))
    (dz,) = pull(dz)
  dz, weight = _within(reach, 0, dz), weight.astype(dz.dtype)
  dx, dweight = 0, []
  for j in range(count + 1):
    reaching = _within(reach, j, dz)
    dx = dx + weight[:, count - j] * _shift(reaching, -j, 0)
    dweight.append(_sum_tokens(reaching * _within(reach, j, _shift(_wide(x), j, 0))))
  first = jnp.pad(dz[:, :count], ((0, 0), (0, max(count - dz.shape[1], 0)), (0, 0)))
  return dx.astype(x.dtype), jnp.stack(dweight[::-1], -1), _sum_tokens(dz), first


def _sum_tokens(z):
  """[B, T, D] -> [B, D]. As a product: XLA's sums down the columns take a CPU ten times as long."""
  ones = jnp.ones(z.shape[:2], z.dtype)
  return jnp.einsum("bt,btd->bd", ones, z, precision="highest")


def _reach(segment_ids, width: int):
  """[B, T], how many tokens back the taps of each token go, at most W - 1, where tokens of a
  document are neighbours; -1 at padding. At the start of a row they go into the state."""
  if segment_ids is None:
    return None
  before = jnp.full(segment_ids.shape[0], width - 1, jnp.int32)
  reach = jnp.minimum(document_positions(segment_ids, before), width - 1)
  return jnp.where(segment_ids != 0, reach, -1)


def _on_rows(arrange, form, x, weight, bias, state, segment_ids, *dy):
  """A form on rows that `arrange`, one of jaxmix.ops.segments, has put in order."""

  def run(segment_ids, x, *dy):
    return form(x, weight, bias, state, _reach(segment_ids, weight.shape[1]), *dy)

  return arrange(run, segment_ids, x, *dy)


def _backward_by_gpu(kernel, x, weight, bias, state, segment_ids, dy):
  rows = reach = None
  if segment_ids is not None:
    rows, _ = order(segment_ids)
    reach = _reach(take_rows(segment_ids, rows), weight.shape[1])
  return kernel(x, weight, bias, state, rows, reach, dy)
