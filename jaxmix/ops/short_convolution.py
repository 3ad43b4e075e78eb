"""Depthwise causal convolution over a few tokens: argument checks, the form by shifted additions,
and where a kernel runs.

In packed rows a tap goes back over the tokens of its own document. Where no padding stands between
them these are neighbours in the row, and a tap is a shift under a mask. Padding that does stand
between them is rare, and is asked for when the program runs: where there is any, taps gather their
tokens instead. On GPUs taps always gather in the forward pass, since a gather costs a GPU no more
than a shift, while asking would have it wait for the host.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmix import sharding
from jaxmix.ops import implementation as implementations
from jaxmix.ops.segments import check_segment_ids, document_indices
from pallas_kernels.short_convolution import reference, tpu

ACTIVATIONS = (None, "silu")
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
    implementation: None, "reference", "xla", "tpu" or "gpu".
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
  return _convolve(x, weight, bias, state, segment_ids, _Call(activation, implementation))


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
    refusal = tpu.refusal(x, weight)
    if refusal is None and self.implementation is None and x.shape[1] < SHORTEST:
      refusal = f"length {x.shape[1]} is below {SHORTEST}"
    return implementations.run(
      "short_convolution",
      self.implementation,
      arrays,
      functions=functions,
      refusals={} if refusal is None else {"tpu": refusal},
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _convolve(x, weight, bias, state, segment_ids, call: _Call):
  """y, and the state after the row."""
  functions = {
    "reference": functools.partial(_by_definition, call.activation),
    "xla": functools.partial(_with_last_inputs, functools.partial(_forward, call.activation)),
    "tpu": functools.partial(_with_last_inputs, _tpu_forward(call.activation)),
  }
  return call.run(functions, (x, weight, bias, state, segment_ids))


def _convolve_forward(x, weight, bias, state, segment_ids, call: _Call):
  # z is computed again in the backward pass: keeping it would cost half as many bytes again.
  arrays = (x, weight, bias, state, segment_ids)
  return _convolve(*arrays, call), arrays


def _convolve_backward(call: _Call, arrays, cotangents):
  functions = {
    "reference": functools.partial(_gradient_of_definition, call.activation),
    "xla": functools.partial(_with_state, functools.partial(_backward, call.activation)),
    "tpu": functools.partial(_with_state, _tpu_backward(call.activation)),
  }
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
  y = form(x, weight, bias, state, segment_ids)
  rows, kept = _last_inputs(x.shape[1], state.shape[1], segment_ids)
  of_row = jnp.take_along_axis(x, jnp.minimum(rows, x.shape[1] - 1)[..., None], axis=1)
  return y, jnp.where((rows < x.shape[1])[..., None], of_row, _keep(state, kept))


def _with_state(form, x, weight, bias, state, segment_ids, dy, dlast):
  dx, dweight, dbias, dz = form(x, weight, bias, state, segment_ids, dy)
  if segment_ids is not None:
    in_first = (segment_ids != 0) & (document_indices(segment_ids) == 0)
    first = jnp.sum(in_first, axis=1)[:, None, None]
    dz = jnp.where(jnp.arange(dz.shape[1])[:, None] < first, dz, 0)
  _, pull = jax.vjp(_from_state, _wide(state), weight.astype(dz.dtype))
  dstate, dweight_of_state = pull(dz)

  rows, kept = _last_inputs(x.shape[1], state.shape[1], segment_ids)
  dx = dx.at[jnp.arange(x.shape[0])[:, None], rows].add(dlast, mode="drop")
  (dkept,) = jax.vjp(lambda state: _keep(state, kept), _wide(state))[1](_wide(dlast))
  gradients = (dx, dweight.sum(0) + dweight_of_state, dbias.sum(0), dstate + dkept)
  return tuple(
    d.astype(of.dtype) for d, of in zip(gradients, (x, weight, bias, state), strict=True)
  )


def _from_state(state, weight):
  """What the inputs before a row add to the z of its first tokens, [B, W - 1, D]."""
  count = state.shape[1]
  padded = jnp.pad(state, ((0, 0), (0, count), (0, 0)))
  return sum((padded[:, i : i + count] * weight[:, i] for i in range(count)), jnp.zeros_like(state))


def _last_inputs(length: int, count: int, segment_ids):
  """Where each of the `count` inputs that become the state stands: the row of x, or `length` where
  it is none; the place in the state before, or `count` where it is none."""
  place = jnp.arange(count)[None]
  if segment_ids is None:
    row = place + length - count
    return jnp.where(row >= 0, row, length), jnp.where(row >= 0, count, place + length)
  documents, index = document_indices(segment_ids), jnp.arange(length)
  in_last = (segment_ids != 0) & (documents == documents[:, -1:])
  rows, before = [], jnp.full((segment_ids.shape[0], 1), length)
  for _ in range(count):  # from the newest to the oldest
    before = jnp.max(jnp.where(in_last & (index < before), index, -1), axis=1, keepdims=True)
    rows.append(before)
  rows = jnp.concatenate([jnp.zeros_like(before[:, :0]), *reversed(rows)], axis=1)
  kept = place + jnp.sum(in_last, axis=1, keepdims=True)
  kept = jnp.where((rows < 0) & (documents[:, -1:] == 0), kept, count)
  return jnp.where(rows >= 0, rows, length), kept


def _keep(state, kept):
  """The inputs of the state that are still among the last, at their new places; elsewhere 0."""
  padded = jnp.pad(state, ((0, 0), (0, 1), (0, 0)))
  return jnp.take_along_axis(padded, kept[..., None], axis=1)


def _wide(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class _Shifts:
  """Taps of rows without padding inside their documents: neighbours in the row.

  Attributes:
    reach: [B, T], how many tokens back the taps of a token go, at most W - 1; -1 at padding. None
      means W - 1 everywhere. At the start of a row they go into the state.
  """

  def __init__(self, segment_ids, length: int, width: int):
    self.length, self.reach = length, None
    if segment_ids is None:
      return
    live, documents = segment_ids != 0, document_indices(segment_ids)
    within, self.reach = live, jnp.where(live, 0, -1)
    for j in range(1, width):
      within &= _shift(live, j, True) & (_shift(documents, j, 0) == documents)
      self.reach += within

  def previous(self, x, j: int):
    """x_{t-j}, 0 beyond the reach of the taps or the start of the row."""
    return self._within(j, _shift(x, j, 0))

  def following(self, z, j: int):
    """z_{t+j} where its taps reach back to t; else 0."""
    return _shift(self._within(j, z), -j, 0)

  def spread(self, first):
    """[B, W - 1, D] of the row's first document -> [B, T, D]; 0 behind them."""
    count, length = first.shape[1], self.length
    first = jnp.pad(first[:, :length], ((0, 0), (0, max(length - count, 0)), (0, 0)))
    if self.reach is None:
      return first
    return jnp.where((self.reach > jnp.arange(length))[..., None], first, 0)

  def first(self, z, count: int):
    """z of the row's first tokens, [B, count, D]; anything where the first document has fewer."""
    return jnp.pad(z[:, :count], ((0, 0), (0, max(count - self.length, 0)), (0, 0)))

  def live(self, z):
    """z, and 0 at padding."""
    return self._within(0, z)

  def _within(self, j: int, z):
    return z if self.reach is None else jnp.where((self.reach >= j)[..., None], z, 0)


