"""Masked language modelling: some tokens of a row are hidden, and told from all the others."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmix.objectives.causal import cross_entropy

SHOWN_AS_MASK, SHOWN_AS_ANY = 0.8, 0.1  # of the chosen tokens; the rest are shown as they are


def masked_loss(
  model,
  batch: dict[str, jax.Array],
  dropout_key: jax.Array | None = None,
  *,
  mask_id: int = 103,
  rate: float = 0.3,
  evaluation_rate: float = 0.15,
) -> tuple[jax.Array, jax.Array]:
  """Summed cross-entropy of the chosen tokens of a batch, and how many they are.

  A share of the tokens of each row is chosen. Of these 80 % are shown as the mask, 10 % as any
  token, and 10 % as they are. Logits are made for them alone.

  Args:
    model: a `jaxmix.models.MaskedLM`.
    batch: inputs [B, T] int32, weights [B, T] float32, 0 at padding, and for packed rows
      segment_ids, positions [B, T] int32. Targets, which are of the next token, are not read.
    dropout_key: of the choice too. None means no dropout, and a choice in each row by its content,
      so that an evaluation comes out the same whatever rows share a batch.
    mask_id: the token that hides, [MASK] of BERT's vocabulary.
    rate, evaluation_rate: the share that is chosen, with a key and without.
  Returns:
    Sum over chosen tokens in nats, and their number; both float32 scalars.
  Source: Devlin et al. 2018 (arXiv 1810.04805), section 3.1; the rates are those of Fu et al. 2023
    (arXiv 2310.12109).
  """
  tokens, live = batch["inputs"], batch["weights"] != 0
  if dropout_key is None:
    rate = evaluation_rate
    # Sums of integers are the same in any order, and so on any mesh.
    contents = jnp.sum(tokens, axis=1).astype(jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), contents)
  else:
    key, dropout_key = jax.random.split(dropout_key)
    keys = jax.random.split(key, len(tokens))
  one_row = functools.partial(choose, rate=rate, mask_id=mask_id, vocab_size=model.vocab_size)
  places, weights, shown = jax.vmap(one_row)(keys, tokens, live)
  features = model.encoder(
    shown,
    segment_ids=batch.get("segment_ids"),
    positions=batch.get("positions"),
    dropout_key=dropout_key,
  )
  hidden = jnp.take_along_axis(features, places[..., None], axis=1)
  targets = jnp.take_along_axis(tokens, places, axis=1)
  total = cross_entropy(model.predictions(hidden), model.output_table, targets, weights)
  return total, weights.sum()


def is_masked(objective: Callable) -> bool:
  """Whether an objective is `masked_loss`, some of its arguments maybe given: its loss is that of
  the chosen tokens, seen from both sides, and says nothing of the bits that a text takes."""
  return inspect.unwrap(getattr(objective, "func", objective)) is masked_loss


def choose(key, tokens, live, *, rate: float, mask_id: int, vocab_size: int):
  """Which tokens of a row are asked for, and what is shown of it.

  Args:
    tokens: [T] int32.   live: [T] bool, False at padding.
  Returns:
    places [K] int32 and weights [K] float32, 0 where there are fewer than K to choose; shown [T]
    int32.
  """
  order_key, kind_key, any_key = jax.random.split(key, 3)
  most = math.ceil(rate * len(tokens))
  score = jnp.where(live, jax.random.uniform(order_key, tokens.shape), -1)
  _, places = jax.lax.top_k(score, most)
  weights = (jnp.arange(most) < jnp.ceil(rate * jnp.sum(live))).astype(jnp.float32)
  kind = jax.random.uniform(kind_key, places.shape)
  other = jax.random.randint(any_key, places.shape, 0, vocab_size, tokens.dtype)
  kept = tokens[places]
  seen = jnp.where(kind < SHOWN_AS_MASK, mask_id, kept)
  seen = jnp.where((kind >= SHOWN_AS_MASK) & (kind < SHOWN_AS_MASK + SHOWN_AS_ANY), other, seen)
  seen = jnp.where(weights > 0, seen, kept)
  return places, weights, tokens.at[places].set(seen)
