"""A training run on a target: what of its memory is what, and what to try where it does not fit."""

from __future__ import annotations

import json

import jax
import pytest

from jaxmix import compile_ahead
from jaxmix.compile_ahead.run import Run, remedies, run_report, run_task, sweep
from jaxmix.compile_ahead.text import run_text
from jaxmix.models import abstract_parameters

SMALL = ("Decoder.dim = 256", "train.batch_size = 16", "make_mesh.data = 2", "make_mesh.fsdp = 4")


@pytest.fixture(scope="module")
def run(repository) -> Run:
  return Run((str(repository / "configs" / "runs" / "quickstart.gin"),), SMALL)


@pytest.fixture(scope="module")
def found(run):
  """The quickstart, wider, on a host of eight H100: compiled as it would be trained there."""
  if (reason := compile_ahead.installed("cuda")) is not None:
    pytest.skip(reason)
  return run_report(run, compile_ahead.compile_one(run_task(run, "h100:8")))


def test_memory_is_told_apart(run, found):
  model = run.configuration().value("model")
  _, parameters, _ = abstract_parameters(lambda *, rngs: model(257, rngs=rngs))
  count = sum(x.size for x in jax.tree.leaves(parameters))
  assert found.parameters == count
  # Nearly all is cut over fsdp=4; norms and scales are not.
  assert 4 * count / 4 <= found.parameter_bytes <= 1.1 * 4 * count / 4
  # Muon keeps one moment of a matrix, Adam two of the rest.
  assert found.parameter_bytes <= found.optimizer_bytes <= 2.1 * found.parameter_bytes
  # Two rows of 128 a device: inputs, targets, weights, documents and positions.
  assert found.batch_bytes == 5 * 4 * 2 * 128
  memory = found.report.memory
  arguments = found.parameter_bytes + found.optimizer_bytes + found.batch_bytes
  assert arguments <= memory.arguments <= arguments + 64 * 1024  # step, rng, padding
  parts = found.gradient_bytes + found.activation_bytes + found.other_bytes
  assert parts == memory.temporaries
  assert memory.aliased >= found.parameter_bytes + found.optimizer_bytes  # updated in place


def test_bound_and_mfu(run, found):
  target, bound = compile_ahead.target("h100:8"), found.report.bound
  assert found.tokens == 16 * 128
  assert bound.compute == found.report.flops / target.matmul_flops
  assert bound.seconds == max(bound.compute, bound.hbm, bound.interconnect) > 0
  assert found.tokens_per_second == found.tokens / bound.seconds
  assert 0 < found.mfu < 1
  # The step computes what the model says, and beside it Muon's Newton-Schulz iterations, the chunks
  # of linear attention and the scores that a window hides.
  assert 0.95 < 8 * found.report.flops / found.model_flops < 3
  assert {row.axes for row in found.report.collectives} >= {("fsdp",)}


def test_a_run_on_two_slices_sends_within_each(repository):
  if (reason := compile_ahead.installed("tpu")) is not None:
    pytest.skip(reason)
  files = (f"configs/{name}.gin" for name in ("runs/quickstart", "mesh/fsdp_slices2"))
  tiny = ('Decoder.pattern = ("linear_attention",)', "Decoder.mixers = None", "Decoder.depth = 1")
  run = Run(tuple(str(repository / name) for name in files), tiny)
  report = run_report(run, compile_ahead.compile_one(run_task(run, "v5e:2x2:2")))
  assert report.report.mesh["data"] == 2 and report.report.mesh["fsdp"] == 4
  assert {row.group_size for row in report.report.collectives} == {4}, "of the four of a slice"
  assert "what slices send one another is not in these times" in run_text(report)


def test_text_and_json_hold_the_figures(found):
  text = run_text(found)
  assert "h100:8: 8 x NVIDIA H100" in text and "(data=2, fsdp=4)" in text
  assert "fits, with" in text and "tokens/s" in text and "reduce-scatter" in text
  values = json.loads(json.dumps(found.to_dict()))
  assert values["fits"] is True and values["bound"]["limited_by"] in text
  assert values["report"]["memory"]["peak"] == found.report.memory.peak
  assert values["parameters"] == found.parameters


def test_remedies_are_those_that_change_something(run):
  first, both, *_ = remedies(run, devices=8)
  assert first[:3] == (
    ("make_mesh.data = 1", "make_mesh.fsdp = -1"),
    ('Decoder.remat = "dots"',),
    ('Decoder.remat = "full"',),
  )
  assert first[3:] == (("train.microbatches = 2",),)  # 16 rows on 8 devices: not in four parts
  assert ("make_mesh.data = 1", "make_mesh.fsdp = -1", 'Decoder.remat = "full"') in both
  done = run.with_params('Decoder.remat = "full"', "make_mesh.data = 1", "make_mesh.fsdp = -1")
  assert remedies(done, devices=8)[0] == (("train.microbatches = 2",),)


def test_sweep_tries_every_way_to_lay_out_the_devices(run):
  tried = sweep(run, devices=8, batch_sizes=(8, 16))
  assert len(tried) == len(set(tried))
  for data, fsdp, tensor in ((1, 8, 1), (8, 1, 1), (1, 4, 2), (1, 1, 8)):
    wanted = (
      f"make_mesh.data = {data}",
      f"make_mesh.fsdp = {fsdp}",
      f"make_mesh.tensor = {tensor}",
    )
    assert (*wanted, "train.batch_size = 8") in tried
  # A batch that the mesh does not divide is not tried.
  assert not [params for params in sweep(run, 8, (4,)) if "make_mesh.fsdp = 8" in params]


def test_rows_are_as_the_run_packs_them(repository):
  """Blocks have no segment_ids, whether the text is here or not; the remedies name the model."""
  run = Run((str(repository / "configs" / "runs" / "corpus_bert_110m.gin"),), (), 512, 128)
  assert set(run.outline().row) == {"inputs", "targets", "weights"}
  packed = run.with_params('TextDataset.packing = "documents"')
  assert "segment_ids" in packed.outline().row
  assert ('Encoder.remat = "full"',) in remedies(run, devices=16)[0]


def test_data_that_is_not_here_is_said_with_the_way_out(repository, monkeypatch):
  monkeypatch.setenv("JAXMIX_DATA", "/nowhere")
  run = Run((str(repository / "configs" / "runs" / "corpus_linear_attention_1b.gin"),))
  with pytest.raises(FileNotFoundError, match=r"the data of this run is not here.*--vocab_size"):
    run.outline()
  given = Run(run.gin_files, vocab_size=32_000, length=4096)
  assert given.outline().sizes == {"vocab_size": 32_000}
  assert given.outline().row["inputs"][0] == (4096,)
