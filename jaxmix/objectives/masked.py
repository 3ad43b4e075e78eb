"""Masked language modelling: some tokens of a row are hidden, and told from all the others."""

from __future__ import annotations

import math

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
    batch: inputs [B, T] int32, and for packed rows segment_ids, positions [B, T] int32. Targets and
      weights, which are of the next token, are not read.
    dropout_key: of the choice too. None means no dropout, and a choice by the content of the batch,
      so that an evaluation comes out the same twice.
    mask_id: the token that hides, [MASK] of BERT's vocabulary.
    rate, evaluation_rate: the share that is chosen, with a key and without.
  Returns:
    Sum over chosen tokens in nats, and their number; both float32 scalars.
  Source: Devlin et al. 2018 (arXiv 1810.04805), section 3.1; the rates are those of Fu et al. 2023
    (arXiv 2310.12109).
  """
  tokens, segment_ids = batch["inputs"], batch.get("segment_ids")
  if dropout_key is None:
    rate = evaluation_rate
    key = jax.random.fold_in(jax.random.key(0), jnp.sum(tokens).astype(jnp.uint32))
  else:
    key, dropout_key = jax.random.split(dropout_key)
  live = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0
  places, weights, shown = choose(key, tokens, live, rate, mask_id, model.vocab_size)
  features = model.encoder(
    shown,
    segment_ids=segment_ids,
    positions=batch.get("positions"),
    dropout_key=dropout_key,
  )
  hidden = jnp.take_along_axis(features, places[..., None], axis=1)
  targets = jnp.take_along_axis(tokens, places, axis=1)
  total = cross_entropy(model.predictions(hidden), model.output_table, targets, weights)
  return total, weights.sum()


def choose(key, tokens, live, rate: float, mask_id: int, vocab_size: int):
  """Which tokens are asked for, and what is shown of a row.

  Args:
    tokens: [B, T] int32.   live: [B, T] bool, False at padding.
  Returns:
    places [B, K] int32 and weights [B, K] float32, 0 where a row has fewer than K to choose;
    shown [B, T] int32.
  """
  order_key, kind_key, any_key = jax.random.split(key, 3)
  most = math.ceil(rate * tokens.shape[1])
  score = jnp.where(live, jax.random.uniform(order_key, tokens.shape), -1)
  _, places = jax.lax.top_k(score, most)
  wanted = jnp.ceil(rate * jnp.sum(live, axis=1, keepdims=True))
  weights = (jnp.arange(most) < wanted).astype(jnp.float32)
  kind = jax.random.uniform(kind_key, places.shape)
  other = jax.random.randint(any_key, places.shape, 0, vocab_size, tokens.dtype)
  kept = jnp.take_along_axis(tokens, places, axis=1)
  seen = jnp.where(kind < SHOWN_AS_MASK, mask_id, kept)
  seen = jnp.where((kind >= SHOWN_AS_MASK) & (kind < SHOWN_AS_MASK + SHOWN_AS_ANY), other, seen)
  seen = jnp.where(weights > 0, seen, kept)
  rows = jnp.arange(len(tokens))[:, None]
  return places, weights, jnp.asarray(tokens).at[rows, places].set(seen)
