"""Laws of packing: every target once, no piece sees another, and lengths that do not fit."""

from __future__ import annotations

import collections
import time

import numpy as np
import pytest

from jaxmix.data.packing import cut_documents, make_rows, plan_rows, stream_batches
from jaxmix.data.token_store import TokenStore

LENGTHS = [1, 2, 7, 40, 8, 9, 17, 1, 3, 25, 16, 15, 2]  # in tokens; rows of 8 below


def store_of(lengths):
  """Documents of these many tokens; a token is its own place, so a target says where it is from."""
  offsets = np.cumsum([0, *lengths], dtype=np.int64)
  tokens = np.arange(offsets[-1]).astype(np.int32)
  return TokenStore(tokens=tokens, offsets=offsets, text_bytes=int(offsets[-1]))


def real(row):
  return row["weights"] > 0


def targets_of(rows):
  counts = collections.Counter()
  for index in range(len(rows)):
    counts.update(rows[index]["targets"][real(rows[index])].tolist())
  return counts


@pytest.mark.parametrize("packing, length", [("documents", 8), ("documents", 64), ("none", 40)])
def test_each_token_of_a_document_but_its_first_is_a_target_once(packing, length):
  store = store_of(LENGTHS)
  rows = make_rows(store, length=length, packing=packing, purpose="training")
  firsts = set(store.offsets[:-1].tolist())
  expected = {token: 1 for token in range(len(store.tokens)) if token not in firsts}
  assert targets_of(rows) == expected


@pytest.mark.parametrize("tokens", [2, 8, 9, 10, 16, 17, 18, 100])
def test_each_token_of_the_stream_but_the_first_is_evaluated_once(tokens):
  store = store_of([tokens - 1, 1])
  rows = make_rows(store, length=8, packing="blocks", purpose="evaluation")
  assert targets_of(rows) == {token: 1 for token in range(1, tokens)}
  assert all(set(rows[i]) == {"inputs", "targets", "weights"} for i in range(len(rows)))


def test_training_blocks_are_contiguous_and_full_and_drop_the_tail():
  rows = make_rows(store_of([50]), length=8, packing="blocks", purpose="training")
  assert len(rows) == 6  # 49 targets
  for index in range(6):
    row = rows[index]
    np.testing.assert_array_equal(row["inputs"], np.arange(8) + 8 * index)
    np.testing.assert_array_equal(row["targets"], row["inputs"] + 1)
    np.testing.assert_array_equal(row["weights"], 1)


@pytest.mark.parametrize("packing, length", [("documents", 8), ("documents", 30), ("none", 45)])
def test_segments_positions_and_targets_belong_together(packing, length):
  store = store_of(LENGTHS)
  rows = make_rows(store, length=length, packing=packing, purpose="training")
  document_of = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
  for index in range(len(rows)):
    row = rows[index]
    np.testing.assert_array_equal(row["segment_ids"] > 0, real(row))
    np.testing.assert_array_equal(row["targets"][real(row)], row["inputs"][real(row)] + 1)
    segments = row["segment_ids"].max()
    used = row["segment_ids"][real(row)]
    assert sorted(set(used.tolist())) == list(range(1, segments + 1))
    for segment in range(1, segments + 1):
      inside = row["segment_ids"] == segment
      inputs = row["inputs"][inside]
      np.testing.assert_array_equal(np.diff(inputs), 1)  # contiguous in the text
      np.testing.assert_array_equal(row["positions"][inside], np.arange(len(inputs)))
      assert len(set(document_of[[*inputs, inputs[-1] + 1]])) == 1  # the last target too
    for key in ("inputs", "targets", "segment_ids", "positions"):
      assert row[key].dtype == np.int32 and not row[key][~real(row)].any()
    assert row["weights"].dtype == np.float32


def test_without_packing_a_row_is_a_document_from_its_start():
  store = store_of(LENGTHS)
  rows = make_rows(store, length=40, packing="none", purpose="training")
  starts = [rows[index]["inputs"][0] for index in range(len(rows))]
  with_targets = [o for o, n in zip(store.offsets, LENGTHS, strict=False) if n > 1]
  assert starts == with_targets


def test_packing_fills_rows_and_is_fast():
  random = np.random.default_rng(0)
  lengths = random.lognormal(4.5, 1.2, 100_000).astype(np.int64) + 1
  store = store_of(lengths)
  start = time.perf_counter()
  rows = make_rows(store, length=256, packing="documents", purpose="training")
  seconds = time.perf_counter() - start
  filled = np.maximum(lengths - 1, 0).sum() / (len(rows) * 256)
  assert filled > 0.99
  assert seconds < 4  # 0.3 s on an idle core


def test_the_plan_depends_on_sizes_only_and_no_row_overflows():
  starts, sizes = cut_documents(store_of(LENGTHS).offsets, length=8)
  plan, again = plan_rows(starts, sizes, length=8), plan_rows(starts, sizes, length=8)
  np.testing.assert_array_equal(plan.starts, again.starts)
  used = np.add.reduceat(plan.sizes, plan.bounds[:-1])
  assert used.max() <= 8 and used.sum() == sizes.sum()
  firsts = plan.starts[plan.bounds[:-1]]
  assert (np.diff(firsts) > 0).all()  # rows come in the order of the text


@pytest.mark.parametrize("tokens, batch_size", [(2, 1), (50, 1), (50, 3), (49, 3), (51, 4), (4, 8)])
def test_streams_go_on_from_batch_to_batch_and_have_each_target_once(tokens, batch_size):
  stream = np.arange(tokens, dtype=np.uint16)
  batches = list(stream_batches(stream, length=8, batch_size=batch_size))
  joined = {key: np.concatenate([b[key] for b in batches], axis=1) for key in batches[0]}
  seen = []
  for row in range(batch_size):
    inside = joined["weights"][row] > 0
    assert not np.diff(inside.astype(int)).max(initial=0) > 0  # padding only after the end
    inputs, targets = joined["inputs"][row][inside], joined["targets"][row][inside]
    np.testing.assert_array_equal(np.diff(inputs), 1)
    np.testing.assert_array_equal(targets, inputs + 1)
    seen += targets.tolist()
  assert seen == list(range(1, tokens))
  assert all(b["inputs"].shape == (batch_size, 8) for b in batches)


@pytest.mark.parametrize(
  "lengths, length, packing, text",
  [
    ([5, 30, 40], 20, "none", "document 1 has 30 tokens where length=20 holds 21 .* set length=39"),
    ([5, 9], 17, "none", "length=17 is more than twice as long as any document: .* set length=8"),
    ([5, 4], 9, "blocks", "length=9 is longer than the whole split: .* set length=8 or less"),
    ([1, 1, 1], 4, "documents", "nothing to predict in 3 tokens of 3 documents"),
  ],
)
def test_lengths_that_do_not_fit_are_errors_with_the_repair(lengths, length, packing, text):
  with pytest.raises(ValueError, match=text):
    make_rows(store_of(lengths), length=length, packing=packing, purpose="training")


def test_a_short_split_can_still_be_evaluated():
  store = store_of([3, 2])
  blocks = make_rows(store, length=100, packing="blocks", purpose="evaluation")
  single = make_rows(store, length=100, packing="none", purpose="evaluation")
  assert (len(blocks), len(single)) == (1, 2)


def test_a_row_out_of_range_is_an_index_error():
  rows = make_rows(store_of([50]), length=8, packing="blocks", purpose="training")
  for index in (-1, 6):
    with pytest.raises(IndexError, match=f"row {index} of 6"):
      rows[index]
