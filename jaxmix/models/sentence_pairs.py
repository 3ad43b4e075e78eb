"""Classification of pairs of sentences, such as premise and hypothesis of natural language
inference: one encoder reads each sentence by itself, a small stack of mixers compares them.

The head is for any mixer, so that Grassmann mixing and attention meet in one setting. Its sizes are
those of the experiment on SNLI of Zhang 2025 (arXiv 2512.19428), which leaves open what is pooled,
how the two sentences meet, and in which order they stand; those choices are ours. The public
re-implementations pool a whole pair into one vector before their head, where a mixer has nothing to
mix: a token spans no plane with itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmix.layers import Embedding, Linear, LinearHead, dropout
from jaxmix.mixers import Grassmann
from jaxmix.models.encoder import WHOLE_ROW_MIXERS, Encoder
from jaxmix.models.parameters import freeze
from jaxmix.models.stack import Stack
from jaxmix.sharding import constrain

TRAININGS = ("trained", "frozen")


class PairHead(Stack):
  """Two sentences as features of their tokens -> logits of classes.

      w = mean over the tokens of a window of (x W + b), plus a vector of the sentence
      y = layers of mixers over the 2 n windows, n of the premise and n of the hypothesis
      a, b = mean over the windows of y, premise and hypothesis
      logits = W_2 gelu(W_1 [a; b; |a - b|; a * b] + b_1) + b_2

  All 2 n windows are in the mixing, so that the two sentences always stand n apart; those without
  any token count in no mean.

  Args:
    features: width of the encoder's features.   classes: C.
    dim: D, width of the head.   depth: layers.
    pattern: names of mixers, as in `Stack`.
    mixers: name -> factory; None takes those of `Encoder`, and for "grassmann" rank 64 in 4 groups
      and the offsets ±1, ±2, ±4, ±n, the last of which pair the two sentences window by window.
    mlp_dim: hidden width of the layers' MLPs.
    placement: see `jaxmix.layers.Block`. "gated_post_norm" is for a mixer with its own way around
      itself, as Grassmann's gate; attention wants "post_norm" or "pre_norm".
    dropout_rate: of the windows, of each branch, and before the last map.
    init_std: of the linear maps of the layers at first, as in `Stack`. By 0.02, as in Devlin et al.
      2018 (arXiv 1810.04805), the layers at first hand on what they are given. Left their own, they
      scramble it, and an encoder that begins at random did not learn (SNLI: a loss of ln 3).
    window: tokens of a window; the next one begins behind it.
    length: the most tokens of a sentence; n = length / window, rounded up.
  Raises:
    ValueError: a name is unknown, a size is below 1, or depth does not hold whole patterns.
  """

  def __init__(
    self,
    features: int,
    classes: int,
    *,
    dim: int = 256,
    depth: int = 2,
    pattern: Sequence[str] = ("grassmann",),
    mixers: Mapping[str, Callable] | None = None,
    mlp_dim: int = 512,
    placement: str = "gated_post_norm",
    dropout_rate: float = 0.1,
    init_std: float | None = 0.02,
    window: int = 8,
    length: int = 48,
    rngs: nnx.Rngs,
  ):
    if window < 1 or length < 1:
      raise ValueError(
        f"PairHead: window={window}, length={length} — expected at least 1 token each — set "
        "window=8, length=48, or what your sentences have"
      )
    windows = -(-length // window)
    if mixers is None:
      offsets = tuple(sign * d for d in sorted({1, 2, 4, windows}) for sign in (1, -1))
      grassmann = functools.partial(Grassmann, rank=64, heads=4, offsets=offsets)
      mixers = {**WHOLE_ROW_MIXERS, "grassmann": grassmann}
    self.project = Linear({"embed": features}, {"mlp": dim}, bias=True, rngs=rngs)
    self.sentence_embedding = Embedding(2, dim, axis="position", rngs=rngs)
    super().__init__(
      dim,
      depth,
      pattern=pattern,
      mixers=mixers,
      mlp="dense",
      mlp_dim=mlp_dim,
      activation=None,
      norm="layer",
      placement=placement,
      bias=True,
      dropout_rate=dropout_rate,
      remat="none",
      dtype="float32",
      init_std=init_std,
      rngs=rngs,
    )
    self.compare = Linear({"pair": 4 * dim}, {"mlp": dim}, bias=True, rngs=rngs)
    self.output = LinearHead(dim, classes, rngs=rngs)
    self.window, self.windows, self.length = window, windows, length

  def __call__(self, features: jax.Array, live: jax.Array, *, dropout_key=None) -> jax.Array:
    """Logits of the classes of pairs.

    Args:
      features: [B, 2, T, F] of the tokens of premise and hypothesis, T at most `length`.
      live: [B, 2, T], true where there is a token, false at padding.
      dropout_key: a PRNG key; None means no dropout.
    Returns:
      [B, C] float32.
    Raises:
      ValueError: sentences are longer than `length`, or the shapes disagree.
    """
    batch, _, length, _ = features.shape
    if length > self.length or live.shape != (batch, 2, length):
      raise ValueError(
        f"PairHead: features have shape {features.shape}, live {live.shape} — expected [B, 2, T, "
        f"F] and [B, 2, T] with T at most length={self.length} — cut the sentences, or set "
        f"PairHead.length={max(length, self.length)}"
      )
    keys = (None, None, None) if dropout_key is None else jax.random.split(dropout_key, 3)
    tokens, counts = self._windowed(features, live)
    x = jnp.where(counts > 0, self.project(tokens), 0)
    x = x + self.sentence_embedding(jnp.arange(2)[:, None], x.dtype)
    x = dropout(x.reshape(batch, 2 * self.windows, self.dim), self.dropout_rate, keys[0])
    x = constrain(x, "batch", "length", None)
    layer_keys = None if keys[1] is None else jax.random.split(keys[1], self.periods)
    positions = jnp.broadcast_to(jnp.arange(2 * self.windows), x.shape[:2])
    y, _ = self.apply_layers(x, None, layer_keys, segment_ids=None, positions=positions)

    y = y.reshape(batch, 2, self.windows, self.dim)
    lives = (counts > 0).astype(y.dtype)
    a, b = jnp.unstack(jnp.sum(y * lives, 2) / jnp.maximum(jnp.sum(lives, 2), 1), axis=1)
    pair = jnp.concatenate([a, b, jnp.abs(a - b), a * b], axis=-1)
    return self.output(dropout(jax.nn.gelu(self.compare(pair)), self.dropout_rate, keys[2]))

  def flops(self, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass over `batch` pairs, a multiply-add counted as
    two; the length of their rows does not matter, they are filled up."""
    windows = 2 * self.windows
    pair = self.compare.flops_per_token + self.output.flops_per_feature
    return self.layer_flops(batch, windows) + batch * (
      windows * self.project.flops_per_token + pair
    )

  def _windowed(self, features, live):
    """Mean features of the tokens of each window, [B, 2, n, F], and how many it has, [B, 2, n, 1].

    The map to D is linear, so the mean may come first, which is less to multiply."""
    missing = self.windows * self.window - features.shape[2]
    weights = live.astype(features.dtype)[..., None]
    whole = ((0, 0), (0, 0), (0, missing), (0, 0))

    def summed(x):
      x = jnp.pad(x, whole).reshape(*x.shape[:2], self.windows, self.window, x.shape[3])
      return jnp.sum(x, axis=3)

    counts = summed(weights)
    return summed(features * weights) / jnp.maximum(counts, 1), counts


