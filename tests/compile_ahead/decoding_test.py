"""A decoding step on a target: what it has to move, what it moves, and where its weights' dtype
counts."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

from jaxmix import compile_ahead
from jaxmix.compile_ahead.decoding import decoding_report, decoding_task
from jaxmix.compile_ahead.run import Run
from jaxmix.compile_ahead.text import decoding_text
from jaxmix.inference.generate import abstract_decoding

SMALL = (
  "Decoder.dim = 512", "Decoder.depth = 4", "Decoder.mlp_dim = 1024", "GatedDeltaNet.heads = 2",
)  # fmt: skip
ROWS = 4


@pytest.fixture(scope="module")
def run(repository) -> Run:
  file = str(repository / "configs" / "runs" / "corpus_gated_deltanet_1b.gin")
  return Run((file,), SMALL, vocab_size=2048, length=4096)


def decoded(run: Run, target: str, **options):
  chip = compile_ahead.target(target)
  if (reason := compile_ahead.installed(chip.platform)) is not None:
    pytest.skip(reason)
  report = compile_ahead.compile_one(decoding_task(run, target, **options))
  return decoding_report(run, report, **options)


@pytest.fixture(scope="module", params=("v5e", "h100"))
def found(request, run):
  """In bfloat16, in which the model computes."""
  return decoded(run, request.param, rows=ROWS)


def sizes(tree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_bytes_are_those_of_the_weights_and_the_state(run, found):
  _, parameters, axes, model = run.model()
  # Matrices in bfloat16, what is no matrix in float32.
  matrices = sum(
    x.size
    for x, axis in zip(jax.tree.leaves(parameters), jax.tree.leaves(axes), strict=True)
    if axis.is_matrix
  )
  assert found.dtype == "bfloat16" and matrices > 0.98 * found.parameters
  assert found.parameter_bytes == sizes(parameters) - 2 * matrices
  assert found.weight_bytes == found.parameter_bytes  # tied: the logits read the whole table
  assert found.state_bytes == sizes(jax.eval_shape(lambda: model.init_state(ROWS)))
  assert found.ideal_bytes == found.weight_bytes + 2 * found.state_bytes
  memory = found.report.memory
  arguments = found.parameter_bytes + found.state_bytes
  assert arguments <= memory.arguments <= 1.05 * arguments  # tiles are padded
  assert memory.aliased >= found.state_bytes  # updated in place
  assert memory.fits


def test_time_is_that_of_the_bytes(found):
  chip = compile_ahead.target(found.report.target)
  assert found.ideal_seconds == found.ideal_bytes / chip.hbm_bandwidth
  assert found.seconds >= found.report.hbm_bytes / chip.hbm_bandwidth
  assert found.tokens_per_second == ROWS / found.seconds
  assert found.ratio == found.seconds / found.ideal_seconds
  # Nothing is read less than once; a step reads a weight or a part of the state thrice at most.
  assert 1 < found.ratio < 4
  if chip.platform == "tpu":
    assert found.scheduled_seconds > 0.9 * found.ideal_seconds
  else:
    assert found.scheduled_seconds is None


def test_text_and_json_hold_the_figures(found):
  text = decoding_text(found)
  assert "matrices in bfloat16" in text and f"each of {ROWS} rows" in text
  assert "state, updated in place" in text and "tokens/s" in text
  assert ("by its schedule" in text) == (found.scheduled_seconds is not None)
  values = json.loads(json.dumps(found.to_dict()))
  assert values["ratio"] == found.ratio and values["fits"] is True


def test_weights_in_float32_cost_their_cast(run):
  narrow, wide = (decoded(run, "v5e", rows=ROWS, dtype=dtype) for dtype in (None, "float32"))
  assert wide.dtype == "float32" and wide.parameter_bytes > 1.9 * narrow.parameter_bytes
  assert wide.scheduled_seconds > 1.2 * narrow.scheduled_seconds


def test_a_table_that_is_looked_up_in_costs_its_rows(run):
  untied = run.with_params("Decoder.tied_embeddings = False", "Decoder.learned_positions = 64")
  found = decoded(untied, "h100", rows=ROWS)
  skipped = (2048 - ROWS + 64 - ROWS) * 512 * 2
  assert found.weight_bytes == found.parameter_bytes - skipped


def test_the_step_takes_what_the_model_hands_on(run):
  graph, parameters, _, model = run.model()
  _, (_, tokens, segment_ids, state) = abstract_decoding(graph, parameters, ROWS)
  assert (tokens.shape, tokens.dtype, segment_ids) == ((ROWS,), jnp.int32, None)
  wanted = jax.eval_shape(lambda: model.init_state(ROWS))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
    lambda x: (x.shape, x.dtype), wanted
  )


def test_several_devices_are_refused(run):
  with pytest.raises(ValueError, match=r"h100:8 has 8 devices.*expected one device"):
    decoding_task(run, "h100:8")
