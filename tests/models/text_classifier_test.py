"""Classifiers of texts: poolings, padding, what the loss sums up."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmix.mixers import MonarchMixer
from jaxmix.models import Encoder, TextClassifier

LENGTH = 12


def classifier(**options) -> TextClassifier:
  mixer = functools.partial(MonarchMixer, visibility="full", max_length=LENGTH, hidden=4)
  encoder = functools.partial(
    Encoder,
    dim=8,
    depth=1,
    pattern=("monarch",),
    mixers={"monarch": mixer},
    mlp="block_diagonal",
    learned_positions=LENGTH,
    token_types=2,
  )
  return TextClassifier(30, 3, encoder=encoder, rngs=nnx.Rngs(params=0), **options)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_padding_changes_nothing(pooling, close):
  random = np.random.default_rng(0)
  tokens = random.integers(1, 30, (2, LENGTH)).astype(np.int32)
  types = np.array([[0] * 5 + [1] * 7, [0] * 3 + [1] * 4 + [0] * 5], np.int32)
  ids = np.array([[1] * 12, [1] * 7 + [0] * 5], np.int32)
  model = classifier(pooling=pooling)
  padded = model(tokens=tokens, token_types=types, segment_ids=ids)
  alone = model(tokens=tokens[1:, :7], token_types=types[1:, :7])
  assert padded.shape == (2, 3)
  close(padded[1:], alone, tolerance=1e-5)
  other = model(tokens=tokens, token_types=1 - types, segment_ids=ids)
  assert not np.allclose(other, padded)


def test_dropout_needs_a_key():
  tokens = np.ones((2, LENGTH), np.int32)
  model = classifier(dropout_rate=0.5)
  quiet = model(tokens=tokens)
  np.testing.assert_array_equal(quiet, model(tokens=tokens))
  assert not np.allclose(quiet, model(tokens=tokens, dropout_key=jax.random.key(0)))


def test_errors():
  with pytest.raises(ValueError, match="pooling='last' is unknown; expected one of mean, first"):
    classifier(pooling="last")
