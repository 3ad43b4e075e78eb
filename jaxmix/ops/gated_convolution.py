"""Gated convolution of rows with filters as long as they are: by the kernels, and around the form
that XLA compiles, `jaxmix.ops.circular`.

The kernels take rows from their start, of one document. Rows of several are walked once for each,
as in the other form.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxmix import sharding
from jaxmix.ops import circular
from jaxmix.ops import implementation as implementations
from jaxmix.ops.segments import document_indices, over_padding
from pallas_kernels.long_convolution import folded, gpu, reference

# Logical axes: rows [B, T, D], filters [D, N], skip [D], documents [B, T]; and of the gradients of
# filters and skip.
ROWS = ("batch", None, "channels")
ARRAYS = (ROWS, ("channels", None), ("channels",), ROWS, ROWS, ("batch", None))
PARTS = (("batch", "channels", None), ("batch", "channels"))


def gated_convolution(
  u, kernel, reverse_kernel, skip, pre_gate, post_gate, before, segment_ids, implementation
):
  """The sum of `jaxmix.ops.long_convolution`, which documents the arguments.

  Args:
    kernel: [D, lags], as many lags as a row can reach.
    before: [B, M, D], gated inputs of the first document before the row; None means none.
  Returns:
    y: [B, T, D] in the dtype of u; anything at padding.
  Raises:
    ValueError: `implementation` is unknown or cannot run this call.
  """
  refusals = {
    "tpu": folded.refusal(u, pre_gate, post_gate),
    "gpu": gpu.refusal(u, pre_gate, post_gate),
  }
  if before is not None:
    refusals = dict.fromkeys(refusals, "the state of a stream comes before the row")
  refusals = {name: reason for name, reason in refusals.items() if reason is not None}
  if implementation is None:
    if u.shape[1] <= circular.SHORT:
      refusals.setdefault("tpu", f"length {u.shape[1]} is not above {circular.SHORT}")
    refusals.setdefault("gpu", "not yet timed against XLA on a GPU; it runs when named")
  u, pre_gate, post_gate = map(_in_parts, (u, pre_gate, post_gate))
  y = implementations.run(
    "long_convolution",
    implementation,
    (u, kernel, reverse_kernel, skip, pre_gate, post_gate, before, segment_ids),
    functions={
      "reference": functools.partial(_around, _by_definition),
      "xla": functools.partial(_around, _by_xla),
      "tpu": _by_tpu,
      "gpu": _by_gpu,
    },
    refusals=refusals,
  )
  return _in_parts(y)


def _in_parts(x):
  """Rows [B, T, D] or None, where the mesh cuts the length held in parts: said on both sides of a
  transform, XLA exchanges parts of the length for channels and back, and gathers nothing."""
  if x is None or not sharding.is_cut("length", x.shape[1]):
    return x
  return sharding.constrain(x, "batch", "length", "mlp")


def gated(u, gate):
  """u behind a gate, or without one, in float32 at least."""
  dtype = jnp.promote_types(u.dtype, jnp.float32)
  return u.astype(dtype) if gate is None else u.astype(dtype) * gate.astype(dtype)


def with_skip(y, g, skip, post_gate):
  """post_gate * (y + skip * g)."""
  return gated(y if skip is None else y + skip.astype(y.dtype) * g, post_gate)


def documents_of(segment_ids):
  """The number of the document of each token, -1 at padding."""
  if segment_ids is None:
    return None
  return jnp.where(segment_ids != 0, document_indices(segment_ids), -1)


def _around(convolve, u, kernel, reverse_kernel, skip, pre_gate, post_gate, before, segment_ids):
  """A form of the convolution alone, with what stands around it."""
  g = gated(u, pre_gate)
  y = convolve(g, kernel, reverse_kernel, before, segment_ids)
  return with_skip(y, g, skip, post_gate).astype(u.dtype)


def _by_definition(g, kernel, reverse_kernel, before, segment_ids):
  if segment_ids is None:
    segment_ids = jnp.ones(g.shape[:2], jnp.int32)
  if before is None:
    before = jnp.zeros((g.shape[0], kernel.shape[1] - 1, g.shape[2]), g.dtype)
  before = before[:, before.shape[1] - (kernel.shape[1] - 1) :]
  return reference.long_convolution(g, kernel, reverse_kernel, before, segment_ids)


def _by_xla(g, kernel, reverse_kernel, before, segment_ids):
  def form(segment_ids, g):
    documents = documents_of(segment_ids)
    if before is None:
      return circular.convolve(g, kernel, reverse_kernel, documents)
    earlier = before.shape[1]
    if documents is not None:
      documents = jnp.pad(documents, ((0, 0), (earlier, 0)))
    rows = jnp.concatenate([before, g], 1)
    return circular.convolve(rows, kernel, None, documents)[:, earlier:]

  return over_padding(form, segment_ids, g)


def _by_tpu(u, kernel, reverse_kernel, skip, pre_gate, post_gate, *around):
  gates = (pre_gate is not None) + (post_gate is not None)
  sizes = folded.Sizes.of(u.shape[1], u.dtype, gates)
  rows = (u, kernel, reverse_kernel, skip, pre_gate, post_gate)
  return _by_kernels(folded, sizes, *rows, *around)


def _by_gpu(u, *arrays):
  sizes = gpu.Sizes.of(u.shape[1])
  return _by_kernels(gpu, (sizes, sizes), u, *arrays)


def _by_kernels(
  kernels, sizes, u, kernel, reverse_kernel, skip, pre_gate, post_gate, before, segment_ids
):
  """`kernels`: the module of a chip's.   `sizes`: how it cuts rows, forward and backward."""
  assert before is None  # is refused
  c = circular.filters(kernel, reverse_kernel, u.shape[1], sizes[1].points)
  skip = jnp.zeros(u.shape[2], c.dtype) if skip is None else skip.astype(c.dtype)

  def form(segment_ids, u, pre_gate, post_gate):
    return _fused(u, c, skip, pre_gate, post_gate, documents_of(segment_ids), kernels, sizes)

  return over_padding(form, segment_ids, u, pre_gate, post_gate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _fused(u, c, skip, pre_gate, post_gate, documents, kernels, sizes):
  run = sharding.shard_kernel(functools.partial(_forward, kernels, sizes), ARRAYS, ROWS)
  return run(u, c, skip, pre_gate, post_gate, documents)


def _fused_forward(*arguments):
  # Spectra of rows are made again in the backward pass: they are more than the rows.
  *arrays, _, _ = arguments
  return _fused(*arguments), arrays


def _fused_backward(kernels, sizes, arrays, dy):
  _, _, _, pre_gate, post_gate, _ = arrays
  gates = [None if gate is None else ROWS for gate in (pre_gate, post_gate)]
  run = sharding.shard_kernel(
    functools.partial(_backward, kernels, sizes), (*ARRAYS, ROWS), (ROWS, *PARTS, *gates)
  )
  du, dc, dskip, dpre, dpost = run(*arrays, dy)
  return du, dc.sum(0), dskip.sum(0), dpre, dpost, None


_fused.defvjp(_fused_forward, _fused_backward)


def _forward(kernels, sizes, u, c, skip, pre_gate, post_gate, documents):
  spectra = kernels.spectra(c, sizes[0])

  def form(u):
    return kernels.forward(u, spectra, skip, pre_gate, post_gate, sizes[0])

  return circular.each_document(documents, form, u)


def _backward(kernels, sizes, u, c, skip, pre_gate, post_gate, documents, dy):
  """Gradients, those of filters and skip behind an axis of one, for each device's rows."""
  spectra, pull = jax.vjp(lambda c: kernels.spectra(c, sizes[1]), c)

  def form(u, dy):
    du, dspectra, *gates = kernels.backward(u, spectra, skip, pre_gate, post_gate, dy, sizes[1])
    return du, [x[None] for x in dspectra], *gates  # rows alone have three axes

  du, dspectra, dpre, dpost = circular.each_document(documents, form, u, dy)
  (dc,) = pull(tuple(x[0] for x in dspectra))
  return du, dc[None], dc[None, :, 0], dpre, dpost  # skip is one more weight of lag 0
