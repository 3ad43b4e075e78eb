"""Grassmann mixing by its definition: every pair of tokens, all of its Plücker coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

NORMALIZATIONS = ("safe", "clamp")
RELATIVE_EPS = 1e-3  # of "safe": the smallest sine of the angle that is resolved


def pairs_of(rank: int) -> tuple[np.ndarray, np.ndarray]:
  """The first and second channels of the R (R - 1) / 2 pairs i < j, in row-major order."""
  return np.triu_indices(rank, 1)


def plucker(u, v, *, eps: float, normalization: str):
  """Normalised Plücker coordinates of the planes of two vectors.

      p_ij = u_i v_j - u_j v_i,  i < j        p / N
      "clamp":  N = max(|p|, eps)
      "safe":   N = sqrt(|p|^2 + (1e-3 |u| |v|)^2 + eps^2)

  0, and without gradient, where u or v is 0.

  Args:
    u, v: [..., R].
  Returns:
    [..., R (R - 1) / 2].
  """
  i, j = pairs_of(u.shape[-1])
  p = u[..., i] * v[..., j] - u[..., j] * v[..., i]
  area = jnp.sum(p * p, -1, keepdims=True)
  lengths = jnp.sum(u * u, -1, keepdims=True) * jnp.sum(v * v, -1, keepdims=True)
  if normalization == "clamp":
    area = jnp.maximum(area, eps**2)
  else:
    area = area + RELATIVE_EPS**2 * lengths + eps**2
  return jnp.where(lengths > 0, p / jnp.sqrt(area), 0)


def grassmann_mix(
  z,
  weight,
  bias,
  before,
  count,
  segment_ids,
  *,
  offsets: Sequence[int],
  eps: float = 1e-8,
  normalization: str = "safe",
):
  """Means of normalised Plücker coordinates, projected.

      g_t = (1 / n_t) sum_d plucker(z_t, z_{t-d}) weight + bias,    0 where n_t = 0

  over the n_t offsets d whose token stands in the same document; offsets count tokens, not padding.

  Args:
    z: [B, T, H, R].   weight: [H R (R - 1) / 2, D].   bias: [D].
    before: [B, M, H, R], the tokens before the first one, oldest first; they belong to the document
      of the first token that is not padding.   count: [B] int32, how many of them, the newest,
      exist.
    segment_ids: [B, T] int32; a change starts a document. 0 is padding: it pairs with nothing and
      gives 0.
    offsets: whole numbers, at most M; below 0 they point to later tokens.
    eps, normalization: see `plucker`.
  Returns:
    [B, T, D], in float32, or in float64 where the inputs are.
  """
  dtype = jnp.promote_types(z.dtype, jnp.float32)
  z, weight, bias, before = (array.astype(dtype) for array in (z, weight, bias, before))
  batch, length, _, _ = z.shape
  live = segment_ids != 0

  # Places of tokens in a row without padding, and the rows back from them.
  earlier = before.shape[1]
  place = jnp.where(live, jnp.cumsum(live, axis=1) - 1, length) + earlier
  rows = jnp.arange(batch)[:, None]
  tokens = jnp.zeros((batch, earlier + length + 1, *z.shape[2:]), dtype)
  tokens = (
    tokens.at[:, :earlier].set(before).at[rows, place].set(jnp.where(live[..., None, None], z, 0))
  )
  document = _documents(segment_ids)
  documents = jnp.full((batch, earlier + length + 1), -1)
  documents = documents.at[:, :earlier].set(
    jnp.where(jnp.arange(earlier) >= earlier - count[:, None], 0, -1)
  )
  documents = documents.at[rows, place].set(jnp.where(live, document, -1))

  total, found = 0.0, jnp.zeros((batch, length), jnp.int32)
  for offset in offsets:
    partner = place - offset
    inside = (partner >= 0) & (partner < earlier + length)
    partner = jnp.clip(partner, 0, earlier + length - 1)
    valid = live & inside & (documents[rows, partner] == document)
    v = tokens[rows, partner]
    p = plucker(jnp.where(live[..., None, None], z, 0), v, eps=eps, normalization=normalization)
    total = total + jnp.where(valid[..., None, None], p, 0)
    found = found + valid
  mean = total / jnp.maximum(found, 1)[..., None, None]
  g = mean.reshape(batch, length, -1) @ weight + bias
  return jnp.where((found > 0)[..., None], g, 0)


def _documents(segment_ids):
  """[B, T], the number of each token's document in its row; padding is no change."""

  def step(carry, id_t):
    current, number = carry
    live = id_t != 0
    number = number + (live & (current != 0) & (id_t != current))
    return (jnp.where(live, id_t, current), number), number

  nothing = jnp.zeros(segment_ids.shape[0], jnp.int32)
  return jax.lax.scan(step, (nothing, nothing), segment_ids.T)[1].T
