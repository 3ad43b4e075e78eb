"""What a checkpoint holds beside what the model wants, leaf by leaf."""

from __future__ import annotations

from typing import Any

import jax


def tree_differences(saved: Any, wanted: Any) -> list[str]:
  """A line for each leaf whose path, dtype or shape differs; typed random keys are integers."""
  saved, wanted = _described(saved), _described(wanted)
  return [
    f"{path}: checkpoint {saved.get(path, 'has nothing')}, "
    f"the model wants {wanted.get(path, 'nothing')}"
    for path in sorted({**saved, **wanted})
    if saved.get(path) != wanted.get(path)
  ]


def stored(leaf: Any) -> Any:
  """What stands for a leaf on the disk: a typed random key is stored as its integers."""
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
  return leaf


def _described(tree: Any) -> dict[str, str]:
  """Path of each leaf -> dtype and shape: "params/layers/qkv" -> "float32[6,256,768]"."""
  described = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    leaf = stored(leaf)
    shape = ",".join(str(size) for size in leaf.shape)
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    described[name] = f"{leaf.dtype}[{shape}]"
  return described
