"""Heads of classes: the golden vectors of subspaces, a feature of zero, what does not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmix.layers import LinearHead, SubspaceHead

pytestmark = pytest.mark.usefixtures("float64")


def golden_head(case):
  classes, dim = int(case["cfg/num_classes"]), int(case["cfg/in_channels"])
  subspace_dim, scale = int(case["cfg/k"]), float(case["cfg/gamma"])
  head = SubspaceHead(dim, classes, subspace_dim=subspace_dim, scale=scale, rngs=nnx.Rngs(params=0))
  head.basis[...] = jnp.asarray(case["param/fc.weight"], jnp.float64).reshape(
    classes, subspace_dim, dim
  )
  return head


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_subspace_head_equals_the_golden_vectors(golden, close, name):
  with np.load(golden / "gcr" / f"head_{name}.npz") as case:
    case = dict(case)
  head = golden_head(case)
  x, cotangent = (jnp.asarray(case[key], jnp.float64) for key in ("x", "cot"))

  def cross_entropy(head, x):
    log_p = jax.nn.log_softmax(head(x))
    return -jnp.mean(jnp.take_along_axis(log_p, case["labels"][:, None], axis=1))

  tolerance = 1e-12  # float64 at both ends
  close(head(x), case["out64"], tolerance=tolerance)
  for loss, value, prefix in (
    (lambda head, x: jnp.sum(head(x) * cotangent), "loss64", "grad64"),
    (cross_entropy, "ce64", "ce_grad64"),
  ):
    found, (of_head, of_x) = jax.value_and_grad(loss, argnums=(0, 1))(head, x)
    close(found, case[value], tolerance=tolerance)
    close(of_x, case[f"{prefix}/x"], tolerance=tolerance)
    weight = case[f"{prefix}/param/fc.weight"].reshape(of_head.basis.shape)
    close(of_head.basis[...], weight, tolerance=tolerance)


def test_a_new_head_has_orthonormal_bases(close):
  basis = SubspaceHead(24, 5, subspace_dim=3, rngs=nnx.Rngs(params=1)).basis[...]
  close(basis @ basis.swapaxes(-1, -2), np.tile(np.eye(3), (5, 1, 1)), tolerance=1e-14)


def test_a_feature_of_zero_has_logits_of_zero_and_no_gradient():
  head = SubspaceHead(6, 4, subspace_dim=2, rngs=nnx.Rngs(params=0))
  x = jnp.zeros((3, 6)).at[1].set(1.0)
  logits = head(x)
  assert not logits[0].any() and logits[1].all()
  of_head, of_x = jax.grad(lambda head, x: jnp.sum(head(x)), argnums=(0, 1))(head, x)
  assert not of_x[0].any() and np.isfinite(of_x).all()
  assert np.isfinite(of_head.basis[...]).all() and of_head.basis[...].any()


@pytest.mark.parametrize("head", [LinearHead, SubspaceHead])
def test_logits_are_float32_for_features_of_any_shape(head):
  with jax.enable_x64(False):
    head = head(16, 3, rngs=nnx.Rngs(params=0))
    logits = head(jnp.ones((2, 5, 16), jnp.bfloat16))
  assert (logits.shape, logits.dtype) == ((2, 5, 3), jnp.float32)
  heads = {"LinearHead": 1, "SubspaceHead": 8}
  assert head.flops_per_feature == 2 * 16 * 3 * heads[type(head).__name__]


def test_logits_stay_below_the_scale_and_reach_it(close):
  head = SubspaceHead(7, 2, subspace_dim=3, scale=11.0, rngs=nnx.Rngs(params=0))
  inside = jnp.asarray([0.5, -2.0, 1.0]) @ head.basis[1]
  logits = head(inside)
  close(logits[1], 11.0, tolerance=1e-14)
  assert logits[0] < 11


def test_a_subspace_larger_than_the_space_is_refused():
  with pytest.raises(
    ValueError,
    match="SubspaceHead: subspace_dim=8 in features of dim=4 — expected from 1 to 4 — set "
    "subspace_dim=4",
  ):
    SubspaceHead(4, 3, rngs=nnx.Rngs(params=0))
