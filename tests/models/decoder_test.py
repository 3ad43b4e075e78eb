"""The decoder: its stack by hand, its variants under the laws of a stream, dropout, precision,
counts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmix.mixers import Attention, LinearAttention
from jaxmix.models import REMAT_POLICIES, Decoder, abstract_parameters
from jaxmix.objectives import causal_loss

VOCABULARY, DIM, BATCH, LENGTH = 50, 16, 2, 24
MIXERS = {
  "linear_attention": functools.partial(LinearAttention, heads=2),
  "local": functools.partial(Attention, heads=2, window=5),
  "attention": functools.partial(Attention, heads=2, position_encoding="none", max_length=LENGTH),
}
VARIANTS = {
  "hybrid": {"pattern": ("linear_attention", "local")},
  "post_norm": {
    "pattern": ("attention",),
    "placement": "post_norm",
    "norm": "layer",
    "mlp": "dense",
    "bias": True,
    "tied_embeddings": False,
    "learned_positions": LENGTH,
  },
}


@functools.cache
def decoder(variant: str = "hybrid", **options) -> Decoder:
  """A decoder of four layers, its biases and scales random too."""
  options = {"mlp_dim": 24, "mixers": MIXERS, **VARIANTS[variant], **options}
  abstract = jax.eval_shape(lambda: Decoder(VOCABULARY, DIM, 4, rngs=nnx.Rngs(params=0), **options))
  random = np.random.default_rng(0)
  leaves, tree = jax.tree.flatten(abstract)
  return jax.tree.unflatten(
    tree, [np.float32(random.normal(size=leaf.shape) * DIM**-0.5) for leaf in leaves]
  )


@pytest.fixture(params=VARIANTS)
def model(request) -> Decoder:
  return decoder(request.param)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
  return np.random.default_rng(1).integers(0, VOCABULARY, (BATCH, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def tolerance(rounding) -> float:
  # Four layers, each with sums over the width (twice), the MLP and the length; the logits' sum.
  return rounding(np.float32, 4 * (2 * DIM + 24 + LENGTH) + DIM)


@jax.jit
def call(model, tokens, state=None, ids=None):
  return model(tokens, state=state, segment_ids=ids)


def test_scan_is_the_stack_by_hand(model, tokens, close, tolerance):
  """Period after period, block after block, each with its own slice of the stacked parameters."""

  @jax.jit
  def by_hand(model, tokens):
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    x = model.embedding(tokens, jnp.float32)
    if model.position_embedding is not None:
      x = x + model.position_embedding(positions, jnp.float32)
    for period in range(model.depth // len(model.pattern)):
      layers = jax.tree.map(lambda leaf, period=period: leaf[period], model.layers)
      for index, name in enumerate(model.pattern):
        x, _ = layers[f"{index}_{name}"](x, positions=positions)
    x = x if model.final_norm is None else model.final_norm(x)
    return x @ (model.embedding if model.output is None else model.output).table[...].T

  close(call(model, tokens)[0], by_hand(model, tokens), tolerance=tolerance)


def test_depth_adds_nothing_to_the_program():
  """The program of 8 layers is that of 4: the periods are scanned."""

  def size(depth):
    model = jax.eval_shape(
      lambda: Decoder(50, 16, depth, pattern=("linear_attention",), rngs=nnx.Rngs(params=0))
    )
    shape = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    return len(str(jax.make_jaxpr(lambda model, tokens: model(tokens)[0])(model, shape)).split())

  assert size(8) == size(4)


def batch_of(tokens: np.ndarray) -> dict[str, np.ndarray]:
  weights = np.ones((BATCH, LENGTH - 1), np.float32)
  return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


@jax.jit
def loss_and_gradients(model, batch):
  return jax.value_and_grad(lambda model: causal_loss(model, batch)[0])(model)


def test_remat_changes_nothing(tokens, close, rounding):
  """Every policy gives the loss and the gradients of keeping everything."""
  found = {
    policy: jax.tree.leaves(loss_and_gradients(decoder(remat=policy), batch_of(tokens)))
    for policy in REMAT_POLICIES
  }
  assert set(found) == {"none", "dots", "full"}
  for policy in ("dots", "full"):
    close(found[policy], found["none"], tolerance=rounding(np.float32, 16))


def test_stream(model, tokens, close, tolerance):
  """A prefill and then one token a call give the logits of the whole."""
  whole, last = call(model, tokens)
  state, pieces = model.init_state(BATCH), []
  for start, end in ((0, 0), (0, 11), *((t, t + 1) for t in range(11, LENGTH))):
    logits, state = call(model, tokens[:, start:end], state)
    pieces.append(logits)
  close(np.concatenate(pieces, axis=1), whole, tolerance=tolerance)
  np.testing.assert_array_equal(state["position"], last["position"])
  np.testing.assert_array_equal(state["position"], [LENGTH, LENGTH])


def test_packing(model, tokens, close, tolerance):
  """Packed documents, with padding, give the logits of the documents apart."""
  ids = np.array([[1] * 8 + [2] * 16, [0] * 3 + [5] * 16 + [0] * 2 + [6] * 3], np.int32)
  logits = np.asarray(call(model, tokens, None, ids)[0])
  for row, start, end in ((0, 0, 8), (0, 8, 24), (1, 3, 19)):
    apart, _ = call(model, tokens[row : row + 1, start:end])
    close(logits[row, start:end], apart[0], tolerance=tolerance)


def test_state_across_documents(model, tokens, close, tolerance):
  """A row whose call begins with another id starts afresh; with the same id it goes on."""
  ids = np.repeat([[3, 3, 3], [3, 0, 4]], (11, 1, LENGTH - 12), axis=1).astype(np.int32)
  whole, last = call(model, tokens, None, ids)
  _, state = call(model, tokens[:, :12], None, ids[:, :12])
  logits, after = call(model, tokens[:, 12:], state, ids[:, 12:])
  close(logits, np.asarray(whole)[:, 12:], tolerance=tolerance)
  for name, expected in (("position", [LENGTH, LENGTH - 12]), ("segment_id", [3, 4])):
    np.testing.assert_array_equal(after[name], expected)
    np.testing.assert_array_equal(last[name], expected)


def test_no_ids_go_on_with_the_document_of_the_state(model, tokens, close, tolerance):
  """As ids would that repeat the state's own."""
  ids = np.full((BATCH, LENGTH), 3, np.int32)
  _, state = call(model, tokens[:, :12], None, ids[:, :12])
  expected = call(model, tokens[:, 12:], state, ids[:, 12:])
  close(call(model, tokens[:, 12:], state), expected, tolerance=tolerance)


