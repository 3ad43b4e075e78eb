"""One token from the logits of each row."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sample(
  logits: jax.Array,
  key: jax.Array,
  *,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
) -> jax.Array:
  """Draws one token a row from softmax(logits / temperature), cut off by rank and by mass.

  First the `top_k` most likely tokens are kept, then of these the fewest most likely ones whose
  probabilities, which sum to 1 over what `top_k` left, reach `top_p` together. Of equally likely
  tokens the lower id ranks first, so never more than `top_k` are kept.

  Args:
    logits: [B, V], any float dtype; -inf for tokens that shall not come.
    key: a PRNG key for the whole batch; not used at temperature 0.
    temperature: 0 takes the most likely token; 1 leaves the model's distribution as it is.
    top_k: tokens kept, at least 1; None or more than V keeps all.
    top_p: mass kept, above 0 and at most 1; None or 1 keeps all.
  Returns:
    [B] int32.
  Raises:
    ValueError: an option is out of its range.
  Source: top-k: Fan et al. 2018 (arXiv 1805.04833), section 5; nucleus: Holtzman et al. 2019
    (arXiv 1904.09751), section 3.1.
  """
  check_options(temperature=temperature, top_k=top_k, top_p=top_p)
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  # The largest becomes 0 before the division, so that no temperature makes an infinity of it.
  logits = logits.astype(jnp.float32)
  logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
  kept = min(top_k or logits.shape[-1], logits.shape[-1])
  cuts_mass = top_p is not None and top_p < 1
  if kept == logits.shape[-1] and not cuts_mass:
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
  ranked, ids = jax.lax.top_k(logits, kept)
  if cuts_mass:
    mass = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass
    first = jnp.arange(kept) == 0  # stays, however little top_p is and cumsum rounds
    ranked = jnp.where(first | (before < top_p), ranked, -jnp.inf)
  rank = jax.random.categorical(key, ranked, axis=-1)
  return jnp.take_along_axis(ids, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


def check_options(*, temperature: float, top_k: int | None, top_p: float | None) -> None:
  """Raises ValueError unless `sample` can take these options."""
  if not 0 <= temperature < float("inf"):
    raise ValueError(
      f"temperature={temperature} — expected a number of at least 0 — use 0 for the most likely "
      "token, 1 for the model's own distribution"
    )
  if top_k is not None and top_k < 1:
    raise ValueError(
      f"top_k={top_k} — expected at least 1 token to draw from — leave it out to keep all"
    )
  if top_p is not None and not 0 < top_p <= 1:
    raise ValueError(
      f"top_p={top_p} — expected a probability above 0 and at most 1 — leave it out to keep all, "
      "or use temperature=0 for the most likely token"
    )
