"""The loss curve of a run, drawn from its metrics file."""

from __future__ import annotations

import json
import math
import os
import pathlib


def plot_losses(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Draws the losses in `workdir/metrics.jsonl` over the steps and returns `workdir/loss.png`.

  Nats per token; the legend gives the last value of each split, in bits per byte too where that was
  measured. The picture appears whole or not at all, so it can be looked at while the run goes on.

  Raises:
    FileNotFoundError: there is no metrics file.
    ValueError: it has no loss yet.
  """
  workdir = pathlib.Path(workdir)
  source = workdir / "metrics.jsonl"
  if not source.exists():
    raise FileNotFoundError(
      f"no {source} — expected the file that a trainer writes — name the work directory of a run"
    )
  curves: dict[str, list[dict]] = {}
  for line in source.read_text(encoding="utf-8").splitlines():
    row = json.loads(line)
    if row.get("loss") is not None:
      curves.setdefault(row["split"], []).append(row)
  if not curves:
    raise ValueError(f"{source} has no loss yet — expected at least one — let the run log a step")

  # A figure of its own, without pyplot: no window, no global state, safe in a thread.
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator

  figure = Figure(figsize=(7.5, 4.5), dpi=130, layout="constrained")
  axes = figure.add_subplot()
  for split, rows in curves.items():
    often = split == "train"  # logged at many steps: a thin line, the points of the others marked
    axes.plot(
      [row["step"] for row in rows],
      [row["loss"] for row in rows],
      linewidth=1.0 if often else 1.8,
      alpha=0.65 if often else 1.0,
      marker="o" if len(rows) < 3 or not often else None,  # one point alone makes no line
      markersize=4,
      zorder=2 if often else 3,
      label=_label(split, rows[-1]),
    )
  losses = sorted(row["loss"] for rows in curves.values() for row in rows)
  if losses[-1] > 4 * losses[len(losses) // 2] > 0:
    axes.set_yscale("log")  # a few huge first losses would flatten the rest into a line
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  axes.set_xlabel("step")
  axes.set_ylabel("loss (nats per token)")
  axes.grid(alpha=0.25)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False)

  target = workdir / "loss.png"
  fresh = workdir / "loss.png.tmp"
  figure.savefig(fresh, format="png")
  os.replace(fresh, target)
  return target


def _label(split: str, row: dict) -> str:
  label = f"{split}: {row['loss']:.3f}"
  bits = row.get("bits_per_byte")
  if bits is not None and math.isfinite(bits):
    label += f" = {bits:.3f} bits per byte"
  return label
