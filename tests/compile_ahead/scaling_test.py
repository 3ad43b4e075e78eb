"""Scaling on paper: how rows are dealt to devices, and what is told of the steps."""

from __future__ import annotations

import json

import pytest

from jaxmix.compile_ahead.communication import Collective
from jaxmix.compile_ahead.report import Memory, Report
from jaxmix.compile_ahead.run import Run, RunReport
from jaxmix.compile_ahead.scaling import plot_scaling, row_of, scaled, scaling_table
from jaxmix.compile_ahead.targets import target

RUN = Run(("configs/runs/corpus_gla_1b.gin",), vocab_size=50_257)


@pytest.mark.parametrize(
  ("name", "length", "rows", "parts"),
  [
    ("v5e:4x4", 4_096, 64, 1),
    ("v5p:4x4x4", 16_384, 64, 1),
    ("v5p:4x4x4", 2**20, 1, 64),
    ("v5p:4x4x4", 2**17, 8, 8),
  ],
)
def test_rows_are_dealt_and_cut(name, length, rows, parts):
  """So many tokens a device; fewer rows than devices are cut over several each."""
  run = scaled(RUN, name, length=length, tokens_per_device=16_384)
  devices = target(name).device_count
  assert run.length == length
  assert run.gin_params == (
    f"train.batch_size = {rows}",
    "make_mesh.data = 1",
    f"make_mesh.fsdp = {devices // parts}",
    f"make_mesh.sequence = {parts}",
  )


def test_length_that_does_not_deal_is_refused():
  with pytest.raises(ValueError, match=r"v5e:4x4: 16 devices of 1000 tokens are 15 rows of length"):
    scaled(RUN, "v5e:4x4", length=1_024, tokens_per_device=1_000)
  with pytest.raises(ValueError, match="expected whole rows that deal evenly"):
    scaled(RUN, "v5e:4x4", length=2**20, tokens_per_device=16_384)


def row(run: str, name: str, length: int, *, flops: float, sent: int = 0, model: int = 1) -> dict:
  """What `row_of` tells of a step of a million tokens."""
  collective = Collective(
    kind="all-gather", axes=("fsdp",), group_size=4, count=1, bytes=2 * sent, wire_bytes=sent,
    devices=(0, 1, 2, 3),
  )  # fmt: skip
  report = Report(
    target=name, versions={"jax": "1"}, mesh={"data": 1, "fsdp": 4, "tensor": 1, "sequence": 4},
    figures={}, lower_seconds=0, compile_seconds=0,
    memory=Memory(2**30, 0, 0, 0, 0, 0, 2**34), flops=flops, hbm_bytes=0,
    collectives=(collective,), pallas_kernels={}, unpriced=(), unknown_loops=(),
    saved_activations=0, stacked_gradients=0, schedule=None, gpu_kernels=None,
  )  # fmt: skip
  return row_of(run, length, RunReport(report, 10, 0, 0, 0, 2**20, model))


def test_row_tells_the_bound():
  chip = target("v5e:4x4")
  found = row("gla", "v5e:4x4", 4096, flops=2 * chip.matmul_flops, sent=5)
  assert found["seconds"] == 2 and found["limited_by"] == "compute"
  assert found["tokens_per_second_per_device"] == 2**20 / 2 / 16
  assert found["rows"] == 256 and found["sent"] == {"all-gather": 5} and found["fits"]
  assert json.loads(json.dumps(found)) == found


def test_kernels_without_an_estimate_take_the_time_of_the_model():
  """Its flops at the peak of all chips."""
  chip = target("v5e:4x4")
  model = int(3 * chip.matmul_flops * 16)
  found = row("attention", "v5e:4x4", 4096, flops=1, model=model)
  assert found["seconds"] == pytest.approx(3) and found["mfu"] == pytest.approx(1)


def test_table_and_picture(tmp_path):
  peak = target("v5e").matmul_flops
  rows = [
    row("gla", name, length, flops=peak)
    for name, length in (("v5e:4x4", 4096), ("v5e:8x8", 4096), ("v5e:4x4", 2**20))
  ]
  lines = scaling_table(rows).splitlines()
  assert len(lines) == 4 and "1,048,576" in lines[3] and "1.00 GiB" in lines[1]
  picture = plot_scaling(rows, tmp_path / "pictures" / "scaling.png")
  assert picture.read_bytes().startswith(b"\x89PNG")
