"""What is known of parameters before there are any: their axes, and what follows from them for
sharding and Muon."""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax
import pytest

from jaxmix.mixers import Attention, LinearAttention
from jaxmix.models import Axes, Decoder, abstract_parameters, init_parameters
from jaxmix.sharding import TABLES
from jaxmix.training import adamw, muon

# A name that is none of a mesh's: an axis that stays whole on every device.
WHOLE = {"layers", "head", "key", "value", "position"}
MODEL = functools.partial(
  Decoder, 50, 16, 4, pattern=("linear_attention", "attention"), mlp_dim=24, norm="layer",
  bias=True, tied_embeddings=False, learned_positions=9,
  mixers={
    "linear_attention": functools.partial(
      LinearAttention, heads=2, key_dim=4, value_dim=6, normalizer="rms", bias=True
    ),
    "attention": functools.partial(Attention, heads=4, key_heads=2, bias=True),
  },
)  # fmt: skip


@pytest.fixture(scope="module")
def abstract():
  return abstract_parameters(MODEL)


def by_path(tree) -> dict:
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, Axes))
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def test_axes_are_complete(abstract):
  """Every parameter names each of its axes by a name that the tables, or nothing, cut."""
  _, parameters, axes = abstract
  parameters, axes = by_path(parameters), by_path(axes)
  assert parameters.keys() == axes.keys()
  known = WHOLE | {name for names in TABLES.values() for name in names}
  for path, parameter in parameters.items():
    assert len(axes[path].names) == parameter.ndim, path
    assert set(axes[path].names) <= known, path
    assert ("layers" in axes[path].names) == path.startswith("['layers']"), path
    assert bool(axes[path].inputs) == path.endswith("['kernel']"), path


def test_matrices(abstract):
  """Kernels and tables are matrices; norms are not, nor are biases, also of heads by channels."""
  axes = by_path(abstract[2])
  assert all(
    axis.is_matrix for path, axis in axes.items() if path.endswith(("['kernel']", "['table']"))
  )
  assert not any(
    axis.is_matrix for path, axis in axes.items() if "norm" in path or path.endswith("['bias']")
  )


def test_matrices_alone_decay(abstract):
  """Without a gradient, weight decay moves kernels and tables, and nothing else."""
  _, parameters, axes = abstract
  for optimizer in (adamw, muon):
    transformation = optimizer(axes, learning_rate=1.0, weight_decay=0.5, clip_norm=None)
    ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), parameters)
    zeros = jax.tree.map(np.zeros_like, ones)
    updates, _ = jax.jit(transformation.update)(zeros, jax.jit(transformation.init)(ones), ones)
    decayed = {path for path, update in by_path(updates).items() if np.any(update)}
    expected = {path for path in by_path(ones) if path.endswith(("['kernel']", "['table']"))}
    assert decayed == expected


def test_initial_parameters_are_the_abstract_ones(abstract):
  """The same tree, shapes and dtypes; another key gives other kernels."""
  parameters = abstract[1]
  made = jax.jit(functools.partial(init_parameters, MODEL))
  one, two = made(jax.random.key(0)), made(jax.random.key(1))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), one) == jax.tree.map(
    lambda x: (x.shape, x.dtype), parameters
  )
  kernel = one["layers"]["1_attention"]["mixer"]["q"]["kernel"]
  assert np.any(kernel != two["layers"]["1_attention"]["mixer"]["q"]["kernel"])
  assert np.any(kernel[0] != kernel[1])  # each layer of a stack draws its own


def test_muon_sees_each_layer_as_its_matrix(abstract, close, rounding):
  """The update of a stacked weight is that of optax's Muon on each layer's matrix alone."""
  _, parameters, axes = abstract
  random = np.random.default_rng(0)
  draw = lambda tree: jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), tree)  # noqa: E731
  weights, gradients = draw(parameters), draw(parameters)
  options = {"learning_rate": 0.1, "weight_decay": 0.0}
  together = muon(axes, clip_norm=None, **options)
  alone = optax.contrib.muon(0.1, adam_b2=0.95, consistent_rms=0.2)

  def step(transformation, weights, gradients):
    return jax.jit(lambda w, g: transformation.update(g, transformation.init(w), w)[0])(
      weights, gradients
    )

  updates, axes = by_path(step(together, weights, gradients)), by_path(axes)
  weights, gradients = by_path(weights), by_path(gradients)
  kernels = [path for path in weights if path.endswith("['kernel']")]
  assert len(kernels) == 2 * (4 + 3)
  for path in kernels:
    rows = int(np.prod(weights[path].shape[1 : 1 + axes[path].inputs]))
    matrices = [
      {str(layer): x[layer].reshape(rows, -1) for layer in range(2)}
      for x in (weights[path], gradients[path])
    ]
    expected = step(alone, *matrices)
    found = {layer: np.asarray(updates[path][int(layer)]).reshape(rows, -1) for layer in expected}
    # Five steps of Newton-Schulz, each with three products of at most 24 channels, and each
    # enlarging what was wrong before up to 3.4445 fold, its first coefficient.
    close(found, expected, tolerance=3.4445**5 * rounding(np.float32, 3 * 24))
    assert np.linalg.matrix_rank(found["0"]) == min(found["0"].shape)


def test_muon_sees_each_block_as_its_matrix(close):
  """Of a block-diagonal map, and of all layers of a stack."""
  random = np.random.default_rng(0)
  weight, gradient = random.normal(size=(2, 2, 3, 4, 5)).astype(np.float32)

  def update(names, weights, gradients):
    axes = {name: Axes(names, inputs=1) for name in weights}
    transformation = muon(axes, learning_rate=0.1, clip_norm=None)
    run = jax.jit(lambda w, g: transformation.update(g, transformation.init(w), w)[0])
    return run(weights, gradients)

  together = update(("layers", "blocks", "embed", "mlp"), {"w": weight}, {"w": gradient})["w"]
  apart = [
    {f"{layer}{block}": x[layer, block] for layer in range(2) for block in range(3)}
    for x in (weight, gradient)
  ]
  expected = update(("embed", "mlp"), *apart)
  close({name: together[int(name[0]), int(name[1])] for name in expected}, expected, tolerance=1e-5)
