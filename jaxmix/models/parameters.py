"""The parameters of a model as a plain nested dict of arrays, and what their axes mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxmix import sharding

BATCHES = ("layers", "blocks")  # axes, all in front, that count matrices and are none of theirs


@dataclasses.dataclass(frozen=True)
class Axes:
  """The logical axes of one parameter.

  Attributes:
    names: one name an array axis, such as ("layers", "embed", "heads", "head").
    inputs: how many axes a linear map contracts, counted after `BATCHES`; 0 for its bias, and None
      where the parameter belongs to no linear map.
    manifold: where its values have to stay: "grassmann" for bases of subspaces, orthonormal rows in
      the last two axes; None where they are free.
    frozen: it stays as it is: the trainer gives it to no optimizer.
  """

  names: tuple[str, ...]
  inputs: int | None
  manifold: str | None = None
  frozen: bool = False

  @property
  def is_matrix(self) -> bool:
    """Whether it is the matrix of a linear map, or a table; norms, biases and points of a manifold
    are neither."""
    several = sum(name not in BATCHES for name in self.names) > 1
    return several and self.inputs != 0 and self.manifold is None


def abstract_parameters(model: Callable[..., nnx.Module]) -> tuple[nnx.GraphDef, dict, dict]:
  """Builds a model without any array.

  Args:
    model: factory `(*, rngs) -> nnx.Module`.
  Returns:
    graph: what `nnx.merge(graph, parameters)` makes the model from;
    parameters: nested dict of jax.ShapeDtypeStruct;
    axes: the same dict with `Axes` as its leaves.
  """
  graph, state = nnx.split(jax.eval_shape(lambda: model(rngs=nnx.Rngs(params=0))))
  return graph, nnx.to_pure_dict(state), _axes_of(state)


def _axes_of(state: nnx.State) -> dict:
  def declared(parameter: nnx.Variable) -> Axes:
    said = parameter.get_metadata()
    return Axes(
      tuple(said["axes"]), said.get("inputs"), said.get("manifold"), said.get("frozen", False)
    )

  axes = jax.tree.map(declared, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
  return nnx.to_pure_dict(axes)


def freeze(module: nnx.Module) -> None:
  """Declares all parameters of a module frozen, see `Axes`; called where the module is made, as
  part of a model that lets no gradient through to it."""
  for parameter in jax.tree.leaves(module, is_leaf=lambda x: isinstance(x, nnx.Variable)):
    parameter.set_metadata(frozen=True)


def cast_matrices(graph: nnx.GraphDef, parameters: dict, dtype) -> dict:
  """Parameters with the matrices in another dtype, such as that of the model, to which it casts
  them at every call; norms, gates and taps keep theirs. Arrays or jax.ShapeDtypeStruct."""
  axes = _axes_of(nnx.state(nnx.merge(graph, parameters)))

  def cast(x, axis):
    if not axis.is_matrix:
      return x
    return x.update(dtype=dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(dtype)

  return jax.tree.map(cast, parameters, axes)


def init_parameters(model: Callable[..., nnx.Module], key: jax.Array) -> dict:
  """The initial parameters of a model, a nested dict of arrays; trace it under jit to make them
  where they are to lie."""
  return nnx.to_pure_dict(nnx.state(model(rngs=nnx.Rngs(params=key))))


def parameter_shardings(parameters: dict, axes: dict, mesh: Mesh) -> dict:
  """The sharding of each parameter on a mesh, by the tables of jaxmix.sharding."""
  return jax.tree.map(
    lambda parameter, axis: sharding.named_sharding(axis.names, parameter.shape, mesh),
    parameters,
    axes,
  )
