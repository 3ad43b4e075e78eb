"""The decoding of a run's model on one device: a step of `jaxmix.inference.generate`, compiled, and
what it moves beside what it has to."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxmix.compile_ahead.process import Task
from jaxmix.compile_ahead.report import Report
from jaxmix.compile_ahead.run import Run
from jaxmix.compile_ahead.targets import Target, target
from jaxmix.inference.generate import abstract_decoding
from jaxmix.models import cast_matrices
from jaxmix.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class DecodingReport:
  """What one decoded token a row needs and costs on a device.

  Attributes:
    report: of the compiled step.
    dtype: of the weight matrices; norms, gates and taps keep that of the model.
    rows: continued side by side; each gets one token a step.
    parameters: their number.   parameter_bytes: of all.
    weight_bytes: of those that a step has to read: of a table that is only looked up in, one row a
      token.
    state_bytes: of what a step is given by the one before. It has to read and write all of it,
      though of a cache of keys and values it writes one place.
  """

  report: Report
  dtype: str
  rows: int
  parameters: int
  parameter_bytes: int
  weight_bytes: int
  state_bytes: int

  @property
  def ideal_bytes(self) -> int:
    """What no program can do without: the weights once, the state in and out."""
    return self.weight_bytes + 2 * self.state_bytes

  @property
  def ideal_seconds(self) -> float:
    """`ideal_bytes` at the bandwidth of HBM."""
    return self.ideal_bytes / target(self.report.target).hbm_bandwidth

  @property
  def seconds(self) -> float:
    """The least time of a step: the lower bound of the compiled program."""
    return self.report.bound.seconds

  @property
  def scheduled_seconds(self) -> float | None:
    """What a TPU's static schedule predicts for a step; None on a GPU, which has none."""
    schedule = self.report.schedule
    return schedule and schedule.seconds(schedule.program.predicted_cycles)

  @property
  def ratio(self) -> float:
    """The least time of the program over that of the ideal one."""
    return self.seconds / self.ideal_seconds

  @property
  def tokens_per_second(self) -> float:
    """The most tokens a second that the least time allows, over all rows."""
    return self.rows / self.seconds

  def to_dict(self) -> dict[str, Any]:
    """Every figure under its name."""
    memory = self.report.memory
    derived = (
      "ideal_bytes", "ideal_seconds", "seconds", "scheduled_seconds", "ratio", "tokens_per_second",
    )  # fmt: skip
    return {
      **dataclasses.asdict(self),
      **{name: getattr(self, name) for name in derived},
      "fits": memory.fits,
      "needed": memory.needed,
      "headroom": memory.headroom,
    }


def decoding_task(run: Run, name: str, *, rows: int = 1, dtype: str | None = None) -> Task:
  """The compilation of a decoding step of a run's model for a target.

  Args:
    run: names the model.   name: of the target.   rows: continued side by side.
    dtype: of the weight matrices; None means that in which the model computes, as `generate` has
      them. In float32, as training leaves them, every token would pay for the cast.
  Raises:
    ValueError: the target has several devices.
  """
  chip = target(name)
  if chip.device_count > 1:
    raise ValueError(
      f"{name} has {chip.device_count} devices, and a decoding step is compiled for one: how "
      "several share the state is up to the program that reads the prompt — expected one device — "
      "name v5e, v6e, h100 or another of one device"
    )
  # A decoding step is nearly all XLA's own operations: the schedule of each is wanted.
  schedule = "everything" if chip.platform == "tpu" else None
  return Task(functools.partial(_program, run, rows, dtype), name, schedule)


def decoding_report(
  run: Run, report: Report, *, rows: int = 1, dtype: str | None = None
) -> DecodingReport:
  """The report of a run's decoding from that of its compiled step; arguments as of the task."""
  *_, model = run.model()
  return DecodingReport(report=report, dtype=dtype or model.dtype, rows=rows, **report.figures)


def _program(run: Run, rows: int, dtype: str | None, chip: Target):
  """The step, its abstract arguments, the mesh, and what `DecodingReport` has of bytes."""
  graph, parameters, _, model = run.model()
  parameters = cast_matrices(graph, parameters, dtype or model.dtype)
  mesh = make_mesh(devices=chip.devices())
  with jax.set_mesh(mesh):
    step, arguments = abstract_decoding(graph, parameters, rows)
  place = NamedSharding(mesh, PartitionSpec())
  arguments = jax.tree.map(lambda x: x.update(sharding=place), arguments)
  figures = {
    "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(parameters)),
    "parameter_bytes": _bytes(parameters),
    "weight_bytes": _bytes(parameters) - _skipped_bytes(parameters, rows),
    "state_bytes": _bytes(arguments[-1]),
  }
  return step, arguments, mesh, figures


def _skipped_bytes(parameters: dict, rows: int) -> int:
  """What a step leaves unread of the tables in which it only looks up a vector for each row."""
  names = ["position_embedding"] if "position_embedding" in parameters else []
  if "output" in parameters:  # else the logits read the whole table of the tokens
    names.append("embedding")
  tables = [parameters[name]["table"] for name in names]
  return sum(max(x.shape[0] - rows, 0) * x.shape[1] * x.dtype.itemsize for x in tables)


def _bytes(tree) -> int:
  return sum(x.dtype.itemsize * math.prod(x.shape) for x in jax.tree.leaves(tree))
