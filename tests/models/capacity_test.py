"""The longest stream that a model can carry is read off its mixers."""

from __future__ import annotations

import functools

import pytest
from flax import nnx

from jaxmix.mixers import Attention, LinearAttention
from jaxmix.models import Decoder, abstract_parameters
from jaxmix.models.capacity import cache_capacity, check_positions, check_stream_length

MIXERS = {
  "linear_attention": functools.partial(LinearAttention, heads=2),
  "attention": functools.partial(Attention, heads=2, max_length=100),
  "longer": functools.partial(Attention, heads=2, max_length=300),
  "local": functools.partial(Attention, heads=2, window=4, max_length=8),
}


def model(*pattern: str, learned_positions: int | None = None) -> Decoder:
  """A decoder without arrays."""
  graph, parameters, _ = abstract_parameters(
    functools.partial(
      Decoder,
      32,
      16,
      2,
      pattern=pattern,
      mixers=MIXERS,
      learned_positions=learned_positions,
    )
  )
  return nnx.merge(graph, parameters)


@pytest.mark.parametrize(
  "pattern, capacity",
  [
    (("linear_attention", "local"), None),
    (("attention", "local"), 100),
    (("longer", "attention"), 100),
    (("longer", "linear_attention"), 300),
  ],
)
def test_the_smallest_cache_that_looks_back_without_end_is_the_capacity(pattern, capacity):
  assert cache_capacity(model(*pattern)) == capacity


def test_what_does_not_fit_is_refused_with_the_repair():
  say = {"what": "a stream", "instead": "ask for less"}
  check_stream_length(model("attention"), 100, **say)
  check_stream_length(model("local"), 10**9, **say)
  with pytest.raises(
    ValueError,
    match=r"^a stream: 101 tokens, but the Attention of this model has a cache for 100 — expected "
    r"at most 100 — ask for less, or set Attention.max_length = 101 .*recurrent mixer",
  ):
    check_stream_length(model("attention"), 101, **say)


def test_more_positions_than_were_learned_are_refused():
  say = {"what": "a prompt", "instead": "ask for less"}
  check_positions(model("attention"), 10**9, **say)
  check_positions(model("attention", learned_positions=50), 50, **say)
  with pytest.raises(ValueError, match=r"^a prompt: 51 tokens, but .* learned 50 positions — "):
    check_positions(model("attention", learned_positions=50), 51, **say)
