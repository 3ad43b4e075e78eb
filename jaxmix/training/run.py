"""A finished or running run as its work directory holds it: the model, its parameters and data."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxmix.configuration import Configuration, load
from jaxmix.data import LabelledDataset, Outline, TextDataset
from jaxmix.models import abstract_parameters, parameter_shardings
from jaxmix.sharding import batch_sharding
from jaxmix.training.checkpoints import Checkpoints
from jaxmix.training.loop import train
from jaxmix.training.step import TrainStep

# What the caller of `train` gives beside its run files.
SUPPLIED = ("workdir", "config")


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run has made so far.

  Attributes:
    graph, params: `flax.nnx.merge(graph, params)` is the model; the parameters are averaged ones
      where the run kept an average, float32, and lie on `mesh`.
    data: the data set that it was trained on; text has its tokenizer.
    mesh: where the parameters lie.
    step: of the checkpoint that was read.
    configuration: of `jaxmix.training.train`; `configuration.value("batch_size")` and the like.
  """

  graph: nnx.GraphDef
  params: dict
  data: TextDataset | LabelledDataset
  mesh: Mesh
  step: int
  configuration: Configuration


def load_run(
  workdir: str | os.PathLike[str],
  *,
  step: int | str = "latest",
  gin_params: Sequence[str] = (),
  mesh: Mesh | None = None,
) -> Run:
  """Opens the work directory of `jaxmix.training.train`, also while it is being trained.

      run = load_run("runs/quickstart")
      logits, state = nnx.merge(run.graph, run.params)(tokens)

  Args:
    workdir: the folder, with config.gin and checkpoints/.
    step: "latest", "best" (the lowest validation loss), or the step of a checkpoint.
    gin_params: overrides of its configuration, such as "make_mesh.fsdp = 1"; what changes the shape
      of a parameter does not fit the checkpoint.
    mesh: where the parameters are to lie; None means the mesh of the configuration.
  Raises:
    FileNotFoundError: no run is there, or no such checkpoint.
    ValueError: `step` is unknown, "best" where nothing was validated, or a run without a
      configuration.
    ConfigurationError, CheckpointMismatch, CheckpointError: config.gin, an override or the
      checkpoint is wrong.
  """
  folder = pathlib.Path(workdir).expanduser()
  configuration = _configuration(folder, gin_params)
  checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
  step = _chosen(checkpoints, step)
  data = configuration.value("data")
  mesh = configuration.value("mesh")() if mesh is None else mesh
  model = functools.partial(configuration.value("model"), **data.outline.sizes)
  graph, parameters, axes = abstract_parameters(model)
  wanted = jax.tree.map(
    lambda parameter, sharding: jax.ShapeDtypeStruct(
      parameter.shape, parameter.dtype, sharding=sharding
    ),
    parameters,
    parameter_shardings(parameters, axes, mesh),
  )
  params = checkpoints.restore_parameters(step, wanted)
  checkpoints.close()
  return Run(graph, params, data, mesh, step, configuration)


def abstract_run(
  configuration: Configuration, mesh: Mesh, *, outline: Outline
) -> tuple[TrainStep, dict[str, jax.ShapeDtypeStruct]]:
  """The training step of a run and a batch for it, without any array: to lower, to compile ahead.

  Args:
    configuration: of `jaxmix.training.train`.
    mesh: where it would run; its devices need not exist.
    outline: of its data set, or of one like it.
  Returns:
    The step and the batch, abstract arrays [B, ...] that lie on the mesh.
  """
  value = configuration.value
  step = TrainStep(
    functools.partial(value("model"), **outline.sizes),
    value("optimizer"),
    mesh=mesh,
    objective=value("objective"),
    microbatches=value("microbatches"),
    ema_decay=value("ema_decay"),
  )

  def array(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    shape = (value("batch_size"), *shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(shape, mesh))

  batch = {name: array(*each) for name, each in outline.row.items()}
  return step, batch


def _configuration(folder: pathlib.Path, gin_params: Sequence[str]) -> Configuration:
  config = folder / "config.gin"
  if not config.is_file():
    state = "it has no config.gin" if folder.is_dir() else "there is no such folder"
    raise FileNotFoundError(
      f"no run in {folder}: {state} — expected the work directory of a training run — train first, "
      "or name the folder that was given to the trainer"
    )
  if not config.read_text(encoding="utf-8").strip():
    raise ValueError(
      f"{config} is empty: the run was started by train(...) without config= — expected its "
      "configuration — write it to that file, or restore the parameters with "
      "jaxmix.training.checkpoints.Checkpoints"
    )
  return load([config.resolve()], gin_params, root=train, supplied=SUPPLIED)


def _chosen(checkpoints: Checkpoints, step: int | str) -> int:
  if step == "latest":
    return checkpoints.latest_step()
  if step == "best":
    best = checkpoints.best_step()
    if best is None:
      raise ValueError(
        f'step="best": no checkpoint in {checkpoints.directory} has a validation loss — expected '
        'one saved at an evaluation — use step="latest" or one of '
        f"{', '.join(map(str, checkpoints.steps()))}"
      )
    return best
  if isinstance(step, str):
    raise ValueError(f'step={step!r} is unknown — expected "latest", "best" or a number of steps')
  return step
