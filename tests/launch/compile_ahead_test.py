"""launch/compile_ahead.py as a user runs it, on GPUs: their compiler is the quicker one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from jaxmix import compile_ahead

# 770 rows split in two parts only, and "dots" leaves one policy to try: two remedies.
TOO_LARGE = (
  "Decoder.dim = 512", "Decoder.mlp_dim = 1408", "Decoder.depth = 4", "LinearAttention.heads = 4",
  "train.batch_size = 770", 'Decoder.remat = "dots"',
)  # fmt: skip


@pytest.fixture(scope="module")
def launch(repository):
  """Runs the script: (exit code, output, errors)."""
  if (reason := compile_ahead.installed("cuda")) is not None:
    pytest.skip(reason)

  def run(*arguments: str):
    command = [sys.executable, str(repository / "launch" / "compile_ahead.py"), *arguments]
    done = subprocess.run(
      command, capture_output=True, text=True, timeout=400, cwd=repository, check=False,
      env=compile_ahead.compilers.environment("cuda"),
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr

  return run


def params(*lines: str) -> list[str]:
  return [word for line in lines for word in ("--gin_param", line)]


def test_a_run_that_does_not_fit_gets_remedies_that_do(launch, tmp_path):
  code, out, err = launch(
    "--gin_file", "configs/runs/corpus_linear_attention_1b.gin", *params(*TOO_LARGE),
    "--vocab_size", "512", "--length", "2048",
    "--target", "a6000", "--json", str(tmp_path / "report.json"),
  )  # fmt: skip
  assert code == 3, err
  assert "a6000: 1 x NVIDIA RTX A6000" in out and "DOES NOT FIT" in out
  (report,) = json.loads((tmp_path / "report.json").read_text())
  assert report["fits"] is False and report["headroom"] < 0
  assert report["remedies"], out
  for remedy in report["remedies"]:
    assert remedy["fits"] is True
    assert "; ".join(remedy["gin_params"]) in out


def test_sweep_ranks_what_fits(launch, tmp_path):
  code, out, err = launch(
    "--gin_file", "configs/runs/quickstart.gin", "--target", "h100:2", "--sweep", "--batch_size",
    "16", "--json", str(tmp_path / "sweep.json"),
  )  # fmt: skip
  assert code == 0, err
  (result,) = json.loads((tmp_path / "sweep.json").read_text())
  speeds = [row["tokens_per_second"] for row in result["sweep"]]
  assert len(speeds) >= 3 and speeds == sorted(speeds, reverse=True)
  assert "tokens/s at most" in out and "make_mesh.tensor = 2" in out


def test_decoding_with_several_numbers_of_rows(launch, tmp_path):
  code, out, err = launch(
    "--gin_file", "configs/runs/quickstart.gin", "--target", "h100", "--decode", "--batch_size",
    "1", "8", "--json", str(tmp_path / "decode.json"),
  )  # fmt: skip
  assert code == 0, err
  (result,) = json.loads((tmp_path / "decode.json").read_text())
  one, eight = result["decode"]
  assert (one["rows"], eight["rows"]) == (1, 8) and one["dtype"] == "float32"
  assert eight["state_bytes"] == 8 * one["state_bytes"]
  assert "each of 1 rows" in out and "each of 8 rows" in out


def test_kernels_on_a_gpu(launch):
  code, out, err = launch("--kernels", "attention", "--case", "train", "--target", "h100")
  assert code == 0, err
  assert "mha_forward" in out and "wgmma" in out and "kernels of XLA" in out


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("--kernels", "--target", "h1000"), "did you mean"),
    (("--kernels", "atention", "--target", "h100"), "no op 'atention' — expected one of attention"),
    (
      ("--kernels", "attention", "--case", "big", "--target", "h100"),
      "attention has no case 'big' — it has causal",
    ),
    (
      ("--gin_file", "configs/runs/quickstart.gin", "--gin_param", "Decoder.dims = 3", "--target",
       "h100"),
      "dims",
    ),
    (("--kernels", "attention", "--decode", "--target", "h100"), "--decode with --kernels"),
    (
      ("--gin_file", "configs/runs/quickstart.gin", "--decode", "--sweep", "--target", "h100"),
      "--decode with --sweep",
    ),
  ],
)  # fmt: skip
def test_mistakes_are_one_line(launch, arguments, message):
  code, _, err = launch(*arguments)
  assert code == 1
  assert message in err and "Traceback" not in err
