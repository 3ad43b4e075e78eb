"""Next-token prediction, without ever holding the logits of a whole batch.

On a mesh each device works through its own positions with its own rows of the table. These are
gathered once, and the sums of their gradient meet once, after the last chunk: the compiler, left to
itself, does both in every chunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxmix import sharding

# What one device works on at a time, whichever is more. Every chunk reads the table and adds to its
# gradient, both in main memory: over fewer positions that takes longer than the matmuls.
_CHUNK_BYTES = 2**26  # of float32 logits
_CHUNK_POSITIONS = 1024


def cross_entropy(
  features: jax.Array,
  table: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  chunk_length: int | None = None,
) -> jax.Array:
  """Summed cross-entropy of the targets under softmax(features table^T).

      sum_bt weights_bt * (logsumexp_v(x_bt . w_v) - x_bt . w_target)

  Logits are made for some positions at a time. Their gradient is formed in the same pass while they
  are at hand, so nothing of size vocabulary is kept or computed twice.

  Args:
    features: [B, T, D], float32 or bfloat16.   table: [V, D] float32.
    targets: [B, T] int32.   weights: [B, T] float32; they get no gradient.
    chunk_length: so many positions of every row at a time; None takes as many positions as give
      64 MiB of logits on a device, or about 1,024 where that is more.
  Returns:
    float32 scalar, in nats.
  """
  if not targets.shape == weights.shape == features.shape[:2]:
    raise ValueError(
      f"cross_entropy: targets {targets.shape} and weights {weights.shape}, expected both "
      f"{features.shape[:2]} as in features"
    )
  return _summed(features, table, targets, weights, chunk_length)


def causal_loss(
  model, batch: dict[str, jax.Array], dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Summed next-token loss of a batch and the weight it was summed over.

  Args:
    model: a `jaxmix.models.Decoder`.
    batch: inputs, targets [B, T] int32, weights [B, T] float32, and for packed rows segment_ids,
      positions [B, T] int32.
    dropout_key: None means no dropout.
  Returns:
    Sum over targets in nats, and the sum of the weights; both float32 scalars.
  """
  features, _ = model.features(
    batch["inputs"],
    segment_ids=batch.get("segment_ids"),
    positions=batch.get("positions"),
    dropout_key=dropout_key,
  )
  weights = batch["weights"]
  return cross_entropy(features, model.output_table, batch["targets"], weights), weights.sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed(features, table, targets, weights, chunk_length):
  return _on_mesh(_value, features, table, targets, weights, chunk_length)[0]


def _summed_forward(features, table, targets, weights, chunk_length):
  total, dx, dtable = _on_mesh(_gradients, features, table, targets, weights, chunk_length)
  return total, (dx, dtable[: len(table)].astype(table.dtype), weights)


def _summed_backward(chunk_length, residuals, cotangent):
  dx, dtable, weights = residuals
  return (cotangent * dx).astype(dx.dtype), cotangent * dtable, None, jnp.zeros_like(weights)


_summed.defvjp(_summed_forward, _summed_backward)


class _Part(NamedTuple):
  """What a device computes: the mesh axes that cut the positions, the rows of the table, and the
  width of its gradient (these among the first); how many rows there are, but for padding."""

  rows: tuple[str, ...]
  vocab: tuple[str, ...]
  embed: tuple[str, ...]
  vocab_size: int
  chunk_length: int | None


def _on_mesh(function, features, table, targets, weights, chunk_length):
  """Runs `_value` or `_gradients` on each device's part of the positions and of the table."""
  mesh = jax.sharding.get_abstract_mesh()
  vocab_size, dim = table.shape
  # Cast before it is gathered, which sends half the bytes. Rows of padding make it divisible.
  padding = -vocab_size % sharding.ways("vocab")
  table = jnp.pad(table.astype(features.dtype), ((0, padding), (0, 0)))
  batch, length = (
    sharding.cuts(axis, size, mesh)
    for axis, size in zip(("batch", "length"), targets.shape, strict=True)
  )
  vocab = sharding.cuts("vocab", len(table), mesh)
  embed = tuple(axis for axis in sharding.cuts("embed", dim, mesh) if axis in batch)
  part = _Part((*batch, *length), vocab, embed, vocab_size, chunk_length)
  rows = P(batch, length)
  run = functools.partial(function, part=part)
  if mesh.size > 1:
    run = jax.shard_map(
      run,
      mesh=mesh,
      in_specs=(rows, P(vocab), rows, rows),
      out_specs=(P(), rows, P(vocab, embed)),
      check_vma=False,
    )
  return run(features, table, targets, weights)


