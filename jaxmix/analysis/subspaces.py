"""The planes that a Grassmann mixer spans along a text, and the angles between them.

A token and its partner d tokens before span a plane in R^r: a point of the Grassmann manifold
Gr(2, r). A text is then a path on it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def reduced_states(model, tokens: np.ndarray) -> dict[int, np.ndarray]:
  """The reduced states of every Grassmann layer along a text, read off the model's own state.

  Args:
    model: a `jaxmix.models.Decoder`.   tokens: [T] int32, one document.
  Returns:
    layer number -> [T, H, R] float32.
  Raises:
    ValueError: no layer of the model is a Grassmann mixer.
  """
  names = [name for name, block in model.layers.items() if hasattr(block.mixer, "head_rank")]
  if not names:
    raise ValueError(
      f"the model's layers are {', '.join(model.pattern)} — expected a Grassmann mixer among them "
      "— analyse a run whose pattern has one"
    )

  def step(state, token):
    _, state = model.features(token[None, None], state=state)
    newest = {name: state["layers"][name]["memory"][:, 0, -1] for name in names}
    return state, newest  # [periods, H, R] each

  run = jax.jit(lambda tokens: jax.lax.scan(step, model.init_state(1), tokens)[1])
  found = run(jnp.asarray(tokens, jnp.int32))
  return {
    period * len(model.pattern) + int(name.split("_")[0]): np.asarray(found[name][:, period])
    for period in range(model.periods)
    for name in sorted(names, key=lambda name: int(name.split("_")[0]))
  }


def plane_bases(z: np.ndarray, offset: int) -> np.ndarray:
  """Orthonormal bases of the planes of z_t and z_{t-offset}.

  Args:
    z: [T, R].   offset: at least 1 and below T.
  Returns:
    [T - offset, R, 2] float64, for t = offset, ..., T - 1; of parallel vectors any plane that holds
    both.
  """
  if not 1 <= offset < len(z):
    raise ValueError(
      f"offset={offset} in {len(z)} tokens — expected from 1 to {len(z) - 1} — take a longer text"
    )
  pairs = np.stack([z[offset:], z[:-offset]], axis=-1).astype(np.float64)
  return np.linalg.qr(pairs)[0]


def principal_angles(one: np.ndarray, other: np.ndarray) -> np.ndarray:
  """The principal angles between subspaces, in radians, smallest first.

  Small angles are taken from their sines and large ones from their cosines, since neither arcus is
  accurate near 1 (Björck and Golub 1973).

  Args:
    one, other: [..., R, K], orthonormal columns.
  Returns:
    [..., K], from 0 to pi / 2.
  """
  products = np.swapaxes(one, -1, -2) @ other
  cosines = np.clip(np.linalg.svd(products, compute_uv=False), 0, 1)
  sines = np.clip(np.linalg.svd(other - one @ products, compute_uv=False)[..., ::-1], 0, 1)
  return np.where(cosines**2 > 0.5, np.arcsin(sines), np.arccos(cosines))
