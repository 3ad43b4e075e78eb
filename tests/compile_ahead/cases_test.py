"""The cases of the kernels as programs, the limit of an op, and the ratio to attention."""

from __future__ import annotations

import pytest

from jaxmix import compile_ahead
from jaxmix.compile_ahead import cases
from jaxmix.compile_ahead.cases import CaseProgram
from jaxmix.compile_ahead.text import case_rows, compare_with_attention, tpu_table

BYTES = 2 * 4 * 4096 * 16 * 128  # of one array of the case "train" in bfloat16
STATE = 4 * 4 * 16 * 128 * 128


def least(op: str, case: str, direction: str, implementation: str = "xla") -> float:
  chip = compile_ahead.target("v5e")
  return CaseProgram(op, case, direction, implementation, "bfloat16").least_seconds(chip)


def test_limit_of_an_op_is_its_arrays_once_a_pass():
  bandwidth = compile_ahead.target("v5e").hbm_bandwidth
  forward = 4 * BYTES + STATE
  assert least("linear_attention", "train", "forward") == forward / bandwidth
  # Again the arrays, and the cotangent; the gradients.
  both = 2 * forward + 3 * BYTES + STATE
  assert least("linear_attention", "train", "forward_backward") == both / bandwidth
  # A float32 decay of every key channel is two arrays more.
  assert least("linear_attention", "train_vector", "forward") == (forward + 2 * BYTES) / bandwidth


def test_limit_of_attention_is_its_causal_pairs():
  peak = compile_ahead.target("v5e").matmul_flops
  flops = 4 * 4 * 16 * 128 * 4096 * 4097 // 2
  for op, implementation in (("attention", "xla"), ("delta_rule", cases.BASELINE)):
    case = "train" if op == "attention" else "train_scalar"
    assert least(op, case, "forward", implementation) == flops / peak
    assert least(op, case, "forward_backward", implementation) == 3 * flops / peak


def test_attention_is_compared_with_once_for_each_shape():
  chip = compile_ahead.target("v5e")
  names = ("train_scalar", "train_vector", "train_2k_scalar")
  programs = [
    (program, chip)
    for op in ("linear_attention", "delta_rule")
    for program in cases.case_programs(op, chip, names=names)
  ]
  found = cases.baselines_once(programs)
  baselines = [case for case, _ in found if case.implementation == cases.BASELINE]
  assert len(baselines) == 2 * len(cases.DIRECTIONS)  # two lengths
  assert len(programs) - len(found) == 4 * len(cases.DIRECTIONS)


def test_implementations_are_chosen_by_name():
  chip = compile_ahead.target("v5e")
  options = {"names": ("train",), "implementations": ("tpu", "xla")}
  found = cases.case_programs("linear_attention", chip, **options)
  assert [program.implementation for program in found] == ["tpu", "tpu", "xla", "xla"]
  with pytest.raises(ValueError, match="no implementation 'cuda' — expected some of tpu, gpu"):
    cases.case_programs("linear_attention", chip, implementations=("cuda",))


def test_a_case_is_that_of_the_ops_that_have_it():
  ops = ("linear_attention", "delta_rule", "short_convolution")
  found = cases.cases_of(ops, ("train_constant", "train_scalar"))
  assert found == {
    "linear_attention": ("train_constant", "train_scalar"),
    "delta_rule": ("train_scalar",),
  }
  assert "train_packed" in cases.cases_of(ops, ())["short_convolution"]
  with pytest.raises(ValueError, match="linear_attention has no case 'trian' — it has one_token"):
    cases.cases_of(ops, ("train_scalar", "trian"))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
  """A kernel and JAX's attention at the same sizes, forward."""
  if (reason := compile_ahead.installed("tpu")) is not None:
    pytest.skip(reason)
  chip = compile_ahead.target("v5e")
  found = []
  for implementation in ("tpu", cases.BASELINE):
    case = CaseProgram("linear_attention", "train_2k", "forward", implementation, "bfloat16")
    found += case_rows(case, compile_ahead.compile_one(cases.case_task(case, chip)))
  compare_with_attention(found)
  return found


def test_a_program_pays_for_no_layout_of_its_own(rows):
  kernel, program, *_ = rows
  assert program["name"] == "program" and kernel["name"] == "linear_attention_forward"
  assert kernel["hbm_bytes"] <= program["hbm_bytes"] < 1.05 * kernel["hbm_bytes"]


def test_program_is_measured_by_the_op_and_by_attention(rows):
  kernel, program, *_, attention = rows
  assert program["over_op_limit"] == program["predicted_us"] / program["op_limit_us"] >= 1
  ratio = attention["predicted_us"] / program["predicted_us"]
  assert program["attention_ratio"] == ratio > 1
  assert "op_limit_us" not in kernel and "attention_ratio" not in attention
  assert f"{ratio:.2f}" in tpu_table(rows)
