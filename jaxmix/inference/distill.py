"""A trained model with the filters of its Monarch mixers as modes, for streams of constant cost."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix.mixers import MonarchMixer
from jaxmix.ops import FilterErrors


def distill_filters(
  graph: nnx.GraphDef, params: dict, *, modes: int
) -> tuple[nnx.GraphDef, dict, dict[int, dict[str, FilterErrors]]]:
  """Fits every long convolution of a decoder by a recurrence of so many modes a channel.

      run = load_run("runs/wikitext2_monarch_small")
      graph, params, errors = distill_filters(run.graph, run.params, modes=16)
      for (token,) in generate(graph, params, [[100, 101]], max_new_tokens=20):
        ...

  A token then costs O(modes D) in each mixer, and a row holds as many numbers, whatever the length;
  the longest stream is as before. Nothing is trained, all else of the model stays as it is.

  Args:
    graph, params: as in `jaxmix.training.run.Run`.
    modes: of each filter, below a quarter of its lags.
  Returns:
    Graph and parameters, and the number of each layer that has filters -> "gated" or "residual"
    -> their errors.
  Raises:
    ValueError: the model has no Monarch mixer whose filters are made by networks, or these have too
      few lags for so many modes.
  Source: see `jaxmix.ops.fit_modes`. On one core 1.4 ms a channel of 128 lags and 12 ms of
    2,048, with 16 modes.
  """
  model = nnx.merge(graph, params)
  errors = {}
  for index, name in enumerate(model.block_names):
    block = model.layers[name]
    if not isinstance(block.mixer, MonarchMixer):
      continue
    layers = [_layer(block.mixer, period).distilled(modes) for period in range(model.periods)]
    for period, (_, of_layer) in enumerate(layers):
      errors[period * len(model.pattern) + index] = of_layer
    block.mixer = jax.tree.map(lambda *x: jnp.stack(x), *(mixer for mixer, _ in layers))
    for parameter in jax.tree.leaves(block.mixer, is_leaf=lambda x: isinstance(x, nnx.Param)):
      axes = parameter.get_metadata()["axes"]
      parameter.set_metadata(axes=axes if axes[0] == "layers" else ("layers", *axes))
  if not errors:
    raise ValueError(
      f"the model's layers are {', '.join(model.pattern)} — expected a Monarch mixer among them — "
      "other mixers need no distillation"
    )
  graph, state = nnx.split(model)
  return graph, nnx.to_pure_dict(state), dict(sorted(errors.items()))


def _layer(mixer: MonarchMixer, period: int) -> MonarchMixer:
  """One of the mixers that are stacked over the periods."""
  return jax.tree.map(lambda x: x[period], mixer)
