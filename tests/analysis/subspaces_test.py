"""Planes along a text, the angles between them, and their picture."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmix.analysis import plane_bases, principal_angles, reduced_states
from jaxmix.analysis.plots import plot_trajectory
from jaxmix.mixers import Grassmann
from jaxmix.models import Decoder


def frames(seed: int, *shape: int) -> np.ndarray:
  return np.linalg.qr(np.random.default_rng(seed).normal(size=shape))[0]


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-4, 0.3, np.pi / 4, 1.5, np.pi / 2 - 1e-10])
def test_known_angles(angle):
  """A plane turned by an angle in one of its directions, in whatever bases: that angle and 0."""
  e = frames(0, 6, 6)
  one = e[:, :2] @ frames(1, 2, 2)
  other = np.stack([e[:, 0], np.cos(angle) * e[:, 1] + np.sin(angle) * e[:, 4]], 1)
  found = principal_angles(one, other @ frames(2, 2, 2))
  np.testing.assert_allclose(found, [0, angle], rtol=0, atol=1e-14)


def test_angles_are_of_the_planes():
  """They are symmetric, do not change under a common rotation, and come in a batch."""
  one, other, turn = frames(0, 5, 7, 2), frames(1, 5, 7, 2), frames(2, 7, 7)
  angles = principal_angles(one, other)
  assert angles.shape == (5, 2) and (angles[:, 0] <= angles[:, 1]).all()
  np.testing.assert_allclose(principal_angles(other, one), angles, atol=1e-12)
  np.testing.assert_allclose(principal_angles(turn @ one, turn @ other), angles, atol=1e-12)


def test_planes_hold_their_vectors():
  z = np.random.default_rng(0).normal(size=(9, 5))
  bases = plane_bases(z, 2)
  assert bases.shape == (7, 5, 2)
  for vectors in (z[2:], z[:-2]):
    projected = np.einsum("nrk,nsk,ns->nr", bases, bases, vectors)
    np.testing.assert_allclose(projected, vectors, atol=1e-12)
  with pytest.raises(ValueError, match=re.escape("offset=9 in 9 tokens — expected from 1 to 8")):
    plane_bases(z, 9)


def make_model(pattern):
  mixers = {
    "grassmann": lambda dim, *, rngs: Grassmann(dim, rank=8, heads=2, schedule=(1, 3), rngs=rngs),
    "other": lambda dim, *, rngs: Grassmann(dim, rank=4, offsets=(2,), rngs=rngs),
  }
  return Decoder(11, 16, 4, pattern=pattern, mixers=mixers, rngs=nnx.Rngs(params=0))


def test_states_of_a_model():
  """Read off the state they are what the first mixer makes of its input."""
  model = make_model(("grassmann",))
  tokens = np.arange(10) % 11
  found = reduced_states(model, tokens)
  assert {layer: z.shape for layer, z in found.items()} == dict.fromkeys(range(4), (10, 2, 4))
  block = jax.tree.map(lambda x: x[0], model.layers["0_grassmann"])
  x = model.embedding(tokens[None], "float32")
  expected = block.mixer.reduce(block.mixer_norm(x))[0]
  np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-6)


def test_picture(tmp_path):
  z = np.random.default_rng(0).normal(size=(30, 6))
  bases = {0: plane_bases(z, 1), 2: plane_bases(z, 4)}
  target = plot_trajectory(bases, [str(t) for t in range(30)], tmp_path / "x" / "y.png", layer=2)
  assert target.read_bytes().startswith(b"\x89PNG")


def test_no_grassmann_layer():
  model = Decoder(11, 16, 1, pattern=("attention",), rngs=nnx.Rngs(params=0))
  with pytest.raises(ValueError, match="the model's layers are attention — expected a Grassmann"):
    reduced_states(model, np.zeros(4, np.int32))
