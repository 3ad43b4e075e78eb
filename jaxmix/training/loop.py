"""Training, top to bottom: everything a run needs is an argument, everything it makes is in its
work directory."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxmix.data import LabelledDataset, Outline, TextDataset
from jaxmix.evaluation import Evaluator, figures
from jaxmix.models.capacity import check_positions
from jaxmix.objectives import causal_loss
from jaxmix.ops import explain_implementation
from jaxmix.sharding import batch_share, make_mesh, put_batch
from jaxmix.training.checkpoints import Checkpoints
from jaxmix.training.interruption import Interruption
from jaxmix.training.metrics import MetricsWriter, PendingResults, StepTimer, peak_flops
from jaxmix.training.plots import plot_losses
from jaxmix.training.resume import restore_newest
from jaxmix.training.step import TrainStep


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended.

  Attributes:
    step: steps done since the beginning of the run.
    interrupted: the signal that stopped it, such as "SIGTERM"; None where it ran to its end.
    validation: the last figures over the validation split; None where none were taken.
  """

  step: int
  interrupted: str | None
  validation: dict[str, float] | None


def train(
  workdir: str,
  *,
  model: Callable[..., nnx.Module],
  data: TextDataset | LabelledDataset,
  optimizer: Callable[[dict], optax.GradientTransformation],
  steps: int,
  batch_size: int,
  mesh: Callable[[], Mesh] = make_mesh,
  objective: Callable = causal_loss,
  initial: Callable[[dict], dict] | None = None,
  microbatches: int = 1,
  ema_decay: float | None = None,
  seed: int = 0,
  log_every: int = 10,
  evaluate_every: int = 500,
  evaluation_batches: int | None = None,
  checkpoint_every: int = 500,
  keep: int = 3,
  keep_best: int = 1,
  tensorboard: bool = False,
  config: str = "",
) -> Result:
  """Trains a model, or goes on with the run that `workdir` holds.

  Writes to `workdir`: checkpoints/, metrics.jsonl, loss.png, config.gin and, if asked,
  tensorboard/.

  Args:
    workdir: folder of the run, one that all processes share; made if absent. A run that it holds
      is continued from its newest whole checkpoint.
    model: factory `(*, rngs, **sizes) -> nnx.Module`; the sizes are those of `data.outline`, for
      text vocab_size.
    data: gives training batches and the validation split.
    optimizer: factory `(axes) -> optax.GradientTransformation`, such as `jaxmix.training.adamw`
      with its settings.
    steps: optimizer steps of the whole run.
    batch_size: rows of a step, over all devices and hosts.
    mesh: factory of the mesh, such as `jaxmix.sharding.make_mesh` with its sizes.
    objective: see `jaxmix.objectives`.
    initial: fresh parameters -> those to begin with, such as `jaxmix.training.warm_start.from_run`;
      None leaves them as they are. A run that goes on does not ask.
    microbatches: parts that a batch is worked through in, to save memory.
    ema_decay: of an average of the parameters, which then is what is evaluated; None means none.
    seed: of parameters, dropout and the order of the data.
    log_every: steps between lines of metrics; losses are checked for NaN as often.
    evaluate_every: steps between evaluations on the validation split; 0 means only at the end.
    evaluation_batches: batches of the validation split that are used; None means all.
    checkpoint_every: steps between checkpoints; one is also written at each evaluation and at the
      end.
    keep, keep_best: newest checkpoints, and best by validation loss, that are kept.
    tensorboard: also write TensorBoard events.
    config: text of the configuration, kept beside each checkpoint.
  Returns:
    A Result; when SIGTERM or SIGINT came to any of the processes, after saving.
  Raises:
    NonFiniteLoss: a loss was NaN or infinite; nothing was saved since the last good checkpoint.
    CheckpointMismatch, ValueError: the checkpoint or the data are not of this configuration.
  """
  _check_counts(
    steps=steps, batch_size=batch_size, log_every=log_every, checkpoint_every=checkpoint_every
  )

  # ---------------------------------------------------------------- devices
  folder = pathlib.Path(workdir)
  primary = jax.process_index() == 0
  mesh = mesh()
  share = batch_share(batch_size, mesh)

  with jax.set_mesh(mesh), Interruption() as interruption:
    # -------------------------------------------------------------- data
    batches = data.batches("train", batch_size=batch_size, seed=seed, shard=share)
    bytes_per_target = {split: data.bytes_per_target(split) for split in ("train", "validation")}
    outline = data.outline

    # -------------------------------------------------------------- model and optimizer
    program = TrainStep(
      functools.partial(model, **outline.sizes),
      optimizer,
      mesh=mesh,
      objective=objective,
      microbatches=microbatches,
      ema_decay=ema_decay,
    )
    evaluator = Evaluator(program.graph, mesh=mesh, objective=objective)
    skeleton = nnx.merge(program.graph, program.parameters)
    if outline.unit == "tokens":
      _check_parts(outline.length, mesh)
      check_positions(
        skeleton,
        outline.length,
        what=f"train on rows of length={outline.length}",
        instead=f"use a shorter length, or set Decoder.learned_positions = {outline.length}",
      )

    # -------------------------------------------------------------- checkpoint, or a fresh start
    checkpoints = Checkpoints(folder / "checkpoints", keep=keep, keep_best=keep_best)
    newest = restore_newest(checkpoints, program.abstract_state())
    if newest is None:
      start, state = 0, program.init(seed, initial)
    else:
      start, state, position = newest
      batches.set_state(position)
    saved = start
    if primary:
      (folder / "config.gin").write_text(config)

    # -------------------------------------------------------------- metrics
    metrics = MetricsWriter(
      folder, total_steps=steps, start_step=start, tensorboard=tensorboard, primary=primary
    )
    peak = peak_flops(mesh.devices.flat[0])
    timer = StepTimer(
      per_step={outline.unit: batch_size * outline.units_per_row},
      flops_per_step=3 * skeleton.flops(batch_size, outline.length),  # backward is twice forward
      peak_flops=peak and peak * mesh.size,
    )
    pending = PendingResults()
    validation = None
    for line in _introduction(program, outline, data.targets("train"), start):
      metrics.note(line)

    # -------------------------------------------------------------- loop
    try:
      for step in range(start + 1, steps + 1):
        with timer.waiting_for_data():
          batch = next(batches)
        if step == start + 1:
          for line in explain_implementation(objective, skeleton, batch):
            metrics.note(line)
        state, results = program.update(state, put_batch(batch, mesh, rows=batch_size))
        pending.add(step, batch, results)
        timer.step_done(results)

        interrupted = interruption.reached()
        stopping = interrupted or step == steps
        evaluating = step == steps or bool(evaluate_every and step % evaluate_every == 0)
        saving = stopping or evaluating or step % checkpoint_every == 0

        if step % log_every == 0 or step == start + 1 or saving:
          good = str(folder / "checkpoints" / str(saved)) if saved else None
          values = pending.read(checkpoint=good)
          losses = figures(values.pop("loss"), bytes_per_target["train"], objective)
          metrics.write(step, {**losses, **values, **batches.epochs, **timer.read()})

        validation_loss = None
        if evaluating and not interrupted:
          with timer.excluded():
            held_out = data.epoch("validation", batch_size=batch_size, shard=share)
            validation = evaluator.run(
              state.get("ema", state["params"]),
              itertools.islice(held_out, evaluation_batches),
              rows=batch_size,
              bytes_per_target=bytes_per_target["validation"],
            )
            validation_loss = validation["loss"]
            metrics.write(step, validation, split="validation")
            if primary:
              plot_losses(folder)

        if saving:
          checkpoints.save(
            step,
            state,
            data=batches.get_state(),
            config=config,
            validation_loss=validation_loss,
          )
          saved = step
        if stopping:
          break
    finally:
      metrics.close()
      checkpoints.close()

  # ---------------------------------------------------------------- end
  interrupted = interruption.requested if saved < steps else None
  return Result(step=saved, interrupted=interrupted, validation=validation)


def _introduction(
  program: TrainStep, outline: Outline, targets: int | None, start: int
) -> Iterator[str]:
  """What is about to run, for the user."""
  mesh = program.mesh
  shape = ", ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
  count = sum(x.size for x in jax.tree.leaves(program.parameters))
  what = "targets" if outline.unit == "tokens" else outline.unit
  size = "" if targets is None else f"; {targets:,} {what} in the training split"
  yield (
    f"{count:,} parameters on {mesh.size} x {mesh.devices.flat[0].device_kind}"
    f"{f' ({shape})' if shape else ''}{size}"
  )
  if start:
    yield f"going on from the checkpoint of step {start}"


def _check_parts(length: int, mesh: Mesh) -> None:
  parts = mesh.shape.get("sequence", 1)
  if length % parts:
    raise ValueError(
      f"train: rows of length={length} do not cut into {parts} equal parts, so each of the "
      f"{parts} devices of a row would work on all of it — expected a multiple of "
      f"make_mesh.sequence={parts} — set TextDataset.length = {-(-length // parts) * parts}"
    )


def _check_counts(**counts: int) -> None:
  for name, count in counts.items():
    if count < 1:
      raise ValueError(f"train: {name}={count}, expected at least 1")
