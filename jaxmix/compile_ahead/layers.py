"""The layers of models side by side on one TPU, rows of many lengths: what the compiler's schedule
predicts that one takes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxmix.compile_ahead.cases import DIRECTIONS
from jaxmix.compile_ahead.process import Task
from jaxmix.compile_ahead.report import Report
from jaxmix.compile_ahead.run import Run
from jaxmix.compile_ahead.targets import Target, target
from jaxmix.compile_ahead.text import table
from jaxmix.models import Stack
from jaxmix.sharding import make_mesh

HEAD = (
  "target", "run", "rows", "direction", "kernels of a layer", "layer us", "kernels us", "limit us",
  "tokens/s", "/ the first",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layers:
  """All layers of a run's model, scanned, without what stands before and behind them.

  Attributes:
    label: name of the run file.   run: of a text; the file has a LENGTH.
    rows, length: B and T of what the layers are given.
    direction: "forward", or "forward_backward" with the gradients of parameters and input.
  """

  label: str
  run: Run
  rows: int
  length: int
  direction: str

  def task(self, name: str) -> Task:
    """Their compilation for a target.

    Raises:
      ValueError: the target is no single TPU, or `direction` is unknown.
    """
    chip = target(name)
    if chip.platform != "tpu" or chip.device_count > 1:
      raise ValueError(
        f"{name}: layers are compiled for one TPU, whose schedule is known before it runs — "
        "expected a name such as v5e or v6e — name one of these"
      )
    if self.direction not in DIRECTIONS:
      raise ValueError(
        f"direction={self.direction!r} is unknown — expected one of {', '.join(DIRECTIONS)} — name "
        "one of these"
      )
    return Task(functools.partial(_program, self), name, "everything")

  def row(self, report: Report) -> dict[str, Any]:
    """The figures of one layer, the mean of all, as JSON has them; times are predicted by the
    schedule, `limit_seconds` is the bound of the report."""
    schedule, depth = report.schedule, report.figures["depth"]
    of_kernels = sum(piece.predicted_cycles for piece in schedule.kernels)
    seconds = schedule.seconds(schedule.program.predicted_cycles) / depth
    return {
      "run": self.label,
      "target": report.target,
      "rows": self.rows,
      "length": self.length,
      "direction": self.direction,
      "kernels": {name: count / depth for name, count in report.pallas_kernels.items()},
      "seconds": seconds,
      "kernel_seconds": schedule.seconds(of_kernels) / depth,
      "limit_seconds": report.bound.seconds / depth,
      "tokens_per_second": self.rows * self.length / seconds,
      "needed": report.memory.needed,
      "times": "derived from the static schedule",
      "versions": dict(report.versions),
    }


def _program(layers: Layers, chip: Target):
  """The function, its abstract arguments, the mesh, and the number of layers."""
  # No layer knows the vocabulary.
  run = dataclasses.replace(layers.run, vocab_size=1, length=layers.length)
  stack = run.with_params(f"LENGTH = {layers.length}").stack()
  mesh = make_mesh(devices=chip.devices())
  x = jax.ShapeDtypeStruct((layers.rows, layers.length, stack.dim), jnp.dtype(stack.dtype))
  backward = layers.direction == "forward_backward"
  place = NamedSharding(mesh, PartitionSpec())
  arguments = jax.tree.map(
    lambda x: x.update(sharding=place), (stack, x, x) if backward else (stack, x)
  )
  return jax.jit(_both if backward else _forward), arguments, mesh, {"depth": stack.depth}


def _forward(stack: Stack, x):
  return stack.apply_layers(x, None, None, segment_ids=None, positions=None)[0]


def _both(stack: Stack, x, dy):
  y, pull = jax.vjp(_forward, stack, x)
  return y, pull(dy)


def compare(rows: Sequence[dict], first: str) -> None:
  """Adds to rows of `Layers.row` how many times as many tokens a second they make as the run of the
  label `first` on the same target, rows and direction, where it is among them: "ratio"."""

  def compared(row: dict) -> tuple:
    return tuple(row[key] for key in ("target", "rows", "length", "direction"))

  speeds = {compared(row): row["tokens_per_second"] for row in rows if row["run"] == first}
  for row in rows:
    if compared(row) in speeds:
      row["ratio"] = row["tokens_per_second"] / speeds[compared(row)]


def layers_table(rows: Iterable[Mapping]) -> str:
  """Rows that `compare` has seen, as text."""
  lines = [
    (
      row["target"],
      row["run"],
      f"{row['rows']}x{row['length']}",
      row["direction"],
      ", ".join(f"{name} x {count:.3g}" for name, count in row["kernels"].items())
      or "none: all is XLA's",
      f"{1e6 * row['seconds']:,.0f}",
      f"{1e6 * row['kernel_seconds']:,.0f}",
      f"{1e6 * row['limit_seconds']:,.0f}",
      f"{row['tokens_per_second']:,.0f}",
      f"{row['ratio']:.2f}" if "ratio" in row else "",
    )
    for row in rows
  ]
  return table([HEAD, *lines])
