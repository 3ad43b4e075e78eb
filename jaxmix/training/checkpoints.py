"""Checkpoints of a training run: written behind the steps, compared before they are read.

One checkpoint is a folder `<directory>/<step>/` with four items:

    state     the train state, a nested dict of arrays: parameters, optimizer, step, random key
    data      JSON, the position of the data iterator, from which the next batch is drawn
    config    JSON, {"gin": the operative configuration of the run}
    metrics   JSON, {"validation_loss": ...}, or {} where nothing was measured

A folder gets its final name only once all of it is written: a killed process leaves the older
checkpoints and a temporary folder, which the next trainer removes. No other file imports Orbax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jaxmix.training.storage import free_bytes, make_writable
from jaxmix.training.tree_differences import stored, tree_differences

_LISTED_DIFFERENCES = 8


class CheckpointMismatch(ValueError):
  """The tree, a shape or a dtype of a checkpoint differs from what the model wants."""


class CheckpointError(RuntimeError):
  """A checkpoint could not be written, or one that exists could not be read."""


@dataclasses.dataclass(frozen=True)
class _Save:
  """A save under way: what an error about it has to tell."""

  step: int
  needed_bytes: int
  free_bytes: int | None


@dataclasses.dataclass(frozen=True)
class _NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
  """Keeps the newest `keep` checkpoints and the `keep_best` with the lowest validation loss.

  Orbax's BestN would also keep checkpoints without a figure as long as there are few of them.
  """

  keep: int
  keep_best: int

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    newest = [info.step for info in checkpoints[-self.keep :]]
    best = _best_first({info.step: _validation_loss(info.metrics) for info in checkpoints})
    kept = {*newest, *best[: self.keep_best]}
    return [info.step in kept for info in checkpoints]


class _Manager(ocp.CheckpointManager):
  """Leaves preemption to the loop.

  Orbax would ask jax about steps of the past while it saves in the background, and jax would take
  one of those for the step at which all processes are.
  """

  def reached_preemption(self, step: int) -> bool:
    return False


def _barrier(*, key: str, timeout_ms: int) -> None:
  """Waits for the other processes; while a failure is passed on, raises it instead.

  Orbax would wait for them after a failed save, who wait at another point until that save is done.
  """
  if (failure := sys.exception()) is not None:
    raise failure
  ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


class Checkpoints:
  """The checkpoints in one folder, of which the newest and the best are kept.

  Args:
    directory: the folder, local or gs://. A trainer creates it and removes what was half written.
    keep: how many of the newest checkpoints stay, at least 1.
    keep_best: how many of those with the lowest validation loss stay besides, at least 0. A
      checkpoint saved without a validation loss never counts as best.
    read_only: True for evaluation and sampling: nothing is created or removed, so that a folder
      can be read while a trainer writes to it; there must be a checkpoint in it.
  Raises:
    TypeError, ValueError: `keep` or `keep_best` is not such a number.
    FileNotFoundError: `read_only` and there is no complete checkpoint.
    NotADirectoryError, PermissionError: the folder cannot be made or written.

  With several processes all of them call every method, at the same point of the program.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    keep: int = 3,
    keep_best: int = 1,
    read_only: bool = False,
  ):
    _check_count("keep", keep, least=1)
    _check_count("keep_best", keep_best, least=0)
    self.directory = epath.Path(directory).expanduser().resolve()
    self._policy = _NewestAndBest(keep, keep_best)
    self._read_only = read_only
    self._under_way: _Save | None = None
    self._handlers = {
      "state": ocp.PyTreeCheckpointHandler(),
      "data": ocp.JsonCheckpointHandler(),
      "config": ocp.JsonCheckpointHandler(),
    }
    # Orbax logs a failed save from several threads, each with its traceback; here it is raised.
    logging.getLogger("absl").addFilter(_not_an_orbax_error)
    if not read_only:
      make_writable(self.directory)
    self._manager = self._open()
    if read_only and not self.steps():
      raise FileNotFoundError(self._no_checkpoint())

  def _open(self) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
      create=not self._read_only,
      cleanup_tmp_directories=not self._read_only,
      preservation_policy=self._policy,
      async_options=ocp.AsyncOptions(barrier_sync_fn=_barrier),
      best_fn=_validation_loss,  # only so that Orbax writes the metrics item; the policy ranks
    )
    return _Manager(self.directory, options=options, item_handlers=self._handlers)

  def save(
    self,
    step: int,
    state: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    config: str,
    validation_loss: float | None = None,
  ) -> None:
    """Starts to write a checkpoint and returns; the arrays may be donated to the next step at once.

    Args:
      step: the number of finished steps, greater than that of every checkpoint here.
      state: the train state, a nested dict of jax arrays; typed random keys are arrays too.
      data: what the data iterator needs to continue, in JSON types.
      config: the operative configuration of the run, as gin text.
      validation_loss: lower is better; None or a value that is not finite means not measured.
    Raises:
      CheckpointError: this save or the one before failed (a full disk); older ones are intact.
      ValueError: there is a checkpoint of this or a later step, or the folder is `read_only`.
      TypeError: `data` holds something that JSON has no type for.
    """
    if self._read_only:
      raise ValueError(
        f"cannot save step {step} in {self.directory}: it was opened with read_only=True — "
        "a trainer's folder is needed — open it with Checkpoints(directory)"
      )
    latest = self.latest_step()
    if latest is not None and step <= latest:
      raise ValueError(
        f"cannot save step {step} in {self.directory}: its newest checkpoint is of step {latest} — "
        f"expected a later step — continue from step {latest} or use another work directory"
      )
    # A NaN would be ranked at random, so it counts as not measured.
    measured = validation_loss is not None and math.isfinite(validation_loss)
    metrics = {"validation_loss": float(validation_loss)} if measured else {}
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(state),
      data=ocp.args.JsonSave(json.loads(json.dumps(data))),  # a copy: it is written later
      config=ocp.args.JsonSave({"gin": config}),
    )
    self._under_way = _Save(step, _tree_bytes(state), free_bytes(self.directory))
    with self._named_failure():
      self._manager.save(step, args=items, metrics=metrics, force=True)

  def wait(self) -> None:
    """Returns when no save is under way. Raises CheckpointError when the last one failed."""
    with self._named_failure():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then releases the threads. Raises CheckpointError when the last save failed."""
    self.wait()
    self._manager.close()

  def steps(self) -> list[int]:
    """The steps of the complete checkpoints, growing; waits for a save under way."""
    self.wait()
    return sorted(self._manager.all_steps())

  def latest_step(self) -> int | None:
    """The step of the newest complete checkpoint, None when there is none."""
    return max(self.steps(), default=None)

  def best_step(self) -> int | None:
    """The step with the lowest validation loss, None when no checkpoint here has one."""
    metrics = {step: self._manager.metrics(step) for step in self.steps()}
    best = _best_first({step: _validation_loss(values) for step, values in metrics.items()})
    return best[0] if best else None

  def config(self, step: int) -> str:
    """The operative configuration, gin text, that the checkpoint of this step was trained with."""
    return self._read(step, config=ocp.args.JsonRestore())["config"]["gin"]

  def restore(self, step: int, abstract_state: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Reads the train state and the position in the data.

    Args:
      step: one of `steps()`.
      abstract_state: the tree wanted. Its leaves are jax.ShapeDtypeStructs with the sharding
        wanted, of any mesh; a leaf without a sharding is placed on the first device.
    Returns:
      state: like `abstract_state`, with arrays;  data: what `save` was given.
    Raises:
      FileNotFoundError: there is no such checkpoint.
      CheckpointMismatch: its tree, shapes or dtypes differ; nothing was read.
      CheckpointError: it is damaged.
    """
    self._compare(step, self._saved_tree(step), abstract_state)
    wanted = _restore_arguments(abstract_state)
    items = self._read(step, state=wanted, data=ocp.args.JsonRestore())
    return items["state"], items["data"]

  def set_aside(self, step: int) -> None:
    """Renames a checkpoint to `<step>.damaged`, which nothing reads and nothing removes."""
    if jax.process_index() == 0:
      aside = self.directory / f"{step}.damaged"
      if aside.exists():  # the run has come by this step before
        aside.rmtree()
      (self.directory / str(step)).rename(aside)
    multihost_utils.sync_global_devices(f"set aside {step}")
    self._manager.reload()

  def restore_parameters(self, step: int, abstract_params: Any, *, prefer: str = "ema") -> Any:
    """Reads the parameters alone, for evaluation and sampling, without the optimizer's state.

    Args:
      step: one of `steps()`.
      abstract_params: the tree wanted, as in `restore`.
      prefer: "ema" for the averaged parameters where the run kept them, otherwise the plain ones;
        "params" for the plain ones always.
    Raises:
      As `restore`, and ValueError for another value of `prefer`.
    """
    if prefer not in ("ema", "params"):
      raise ValueError(
        f"prefer={prefer!r} is unknown — expected 'ema' or 'params' — use one of them"
      )
    saved = self._saved_tree(step)
    root = prefer if saved.get(prefer) else "params"
    self._compare(step, {root: saved.get(root)}, {root: abstract_params})
    arguments = _restore_arguments({root: abstract_params}, partial_restore=True)
    return self._read(step, state=arguments)["state"][root]

  def _saved_tree(self, step: int) -> Mapping[str, Any]:
    with self._readable(step):
      return self._manager.item_metadata(step)["state"].tree

  def _read(self, step: int, **arguments: Any) -> Any:
    # Not by the manager, where a process that can read waits for those that cannot.
    with self._readable(step):
      folder = self.directory / str(step)
      return {
        name: self._handlers[name].restore(folder / name, args=each)
        for name, each in arguments.items()
      }

  @contextlib.contextmanager
  def _readable(self, step: int) -> Iterator[None]:
    steps = self.steps()
    if not steps:
      raise FileNotFoundError(self._no_checkpoint())
    if step not in steps:
      raise FileNotFoundError(
        f"no checkpoint of step {step} in {self.directory} — it has steps {steps} — choose one"
      )
    try:
      yield
    except Exception as error:
      others = [other for other in steps if other != step]
      repair = f"continue from step {others[-1]}" if others else "train again"
      raise CheckpointError(
        f"checkpoint {self.directory / str(step)} cannot be read: {_cause(error)} — "
        f"expected the files that a finished save leaves — remove that folder and {repair}"
      ) from error

  @contextlib.contextmanager
  def _named_failure(self) -> Iterator[None]:
    """Turns what a failed save raises, here or in its thread, into one error with its repair."""
    try:
      yield
    except Exception as error:
      # The manager raises an old failure again and has forgotten the checkpoints that it meant to
      # remove. A new one lists what is on the disk and removes what was half written; but all
      # processes would have to make one, and the others wait for this save.
      if jax.process_count() == 1:
        self._manager = self._open()
      save, steps = self._under_way, self._manager.all_steps()
      need = f"it takes up to {_megabytes(save.needed_bytes)}"
      if save.free_bytes is not None:
        need += f", {_megabytes(save.free_bytes)} were free when it began"
      intact = f"steps {sorted(steps)}" if steps else "none, this was the first"
      raise CheckpointError(
        f"checkpoint {self.directory / str(save.step)} was not written: {_cause(error)} — "
        f"{need} — free some space or keep fewer checkpoints, then run the same command again; "
        f"intact: {intact}"
      ) from error

  def _compare(self, step: int, saved: Any, wanted: Any) -> None:
    differences = tree_differences(saved, wanted)
    if not differences:
      return
    lines = differences[:_LISTED_DIFFERENCES]
    if len(differences) > len(lines):
      lines.append(f"... and {len(differences) - len(lines)} more")
    raise CheckpointMismatch(
      f"checkpoint {self.directory / str(step)} does not fit the model:\n  "
      + "\n  ".join(lines)
      + "\nuse the model and the optimizer of the configuration saved beside the checkpoint, "
      "or start in another work directory"
    )

  def _no_checkpoint(self) -> str:
    state = "none in it is complete" if self.directory.exists() else "there is no such folder"
    return (
      f"no checkpoint in {self.directory}: {state} — expected <step>/ as a trainer leaves it — "
      "train first, or name the work directory of a run that saved one"
    )


