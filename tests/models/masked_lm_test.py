"""Masked language models: published sizes, and the objective."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmix import sharding
from jaxmix.mixers import Attention, MonarchMixer
from jaxmix.models import Encoder, MaskedLM
from jaxmix.objectives import masked_loss
from jaxmix.objectives.masked import choose


def monarch_bert(dim, *, depth=12, hidden=128, max_length=128, norm=False, **options):
  """The published arrangement."""
  mixer = functools.partial(
    MonarchMixer, visibility="full", residual=True, norm=norm, max_length=max_length, hidden=hidden
  )
  encoder = functools.partial(
    Encoder,
    dim=dim,
    depth=depth,
    pattern=("monarch",),
    mixers={"monarch": mixer},
    placement="mlp_post_norm",
    activation="exact_gelu",
    norm_eps=1e-12,
    learned_positions=max_length,
    token_types=2,
    embedding_norm=True,
    **{"mlp": "gated_block_diagonal", **options},
  )
  return functools.partial(MaskedLM, encoder=encoder, rngs=nnx.Rngs(params=0))


@pytest.mark.parametrize(("dim", "length", "norm", "count"), [
  (768, 128, False, 80_267_328),
  (768, 128, True, 80_267_328 + 12 * 2 * 768),
  (960, 128, False, 115_583_616),
  (1536, 128, False, 259_133_760),
  (1792, 128, False, 341_038_144),
  (768, 2048, False, 81_972_288),
  (768, 8192, False, 87_428_160),
  (768, 32768, False, 109_251_648),
])  # fmt: skip
def test_published_sizes(dim, length, norm, count):
  """To the last parameter, with the vocabulary padded to 30,528."""
  model = jax.eval_shape(lambda: monarch_bert(dim, max_length=length, norm=norm)(30_528))
  assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == count


VOCABULARY, LENGTH = 40, 24


@pytest.fixture(scope="module")
def model():
  mixer = functools.partial(Attention, heads=2, visibility="full")
  encoder = functools.partial(
    Encoder, dim=16, depth=1, pattern=("attention",), mixers={"attention": mixer}, mlp_dim=24
  )
  return MaskedLM(VOCABULARY, encoder=encoder, rngs=nnx.Rngs(params=0))


@pytest.fixture(scope="module")
def batch():
  ids = np.array([[1] * 24, [1] * 9 + [2] * 6 + [0] * 9], np.int32)
  tokens = np.random.default_rng(0).integers(5, VOCABULARY, ids.shape).astype(np.int32)
  live = ids != 0
  inputs = np.where(live, tokens, 0).astype(np.int32)
  return {"inputs": inputs, "weights": live.astype(np.float32), "segment_ids": ids}


def choose_rows(keys, tokens, live, vocabulary: int):
  """Of several rows, a share of 0.3 behind the mask 4."""
  one_row = functools.partial(choose, rate=0.3, mask_id=4, vocab_size=vocabulary)
  return jax.vmap(one_row)(keys, tokens, live)


def test_loss_is_that_of_the_logits(model, batch, close):
  """Of the chosen tokens of the very rows that are shown."""
  key = jax.random.key(3)
  keys = jax.random.split(jax.random.split(key)[0], 2)
  places, weights, shown = choose_rows(keys, batch["inputs"], batch["weights"] != 0, VOCABULARY)
  log_p = jax.nn.log_softmax(model(shown, segment_ids=batch["segment_ids"]))
  rows = np.arange(2)[:, None]
  expected = -np.sum(weights * log_p[rows, places, batch["inputs"][rows, places]])
  total, count = masked_loss(model, batch, key, mask_id=4)
  close((total, count), (expected, 8 + 5), tolerance=1e-5)  # 0.3 of 24 and of 15


def test_choice():
  """Shares of what is chosen and how it is shown, in a long row; padding is never chosen."""
  tokens = np.random.default_rng(1).integers(5, 1000, (2, 20_000)).astype(np.int32)
  live = np.arange(20_000) < np.array([[20_000], [5_000]])
  keys = jax.random.split(jax.random.key(0), 2)
  places, weights, shown = map(np.asarray, choose_rows(keys, tokens, live, 1000))
  assert weights.sum(1).tolist() == [6000, 1500]
  for row in range(2):
    chosen = places[row][weights[row] > 0]
    assert len(set(chosen)) == len(chosen) and live[row, chosen].all()
    now, then = shown[row, chosen], tokens[row, chosen]
    assert abs(np.mean(now == 4) - 0.8) < 0.03
    assert abs(np.mean(now == then) - 0.1) < 0.03
    untouched = np.setdiff1d(np.arange(20_000), chosen)
    np.testing.assert_array_equal(shown[row, untouched], tokens[row, untouched])


def test_evaluation_repeats(model, batch, close):
  """Without a key the choice in a row hangs on its tokens alone, whatever rows are beside it, and
  wherever: rows of padding, of no weight, are not asked for. With a key, it hangs on that."""
  loss = jax.jit(functools.partial(masked_loss, mask_id=4))
  whole = loss(model, batch)
  assert whole == loss(model, batch)
  assert whole[1] == 4 + 3
  alone = [loss(model, {name: x[row : row + 1] for name, x in batch.items()}) for row in range(2)]
  close(np.sum(alone, 0), np.array(whole), tolerance=1e-6)
  other = {**batch, "inputs": batch["inputs"][::-1]}
  assert loss(model, other)[0] != whole[0]
  one, two = (loss(model, batch, jax.random.key(seed))[0] for seed in range(2))
  assert one != two
  padding = {name: np.zeros_like(batch[name]) for name in ("inputs", "weights")}
  rows = {name: batch[name][:1] for name in padding}
  filled = {name: np.concatenate([rows[name], padding[name]]) for name in padding}
  close(loss(model, filled), loss(model, rows), tolerance=1e-6)


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "tensor": 2, "sequence": 2}])
def test_evaluation_is_the_same_on_a_mesh(sizes, model, batch, close):
  """Rows that are cut over 8 devices, and their length too, have the same tokens chosen."""
  rows = {name: np.tile(x, (4, 1)) for name, x in batch.items()}
  rows["inputs"] = rows["inputs"] + np.arange(8, dtype=np.int32)[:, None] % 3
  loss = jax.jit(functools.partial(masked_loss, mask_id=4))
  expected, mesh = loss(model, rows), sharding.make_mesh(**sizes)
  with jax.set_mesh(mesh):
    found = loss(model, sharding.put_batch(rows, mesh))
  close(found, expected, tolerance=1e-6)


def test_padding_changes_nothing(batch, close):
  """Features of a padded batch are those of its rows alone: of the Monarch mixer too."""
  model = monarch_bert(16, depth=2, hidden=8, max_length=LENGTH, mlp_dim=32)(VOCABULARY)
  tokens, ids = batch["inputs"], batch["segment_ids"]
  padded = model(tokens, segment_ids=ids)
  alone = model(tokens[1:, :15], segment_ids=ids[1:, :15])
  close(padded[1:, :15], alone, tolerance=1e-5)
