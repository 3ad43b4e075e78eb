"""The encoder: packing and padding under any pattern, what a token sees, dropout, counts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmix.mixers import Attention, Grassmann, LinearAttention
from jaxmix.models import Encoder, abstract_parameters

VOCABULARY, DIM, MLP, LENGTH = 30, 16, 24, 20
MIXERS = {
  "attention": functools.partial(Attention, heads=2, visibility="full"),
  "grassmann": functools.partial(Grassmann, rank=6, offsets=(1, -1, 3, -3)),
  "linear_attention": functools.partial(LinearAttention, heads=2),
}
PATTERNS = {
  "attention": ("attention",),
  "grassmann": ("grassmann",),
  "hybrid": ("grassmann", "attention"),
  "causal": ("linear_attention",),
}


@functools.cache
def encoder(pattern: str = "hybrid", **options) -> Encoder:
  """An encoder of two layers, its biases and scales random too."""
  abstract = jax.eval_shape(
    lambda: Encoder(
      VOCABULARY, DIM, 2, pattern=PATTERNS[pattern], mixers=MIXERS, mlp_dim=MLP,
      learned_positions=LENGTH, rngs=nnx.Rngs(params=0), **options,
    )
  )  # fmt: skip
  random = np.random.default_rng(0)
  leaves, tree = jax.tree.flatten(abstract)
  return jax.tree.unflatten(
    tree, [np.float32(random.normal(size=leaf.shape) * DIM**-0.5) for leaf in leaves]
  )


@pytest.fixture(params=PATTERNS)
def model(request) -> Encoder:
  return encoder(request.param)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
  return np.random.default_rng(1).integers(1, VOCABULARY, (2, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def tolerance(rounding) -> float:
  # Two layers, each with sums over the width (twice), the MLP and the length.
  return rounding(np.float32, 2 * (2 * DIM + MLP + LENGTH))


@jax.jit
def call(model, tokens, ids=None):
  return model(tokens, segment_ids=ids)


def test_packing_and_padding(model, tokens, close, tolerance):
  """Documents packed into rows with padding have the features that they have apart."""
  ids = np.array([[1] * 8 + [2] * 12, [0] * 3 + [5] * 12 + [0] * 5], np.int32)
  features = np.asarray(call(model, tokens, ids))
  assert features.shape == (2, LENGTH, DIM)
  for row, start, end in ((0, 0, 8), (0, 8, 20), (1, 3, 15)):
    apart = call(model, tokens[row : row + 1, start:end])
    close(features[row, start:end], apart[0], tolerance=tolerance)
  np.testing.assert_array_equal(features[ids == 0], 0)
  other = np.where(ids == 0, 1, tokens)
  np.testing.assert_array_equal(call(model, other, ids), features)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_a_token_sees(pattern, tokens):
  """Later tokens too, unless the mixer looks back only."""
  changed = tokens.copy()
  changed[:, -1] = changed[:, -1] % (VOCABULARY - 1) + 1
  before, after = (np.asarray(call(encoder(pattern), x)) for x in (tokens, changed))
  seen = {LENGTH - 1 - int(t) for t in np.flatnonzero(np.any(before != after, axis=(0, 2)))}
  two_layers = {0, 1, 2, 3, 4, 6}  # sums of two out of 0, ±1, ±3
  everything = set(range(LENGTH))
  assert seen == {"grassmann": two_layers, "causal": {0}}.get(pattern, everything)


def test_defaults():
  """Attention sees all of the row; the MLP is dense, four times as wide."""
  model = jax.eval_shape(lambda: Encoder(VOCABULARY, DIM, 1, rngs=nnx.Rngs(params=0)))
  block = model.layers["0_attention"]
  assert block.mixer.visibility == "full"
  assert block.mlp.up.kernel.shape == (1, DIM, 4 * DIM)
  assert model.position_embedding is None


def test_dropout(tokens):
  """Off without a key, the same for a key, another for another."""
  model = encoder(dropout_rate=0.5)
  features = jax.jit(lambda model, key: model(tokens, dropout_key=key))
  without, one, two = (
    np.asarray(features(model, key)) for key in (None, jax.random.key(0), jax.random.key(1))
  )
  np.testing.assert_array_equal(without, features(encoder(), None))
  np.testing.assert_array_equal(one, features(model, jax.random.key(0)))
  assert np.any(one != without) and np.any(one != two)


def test_dtype(tokens):
  model = encoder(dtype="bfloat16")
  assert jax.eval_shape(call, model, tokens).dtype == jnp.bfloat16


def test_parameter_count_and_flops():
  mixers = {"attention": functools.partial(Attention, heads=2, visibility="full")}
  options = {"pattern": ("attention",), "mixers": mixers, "mlp_dim": MLP}
  make = functools.partial(Encoder, VOCABULARY, DIM, 2, learned_positions=LENGTH, **options)
  _, parameters, _ = abstract_parameters(make)
  block = 4 * DIM * DIM + 2 * DIM * MLP + MLP + DIM + 2 * (2 * DIM)
  by_hand = (VOCABULARY + LENGTH) * DIM + 2 * block + 2 * DIM
  assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) == by_hand
  model = jax.eval_shape(lambda: make(rngs=nnx.Rngs(params=0)))
  per_token = 2 * (4 * DIM * DIM + 2 * DIM * MLP)
  assert model.flops(3, 10) == 2 * 3 * (10 * per_token + 4 * 10 * 10 * DIM)


def test_rows_beyond_the_positions_are_refused(tokens):
  rows = np.zeros((1, LENGTH + 1), np.int32)
  with pytest.raises(ValueError) as error:
    jax.eval_shape(encoder(), rows)
  assert str(error.value) == (
    "Encoder: rows of 21 tokens, learned_positions=20 — expected rows of at most that many — set "
    "Encoder.learned_positions=21, or give shorter rows"
  )