def test_padding_changes_no_state(model, tokens):
  """A call of padding leaves every row in its document, at its position."""
  _, state = call(model, tokens[:, :12], None, np.full((BATCH, 12), 3, np.int32))
  _, after = call(model, tokens[:, 12:], state, np.zeros((BATCH, 12), np.int32))
  jax.tree.map(np.testing.assert_array_equal, after, state)


def test_no_tokens(model):
  """Length 0 gives no logits and the state as it was."""
  logits, state = call(model, np.zeros((BATCH, 0), np.int32), model.init_state(BATCH))
  assert logits.shape == (BATCH, 0, VOCABULARY)
  jax.tree.map(np.testing.assert_array_equal, state, model.init_state(BATCH))


def test_dropout(tokens):
  """Off without a key, the same for a key, another for another; every layer draws its own."""
  model = decoder(dropout_rate=0.5)
  features = jax.jit(lambda model, key: model.features(tokens, dropout_key=key)[0])
  without, one, two = (
    np.asarray(features(model, key)) for key in (None, jax.random.key(0), jax.random.key(1))
  )
  np.testing.assert_array_equal(without, features(decoder(), None))
  np.testing.assert_array_equal(one, features(model, jax.random.key(0)))
  assert np.any(one != without) and np.any(one != two)
  np.testing.assert_array_equal(features(decoder(), jax.random.key(0)), without)  # a rate of 0


def test_bfloat16(tokens, errors, rounding):
  """Activations in bfloat16; parameters, gradients, logits and loss in float32, and near to it."""
  model = decoder(dtype="bfloat16")
  features, logits = (
    jax.eval_shape(lambda model: model.features(tokens)[0], model),
    jax.eval_shape(lambda model: model(tokens)[0], model),
  )
  assert features.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  value, gradients = loss_and_gradients(model, batch_of(tokens))
  assert value.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {np.dtype(np.float32)}
  exact_value, exact = loss_and_gradients(decoder(remat="none"), batch_of(tokens))
  # Each of 4 layers rounds about 10 results to bfloat16 on the way in, and as many on the way back.
  for found, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(exact), strict=True):
    assert errors(found, expected)[0] <= rounding(jnp.bfloat16, 2 * 4 * 10)
  assert abs(value / exact_value - 1) <= rounding(jnp.bfloat16, 4 * 10)


