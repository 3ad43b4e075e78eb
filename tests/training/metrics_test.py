"""What a run reports: one line a step across restarts, its speed, its picture, its end."""

from __future__ import annotations

import io
import json
import math
import types

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxmix.training import metrics
from jaxmix.training.metrics import (
  MetricsWriter,
  NonFiniteLoss,
  StepTimer,
  batch_fingerprint,
  peak_flops,
)
from jaxmix.training.plots import plot_comparison, plot_losses


class Terminal(io.StringIO):
  def isatty(self):
    return True


def rows(workdir) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def writer(workdir, **options) -> MetricsWriter:
  return MetricsWriter(workdir, **{"total_steps": 2000, "stream": io.StringIO(), **options})


def test_a_plain_line_shows_the_figures_with_their_units(tmp_path):
  stream = io.StringIO()
  report = writer(tmp_path, stream=stream)
  figures = {
    "loss": 2.3141,
    "bits_per_byte": 3.34,
    "gradient_norm": 0.81,
    "tokens_per_second": 12_345.0,
    "step_seconds": 0.084,
    "data_fraction": 0.001,
    "mfu": 0.4213,
    "momentum": 0.12345678,
  }
  report.write(100, figures)
  report.write(2000, {"loss": 2.5, "perplexity": 12.18}, split="validation")
  report.note("saved")
  report.close()
  assert stream.getvalue().splitlines() == [
    "step  100/2000  loss 2.314  bits/byte 3.340  grad 0.81  12.3k tok/s  step 84 ms  data 0.1%  "
    "mfu 42.1%  momentum 0.1235",
    "step 2000/2000  validation  loss 2.500  ppl 12.18",
    "saved",
  ]


def test_each_line_is_on_the_disk_as_soon_as_it_is_written(tmp_path):
  report = writer(tmp_path)
  report.write(1, {"loss": jnp.float32(1.5), "gradient_norm": math.inf})
  assert rows(tmp_path) == [{"step": 1, "split": "train", "loss": 1.5, "gradient_norm": None}]
  report.close()


def test_a_resumed_run_has_each_step_once(tmp_path):
  killed = writer(tmp_path)
  for step in range(1, 6):
    killed.write(step, {"loss": float(step)})
  killed.close()
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 3, "split": "tr')  # the line during which the process was killed
  resumed = writer(tmp_path, start_step=3)
  for step in range(4, 8):
    resumed.write(step, {"loss": 10.0 * step})
  resumed.close()
  assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
    *((step, step) for step in (1, 2, 3)),
    *((step, 10 * step) for step in (4, 5, 6, 7)),
  ]
  writer(tmp_path).close()
  assert rows(tmp_path) == []


def test_a_terminal_shows_a_bar_that_starts_where_the_run_continues(tmp_path):
  terminal = Terminal()
  report = writer(tmp_path, stream=terminal, start_step=500)
  report.write(1000, {"loss": 2.3})
  report.write(1000, {"loss": 2.5}, split="validation")
  report.close()
  assert "1000/2000" in terminal.getvalue()
  assert "loss 2.300" in terminal.getvalue()
  assert "step 1000/2000  validation  loss 2.500\n" in terminal.getvalue()


def test_only_the_primary_process_writes(tmp_path):
  stream = io.StringIO()
  report = writer(tmp_path / "run", primary=False, tensorboard=True, stream=stream)
  report.write(1, {"loss": 1.0})
  report.note("hello")
  report.close()
  assert not (tmp_path / "run").exists()
  assert stream.getvalue() == ""


def test_tensorboard_gets_the_events_when_asked(tmp_path):
  report = writer(tmp_path, tensorboard=True)
  report.write(1, {"loss": 1.0})
  report.close()
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert b"train/loss" in events.read_bytes()


class Clock:
  now = 100.0

  def __call__(self) -> float:
    return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
  clock = Clock()
  monkeypatch.setattr(metrics, "perf_counter", clock)
  return clock


def test_compilation_waiting_and_evaluation_are_told_apart(clock):
  timer = StepTimer(per_step={"tokens": 1000}, flops_per_step=2e12, peak_flops=1e13)

  def step(seconds, waiting):
    with timer.waiting_for_data():
      clock.now += waiting
    clock.now += seconds - waiting
    timer.step_done(jnp.zeros(()))

  step(7.0, waiting=1.0)
  assert timer.read() == {"compile_seconds": pytest.approx(6.0)}
  for _ in range(4):
    step(0.5, waiting=0.05)
  figures = timer.read()
  assert figures == {
    "tokens_per_second": pytest.approx(2000),
    "step_seconds": pytest.approx(0.5),
    "data_fraction": pytest.approx(0.1),
    "mfu": pytest.approx(0.4),
  }
  with timer.excluded():
    clock.now += 60.0
  for _ in range(4):
    step(0.5, waiting=0.05)
  assert timer.read() == pytest.approx(figures)
  assert timer.read() == {}