class _Gathers:
  """The same of any rows: padding may stand inside a document."""

  def __init__(self, segment_ids):
    self._live, self._documents = segment_ids != 0, document_indices(segment_ids)
    self._rank = jnp.cumsum(self._live, axis=1, dtype=jnp.int32) - self._live
    batch, length = segment_ids.shape
    # The row of each token that is not padding, by its rank.
    self._rows = jnp.zeros_like(segment_ids)
    self._rows = self._rows.at[
      jnp.arange(batch)[:, None], jnp.where(self._live, self._rank, length)
    ].set(jnp.arange(length, dtype=segment_ids.dtype), mode="drop")

  def previous(self, x, j: int):
    return self._take(x, self._rank - j)

  def following(self, z, j: int):
    return self._take(z, self._rank + j)

  def spread(self, first):
    if first.shape[1] == 0:
      return 0
    early = self._live & (self._documents == 0) & (self._rank < first.shape[1])
    found = jnp.take_along_axis(first, jnp.minimum(self._rank, first.shape[1] - 1)[..., None], 1)
    return jnp.where(early[..., None], found, 0)

  def first(self, z, count: int):
    rows = jnp.pad(self._rows[:, :count], ((0, 0), (0, max(count - z.shape[1], 0))))
    return jnp.take_along_axis(z, rows[..., None], axis=1)

  def live(self, z):
    return jnp.where(self._live[..., None], z, 0)

  def _take(self, x, rank):
    """x of the tokens of these ranks, 0 where these are of another document than the row's."""
    total = self._rank[:, -1:] + self._live[:, -1:]
    row = jnp.take_along_axis(self._rows, jnp.clip(rank, 0, x.shape[1] - 1), axis=1)
    same = jnp.take_along_axis(self._documents, row, axis=1) == self._documents
    same &= self._live & (rank >= 0) & (rank < total)
    return jnp.where(same[..., None], jnp.take_along_axis(x, row[..., None], axis=1), 0)


