"""Loss curves, drawn from the metrics files of runs."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping


def plot_losses(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Draws the losses in `workdir/metrics.jsonl` over the steps and returns `workdir/loss.png`.

  Nats per token or example; the legend gives the last value of each split, and its bits per byte or
  accuracy where that was measured. The picture appears whole or not at all, so it can be looked at
  while the run goes on.

  Raises:
    FileNotFoundError: there is no metrics file.
    ValueError: it has no loss yet.
  """
  workdir = pathlib.Path(workdir)
  figure, axes = _figure()
  losses = []
  for split, rows in _curves(workdir).items():
    often = split == "train"  # logged at many steps: a thin line, the points of the others marked
    losses += [row["loss"] for row in rows]
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
  what = "example" if any("accuracy" in row for row in rows) else "token"
  axes.set_ylabel(f"loss (nats per {what})")
  losses.sort()
  if losses[-1] > 4 * losses[len(losses) // 2] > 0:
    axes.set_yscale("log")  # a few huge first losses would flatten the rest into a line
  return _save(figure, axes, workdir / "loss.png")


def plot_comparison(
  runs: Mapping[str, str | os.PathLike[str]], target: str | os.PathLike[str], *, split: str
) -> pathlib.Path:
  """Draws one curve a run: the perplexity of a split over the steps, or its accuracy where all have
  that.

  Args:
    runs: label -> work directory.   target: the picture to write.   split: such as "validation".
  Returns:
    target. The legend gives the last value of each run, best first.
  Raises:
    FileNotFoundError: a run has no metrics file.
    ValueError: a run has no loss of this split.
  """
  figure, axes = _figure()
  curves = {}
  for label, workdir in runs.items():
    found = _curves(pathlib.Path(workdir))
    if split not in found:
      raise ValueError(
        f"{workdir} has no losses of {split!r} — it has {', '.join(found)} — name one of these"
      )
    curves[label] = found[split]
  accuracy = all("accuracy" in row for rows in curves.values() for row in rows)
  value = (lambda row: row["accuracy"]) if accuracy else lambda row: math.exp(row["loss"])
  best_first = sorted(
    curves.items(), key=lambda curve: value(curve[1][-1]) * (-1 if accuracy else 1)
  )
  for label, rows in best_first:
    axes.plot(
      [row["step"] for row in rows],
      [value(row) for row in rows],
      marker="o",
      markersize=4,
      label=f"{label}: {value(rows[-1]):{'.2%' if accuracy else '.1f'}}",
    )
  axes.set_yscale("linear" if accuracy else "log")
  axes.set_ylabel(f"{'accuracy' if accuracy else 'perplexity'}, {split}")
  return _save(figure, axes, pathlib.Path(target))


def _curves(workdir: pathlib.Path) -> dict[str, list[dict]]:
  """Split -> its rows that have a loss."""
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
  return curves


def _figure():
  # A figure of its own, without pyplot: no window, no global state, safe in a thread.
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator

  figure = Figure(figsize=(7.5, 4.5), dpi=130, layout="constrained")
  axes = figure.add_subplot()
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  axes.set_xlabel("step")
  axes.grid(alpha=0.25)
  axes.spines[["top", "right"]].set_visible(False)
  return figure, axes


def _save(figure, axes, target: pathlib.Path) -> pathlib.Path:
  axes.legend(frameon=False)
  fresh = target.with_name(target.name + ".tmp")
  figure.savefig(fresh, format="png")
  os.replace(fresh, target)
  return target


def _label(split: str, row: dict) -> str:
  label = f"{split}: {row['loss']:.3f}"
  bits, accuracy = row.get("bits_per_byte"), row.get("accuracy")
  if bits is not None and math.isfinite(bits):
    label += f" = {bits:.3f} bits per byte"
  if accuracy is not None:
    label += f", accuracy {accuracy:.2%}"
  return label
