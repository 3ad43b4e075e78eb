"""A split with carried state: what is carried, what starts again, and what does not fit."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmix.data import ByteTokenizer, LocalFiles, TextDataset
from jaxmix.evaluation.run import evaluate_split, evaluate_streams
from jaxmix.mixers import Attention, LinearAttention
from jaxmix.models import Decoder, abstract_parameters, init_parameters
from jaxmix.objectives import causal_loss
from jaxmix.sharding import make_mesh

LENGTH = 16
TEXT = "".join(chr(97 + index * index % 26) for index in range(200))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TextDataset:
  """One document of 200 letters as the split "validation"."""
  folder = tmp_path_factory.mktemp("letters")
  (folder / "text.txt").write_text(TEXT)
  source = LocalFiles(train=folder / "text.txt", validation=folder / "text.txt")
  return TextDataset(
    source, ByteTokenizer(), length=LENGTH, packing="blocks", separator="none", cache_dir=folder
  )


def build(**options):
  """Graph and parameters of a decoder of one layer."""
  factory = functools.partial(Decoder, 257, 16, 1, **options)
  graph, _, _ = abstract_parameters(factory)
  return graph, jax.jit(functools.partial(init_parameters, factory))(jax.random.key(0))


def test_learned_positions_start_again_and_the_state_goes_on(data):
  mixers = {"linear_attention": functools.partial(LinearAttention, heads=2)}
  graph, params = build(pattern=("linear_attention",), mixers=mixers, learned_positions=LENGTH)
  params["position_embedding"] = jax.tree.map(lambda x: 50 * x, params["position_embedding"])
  mesh = make_mesh()
  carried = evaluate_streams(graph, params, data, "validation", batch_size=1, mesh=mesh)

  tokens = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)[None]
  batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
  batch["weights"] = np.ones(batch["targets"].shape, np.float32)
  batch["positions"] = np.arange(tokens.size - 1, dtype=np.int32)[None] % LENGTH
  loss = jax.jit(lambda params, batch: causal_loss(nnx.merge(graph, params), batch))
  total, weight = loss(params, batch)
  # float32 sums in another order
  assert carried["loss"] == pytest.approx(float(total / weight), rel=1e-5)
  assert carried["targets"] == len(TEXT) - 1
  assert carried["bits_per_byte"] == pytest.approx(
    float(total) / np.log(2) / len(TEXT.encode()), rel=1e-5
  )
  fresh = evaluate_split(graph, params, data, "validation", batch_size=3, mesh=mesh)
  assert fresh["targets"] == carried["targets"]
  assert fresh["loss"] != pytest.approx(carried["loss"], rel=1e-5)


def test_a_stream_that_is_longer_than_the_cache_is_refused(data):
  mixers = {"attention": functools.partial(Attention, heads=2, max_length=5 * LENGTH)}
  graph, params = build(pattern=("attention",), mixers=mixers)
  streams = functools.partial(evaluate_streams, graph, params, data, "validation", mesh=make_mesh())
  assert np.isfinite(streams(batch_size=3)["loss"])  # 67 targets a stream, in 5 rows
  with pytest.raises(
    ValueError,
    match=r"split 'validation' as 2 streams with carried state: 112 tokens, but the Attention of "
    r"this model has a cache for 80 — expected at most 80 — use a larger batch_size, which makes "
    r"the streams shorter, or set Attention.max_length = 112",
  ):
    streams(batch_size=2)