def test_state_has_the_dtype_of_the_activations():
  state = jax.eval_shape(lambda: decoder(dtype="bfloat16").init_state(BATCH))["layers"]
  assert state["0_linear_attention"].dtype == jnp.float32
  assert state["1_local"]["k"].dtype == jnp.bfloat16


@pytest.mark.parametrize("pattern", ["attention", "linear_attention"])
def test_parameter_count(pattern):
  """12,585,472 parameters in the small setting of the WikiText-2 literature, by hand and in
  fact."""
  mixers = {
    "attention": functools.partial(Attention, heads=4, position_encoding="none", bias=True),
    "linear_attention": functools.partial(LinearAttention, heads=4, bias=True),
  }
  _, parameters, _ = abstract_parameters(
    functools.partial(
      Decoder, 30_522, 256, 6, pattern=(pattern,), mixers=mixers, mlp="dense", mlp_dim=1024,
      norm="layer", bias=True, learned_positions=128,
    )
  )  # fmt: skip
  block = 4 * (256 * 256 + 256) + (256 * 1024 + 1024) + (1024 * 256 + 256) + 2 * (2 * 256)
  by_hand = (30_522 + 128) * 256 + 6 * block + 2 * 256
  assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) == by_hand == 12_585_472


def test_flops():
  """Layers and logits, a multiply-add counted as two."""
  model = decoder("hybrid")
  linear = 4 * 2 * DIM * DIM + 4 * 2 * 8 * 8
  pairs = 5 * LENGTH - 10  # a window of 5: the first four tokens see fewer
  per_token = 2 * (linear + 4 * 2 * DIM * DIM + 2 * 3 * 2 * DIM * 24) + 2 * DIM * VOCABULARY
  assert model.flops(BATCH, LENGTH) == BATCH * (LENGTH * per_token + 2 * 4 * pairs * DIM)


def test_default_widths_of_the_mlp():
  """4 D, or 8 D / 3 rounded up to 64 when gated; dense with gelu, gated with silu."""
  make = functools.partial(Decoder, 50, 256, 1, pattern=("linear_attention",))
  dense, gated = (
    jax.eval_shape(lambda mlp=mlp: make(mlp=mlp, rngs=nnx.Rngs(params=0)))
    for mlp in ("dense", "gated")
  )
  dense, gated = (model.layers["0_linear_attention"].mlp for model in (dense, gated))
  assert dense.up.kernel.shape == (1, 256, 1024) and gated.up.kernel.shape == (1, 256, 704)
  assert dense.activation is jax.nn.gelu and gated.activation is jax.nn.silu


@pytest.mark.parametrize(
  ("options", "text"),
  [
    ({"pattern": ("linear_atention",)},
     "Decoder: pattern names 'linear_atention', which is unknown; expected one of attention, "
     "deltanet, gated_deltanet, gla, grassmann, hgrn2, hla, kda, lightning, linear_attention, "
     "mamba2, monarch, retnet, simple_gla"),
    ({"mlp": "wide"},
     "Decoder: mlp names 'wide', which is unknown; expected one of dense, gated, block_diagonal, "
     "gated_block_diagonal, none"),
    ({"norm": "batch"},
     "Decoder: norm names 'batch', which is unknown; expected one of rms, layer"),
    ({"remat": "some"},
     "Decoder: remat names 'some', which is unknown; expected one of none, dots, full"),
    ({"dtype": "float16"},
     "Decoder: dtype names 'float16', which is unknown; expected one of float32, bfloat16"),
    ({"pattern": ("attention",) * 3},
     "Decoder: depth=4 does not hold the pattern of 3 mixers a whole number of times; change "
     "one of them"),
    ({"pattern": ()},
     "Decoder: depth=4 does not hold the pattern of 0 mixers a whole number of times; change "
     "one of them"),
    ({"dropout_rate": 1.0}, "Decoder: dropout_rate=1.0, expected at least 0 and below 1"),
    ({"placement": "sandwich"},
     "placement='sandwich' is unknown; expected one of pre_norm, post_norm, gated_post_norm, "
     "mlp_post_norm"),
    ({"activation": "tanh"},
     "activation='tanh' is unknown; expected one of gelu, exact_gelu, relu, silu"),
  ],
)  # fmt: skip
def test_errors(options, text):
  with pytest.raises(ValueError) as error:
    jax.eval_shape(lambda: Decoder(50, 16, 4, rngs=nnx.Rngs(params=0), **options))
  assert str(error.value) == text
