"""Parameters to begin with that another run has made."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax

from jaxmix.training.run import load_run


def from_run(
  parameters: dict,
  *,
  workdir: str | os.PathLike[str],
  parts: Mapping[str, str],
  step: int | str = "latest",
) -> dict:
  """Parameters with parts of them taken from a run: the `initial` of `jaxmix.training.train`.

  Args:
    parameters: of the new model, nested dict of arrays.
    workdir, step: of the run, see `load_run`.
    parts: name of a part of the new model -> that of the old one, such as {"encoder": "encoder"};
      parts of parts are written "encoder/layers".
  Returns:
    `parameters`, with these parts replaced; they lie where the new ones do.
  Raises:
    ValueError: a part does not exist, or does not have the same parameters in both models.
    What `load_run` raises.
  """
  old = load_run(workdir, step=step).params
  for new_name, old_name in parts.items():
    target, source = _part(parameters, new_name, "the new model"), _part(old, old_name, workdir)
    differences = _differences(target, source)
    if differences:
      raise ValueError(
        f"from_run: {new_name!r} of the new model is not {old_name!r} of {workdir}: "
        f"{'; '.join(differences[:3])}{' ...' if len(differences) > 3 else ''} — expected the same "
        "parameters — configure that part of the model as in the run's config.gin"
      )
    placed = jax.tree.map(lambda new, x: jax.device_put(x, new.sharding), target, source)
    parameters = _replaced(parameters, new_name.split("/"), placed)
  return parameters


def _part(tree: dict, name: str, whose) -> dict:
  for key in name.split("/"):
    if not isinstance(tree, dict) or key not in tree:
      known = ", ".join(map(str, tree)) if isinstance(tree, dict) else "none"
      raise ValueError(
        f"from_run: {whose} has no part {name!r} — expected one of {known} — name it so in parts"
      )
    tree = tree[key]
  return tree


def _differences(target, source) -> list[str]:
  new, old = (
    {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    for tree in (target, source)
  )
  return [
    f"{path} is {new.get(path, 'missing')} here, {old.get(path, 'missing')} there"
    for path in sorted(new.keys() | old.keys())
    if new.get(path) != old.get(path)
  ]


def _replaced(tree: dict, keys: list[str], value) -> dict:
  if not keys:
    return value
  return {**tree, keys[0]: _replaced(tree[keys[0]], keys[1:], value)}
