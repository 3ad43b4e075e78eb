"""Grassmann mixing: argument checks, the gradient, and where a kernel runs. The form that XLA
compiles is in `jaxmix.ops.plucker`.

Partners are found by their distance in rows. Rows with padding inside a document are put in order
first; how far back the tokens of a document reach then says which partners exist.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmix import sharding
from jaxmix.ops import implementation as implementations
from jaxmix.ops import parts, plucker
from jaxmix.ops.segments import (
  check_segment_ids,
  document_positions,
  in_order,
  last_token,
  newest_rows,
  over_padding,
)
from pallas_kernels.grassmann import gpu, reference, tpu
from pallas_kernels.grassmann.reference import NORMALIZATIONS

# Logical axes: rows [B, T, D], and of what the forms take and return.
ROWS = ("batch", None, None)
STATES = ("batch", None, None, None)
ARRAYS = (STATES, STATES, (None, None), (None,), ("batch",), ("batch", None))
GRADIENTS = (STATES, STATES, ("batch", None, None), ("batch", None))
SHORTEST = 64  # tokens from which a kernel is chosen; fewer are not worth its start


def grassmann_mix(
  z: jax.Array,
  weight: jax.Array,
  bias: jax.Array,
  *,
  offsets: Sequence[int] | Sequence[Sequence[int]],
  state: dict[str, jax.Array] | None = None,
  segment_ids: jax.Array | None = None,
  eps: float = 1e-8,
  normalization: str = "safe",
  implementation: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
  """Mean of the normalised wedge products of each token with earlier ones, projected.

      p_ij(u, v) = u_i v_j - u_j v_i,  i < j        p^(u, v) = p / N(p)
      y_t = (1 / n_t) sum_d p^(z_t, z_{t-d}) weight + bias,        0 where n_t = 0

  over the n_t offsets d whose token exists in the same document. N is |p|, kept from 0:

      "safe":  sqrt(|p|^2 + (1e-3 |u| |v|)^2 + eps^2)
      "smooth":  sqrt(|p|^2 + eps^2)        "clamp":  max(|p|, eps)

  "safe" bounds the gradients of nearly parallel vectors, such as repeated tokens, by a thousand
  times those of others; with "clamp", as published, and "smooth" they reach 1 / eps. A zero vector
  gives 0 and gets no gradient.

  Args:
    z: [B, T, R] reduced states, or [B, T, H, R], groups with planes of their own; computed with in
      float32.
    weight: [H R (R - 1) / 2, D], float32 or bfloat16; pairs i < j in row-major order.
    bias: [D].
    offsets: whole numbers, counted in tokens of the document, padding not among them; one that
      comes twice counts twice. Or one sequence a group, all of one length. Below 0 they point to
      later tokens, and there is no state.
    state: from `grassmann_state` or an earlier call; None means no token before the first. It
      belongs to the document of the first token that is not padding.
    segment_ids: [B, T] int32; tokens pair within their document. 0 marks padding, whose output
      is 0.
    eps: see above.   normalization: "safe", "smooth" or "clamp".
    implementation: None, "reference", "xla", "tpu" or "gpu" (kernels forward and backward).
  Returns:
    y: [B, T, D] in the dtype of weight;   state: the last tokens of the row's last document, a dict
    of memory [B, max(offsets), H, R] float32 and length [B] int32, how many tokens that document
    has so far; None where an offset is below 0.
  Raises:
    ValueError: shapes or options disagree, or `implementation` cannot run this call (the message
      says why).
  Source: Zhang 2025 (arXiv 2512.19428), section 3, with z_{t-d} for its z_{t+d}, which would show a
    token its successors. Cost O(T R (offsets + R D)) time, O(R max(offsets)) state.
  """
  groups = (1, *z.shape[2:-1])[-1]
  offsets = offsets_of_groups(offsets, groups)
  check_arrays(z, weight, bias, offsets, state, segment_ids, normalization)
  dtype = jnp.promote_types(z.dtype, jnp.float32)
  z = z.astype(dtype).reshape(*z.shape[:2], groups, z.shape[-1])
  streams = min(map(min, offsets)) > 0
  if state is None:
    state = grassmann_state(z.shape[0], offsets, z.shape[2:], dtype)
  if z.shape[1] == 0:
    return jnp.zeros((*z.shape[:2], weight.shape[1]), weight.dtype), state if streams else None
  call = _Call(offsets, float(eps), normalization, implementation)

  def mix(z, state, segment_ids, weight, bias):
    return _mix(z, state["memory"], weight, bias, state["length"], segment_ids, call)

  if not streams:
    return mix(z, state, segment_ids, weight, bias), None
  return along_rows(mix, z, state, segment_ids, weight, bias)


def offsets_of_groups(offsets, groups: int) -> plucker.Offsets:
  """The offsets of each group of z [B, T, H, R], whether one sequence is given for all or one for
  each.

  Raises:
    ValueError: they are not whole numbers other than 0, or not one sequence a group.
  """
  each = tuple(offsets)
  if not any(isinstance(of_group, Sequence) for of_group in each):
    each = (each,) * groups
  valid = len(each) == groups and len({len(of_group) for of_group in each}) == 1
  if not valid or not each[0] or not all(isinstance(d, int) and d for g in each for d in g):
    raise ValueError(
      f"grassmann_mix: offsets={tuple(offsets)}, expected whole numbers other than 0, since a "
      f"token spans no plane with itself, or such a sequence for each of {groups} groups, all of "
      "one length; give at least one, such as (1,)"
    )
  return tuple(map(tuple, each))


def grassmann_state(
  batch: int, offsets: Sequence[int], shape: Sequence[int], dtype=jnp.float32
) -> dict[str, jax.Array]:
  """The state before the first token: memory [B, max(offsets), H, R] and length [B] int32.

  Args:
    offsets: as given to `grassmann_mix`.   shape: (H, R), or (R,) for one group.
    dtype: of z; float64 for computing in it.
  """
  groups = (1, *shape)[-2:]
  rows = max(0, *map(max, offsets_of_groups(offsets, groups[0])))
  return {
    "memory": jnp.zeros((batch, rows, *groups), dtype),
    "length": jnp.zeros(batch, jnp.int32),
  }


def check_arrays(z, weight, bias, offsets, state, segment_ids, normalization) -> None:
  """Raises ValueError unless the arguments of `grassmann_mix` fit one another."""
  if z.ndim not in (3, 4) or weight.ndim != 2 or bias.shape != weight.shape[1:]:
    raise ValueError(
      f"grassmann_mix: z, weight and bias have shapes {z.shape}, {weight.shape}, {bias.shape}, "
      "expected [B, T, R] or [B, T, H, R], [H R (R - 1) / 2, D] and [D]"
    )
  groups, rank = (1, *z.shape[2:])[-2:]
  if rank < 2 or weight.shape[0] != groups * math.comb(rank, 2):
    raise ValueError(
      f"grassmann_mix: weight has {weight.shape[0]} rows, expected {groups * math.comb(rank, 2)}, "
      f"one for each pair of the {rank} channels in each of {groups} groups"
    )
  if state is not None:
    if min(map(min, offsets)) < 0:
      raise ValueError(
        f"grassmann_mix: offsets={offsets} point to later tokens too, which a stream does not have "
        "yet; use offsets above 0, or no state"
      )
    shape = (z.shape[0], max(map(max, offsets)), groups, rank)
    if state["memory"].shape != shape or state["length"].shape != shape[:1]:
      raise ValueError(
        f"grassmann_mix: the state has memory {list(state['memory'].shape)} and length "
        f"{list(state['length'].shape)}, expected {list(shape)} and {list(shape[:1])}; make it by "
        "grassmann_state with these offsets"
      )
  if normalization not in NORMALIZATIONS:
    raise ValueError(
      f"grassmann_mix: normalization={normalization!r} is unknown; expected one of "
      f"{', '.join(NORMALIZATIONS)}"
    )
  check_segment_ids("grassmann_mix", segment_ids, *z.shape[:2])


def state_after(state, z, segment_ids) -> dict[str, jax.Array]:
  """The state behind a row of z [B, T, H, R]."""
  length = state["length"]
  if segment_ids is None:
    after = length + z.shape[1]
  else:
    after = last_token(segment_ids, document_positions(segment_ids, length) + 1, length)
  return {"memory": newest_rows(state["memory"], z, segment_ids), "length": after}


def along_rows(mix, z, state, segment_ids, *parameters):
  """y = mix(z, state, segment_ids, *parameters) and the state after the rows z [B, T, H, R]; by
  parts of them where the mesh cuts the length."""
  if not sharding.is_cut("length", z.shape[1]):
    return mix(z, state, segment_ids, *parameters), state_after(state, z, segment_ids)

  def part(z, memory, length, segment_ids, *parameters):
    before = _state_before(z, {"memory": memory, "length": length}, segment_ids)
    y = mix(z, before, segment_ids, *parameters)
    after = parts.of_last(state_after(before, z, segment_ids))
    return y, after["memory"], after["length"]

  whole = ((None,) * x.ndim for x in parameters)
  run = sharding.shard_kernel(
    part,
    (("batch", "length", None, None), STATES, ("batch",), ("batch", "length"), *whole),
    (("batch", "length", None), STATES, ("batch",)),
  )
  y, memory, length = run(z, state["memory"], state["length"], segment_ids, *parameters)
  return y, {"memory": memory, "length": length}


def _state_before(z, state, segment_ids):
  """The state before this device's part of the rows; `state` is the one before all of them."""
  zeros, count = jax.tree.map(jnp.zeros_like, state), parts.count_tokens(z, segment_ids)

  def apply(count, state):
    return {**state, "memory": parts.moved_up(count, state["memory"])}

  before = parts.state_before(
    parts.Part(state_after(zeros, z, segment_ids), count, parts.Documents.of(segment_ids)),
    state,
    apply=apply,
    compose=jnp.add,
    reach=-(-state["memory"].shape[1] // z.shape[1]),
  )
  if segment_ids is None:  # neighbours alone were asked
    before["length"] = state["length"] + jax.lax.axis_index(parts.AXIS) * z.shape[1]
  return before


class _Call(NamedTuple):
  """What a call fixes besides its arrays."""

  offsets: plucker.Offsets
  eps: float
  normalization: str
  implementation: str | None

  @property
  def options(self) -> dict[str, object]:
    """What every form is told."""
    return {"offsets": self.offsets, "eps": self.eps, "normalization": self.normalization}

  def kernel(self, function):
    """A kernel's function on the rows of a call."""
    return functools.partial(function, **{**self.options, "offsets": self.offsets[0]})

  def run(self, functions, arrays):
    """The one of `functions` that the call names or its platform gets."""
    return implementations.run(
      "grassmann_mix",
      self.implementation,
      arrays,
      functions=functions,
      refusals=self._refusals(*arrays[:3]),
    )

  def _refusals(self, z, before, weight) -> dict[str, str]:
    """Kernel -> why it cannot run, or is not chosen unless it is named."""
    refusals = {}
    for name, kernels in (("tpu", tpu), ("gpu", gpu)):
      if len(set(self.offsets)) > 1:
        refusals[name] = "groups have offsets of their own"
      elif (refusal := kernels.refusal(z, weight, self.offsets[0])) is not None:
        refusals[name] = refusal
    if self.implementation is None:
      if z.shape[1] < SHORTEST:
        refusals.setdefault("tpu", f"length {z.shape[1]} is below {SHORTEST}")
      refusals.setdefault("gpu", "not yet timed against XLA on a GPU; it runs when named")
    return refusals


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _mix(z, before, weight, bias, length, segment_ids, call: _Call):
  by_xla = functools.partial(plucker.forward, **call.options)
  by_tpu, by_gpu = (
    functools.partial(_kernel_forward, call.kernel(kernels.forward)) for kernels in (tpu, gpu)
  )
  functions = {
    "reference": functools.partial(_by_definition, call),
    "xla": functools.partial(_on_rows, over_padding, by_xla),
    "tpu": sharding.shard_kernel(functools.partial(_on_rows, over_padding, by_tpu), ARRAYS, ROWS),
    "gpu": sharding.shard_kernel(functools.partial(_on_rows, in_order, by_gpu), ARRAYS, ROWS),
  }
  return call.run(functions, (z, before, weight, bias, length, segment_ids))


def _mix_forward(z, before, weight, bias, length, segment_ids, call: _Call):
  # Directions and coordinates are made again in the backward pass: they are more than the inputs.
  arrays = (z, before, weight, bias, length, segment_ids)
  return _mix(*arrays, call), arrays


def _mix_backward(call: _Call, arrays, dy):
  by_xla = functools.partial(plucker.backward, **call.options)
  by_tpu, by_gpu = (
    functools.partial(_kernel_backward, call.kernel(kernels.backward)) for kernels in (tpu, gpu)
  )
  axes = (*ARRAYS, ROWS), GRADIENTS
  functions = {
    "reference": functools.partial(_gradient_of_definition, call),
    "xla": functools.partial(_on_rows, over_padding, by_xla),
    "tpu": _summed(sharding.shard_kernel(functools.partial(_on_rows, over_padding, by_tpu), *axes)),
    "gpu": _summed(sharding.shard_kernel(functools.partial(_on_rows, in_order, by_gpu), *axes)),
  }
  return *call.run(functions, (*arrays, dy)), None, None


_mix.defvjp(_mix_forward, _mix_backward)


def _kernel_forward(kernel, z, before, weight, bias, reach):
  return kernel(*map(_one_group, (z, before)), weight, bias, reach.back)


def _kernel_backward(kernel, z, before, weight, bias, reach, dy):
  """Gradients, those of the parameters behind an axis of one, for each device's part of a batch."""
  dz, dbefore, dweight, dbias = kernel(*map(_one_group, (z, before)), weight, reach.back, dy)
  dweight, dbias = dweight.astype(weight.dtype), dbias.astype(bias.dtype)
  return dz.reshape(z.shape), dbefore.reshape(before.shape), dweight[None], dbias[None]


def _one_group(x):
  return x[:, :, 0] if x.shape[2] == 1 else x


def _summed(function):
  """The function with the gradients of the parameters summed over the devices."""

  def run(*arrays):
    dz, dbefore, dweight, dbias = function(*arrays)
    return dz, dbefore, dweight.sum(0), dbias.sum(0)

  return run


def _by_definition(call, z, before, weight, bias, length, segment_ids):
  count = jnp.minimum(length, before.shape[1])
  ids = jnp.ones(z.shape[:2], jnp.int32) if segment_ids is None else segment_ids
  y = reference.grassmann_mix(z, weight, bias, before, count, ids, **call.options)
  return y.astype(weight.dtype)


def _gradient_of_definition(call, z, before, weight, bias, length, segment_ids, dy):
  def run(z, before, weight, bias):
    return _by_definition(call, z, before, weight, bias, length, segment_ids)

  return jax.vjp(run, z, before, weight, bias)[1](dy)


def _on_rows(arrange, form, z, before, weight, bias, length, segment_ids, *dy):
  """A form on rows that `arrange`, one of jaxmix.ops.segments, has put in order. It is told how far
  back and ahead the document of a token goes; what stands at padding is set to 0."""

  def run(segment_ids, z, *dy):
    if segment_ids is not None:
      z = jnp.where((segment_ids != 0)[..., None, None], z, 0)
    return form(z, before, weight, bias, plucker.reach_of(segment_ids, length, z.shape[1]), *dy)

  return arrange(run, segment_ids, z, *dy)
