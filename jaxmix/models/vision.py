"""Classification of images: patches are the tokens of any pattern of mixers (Dosovitskiy et al.
2021, arXiv 2010.11929)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix.layers import Embedding, Linear, LinearHead, dropout
from jaxmix.models.encoder import WHOLE_ROW_MIXERS
from jaxmix.models.stack import Stack
from jaxmix.sharding import constrain


class ImageClassifier(Stack):
  """Patches -> linear embedding and learned positions -> stack -> mean -> head.

  Patches stand row by row, as text is read. What differs from the source: features are the mean
  over all patches, not those of one more token.

  Args:
    image_shape: (height, width), or (height, width, channels).   classes: C.
    patch_size: height and width of a patch in pixels.
    mixers: as in `Stack`; None takes `jaxmix.mixers.MIXERS`, attention with visibility="full".
    head: factory `(dim, classes, *, rngs) -> head`, such as `LinearHead` or `SubspaceHead`.
    dropout_rate: of the embedded patches and of each branch.
    The rest: see `jaxmix.models.stack.Stack`.
  Raises:
    ValueError: patches do not cover the image, a name is unknown, or depth does not hold whole
      patterns.
  """

  def __init__(
    self,
    image_shape: Sequence[int],
    classes: int,
    dim: int,
    depth: int,
    *,
    patch_size: int,
    pattern: Sequence[str] = ("attention",),
    mixers: Mapping[str, Callable] | None = None,
    head: Callable[..., nnx.Module] = LinearHead,
    mlp: str = "dense",
    mlp_dim: int | None = None,
    activation: str | None = None,
    norm: str = "layer",
    placement: str = "pre_norm",
    bias: bool = True,
    dropout_rate: float = 0.0,
    remat: str = "none",
    dtype: str = "float32",
    init_std: float | None = None,
    rngs: nnx.Rngs,
  ):
    height, width, channels = (*image_shape, 1)[:3]
    if patch_size < 1 or height % patch_size or width % patch_size:
      best = math.gcd(height, width)
      raise ValueError(
        f"ImageClassifier: patches of patch_size={patch_size} do not cover images of {height} x "
        f"{width} — expected a divisor of both — set patch_size to a divisor of {best}, or cut the "
        "images"
      )
    self.grid = (height // patch_size, width // patch_size)
    self.embed = Linear({"pixels": patch_size**2 * channels}, {"embed": dim}, bias=True, rngs=rngs)
    self.position_embedding = Embedding(math.prod(self.grid), dim, axis="position", rngs=rngs)
    super().__init__(
      dim,
      depth,
      pattern=pattern,
      mixers=WHOLE_ROW_MIXERS if mixers is None else mixers,
      mlp=mlp,
      mlp_dim=mlp_dim,
      activation=activation,
      norm=norm,
      placement=placement,
      bias=bias,
      dropout_rate=dropout_rate,
      remat=remat,
      dtype=dtype,
      init_std=init_std,
      rngs=rngs,
    )
    self.head = head(dim, classes, rngs=rngs)
    self.image_shape, self.patch_size = tuple(image_shape), patch_size

  def __call__(self, *, image: jax.Array, dropout_key=None) -> jax.Array:
    """Logits of the classes.

    Args:
      image: [B, height, width] or [B, height, width, channels], floating.
      dropout_key: a PRNG key; None means no dropout.
    Returns:
      [B, C] float32.
    Raises:
      ValueError: images of another shape.
    """
    return self.head(self.features(image, dropout_key=dropout_key))

  def features(self, image: jax.Array, *, dropout_key=None) -> jax.Array:
    """What the head reads, [B, D] in `dtype`; see `__call__`."""
    if image.shape[1:] != self.image_shape:
      raise ValueError(
        f"ImageClassifier: images of shape {image.shape[1:]} — expected {self.image_shape}, as "
        "at its making — resize them, or make a model with their image_shape"
      )
    patch_key, layer_keys = None, None
    if dropout_key is not None:
      patch_key, stack_key = jax.random.split(dropout_key)
      layer_keys = jax.random.split(stack_key, self.periods)
    patches = self._patches(image.astype(jnp.dtype(self.dtype)))
    positions = jnp.broadcast_to(jnp.arange(patches.shape[1]), patches.shape[:2])
    x = self.embed(patches) + self.position_embedding(positions, patches.dtype)
    x = constrain(dropout(x, self.dropout_rate, patch_key), "batch", "length", None)
    x, _ = self.apply_layers(x, None, layer_keys, segment_ids=None, positions=positions)
    return jnp.mean(x, axis=1)

  def flops(self, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass, a multiply-add counted as two; `length`, the
    pixels of an image, is known."""
    patches = math.prod(self.grid)
    embedding = patches * self.embed.flops_per_token
    return self.layer_flops(batch, patches) + batch * (embedding + self.head.flops_per_feature)

  def _patches(self, image: jax.Array) -> jax.Array:
    """[B, height, width, ...] -> [B, patches, pixels of a patch]."""
    rows, columns = self.grid
    size = self.patch_size
    x = image.reshape(len(image), rows, size, columns, size, -1)
    return jnp.swapaxes(x, 2, 3).reshape(len(image), rows * columns, -1)
