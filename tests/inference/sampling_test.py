"""Which tokens a draw can give, how often it gives them, and what it refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix.inference import sample

# Powers of two, so that sums are exact: ids 2, 0, 3, 1, 4 in the order of their probability.
PROBABILITIES = np.array([0.25, 0.0625, 0.5, 0.125, 0.0625], np.float32)
ROWS = 4096


def draws(probabilities, *, seed: int = 0, temperature: float = 1.0, **options) -> np.ndarray:
  logits = jnp.log(jnp.broadcast_to(jnp.asarray(probabilities), (ROWS, len(probabilities))))
  tokens = sample(logits, jax.random.key(seed), temperature=temperature, **options)
  assert tokens.shape == (ROWS,) and tokens.dtype == jnp.int32
  return np.asarray(tokens)


def test_temperature_zero_takes_the_most_likely_token_and_of_equals_the_first():
  logits = jnp.array([[0.0, 3.0, 1.0], [2.0, -1.0, 2.0]])
  for seed in (0, 1):
    np.testing.assert_array_equal(sample(logits, jax.random.key(seed), temperature=0), [1, 0])


@pytest.mark.parametrize(
  "options, kept",
  [
    ({}, {0, 1, 2, 3, 4}),
    ({"top_k": 1}, {2}),
    ({"top_k": 3}, {0, 2, 3}),
    ({"top_k": 4}, {0, 1, 2, 3}),  # ids 1 and 4 are equally likely: the lower one ranks first
    ({"top_k": 99}, {0, 1, 2, 3, 4}),
    ({"top_p": 1e-9}, {2}),
    ({"top_p": 0.5}, {2}),
    ({"top_p": 0.75}, {0, 2}),
    ({"top_p": 0.76}, {0, 2, 3}),
    ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
    ({"top_k": 2, "top_p": 0.6}, {2}),  # of the two that top_k leaves, id 2 has 2/3
    ({"top_k": 2, "top_p": 0.7}, {0, 2}),
    ({"temperature": 2.0, "top_p": 0.5}, {0, 2}),  # flatter, so that it takes two to reach half
  ],
)
def test_exactly_the_kept_tokens_come(options, kept):
  assert set(draws(PROBABILITIES, **options)) == kept


@pytest.mark.parametrize(
  "options, expected",
  [
    ({}, PROBABILITIES),
    ({"temperature": 0.5}, PROBABILITIES**2 / np.sum(PROBABILITIES**2)),
    ({"top_k": 3}, np.array([0.25, 0, 0.5, 0.125, 0]) / 0.875),
    ({"top_p": 0.75}, np.array([0.25, 0, 0.5, 0, 0]) / 0.75),
  ],
)
def test_tokens_come_as_often_as_their_probability_says(options, expected):
  counts = sum(
    np.bincount(draws(PROBABILITIES, seed=seed, **options), minlength=5) for seed in range(4)
  )
  n = 4 * ROWS
  deviation = np.sqrt(n * expected * (1 - expected))
  # Five standard deviations of a binomial: once in a million for a right sampler.
  assert np.all(np.abs(counts - n * expected) <= 5 * deviation)


def test_what_cuts_nothing_changes_no_draw():
  plain = draws(PROBABILITIES)
  for options in ({"top_k": 5}, {"top_k": 1000}, {"top_p": 1.0}, {"top_k": 5, "top_p": 1}):
    np.testing.assert_array_equal(draws(PROBABILITIES, **options), plain)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_logits_and_temperatures_are_no_trouble(options, dtype):
  logits = jnp.array([[-jnp.inf, 1e30, -1e30, -jnp.inf]] * 64, dtype)
  np.testing.assert_array_equal(sample(logits, jax.random.key(0), **options), 1)
  logits = jnp.array([[0.0, 1.0, 2.0, 3.0]] * 64, dtype)
  np.testing.assert_array_equal(sample(logits, jax.random.key(0), temperature=1e-30, **options), 3)
  logits = jnp.array([[0.0, -jnp.inf, 0.0, -jnp.inf]] * 64, dtype)
  assert set(np.asarray(sample(logits, jax.random.key(0), **options))) == {0, 2}


@pytest.mark.parametrize(
  "options, text",
  [
    ({"temperature": -1.0}, r"temperature=-1.0 — expected a number of at least 0"),
    ({"temperature": float("nan")}, r"temperature=nan — expected a number of at least 0"),
    ({"top_k": 0}, r"top_k=0 — expected at least 1 token"),
    ({"top_p": 0.0}, r"top_p=0.0 — expected a probability above 0 and at most 1"),
    ({"top_p": 1.5}, r"top_p=1.5 — expected a probability above 0 and at most 1"),
  ],
)
def test_options_out_of_range_are_refused(options, text):
  with pytest.raises(ValueError, match=text):
    sample(jnp.zeros((1, 4)), jax.random.key(0), **options)
