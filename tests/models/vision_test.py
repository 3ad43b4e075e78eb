"""The classifier of images: its patches, its heads, counts, and what it refuses."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmix.layers import SubspaceHead
from jaxmix.mixers import Attention, Grassmann
from jaxmix.models import ImageClassifier, abstract_parameters
from jaxmix.objectives import classification_loss

DIM, CLASSES = 8, 3
MIXERS = {
  "attention": functools.partial(Attention, heads=2, visibility="full"),
  "grassmann": functools.partial(Grassmann, rank=4, offsets=(1, -1)),
}
make = functools.partial(
  ImageClassifier, (6, 4), CLASSES, DIM, 2, patch_size=2, mixers=MIXERS, mlp_dim=12
)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
  return np.random.default_rng(0).random((5, 6, 4)).astype(np.float32)


def test_patches_are_cut_row_by_row(images, close, rounding):
  """The stack on patches that are cut by hand, in the order in which text is read."""
  model = make(rngs=nnx.Rngs(params=0))
  patches = [
    images[:, row : row + 2, column : column + 2].reshape(5, 4)
    for row in (0, 2, 4)
    for column in (0, 2)
  ]
  x = model.embed(jnp.stack(patches, 1)) + model.position_embedding.table[...]
  x, _ = model.apply_layers(
    x, None, None, segment_ids=None, positions=jnp.broadcast_to(jnp.arange(6), (5, 6))
  )
  tolerance = rounding(np.float32, 2 * (2 * DIM + 12 + 6))
  close(model.features(images), jnp.mean(x, 1), tolerance=tolerance)
  close(model(image=images), model.head(jnp.mean(x, 1)), tolerance=tolerance)


@pytest.mark.parametrize("pattern", ["attention", "grassmann"])
@pytest.mark.parametrize("head", [None, functools.partial(SubspaceHead, subspace_dim=2)])
def test_gradients_reach_every_parameter(pattern, head, images):
  options = {} if head is None else {"head": head}
  model = make(pattern=(pattern,), rngs=nnx.Rngs(params=0), **options)
  batch = {
    "image": images,
    "label": np.arange(5, dtype=np.int32) % CLASSES,
    "weights": np.ones(5, np.float32),
  }
  gradients = jax.jit(jax.grad(lambda model: classification_loss(model, batch)[0]))(model)
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.any(gradient != 0), jax.tree_util.keystr(path)


def test_channels_dropout_and_dtype():
  """Colours are pixels of a patch; dropout needs a key; logits are float32 in any dtype."""
  model = ImageClassifier(
    (4, 4, 3), CLASSES, DIM, 1, patch_size=4, mixers=MIXERS, dropout_rate=0.5, dtype="bfloat16",
    rngs=nnx.Rngs(params=0),
  )  # fmt: skip
  assert model.embed.kernel.shape == (48, DIM)
  images = np.random.default_rng(0).random((2, 4, 4, 3)).astype(np.float32)
  assert model.features(images).dtype == jnp.bfloat16
  without, dropped = (
    np.asarray(model(image=images, dropout_key=key)) for key in (None, jax.random.key(0))
  )
  assert without.dtype == np.float32 and np.any(without != dropped)


def test_parameter_count_and_flops():
  _, parameters, _ = abstract_parameters(make)
  block = 4 * DIM * DIM + 2 * DIM * 12 + 12 + DIM + 2 * (2 * DIM)
  by_hand = (4 + 1 + 6) * DIM + 2 * block + 2 * DIM + (DIM + 1) * CLASSES
  assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) == by_hand
  model = jax.eval_shape(lambda: make(rngs=nnx.Rngs(params=0)))
  layers = 2 * (6 * 2 * (4 * DIM * DIM + 2 * DIM * 12) + 4 * 6 * 6 * DIM)
  assert model.flops(5, 24) == 5 * (layers + 6 * 2 * 4 * DIM + 2 * DIM * CLASSES)


def test_errors(images):
  with pytest.raises(ValueError) as error:
    ImageClassifier((28, 28), 10, DIM, 1, patch_size=8, rngs=nnx.Rngs(params=0))
  assert str(error.value) == (
    "ImageClassifier: patches of patch_size=8 do not cover images of 28 x 28 — expected a divisor "
    "of both — set patch_size to a divisor of 28, or cut the images"
  )
  with pytest.raises(ValueError) as error:
    make(rngs=nnx.Rngs(params=0))(image=images[:, :4])
  assert str(error.value) == (
    "ImageClassifier: images of shape (4, 4) — expected (6, 4), as at its making — resize them, or "
    "make a model with their image_shape"
  )
