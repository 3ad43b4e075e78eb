"""The training step: a pure function of the train state and a batch.

The train state is a plain dict: "params" (float32), "opt_state", "step" (int32), "rng" (key data,
uint32) and, with an exponential moving average, "ema".
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmix.models import abstract_parameters, init_parameters, parameter_shardings
from jaxmix.objectives import causal_loss
from jaxmix.training.optimizers import without_frozen

_paths = jax.tree_util.tree_leaves_with_path


class TrainStep:
  """What one run compiles: how its state begins, where it lies, and how a batch changes it.

  Args:
    model: factory `(*, rngs) -> nnx.Module`.
    optimizer: factory `(axes) -> optax.GradientTransformation`.
    objective: see `jaxmix.objectives`.
    microbatches: parts that a batch is worked through in, one after the other; the result does not
      depend on it but for rounding.
    ema_decay: of an average of the parameters over the steps; None means none.
    mesh: where it runs.
  """

  def __init__(
    self,
    model: Callable[..., nnx.Module],
    optimizer: Callable[[dict], optax.GradientTransformation],
    *,
    mesh: Mesh,
    objective: Callable = causal_loss,
    microbatches: int = 1,
    ema_decay: float | None = None,
  ):
    if microbatches < 1:
      raise ValueError(f"microbatches={microbatches}, expected at least 1")
    if ema_decay is not None and not 0 < ema_decay < 1:
      raise ValueError(f"ema_decay={ema_decay}, expected between 0 and 1, or None for no average")
    self.model, self.objective, self.microbatches, self.ema_decay = (
      model,
      objective,
      microbatches,
      ema_decay,
    )
    self.graph, self.parameters, self.axes = abstract_parameters(model)
    self.transformation = without_frozen(optimizer, self.axes)
    self.mesh = mesh
    self.shardings = self._state_shardings()
    self.update = jax.jit(self._update, donate_argnums=0, out_shardings=(self.shardings, None))

  def init(self, seed: int, initial: Callable[[dict], dict] | None = None) -> dict:
    """The train state before the first step, made on the devices where it is to lie.

    Args:
      seed: of parameters and dropout.
      initial: fresh parameters -> those to begin with; None means the same.
    """
    state = jax.jit(self._init, out_shardings=self.shardings)(jax.random.key(seed))
    if initial is None:
      return state
    params = initial(state["params"])
    state = {**state, "params": params}
    # An average is an array of its own: both are given away at every step.
    return state if self.ema_decay is None else {**state, "ema": jax.tree.map(jnp.copy, params)}

  def abstract_state(self) -> dict:
    """The train state as jax.ShapeDtypeStruct with shardings: what a checkpoint must hold, what
    compiles ahead."""
    shapes = jax.eval_shape(lambda: self._init(jax.random.key(0)))
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings
    )

  def _init(self, key: jax.Array) -> dict:
    init_key, step_key = jax.random.split(key)
    params = init_parameters(self.model, init_key)
    state = {
      "params": params,
      "opt_state": self.transformation.init(params),
      "step": jnp.zeros((), jnp.int32),
      "rng": jax.random.key_data(step_key),
    }
    return state if self.ema_decay is None else {**state, "ema": params}

  def _state_shardings(self) -> dict:
    whole = NamedSharding(self.mesh, PartitionSpec())
    params = parameter_shardings(self.parameters, self.axes, self.mesh)
    # Moments are copies of the parameter tree somewhere inside the optimizer's state: a leaf whose
    # path ends like that of a parameter of its shape lies where the parameter lies.
    places = {
      path: (leaf.shape, place)
      for (path, leaf), place in zip(_paths(self.parameters), jax.tree.leaves(params), strict=True)
    }

    def place(path, leaf):
      for start in range(len(path)):
        shape, sharding = places.get(path[start:], (None, whole))
        if shape == leaf.shape:
          return sharding
      return whole

    opt_state = jax.tree_util.tree_map_with_path(
      place, jax.eval_shape(self.transformation.init, self.parameters)
    )
    shardings = {"params": params, "opt_state": opt_state, "step": whole, "rng": whole}
    return shardings if self.ema_decay is None else {**shardings, "ema": params}

  def _update(self, state: dict, batch: dict) -> tuple[dict, dict]:
    """One step: (state, batch of arrays [B, ...]) -> (state, metrics); call it as `update`, under
    `jax.set_mesh`."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state["rng"]), state["step"])

    def loss(params, part, key):
      total, *sums = self.objective(nnx.merge(self.graph, params), part, key)
      return total, sums

    (total, (weight, *further)), grads = self._accumulate(
      jax.value_and_grad(loss, has_aux=True), state["params"], batch, key
    )
    scale = 1 / jnp.maximum(weight, 1)  # a batch without any target changes nothing
    grads = jax.tree.map(lambda g: g * scale, grads)
    updates, opt_state = self.transformation.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    after = {**state, "params": params, "opt_state": opt_state, "step": state["step"] + 1}
    if self.ema_decay is not None:
      after["ema"] = optax.incremental_update(params, state["ema"], 1 - self.ema_decay)
    means = {name: value * scale for each in further for name, value in each.items()}
    return after, {"loss": total * scale, **means, "gradient_norm": optax.tree.norm(grads)}

  def _accumulate(self, value_and_grad, params, batch, key):
    """Sums loss, weight, further sums and gradient over the microbatches."""
    if self.microbatches == 1:
      return value_and_grad(params, batch, key)
    rows = next(iter(batch.values())).shape[0]
    if rows % self.microbatches:
      raise ValueError(
        f"batch of {rows} rows does not split into microbatches={self.microbatches}; make one a "
        "multiple of the other"
      )

    def split(
      x,
    ):  # every part takes every n-th row, so that each device keeps working on rows that it holds
      return jnp.moveaxis(x.reshape(-1, self.microbatches, *x.shape[1:]), 1, 0)

    def add(sums, part):
      part, index = part
      return jax.tree.map(
        jnp.add, sums, value_and_grad(params, part, jax.random.fold_in(key, index))
      ), None

    parts = (jax.tree.map(split, batch), jnp.arange(self.microbatches))
    first = jax.tree.map(lambda x: x[0], parts[0])
    shapes = jax.eval_shape(value_and_grad, params, first, key)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zero, parts)[0]
