"""The loss of a model over a whole split, and what goes with it: perplexity, or accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxmix.objectives import binary_figures, causal_loss, cross_entropy, is_masked
from jaxmix.sharding import put_batch

BINARY = ("positive", "predicted", "true_positive")  # what `binary_figures` is of


class Evaluator:
  """Runs a model over batches and sums up its loss and what else the objective sums up.

  Args:
    graph: the model's graph, from `jaxmix.models.abstract_parameters`.
    mesh: where it runs; call the methods under `jax.set_mesh(mesh)`.
    objective: see `jaxmix.objectives`.
  """

  def __init__(self, graph: nnx.GraphDef, *, mesh: Mesh, objective: Callable = causal_loss):
    self.graph, self.mesh, self.objective = graph, mesh, objective
    self._sums = jax.jit(lambda params, batch: objective(nnx.merge(graph, params), batch))
    # Under jit, so that it lies on the mesh, which may be that of several processes.
    self._initial_state = jax.jit(
      lambda params, rows: nnx.merge(graph, params).init_state(rows), static_argnums=1
    )
    self._streamed_sums = jax.jit(self._stream, donate_argnums=2, static_argnums=3)

  def run(
    self,
    params: dict,
    batches: Iterable[dict],
    *,
    bytes_per_target: float | None,
    rows: int | None = None,
  ) -> dict[str, float]:
    """Figures over all targets of the batches.

    Args:
      params: the model's parameters.
      batches: dicts of arrays, such as the `epoch` of a data set yields.
      bytes_per_target: UTF-8 bytes of text for each target; None where targets are no text.
      rows: of a whole batch, where `batches` are the share of this process; see `put_batch`.
    Returns:
      See `figures`; the means of what else the objective sums up, such as accuracy; targets.
    """
    sums = [self._sums(params, put_batch(batch, self.mesh, rows=rows)) for batch in batches]
    return _mean(sums, bytes_per_target, self.objective)

  def run_streams(
    self, params: dict, batches: Iterable[dict], *, bytes_per_target: float, restart_positions: bool
  ) -> dict[str, float]:
    """The same with carried state: row b of a batch goes on where row b of the batch before ended.

    Args:
      batches: such as `TextDataset.streams` yields.
      restart_positions: count positions from 0 in every batch, for models whose table of positions
        is as long as a row.
    """
    state, sums = None, []
    for batch in batches:
      if state is None:
        state = self._initial_state(params, batch["inputs"].shape[0])
      total, state = self._streamed_sums(
        params, put_batch(batch, self.mesh), state, restart_positions
      )
      sums.append(total)
    return _mean(sums, bytes_per_target)

  def _stream(self, params, batch, state, restart_positions):
    model = nnx.merge(self.graph, params)
    inputs = batch["inputs"]
    positions = jax.lax.broadcasted_iota("int32", inputs.shape, 1) if restart_positions else None
    features, state = model.features(inputs, state=state, positions=positions)
    loss = cross_entropy(features, model.output_table, batch["targets"], batch["weights"])
    return (loss, batch["weights"].sum()), state


def figures(
  loss: float, bytes_per_target: float | None, objective: Callable = causal_loss
) -> dict[str, float]:
  """The ways to state the loss of a language model; that of another has one.

  Args:
    loss: nats per target.   bytes_per_target: UTF-8 bytes of text for each target; None where
      targets are no text.   objective: what the loss is of.
  Returns:
    loss; for text also perplexity = exp(loss), and where all of it is asked for, bits_per_byte =
    loss / ln 2 / bytes_per_target.
  """
  if bytes_per_target is None:
    return {"loss": loss}
  bits = {} if is_masked(objective) else {"bits_per_byte": loss / math.log(2) / bytes_per_target}
  return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, **bits}


def _mean(
  sums: list[tuple], bytes_per_target: float | None, objective: Callable = causal_loss
) -> dict[str, float]:
  def total(*parts):
    return float(np.sum(parts, dtype=np.float64))

  loss, weight, *further = jax.tree.map(total, *jax.device_get(sums))
  means = {name: value / weight for each in further for name, value in each.items()}
  binary = {name: means.pop(name) for name in BINARY if name in means}
  further = binary_figures(**binary) if binary else {}
  text = figures(loss / weight, bytes_per_target, objective)
  return {**text, **means, **further, "targets": int(weight)}