class SentencePairClassifier(nnx.Module):
  """An encoder that reads both sentences, each by itself, and a head that compares them.

  Args:
    vocab_size: tokens of the vocabulary; token 0 is padding.   classes: C.
    encoder: factory `(vocab_size, *, rngs) -> encoder`, such as `Encoder` with its sizes.
    head: factory `(features, classes, *, rngs) -> head`, such as `PairHead`.
    encoder_training: "trained", or "frozen": the encoder stays as it is, without dropout; its
      parameters get no gradient, and the trainer leaves them alone.
    rngs: gives the initial parameters.
  Raises:
    ValueError: encoder_training is unknown.
  """

  def __init__(
    self,
    vocab_size: int,
    classes: int,
    *,
    encoder: Callable[..., Encoder],
    head: Callable[..., nnx.Module] = PairHead,
    encoder_training: str = "trained",
    rngs: nnx.Rngs,
  ):
    if encoder_training not in TRAININGS:
      raise ValueError(
        f"SentencePairClassifier: encoder_training={encoder_training!r} is unknown; expected one "
        f"of {', '.join(TRAININGS)}"
      )
    self.encoder = encoder(vocab_size, rngs=rngs)
    if encoder_training == "frozen":
      freeze(self.encoder)
    self.head = head(self.encoder.dim, classes, rngs=rngs)
    self.encoder_training = encoder_training

  def __call__(self, *, premise: jax.Array, hypothesis: jax.Array, dropout_key=None) -> jax.Array:
    """Logits of the classes.

    Args:
      premise, hypothesis: [B, T] int32, 0 is padding.
      dropout_key: a PRNG key; None means no dropout.
    Returns:
      [B, C] float32.
    Raises:
      ValueError: the two have different shapes.
    """
    if premise.shape != hypothesis.shape:
      raise ValueError(
        f"SentencePairClassifier: premise has shape {premise.shape}, hypothesis "
        f"{hypothesis.shape} — expected [B, T] of both — fill the shorter rows up with 0"
      )
    frozen = self.encoder_training == "frozen"
    keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    # The two of a pair as neighbouring rows, so that a pair stays on its device.
    tokens = jnp.stack([premise, hypothesis], axis=1)
    rows = tokens.reshape(-1, premise.shape[1])
    features = self.encoder(
      rows, segment_ids=(rows != 0).astype(jnp.int32), dropout_key=None if frozen else keys[0]
    )
    features = jax.lax.stop_gradient(features) if frozen else features
    features = features.reshape(*tokens.shape, features.shape[-1])
    return self.head(features, tokens != 0, dropout_key=keys[1])

  def flops(self, batch: int, length: int) -> int:
    """Floating-point operations of a forward pass over `batch` pairs of two rows of `length`
    tokens, a multiply-add counted as two."""
    return self.encoder.flops(2 * batch, length) + self.head.flops(batch, length)
