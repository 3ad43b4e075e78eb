"""Layers side by side: which kernels are in them, and what is told of them."""

from __future__ import annotations

import json

import pytest

from jaxmix import compile_ahead
from jaxmix.compile_ahead.layers import Layers, compare, layers_table
from jaxmix.compile_ahead.run import Run

SMALL = ("Encoder.dim = 128", "Encoder.mlp_dim = 256", "Encoder.depth = 2")
OWN = {
  "bert_110m": ("Attention.heads = 2",),
  "monarch_bert_80m": ("MonarchMixer.hidden = 16", "MonarchMixer.residual = False"),
}
KERNELS = {
  "bert_110m": {"splash_mqa_fwd_no_residuals": 1},
  "monarch_bert_80m": {"long_convolution_forward": 1, "short_convolution_forward": 3},
}


def layers(repository, name: str, direction: str = "forward") -> Layers:
  file = str(repository / "configs" / "runs" / f"corpus_{name}.gin")
  return Layers(name, Run((file,), (*SMALL, *OWN[name])), rows=2, length=512, direction=direction)


@pytest.fixture(scope="module")
def rows(repository) -> dict[str, dict]:
  if (reason := compile_ahead.installed("tpu")) is not None:
    pytest.skip(reason)
  chosen = [layers(repository, name) for name in OWN]
  reports = compile_ahead.compile_all([each.task("v5e") for each in chosen])
  found = [each.row(report) for each, report in zip(chosen, reports, strict=True)]
  compare(found, "bert_110m")
  return {row["run"]: row for row in found}


@pytest.mark.parametrize("name", OWN)
def test_kernels_are_those_of_a_layer(rows, name):
  """As `implementation=None` chooses them for the target, in each of both layers."""
  row = rows[name]
  assert row["kernels"] == KERNELS[name]
  assert 0 < row["kernel_seconds"] < row["seconds"]
  assert row["limit_seconds"] <= row["seconds"]
  assert row["tokens_per_second"] == 2 * 512 / row["seconds"]


def test_table_compares_with_the_first(rows):
  bert, monarch = rows.values()
  assert bert["ratio"] == 1
  assert monarch["ratio"] == monarch["tokens_per_second"] / bert["tokens_per_second"]
  text = layers_table([bert, monarch])
  assert "2x512" in text and "long_convolution_forward x 1" in text and "/ the first" in text
  assert json.loads(json.dumps(monarch)) == monarch
  other = {**monarch, "direction": "forward_backward"}
  del other["ratio"]
  compare([bert, other], "bert_110m")
  assert "ratio" not in other and layers_table([bert, other])


@pytest.mark.parametrize(
  ("target", "direction", "message"),
  [
    ("h100", "forward", "h100: layers are compiled for one TPU"),
    ("v5e:4x4", "forward", "v5e:4x4: layers are compiled for one TPU"),
    ("v5e", "backward", "direction='backward' is unknown — expected one of forward, forward_back"),
  ],
)
def test_what_is_refused(repository, target, direction, message):
  with pytest.raises(ValueError, match=message):
    layers(repository, "bert_110m", direction).task(target)
