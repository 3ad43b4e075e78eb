"""Scaling on paper: the training step of models on machines of many sizes and rows of many lengths,
compiled, as rows of a table and as a picture.

A step has so many tokens a device, whatever the machine and the length. Rows are dealt to devices;
where there are fewer rows than devices, each is cut along its length over several.
"""

from __future__ import annotations

import os
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmix.compile_ahead.run import Run, RunReport
from jaxmix.compile_ahead.targets import target
from jaxmix.compile_ahead.text import gib, quantity, table

HEAD = (
  "run", "target", "length", "rows", "cut over", "memory", "sent a step", "step at least",
  "limited by", "tokens/s a chip", "MFU at most",
)  # fmt: skip


def scaled(run: Run, name: str, *, length: int, tokens_per_device: int) -> Run:
  """The run on a target with rows of that length.

  Args:
    run: with its vocab_size.   name: of the target.   tokens_per_device: of a step.
  Raises:
    ValueError: the tokens of a step are no whole number of rows, or the rows do not deal evenly.
  """
  devices = target(name).device_count
  rows, rest = divmod(devices * tokens_per_device, length)
  parts = max(1, devices // max(rows, 1))
  if rest or rows < 1 or devices % parts or rows % (devices // parts):
    raise ValueError(
      f"{name}: {devices} devices of {tokens_per_device} tokens are {rows} rows of length={length} "
      f"and {rest} tokens, cut over {parts} devices each — expected whole rows that deal evenly — "
      "use powers of two"
    )
  sized = Run(run.gin_files, run.gin_params, run.vocab_size, length)
  return sized.with_params(
    f"train.batch_size = {rows}",
    "make_mesh.data = 1",
    f"make_mesh.fsdp = {devices // parts}",
    f"make_mesh.sequence = {parts}",
  )


def row_of(label: str, length: int, found: RunReport) -> dict[str, Any]:
  """The figures of one step, as JSON has them; bytes are those of one device.

  `seconds` is the lower bound of the step: that of the compiled program, or the flops of the model
  at the peak of the chips where these are more, as of kernels that carry no estimate.
  """
  report, chip = found.report, target(found.report.target)
  model = found.model_flops / (chip.matmul_flops * chip.device_count)
  seconds = max(report.bound.seconds, model)
  sent: Counter[str] = Counter()
  for each in report.collectives:
    sent[each.kind] += each.wire_bytes
  return {
    "run": label,
    "target": chip.name,
    "devices": chip.device_count,
    "parameters": found.parameters,
    "length": length,
    "rows": found.tokens // length,
    "mesh": dict(report.mesh),
    "tokens": found.tokens,
    "needed": report.memory.needed,
    "capacity": report.memory.capacity,
    "fits": report.memory.fits,
    "sent": dict(sent),
    "seconds": seconds,
    "limited_by": "compute" if seconds > report.bound.seconds else report.bound.limited_by,
    "tokens_per_second_per_device": found.tokens / seconds / chip.device_count,
    "mfu": model / seconds,
    "versions": dict(report.versions),
  }


def scaling_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """The rows as text."""
  lines = [
    (
      row["run"],
      row["target"],
      f"{row['length']:,}",
      f"{row['rows']:,}",
      str(row["mesh"]["sequence"]),
      gib(row["needed"]) + ("" if row["fits"] else " (does not fit)"),
      quantity(sum(row["sent"].values()), "B"),
      f"{1e3 * row['seconds']:,.0f} ms",
      row["limited_by"],
      f"{row['tokens_per_second_per_device']:,.0f}",
      f"{row['mfu']:.0%}",
    )
    for row in rows
  ]
  return table([HEAD, *lines])


def plot_scaling(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> pathlib.Path:
  """Draws tokens a second and chip: over the chips, at the length that most machines have, and over
  the length, on the machine that has most lengths.

  Args:
    rows: of `row_of`.   path: the PNG to write.
  """
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11, 4.5), dpi=130, layout="constrained")
  weak, lengths = figure.subplots(1, 2)
  length = _most_common(rows, "length", of="target")
  for (label, chip), points in _series(rows, lambda row: row["length"] == length):
    weak.plot(*_xy(points, "devices"), marker="o", label=f"{label}, {chip}")
  weak.set_xlabel(f"chips, rows of {length:,} tokens")
  weak.set_xscale("log", base=2)
  machine = _most_common(rows, "target", of="length")
  for (label, _), points in _series(rows, lambda row: row["target"] == machine):
    lengths.plot(*_xy(points, "length"), marker="o", label=label)
  lengths.set_xlabel(f"length of the rows, {machine}")
  lengths.set_xscale("log", base=2)
  lengths.set_yscale("log", base=2)
  for axes in (weak, lengths):
    axes.set_ylabel("tokens a second and chip, at most")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
  weak.set_ylim(bottom=0)
  path = pathlib.Path(path).expanduser()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)
  return path


def _most_common(rows, key: str, *, of: str):
  """The value of `key` that stands with the most values of `of`."""
  pairs = {(row[key], row[of]) for row in rows}
  return Counter(value for value, _ in sorted(pairs)).most_common(1)[0][0]


def _series(rows, chosen):
  """((run, chip), its rows that are chosen and fit) in turn."""
  found: dict[tuple[str, str], list] = {}
  for row in rows:
    if chosen(row) and row["fits"]:
      found.setdefault((row["run"], target(row["target"]).chip), []).append(row)
  return found.items()


def _xy(points, key: str):
  points = sorted(points, key=lambda row: row[key])
  return [row[key] for row in points], [row["tokens_per_second_per_device"] for row in points]