def _value(features, table, targets, weights, part: _Part):
  def step(total, chunk):
    return total + _loss(*chunk, table, part)[0], None

  chunks = _chunks(features, targets, weights, len(table), part.chunk_length)
  total, _ = jax.lax.scan(step, jnp.zeros((), jnp.float32), chunks)
  return jax.lax.psum(total, part.rows), None, None


def _gradients(features, table, targets, weights, part: _Part):
  def step(carry, chunk):
    (total, dtable), (x, target, weight) = carry, chunk
    loss, dlogits = _loss(x, target, weight, table, part)
    dtable = dtable + jnp.einsum("cv,cd->vd", dlogits, x, preferred_element_type=jnp.float32)
    dx = jnp.einsum("cv,vd->cd", dlogits, table, preferred_element_type=jnp.float32)
    return (total + loss, dtable), jax.lax.psum(dx, part.vocab).astype(x.dtype)

  start = (jnp.zeros((), jnp.float32), jnp.zeros(table.shape, jnp.float32))
  chunks = _chunks(features, targets, weights, len(table), part.chunk_length)
  (total, dtable), dx = jax.lax.scan(step, start, chunks)
  dtable = jax.lax.psum_scatter(dtable, part.embed, scatter_dimension=1, tiled=True)
  dtable = jax.lax.psum(dtable, tuple(axis for axis in part.rows if axis not in part.embed))
  dx = dx.reshape(-1, dx.shape[-1])[: targets.size].reshape(features.shape)
  return jax.lax.psum(total, part.rows), dx, dtable


def _loss(x, target, weight, table, part: _Part):
  """Summed loss of positions [C, D], [C], [C] and its gradient by their logits, [C, V], in the
  dtype of x; the table is this device's part."""
  logits = jnp.einsum("cd,vd->cv", x, table, preferred_element_type=jnp.float32)
  token = jax.lax.axis_index(part.vocab) * len(table) + jnp.arange(len(table))
  if part.vocab:
    logits = jnp.where(token < part.vocab_size, logits, -jnp.inf)
  lse = jax.nn.logsumexp(logits, axis=-1)
  largest = jax.lax.pmax(lse, part.vocab)
  lse = largest + jnp.log(jax.lax.psum(jnp.exp(lse - largest), part.vocab))
  # A masked sum rather than a gather: the target's row may be another device's.
  hit = token == target[:, None]
  at_target = jax.lax.psum(jnp.sum(jnp.where(hit, logits, 0), axis=-1), part.vocab)
  dlogits = weight[:, None] * (jnp.exp(logits - lse[:, None]) - hit)
  return jnp.sum(weight * (lse - at_target)), dlogits.astype(x.dtype)


def _chunks(features, targets, weights, vocab_size: int, chunk_length: int | None):
  """[B, T, ...] -> [N, C, ...], padded by zeros; a padded position has weight 0."""
  if chunk_length is None:
    size = _chunk_size(targets.size, max(_CHUNK_POSITIONS, _CHUNK_BYTES // (4 * vocab_size)))
  else:
    size = targets.shape[0] * max(1, min(chunk_length, targets.shape[1]))

  def cut(x):
    x = x.reshape(targets.size, *x.shape[2:])
    x = jnp.pad(x, ((0, -len(x) % size), *((0, 0),) * (x.ndim - 1)))
    return x.reshape(-1, size, *x.shape[1:])

  return tuple(map(cut, (features, targets, weights)))


def _chunk_size(count: int, limit: int) -> int:
  """Positions at a time, in whole tiles of a TPU: a divisor of their number where one is near the
  limit, otherwise what leaves little of the last chunk empty."""
  if count <= limit:
    return max(1, count)
  for tile in (128, 8):
    for size in range(limit - limit % tile, limit // 2, -tile):
      if count % size == 0:
        return size
  fewest = -(-count // (limit - limit % 8))
  return -(-count // (8 * fewest)) * 8