def _shift(x, j: int, fill):
  """x_{t-j} along axis 1, `fill` where there is none; j may be below 0."""
  before, after = max(j, 0), max(-j, 0)
  ends = ((0, 0), (before, after), *((0, 0),) * (x.ndim - 2))
  x = jnp.pad(x, ends, constant_values=fill)
  return x[:, after : x.shape[1] - before]


def _before_activation(taps, x, weight, bias, state):
  weight, bias, x = (a.astype(_wide(x).dtype) for a in (weight, bias, x))
  z = bias + taps.spread(_from_state(state.astype(x.dtype), weight))
  for j in range(weight.shape[1]):
    z = z + weight[:, -1 - j] * taps.previous(x, j)
  return z


def _convolve_rows(activation, taps, x, weight, bias, state):
  """y; the form of `_Call` on rows whose neighbours `taps` finds."""
  z = taps.live(_before_activation(taps, x, weight, bias, state))
  return (z if activation is None else jax.nn.silu(z)).astype(x.dtype)


def _gradient_of_rows(activation, taps, x, weight, bias, state, dy):
  """dx, dweight, dbias and the first dz."""
  dz = _wide(dy)
  if activation is not None:
    _, pull = jax.vjp(jax.nn.silu, _before_activation(taps, x, weight, bias, state))
    (dz,) = pull(dz)
  dz, x_wide, weight = taps.live(dz), _wide(x), weight.astype(dz.dtype)
  count = weight.shape[1]
  dx = sum(weight[:, -1 - j] * taps.following(dz, j) for j in range(count))
  dweight = [jnp.sum(dz * taps.previous(x_wide, j), axis=1) for j in reversed(range(count))]
  return dx.astype(x.dtype), jnp.stack(dweight, -1), dz.sum(1), taps.first(dz, count - 1)


def _either(segment_ids, neighbours, gathered):
  """The first, or where padding stands inside a document the second."""
  if segment_ids is None:
    return neighbours()
  live, documents = segment_ids != 0, document_indices(segment_ids)
  inside = live[:, 1:] & ~live[:, :-1] & (documents[:, 1:] == documents[:, :-1])
  return jax.lax.cond(jnp.any(inside), gathered, neighbours)


def _forward(activation, x, weight, bias, state, segment_ids):
  def run(taps):
    return _convolve_rows(activation, taps, x, weight, bias, state)

  return _either(
    segment_ids,
    lambda: run(_Shifts(segment_ids, *_size(x, weight))),
    lambda: run(_Gathers(segment_ids)),
  )


def _backward(activation, x, weight, bias, state, segment_ids, dy):
  def run(taps):
    return _gradient_of_rows(activation, taps, x, weight, bias, state, dy)

  return _either(
    segment_ids,
    lambda: run(_Shifts(segment_ids, *_size(x, weight))),
    lambda: run(_Gathers(segment_ids)),
  )


def _size(x, weight) -> tuple[int, int]:
  return x.shape[1], weight.shape[1]


ROWS, PLAIN = ("batch", None, "heads"), ("batch", None)
WEIGHT, BIAS = ("heads", None), ("heads",)
ARRAYS = (ROWS, WEIGHT, BIAS, ROWS, PLAIN)


def _tpu_forward(activation):
  def run(x, weight, bias, state, segment_ids):
    return _either(
      segment_ids,
      lambda: tpu.forward(
        x,
        weight,
        bias,
        state,
        _Shifts(segment_ids, *_size(x, weight)).reach,
        activation=activation,
      ),
      lambda: _convolve_rows(activation, _Gathers(segment_ids), x, weight, bias, state),
    )

  return sharding.shard_kernel(run, in_axes=ARRAYS, out_axes=ROWS)


def _tpu_backward(activation):
  def run(x, weight, bias, state, segment_ids, dy):
    return _either(
      segment_ids,
      lambda: tpu.backward(
        x,
        weight,
        bias,
        state,
        _Shifts(segment_ids, *_size(x, weight)).reach,
        dy,
        activation=activation,
      ),
      lambda: _gradient_of_rows(activation, _Gathers(segment_ids), x, weight, bias, state, dy),
    )

  out = (ROWS, ("batch", "heads", None), ("batch", "heads"), ROWS)
  return sharding.shard_kernel(run, in_axes=(*ARRAYS, ROWS), out_axes=out)