def test_without_a_known_peak_no_mfu_is_reported(clock):
  timer = StepTimer(per_step={"tokens": 1000}, flops_per_step=2e12, peak_flops=None)
  for _ in range(2):
    clock.now += 1.0
    timer.step_done(jnp.zeros(()))
  assert set(timer.read()) == {
    "compile_seconds",
    "tokens_per_second",
    "step_seconds",
    "data_fraction",
  }


def device(kind: str) -> types.SimpleNamespace:
  return types.SimpleNamespace(device_kind=kind)


@pytest.mark.parametrize(
  ("kind", "chip", "devices"),
  [
    ("TPU v4", pltpu.ChipVersion.TPU_V4, 1),
    ("TPU v5 lite", pltpu.ChipVersion.TPU_V5E, 1),
    ("TPU v5", pltpu.ChipVersion.TPU_V5P, 1),
    ("TPU v6 lite", pltpu.ChipVersion.TPU_V6E, 1),
    ("TPU7x", pltpu.ChipVersion.TPU_7X, 2),
  ],
)
def test_the_tpu_peaks_are_those_jax_knows(kind, chip, devices):
  one_core = pltpu.get_tpu_info_for_chip(chip, 1).bf16_ops_per_second
  per_chip = one_core * chip.num_physical_tensor_cores_per_chip
  # jax rounds to two or three digits: 0.92e15 for the 918e12 of the documentation.
  assert peak_flops(device(kind)) * devices == pytest.approx(per_chip, rel=5e-3)


def test_an_unknown_device_has_no_peak():
  assert peak_flops(device("cpu")) is None
  # Not the RTX A6000 and not the RTX 4090, although the names begin alike.
  assert peak_flops(device("NVIDIA RTX 6000 Ada Generation")) is None
  assert peak_flops(device("NVIDIA GeForce RTX 4090 Laptop GPU")) is None
  assert peak_flops(device("NVIDIA H200")) == 989.4e12


def test_the_fingerprint_is_of_the_content():
  batch = {"tokens": np.arange(12, dtype=np.int32).reshape(3, 4), "weight": np.float32(2)}
  print_ = batch_fingerprint(batch)
  assert print_ == "99894114b4ce2f42"  # the same in every process and on every machine
  assert print_ == batch_fingerprint(dict(reversed(batch.items())))
  assert print_ == batch_fingerprint({**batch, "tokens": jnp.asarray(batch["tokens"])})
  assert print_ == batch_fingerprint({**batch, "tokens": np.asfortranarray(batch["tokens"])})
  others = [
    {**batch, "tokens": batch["tokens"].reshape(4, 3)},
    {**batch, "tokens": batch["tokens"].astype(np.uint32)},
    {**batch, "tokens": batch["tokens"][::-1]},
    {"inputs": batch["tokens"], "weight": batch["weight"]},
    {**batch, "weight": np.ones(1, np.float32) * 2},
  ]
  assert len({print_, *map(batch_fingerprint, others)}) == 1 + len(others)


def test_a_loss_that_is_not_finite_names_step_batch_checkpoint_and_repair():
  error = NonFiniteLoss(step=120, loss=math.nan, fingerprint="5f2c", checkpoint="run/100")
  assert str(error) == (
    "the loss of step 120 is nan (batch 5f2c; last good checkpoint: run/100) — expected a finite "
    "one — lower the learning rate, clip the gradients to a smaller norm, or compute in float32"
  )
  without = NonFiniteLoss(step=3, loss=math.inf, fingerprint="5f2c", checkpoint=None)
  assert "the loss of step 3 is inf" in str(without)
  assert "no checkpoint was saved before" in str(without)


def test_the_losses_are_drawn_whole_or_not_at_all(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no .*metrics.jsonl — expected the file"):
    plot_losses(tmp_path)
  report = writer(tmp_path)
  report.write(0, {"loss": math.nan})
  with pytest.raises(ValueError, match=r"metrics.jsonl has no loss yet"):
    plot_losses(tmp_path)
  for step in (10, 20, 30):
    report.write(step, {"loss": 90 / step, "bits_per_byte": 1.0})
  report.write(30, {"loss": 3.5}, split="validation")
  report.close()
  picture = plot_losses(tmp_path)
  assert picture == tmp_path / "loss.png"
  assert picture.read_bytes().startswith(b"\x89PNG")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_runs_are_compared_in_one_picture(tmp_path):
  for label, loss in (("one", 5.0), ("two", 4.0)):
    report = writer(tmp_path / label)
    for step in (10, 20):
      report.write(step, {"loss": loss - step / 20}, split="validation")
    report.close()
  runs = {label: tmp_path / label for label in ("one", "two")}
  picture = plot_comparison(runs, tmp_path / "both.png", split="validation")
  assert picture.read_bytes().startswith(b"\x89PNG")
  with pytest.raises(ValueError) as error:
    plot_comparison(runs, tmp_path / "both.png", split="test")
  assert str(error.value) == (
    f"{tmp_path / 'one'} has no losses of 'test' — it has validation — name one of these"
  )
