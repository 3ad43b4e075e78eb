"""A whole split of a data set, each row by itself or as long streams with carried state."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxmix.data import LabelledDataset, TextDataset
from jaxmix.evaluation.evaluator import Evaluator
from jaxmix.models.capacity import check_stream_length
from jaxmix.objectives import causal_loss
from jaxmix.sharding import batch_share


def evaluate_split(
  graph: nnx.GraphDef,
  params: dict,
  data: TextDataset | LabelledDataset,
  split: str,
  *,
  batch_size: int,
  mesh: Mesh,
  objective: Callable = causal_loss,
) -> dict[str, float]:
  """Figures of a model over a split, in the rows that it was trained on.

  Args:
    graph, params: the model's, as in `jaxmix.training.run.Run`.
    data: the data set.   split: one of its splits.
    batch_size: rows at a time; the figures do not depend on it but for rounding.
    mesh: where it runs.
    objective: see `jaxmix.objectives`.
  Returns:
    See `Evaluator.run`.
  Raises:
    ValueError: there is no such split, or it does not fit the data's settings.
  """
  with jax.set_mesh(mesh):
    return Evaluator(graph, mesh=mesh, objective=objective).run(
      params,
      data.epoch(split, batch_size=batch_size, shard=batch_share(batch_size, mesh)),
      rows=batch_size,
      bytes_per_target=data.bytes_per_target(split),
    )


def evaluate_streams(
  graph: nnx.GraphDef,
  params: dict,
  data: TextDataset,
  split: str,
  *,
  batch_size: int,
  mesh: Mesh,
) -> dict[str, float]:
  """The same with carried state: the split as `batch_size` long streams, none of which forgets.

  Learned positions start again with every row of the data, since there are no more of them; every
  other notion of position goes on. The loss is that of the next token.

  Args:
    batch_size: streams side by side; the fewer, the longer each is.
    The rest: see `evaluate_split`.
  Raises:
    ValueError: the data is no text; an attention without window meets a stream longer than its
      cache; also as `evaluate_split`.
  """
  if not isinstance(data, TextDataset):
    raise ValueError(
      f"a carried state through a {type(data).__name__}, whose examples do not go on from one "
      "another — expected a TextDataset — evaluate it without carrying a state"
    )
  model = nnx.merge(graph, params)
  targets = [batch["weights"].sum() for batch in data.streams(split, batch_size=batch_size)]
  check_stream_length(
    model,
    len(targets) * data.length,
    what=f"split {split!r} as {batch_size} streams with carried state",
    instead="use a larger batch_size, which makes the streams shorter",
  )
  with jax.set_mesh(mesh):
    return Evaluator(graph, mesh=mesh).run_streams(
      params,
      data.streams(split, batch_size=batch_size),
      bytes_per_target=data.text_bytes(split) / float(sum(targets)),
      restart_positions=model.position_embedding is not None,
    )
