"""The picture of a text's path on the Grassmann manifold."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxmix.analysis.subspaces import principal_angles

LABELS = 40  # tokens that are written beside their points; more would cover one another


def plot_trajectory(
  bases: Mapping[int, np.ndarray],
  tokens: Sequence[str],
  target: str | os.PathLike[str],
  *,
  layer: int,
) -> Path:
  """Draws the path of a text through the planes of one layer, and how far it turns in all of them.

  Left: the planes of `layer` as points, their projectors seen along the two directions in which
  they vary most. Right: the principal angles between the planes of successive tokens in `layer`,
  and their distance on the manifold, sqrt(sum of squared angles), in every layer.

  Args:
    bases: layer number -> [n, R, 2], of `plane_bases`; the last plane is that of the last token.
    tokens: all tokens of the text.   target: the PNG to write.
    layer: one of bases.
  Returns:
    The path of the picture.
  """
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  target = Path(target).expanduser()
  figure = plt.figure(figsize=(14, 7), layout="constrained")
  left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
  _draw_path(left.subplots(), bases[layer], tokens)
  angles_axes, distances_axes = right.subplots(2, 1, sharex=True)
  _draw_angles(angles_axes, bases[layer], len(tokens), layer)
  image = _draw_distances(distances_axes, bases, len(tokens))
  right.colorbar(image, ax=distances_axes, label="radians")
  target.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(target, dpi=120)
  plt.close(figure)
  return target


def _draw_path(axes, bases: np.ndarray, tokens: Sequence[str]) -> None:
  projectors = (bases @ np.swapaxes(bases, -1, -2)).reshape(len(bases), -1)
  centred = projectors - projectors.mean(0)
  _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
  x, y = (centred @ directions[:2].T).T
  axes.plot(x, y, color="0.8", linewidth=0.8, zorder=1)
  axes.scatter(x, y, c=np.arange(len(x)), cmap="viridis", s=18, zorder=2)
  every = max(1, len(x) // LABELS)
  for index in range(0, len(x), every):
    label = tokens[len(tokens) - len(x) + index]
    axes.annotate(label, (x[index], y[index]), fontsize=7, xytext=(3, 3),
                  textcoords="offset points")  # fmt: skip
  share = (sizes[:2] ** 2).sum() / max((sizes**2).sum(), np.finfo(float).tiny)
  axes.set_title(f"planes of the text, first token dark ({share:.0%} of their variance)")
  axes.set_xticks([])
  axes.set_yticks([])


def _successive_angles(bases: np.ndarray, length: int) -> np.ndarray:
  """[length, 2], the angles between each token's plane and the one before; NaN where there is
  none."""
  angles = np.full((length, 2), np.nan)
  angles[length - len(bases) + 1 :] = principal_angles(bases[:-1], bases[1:])
  return angles


def _draw_angles(axes, bases: np.ndarray, length: int, layer: int) -> None:
  angles = np.degrees(_successive_angles(bases, length))
  for index, label in enumerate(("smaller", "larger")):
    axes.plot(angles[:, index], linewidth=1, label=label)
  axes.set_ylim(0, 92)
  axes.set_ylabel("degrees")
  axes.legend(loc="lower right", fontsize=8)
  axes.set_title(f"principal angles between successive planes, layer {layer}")


def _draw_distances(axes, bases: Mapping[int, np.ndarray], length: int):
  layers = sorted(bases)
  distances = [np.sqrt((_successive_angles(bases[each], length) ** 2).sum(1)) for each in layers]
  image = axes.imshow(np.stack(distances), aspect="auto", interpolation="nearest", cmap="magma")
  axes.set_yticks(range(len(layers)), layers)
  axes.set_ylabel("layer")
  axes.set_xlabel("token")
  axes.set_title("distance between successive planes")
  return image
