"""What constructors of mixers refuse, and the feature maps and normalisers by name."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmix.mixers import MIXERS, Attention, LinearAttention


@pytest.mark.parametrize(
  ("make", "text"),
  [
    (functools.partial(Attention, 30, heads=4),
     "Attention: dim=30 is not a multiple of heads=4; try heads=2 or set head_dim"),
    (functools.partial(Attention, 32, heads=4, key_heads=3),
     "Attention: heads=4 is not a multiple of key_heads=3; try key_heads=1"),
    (functools.partial(Attention, 32, heads=4, position_encoding="alibi"),
     "Attention: position_encoding='alibi' is unknown; expected one of rotary, none"),
    (functools.partial(Attention, 12, heads=4),
     "Attention: rotary positions turn pairs of channels, head_dim=3 is odd; use an even head_dim"),
    (functools.partial(LinearAttention, 30, heads=4),
     "LinearAttention: dim=30 is not a multiple of heads=4; try heads=2 or set key_dim and "
     "value_dim"),
    (functools.partial(LinearAttention, 32, heads=4, feature_map="exp"),
     "LinearAttention: feature_map='exp' is unknown; expected one of elu_plus_one, relu, "
     "softmax, identity, hedgehog"),
    (functools.partial(LinearAttention, 32, heads=4, normalizer="layer"),
     "LinearAttention: normalizer='layer' is unknown; expected one of sum, rms, none"),
    (functools.partial(LinearAttention, 32, heads=4, feature_map="identity"),
     'LinearAttention: normalizer="sum" divides by weights that feature_map="identity" lets be '
     'zero; use normalizer="rms"'),
  ],
)  # fmt: skip
def test_errors(make, text):
  with pytest.raises(ValueError) as error:
    make(rngs=nnx.Rngs(params=0))
  assert str(error.value) == text


def test_full_visibility_has_no_state():
  mixer = jax.eval_shape(lambda: Attention(32, heads=4, visibility="full", rngs=nnx.Rngs(params=0)))
  with pytest.raises(ValueError) as error:
    mixer.init_state(1)
  assert str(error.value) == (
    'Attention: visibility="full" cannot stream, since every token sees the later ones; use '
    'visibility="causal"'
  )


def test_every_mixer_has_a_name():
  assert {name.replace("_", "") for name in MIXERS} == {
    mixer.__name__.lower().removesuffix("mixer") for mixer in MIXERS.values()
  }


@pytest.mark.parametrize("feature_map", ["elu_plus_one", "relu", "softmax"])
def test_feature_maps(feature_map, close, rounding):
  """The whole mixer with the sum of weights, by its formula over all pairs, in numpy."""
  mixer = LinearAttention(16, heads=2, feature_map=feature_map, rngs=nnx.Rngs(params=0))
  x = np.random.default_rng(0).normal(size=(1, 9, 16))
  phi = {
    "elu_plus_one": lambda z: np.where(z > 0, z + 1, np.exp(z)),
    "relu": lambda z: np.maximum(z, 0),
    "softmax": lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True),
  }[feature_map]
  q, k, v = (
    np.einsum("btd,dhk->bthk", x, np.float64(part.kernel[...]))
    for part in (mixer.q, mixer.k, mixer.v)
  )
  weights = np.einsum("bthk,bshk->bhts", phi(q), phi(k)) * np.tri(9) / np.sqrt(8)
  y = np.einsum("bhts,bshv->bthv", weights, v) / (
    np.moveaxis(weights.sum(-1), 1, 2)[..., None] + 1e-10
  )
  y = np.einsum("bthv,hvd->btd", y, np.float64(mixer.out.kernel[...]))
  close(mixer(jnp.asarray(x, jnp.float32))[0], y, tolerance=rounding(np.float32, 4 * 16 + 9))
