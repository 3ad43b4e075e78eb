"""Next-token prediction, without ever holding the logits of a whole batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxmix import sharding

_CHUNK_BYTES = 2**26  # float32 logits that one device holds at a time


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

  Logits are made for `chunk_length` positions at a time. Their gradient is formed in the same pass
  while they are at hand, so nothing of size vocabulary is kept or computed twice.

  Args:
    features: [B, T, D], float32 or bfloat16.   table: [V, D] float32.
    targets: [B, T] int32.   weights: [B, T] float32; they get no gradient.
    chunk_length: positions at a time; None keeps a chunk's logits within 64 MiB a device.
  Returns:
    float32 scalar, in nats.
  """
  batch, length, _ = features.shape
  if targets.shape != (batch, length) or weights.shape != (batch, length):
    raise ValueError(
      f"cross_entropy: targets {targets.shape} and weights {weights.shape}, expected both "
      f"{(batch, length)} as in features"
    )
  if chunk_length is None:
    row_bytes = 4 * batch * table.shape[0] // sharding.ways("batch")
    chunk_length = max(1, _CHUNK_BYTES // max(row_bytes, 1))
  return _summed(features, table, targets, weights, max(1, min(chunk_length, length)))


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
  return cross_entropy(features, model.output_table, batch["targets"], batch["weights"]), batch[
    "weights"
  ].sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed(features, table, targets, weights, chunk_length):
  table = table.astype(features.dtype)

  def step(total, chunk):
    logits, lse = _logits(chunk[0], table)
    return total + jnp.sum(chunk[2] * (lse - _at_target(logits, chunk[1]))), None

  return jax.lax.scan(
    step, jnp.zeros((), jnp.float32), _chunks(chunk_length, features, targets, weights)
  )[0]


def _summed_forward(features, table, targets, weights, chunk_length):
  cast = table.astype(features.dtype)

  def step(carry, chunk):
    total, dtable = carry
    x, target, weight = chunk
    logits, lse = _logits(x, cast)
    total = total + jnp.sum(weight * (lse - _at_target(logits, target)))
    hit = jnp.arange(table.shape[0]) == target[..., None]
    dlogits = (weight[..., None] * (jnp.exp(logits - lse[..., None]) - hit)).astype(x.dtype)
    dx = jnp.einsum("btv,vd->btd", dlogits, cast, preferred_element_type=jnp.float32).astype(
      x.dtype
    )
    dtable = dtable + jnp.einsum("btv,btd->vd", dlogits, x, preferred_element_type=jnp.float32)
    return (total, dtable), dx

  start = (jnp.zeros((), jnp.float32), jnp.zeros(table.shape, jnp.float32))
  (total, dtable), dx = jax.lax.scan(step, start, _chunks(chunk_length, features, targets, weights))
  dx = jnp.moveaxis(dx, 0, 1).reshape(features.shape[0], -1, features.shape[2])[
    :, : features.shape[1]
  ]
  return total, (dx, dtable.astype(table.dtype), weights)


def _summed_backward(chunk_length, residuals, cotangent):
  dx, dtable, weights = residuals
  return (cotangent * dx).astype(dx.dtype), cotangent * dtable, None, jnp.zeros_like(weights)


_summed.defvjp(_summed_forward, _summed_backward)


def _chunks(chunk_length: int, *arrays):
  """[B, T, ...] -> [N, B, chunk_length, ...], padded by zeros; a padded position has weight 0."""

  def cut(x):
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk_length), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk_length, *x.shape[2:]), 1, 0)

  return tuple(cut(x) for x in arrays)


def _logits(x, table):
  logits = jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)
  logits = sharding.constrain(logits, "batch", None, "vocab")
  return logits, jax.nn.logsumexp(logits, axis=-1)


def _at_target(logits, target):
  # A masked sum rather than a gather, so that a vocabulary cut over devices needs no gather across
  # them.
  return jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == target[..., None], logits, 0), axis=-1)
