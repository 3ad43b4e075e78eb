"""Frozen parameters under the trainer: no optimizer moves them, none keeps moments of them."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from jaxmix.mixers import Attention, Grassmann
from jaxmix.models import Encoder, PairHead, SentencePairClassifier
from jaxmix.objectives import classification_loss
from jaxmix.sharding import make_mesh, put_batch
from jaxmix.training import TrainStep, adamw, muon, with_subspaces

VOCABULARY = 41  # no other array has an axis of this length
MODEL = functools.partial(
  SentencePairClassifier, VOCABULARY, 3,
  encoder=functools.partial(
    Encoder, dim=8, depth=1, mlp_dim=16, dropout_rate=0.1,
    mixers={"attention": functools.partial(Attention, heads=2, visibility="full")},
  ),
  head=functools.partial(
    PairHead, dim=16, depth=1, mlp_dim=16, window=2, length=6,
    mixers={"grassmann": functools.partial(Grassmann, rank=8, heads=2, offsets=(1, -1, 3, -3))},
  ),
)  # fmt: skip
RATES = {"learning_rate": 0.01, "weight_decay": 0.5}
OPTIMIZERS = {
  "adamw": functools.partial(adamw, **RATES),
  "muon": functools.partial(muon, **RATES),
  "with_subspaces": functools.partial(
    with_subspaces, optimizer=functools.partial(adamw, **RATES), learning_rate=0.1
  ),
}


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
  random = np.random.default_rng(0)
  premise, hypothesis = random.integers(0, VOCABULARY, (2, 8, 6)).astype(np.int32)
  label = random.integers(0, 3, 8).astype(np.int32)
  weights = np.ones(8, np.float32)
  return {"premise": premise, "hypothesis": hypothesis, "label": label, "weights": weights}


def steps(model, optimizer, batch, *, count=3, mesh=None):
  """The train states before and after, and the last step's figures."""
  mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
  program = TrainStep(model, optimizer, mesh=mesh, objective=classification_loss)
  with jax.set_mesh(mesh):
    state = program.init(0)
    before = jax.device_get(state)
    for _ in range(count):
      state, results = program.update(state, put_batch(batch, mesh))
    return before, jax.device_get(state), jax.device_get(results)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_stays(name, batch):
  model = functools.partial(MODEL, encoder_training="frozen")
  before, after, _ = steps(model, OPTIMIZERS[name], batch)
  jax.tree.map(
    np.testing.assert_array_equal, after["params"]["encoder"], before["params"]["encoder"]
  )
  pairs = zip(*(jax.tree.leaves(state["params"]["head"]) for state in (before, after)), strict=True)
  assert all(np.any(x != y) for x, y in pairs)
  assert not any(VOCABULARY in np.shape(leaf) for leaf in jax.tree.leaves(after["opt_state"]))


def test_trained_moves(batch):
  before, after, _ = steps(MODEL, OPTIMIZERS["adamw"], batch)
  pairs = zip(*(jax.tree.leaves(state["params"]) for state in (before, after)), strict=True)
  assert all(np.any(x != y) for x, y in pairs)
  assert any(VOCABULARY in np.shape(leaf) for leaf in jax.tree.leaves(after["opt_state"]))


@pytest.mark.parametrize("encoder_training", ["trained", "frozen"])
def test_a_mesh_changes_nothing(encoder_training, batch):
  if jax.device_count() != 8:
    pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
  model = functools.partial(MODEL, encoder_training=encoder_training)
  optimizer = OPTIMIZERS["adamw"]
  one, many = (
    steps(model, optimizer, batch, count=1, mesh=mesh)[1:]
    for mesh in (None, make_mesh(data=2, fsdp=2, tensor=2))
  )
  np.testing.assert_allclose(one[1]["loss"], many[1]["loss"], rtol=1e-5)  # float32
  np.testing.assert_allclose(one[1]["gradient_norm"], many[1]["gradient_norm"], rtol=1e-4)
