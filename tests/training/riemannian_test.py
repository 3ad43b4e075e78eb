"""Riemannian SGD: the golden runs, staying on the manifold, and company with other optimizers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxmix.layers import Linear, SubspaceHead
from jaxmix.models import abstract_parameters
from jaxmix.sharding import make_mesh
from jaxmix.training import TrainStep, adamw, muon, riemannian_sgd, with_subspaces

RETRACTIONS = ("geodesic", "qr", "polar")


@pytest.fixture
def wide():
  """float64 in one test."""
  with jax.enable_x64(True):
    yield


class Classifier(nnx.Module):
  """A linear map and a head of subspaces."""

  def __init__(self, inputs=6, dim=16, classes=4, *, subspace_dim=3, scale=25.0, rngs):
    self.backbone = Linear({"embed": inputs}, {"mlp": dim}, bias=True, rngs=rngs)
    self.head = SubspaceHead(dim, classes, subspace_dim=subspace_dim, scale=scale, rngs=rngs)

  def __call__(self, x):
    return self.head(self.backbone(x))


def mean_loss(model, x, labels):
  log_p = jax.nn.log_softmax(model(x))
  return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=1))


def projectors(bases):
  return np.einsum("...kd,...ke->...de", bases, bases)


def sgd(axes, *, learning_rate, momentum, weight_decay):
  """That of the golden runs, which decays biases too."""
  return optax.chain(
    optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum or None)
  )


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_training_equals_the_golden_run(golden, close, name):
  with np.load(golden / "gcr" / f"rsgd_{name}.npz") as run:
    run = {key: x.astype(np.float64) if x.dtype == np.float32 else x for key, x in run.items()}
  settings = {key[4:]: float(x) for key, x in run.items() if key.startswith("cfg/")}
  dim, inputs = run["backbone_W0"].shape
  factory = functools.partial(
    Classifier,
    inputs,
    dim,
    int(settings["num_classes"]),
    subspace_dim=int(settings["k"]),
    scale=settings["gamma"],
  )
  graph, _, axes = abstract_parameters(factory)
  params = {
    "backbone": {"kernel": run["backbone_W0"].T, "bias": run["backbone_b0"]},
    "head": {"basis": run["W0"]},
  }
  lr, momentum = settings["lr"], settings["momentum"]
  optimizer = with_subspaces(
    axes,
    optimizer=functools.partial(
      sgd, learning_rate=lr, momentum=momentum, weight_decay=settings["weight_decay"]
    ),
    learning_rate=lr * settings["lr_factor"],
    momentum=momentum,
  )
  state = optimizer.init(params)

  @jax.jit
  def step(params, state, x, labels):
    loss, grads = jax.value_and_grad(lambda params: mean_loss(nnx.merge(graph, params), x, labels))(
      params
    )
    updates, state = optimizer.update(grads, state, params)
    return loss, optax.apply_updates(params, updates), state

  tolerance = 1e-11  # float64 at both ends
  for index, (x, labels) in enumerate(zip(run["X"], run["Y"], strict=True)):
    loss, params, state = step(params, state, x, labels)
    basis, expected = params["head"]["basis"], run["W64"][index]
    close(loss, run["loss64"][index], tolerance=tolerance)
    close(projectors(basis), run["proj64"][index], tolerance=tolerance)
    close(params["backbone"]["kernel"].T, run["backbone_W64"][index], tolerance=tolerance)
    # The reference's QR turns the basis within its subspace (mostly signs of rows) and leaves its
    # momentum as it is. From there on its run is another one, which this one follows by turning
    # its basis too.
    turn = np.einsum("ckd,cjd->ckj", expected, basis)
    params["head"]["basis"] = turn @ basis
    close(params["head"]["basis"], expected, tolerance=tolerance)
  close(params["backbone"]["bias"], run["backbone_b64_final"], tolerance=tolerance)


def orthonormal(*shape, seed=0):
  *stack, rows, dim = shape
  frames = np.linalg.qr(np.random.default_rng(seed).normal(size=(*stack, dim, rows)))[0]
  return jnp.asarray(frames.swapaxes(-1, -2), jnp.float32)


def amiss(basis):
  return float(jnp.abs(basis @ basis.swapaxes(-1, -2) - jnp.eye(basis.shape[-2])).max())


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_bases_stay_orthonormal_over_many_large_steps(retraction):
  """Also with axes before those of the bases, such as layers."""
  params = {"basis": orthonormal(2, 3, 4, 32)}
  optimizer = riemannian_sgd(0.3, retraction=retraction)

  def step(carry, key):
    params, state = carry
    grads = {"basis": 5 * jax.random.normal(key, params["basis"].shape)}
    updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  keys = jax.random.split(jax.random.key(0), 2000)
  (params, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))(
    (params, optimizer.init(params))
  )
  assert amiss(params["basis"]) < 1e-5, "a few units in the last place of float32"
  assert state.count == 2000


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_retractions_reach_the_subspace_of_the_geodesic_to_second_order(retraction):
  """Halving the rate halves a step, and divides its distance to the geodesic by 8."""
  basis = jnp.asarray(orthonormal(3, 4, 16), jnp.float64)
  basis = jnp.linalg.qr(basis.swapaxes(-1, -2))[0].swapaxes(-1, -2)
  gradient = jnp.asarray(np.random.default_rng(1).normal(size=basis.shape))

  def subspace(rate, retraction):
    optimizer = riemannian_sgd(rate, retraction=retraction)
    update, _ = optimizer.update(gradient, optimizer.init(basis), basis)
    return projectors(basis + update)

  def distance(rate):
    return np.abs(subspace(rate, retraction) - subspace(rate, "geodesic")).max()

  if retraction == "geodesic":
    assert distance(1e-2) == 0
  else:
    assert distance(1e-2) / distance(5e-3) == pytest.approx(8, rel=0.05)
  moved = [np.abs(subspace(rate, retraction) - projectors(basis)).max() for rate in (1e-3, 5e-4)]
  assert moved[0] / moved[1] == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_no_gradient_means_no_step(retraction, rounding):
  basis = orthonormal(3, 4, 16)
  optimizer = riemannian_sgd(0.1, retraction=retraction)
  update, _ = optimizer.update(jnp.zeros_like(basis), optimizer.init(basis), basis)
  # What is left is the correction of the basis itself: sums of 16 products.
  assert np.abs(update).max() <= rounding(np.float32, 16)


def test_the_rate_may_be_a_schedule():
  basis = orthonormal(3, 4, 16)
  gradient = jnp.ones_like(basis)
  optimizer = riemannian_sgd(lambda step: jnp.where(step == 1, 0.1, 0.0))
  state = optimizer.init(basis)
  first, state = optimizer.update(gradient, state, basis)
  second, _ = optimizer.update(gradient, state, basis)
  assert np.abs(first).max() < 1e-6 < 1e-2 < np.abs(second).max()


def objective(model, batch, dropout_key=None):
  return mean_loss(model, batch["x"], batch["label"]) * len(batch["x"]), 1.0 * len(batch["x"])


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["one", "eight"])
@pytest.mark.parametrize("optimizer", [adamw, muon])
def test_subspaces_train_beside_another_optimizer(optimizer, mesh):
  """The rest moves just as under that optimizer alone, and the momentum lies where the bases do."""
  devices = jax.devices() if mesh else jax.devices()[:1]
  if mesh and len(devices) != 8:
    pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
  others = functools.partial(optimizer, learning_rate=0.01)
  mesh = make_mesh(**mesh, devices=devices)
  program = TrainStep(
    Classifier,
    functools.partial(with_subspaces, optimizer=others, learning_rate=0.1),
    mesh=mesh,
    objective=objective,
  )
  places = [
    sharding
    for path, sharding in jax.tree_util.tree_leaves_with_path(program.shardings["opt_state"])
    if "basis" in jax.tree_util.keystr(path)
  ]
  assert places == [program.shardings["params"]["head"]["basis"]]
  random = np.random.default_rng(0)
  x = random.normal(size=(32, 6)).astype(np.float32)
  batch = {"x": x, "label": (x[:, 0] > 0) * 2 + (x[:, 1] > 0)}
  with jax.set_mesh(mesh):
    state = program.init(0)
    before = jax.device_get(state["params"])
    losses = []
    for _ in range(30):
      state, results = program.update(state, batch)
      losses.append(float(results["loss"]))
      if len(losses) == 1:
        after = jax.device_get(state["params"])
  assert losses[-1] < losses[0] / 4
  assert amiss(jnp.asarray(jax.device_get(state["params"]["head"]["basis"]))) < 1e-5

  # One step of the others by themselves: the clipping of each is by its own gradient.
  grads = jax.grad(
    lambda params: mean_loss(
      nnx.merge(program.graph, params), **{"x": batch["x"], "labels": batch["label"]}
    )
  )(before)
  alone = others({"backbone": program.axes["backbone"]})
  rest = {"backbone": before["backbone"]}
  updates, _ = alone.update({"backbone": grads["backbone"]}, alone.init(rest), rest)
  expected = optax.apply_updates(rest, updates)
  for name, value in expected["backbone"].items():
    np.testing.assert_allclose(after["backbone"][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", [adamw, muon])
def test_an_optimizer_of_free_parameters_refuses_subspaces(optimizer):
  _, _, axes = abstract_parameters(Classifier)
  with pytest.raises(
    ValueError,
    match=rf"{optimizer.__name__}: the parameter \['head'\]\['basis'\] is a point of the manifold "
    r"'grassmann'.* — use with_subspaces",
  ):
    optimizer(axes, learning_rate=0.1)


def test_subspaces_neither_decay_nor_are_matrices():
  _, _, axes = abstract_parameters(Classifier)
  assert axes["head"]["basis"].manifold == "grassmann"
  assert not axes["head"]["basis"].is_matrix
  assert axes["backbone"]["kernel"].manifold is None and axes["backbone"]["kernel"].is_matrix


def test_an_unknown_retraction_is_refused():
  with pytest.raises(ValueError, match="retraction='svd' is unknown — expected one of geodesic"):
    riemannian_sgd(0.1, retraction="svd")