def _check_count(name: str, value: int, *, least: int) -> None:
  if not isinstance(value, int) or isinstance(value, bool) or value < least:
    kind = ValueError if isinstance(value, int) else TypeError
    raise kind(f"{name}={value!r} — expected an integer of at least {least} — use {name}={least}")


def _restore_arguments(abstract: Any, **options: Any) -> ocp.args.PyTreeRestore:
  def placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  abstract = jax.tree.map(placed, abstract)
  restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
  return ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, **options)


def _validation_loss(metrics: Mapping[str, float] | None) -> float | None:
  return (metrics or {}).get("validation_loss")


def _best_first(losses: Mapping[int, float | None]) -> list[int]:
  """The steps that have a loss, the lowest loss first; of equal ones the newest first."""
  return [-step for _, step in sorted((x, -step) for step, x in losses.items() if x is not None)]


def _tree_bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in map(stored, jax.tree.leaves(tree)))


def _megabytes(count: int) -> str:
  return f"{count / 1e6:,.1f} MB"


def _cause(error: BaseException) -> str:
  """The error in one line; of a long chain of files both ends, which say what and why."""
  text = " ".join(str(error).split())
  return (
    f"{type(error).__name__}: {text if len(text) <= 200 else f'{text[:100]} ... {text[-100:]}'}"
  )


def _not_an_orbax_error(record: logging.LogRecord) -> bool:
  return record.levelno < logging.ERROR or "orbax" not in record.pathname
