"""What a training run reports: figures at every N steps, its speed, and why it stopped.

The names of the figures are those of the loop; a few have a short form on the terminal (`_SHORT`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import Any, TextIO

import jax
import numpy as np

_SHORT = {
  "loss": lambda x: f"loss {x:.3f}",
  "perplexity": lambda x: f"ppl {x:.2f}",
  "bits_per_byte": lambda x: f"bits/byte {x:.3f}",
  "gradient_norm": lambda x: f"grad {x:.2f}",
  "learning_rate": lambda x: f"lr {x:.2e}",
  "accuracy": lambda x: f"accuracy {x:.2%}",
  "tokens_per_second": lambda x: f"{_thousands(x)} tok/s",
  "examples_per_second": lambda x: f"{_thousands(x)} examples/s",
  "step_seconds": lambda x: f"step {x * 1e3:.3g} ms",
  "data_fraction": lambda x: f"data {x:.1%}",
  "mfu": lambda x: f"mfu {x:.1%}",
  "compile_seconds": lambda x: f"compile {x:.1f} s",
}

# Dense bfloat16 peak, FLOP/s of one jax device, by its `device_kind`. TPU: the page of each version
# in the Cloud TPU documentation, "Peak compute per chip (BF16)"; a chip has two names where libtpu
# and the documentation differ. A TPU7x chip is two jax devices, every other chip here is one.
# NVIDIA: matrix multiply with float32 accumulation, without sparsity, as the figures of the data
# sheets are commonly quoted; the sheets themselves have not been compared.
_PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 2307e12 / 2,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA A100-PCIE-40GB": 312e12,
  "NVIDIA A100 80GB PCIe": 312e12,
  "NVIDIA H100 80GB HBM3": 989.4e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 NVL": 835.5e12,
  "NVIDIA H200": 989.4e12,
  "NVIDIA H200 NVL": 835.5e12,
  "NVIDIA RTX A6000": 154.8e12,
  "NVIDIA GeForce RTX 4090": 165.2e12,
  "NVIDIA B200": 2250e12,
}


def peak_flops(device: jax.Device) -> float | None:
  """Dense bfloat16 peak of one jax device in FLOP/s, None where it is not known (a CPU)."""
  return _PEAK_FLOPS.get(device.device_kind)


class NonFiniteLoss(RuntimeError):
  """The loss became NaN or infinite; the message names the step, the batch and the repair."""

  def __init__(self, *, step: int, loss: float, fingerprint: str, checkpoint: str | None):
    """`fingerprint`: of the batch; `checkpoint`: the last good one as a path, None without one."""
    back = f"last good checkpoint: {checkpoint}" if checkpoint else "no checkpoint was saved before"
    super().__init__(
      f"the loss of step {step} is {loss} (batch {fingerprint}; {back}) — expected a finite one — "
      "lower the learning rate, clip the gradients to a smaller norm, or compute in float32"
    )


def batch_fingerprint(batch: Mapping[str, np.ndarray]) -> str:
  """16 hex digits of the content of a batch: names, dtypes, shapes and bytes, in any order."""
  digest = hashlib.blake2b(digest_size=8)
  for name in sorted(batch):
    array = np.ascontiguousarray(batch[name])
    # The shape comes from the batch: ascontiguousarray gives a scalar an axis.
    digest.update(f"{name}:{array.dtype.str}{np.shape(batch[name])};".encode())
    digest.update(array.view(np.uint8).data)
  return digest.hexdigest()


class PendingResults:
  """Results of steps that were dispatched and not yet waited for.

  Reading them one by one would make the host wait for every step; not reading them would let a run
  go on after a NaN. They are fetched together, and the batches are kept until then so that a bad
  one can be named.
  """

  def __init__(self):
    self._pending: list[tuple[int, Mapping[str, np.ndarray], Mapping[str, jax.Array]]] = []

  def add(
    self, step: int, batch: Mapping[str, np.ndarray], results: Mapping[str, jax.Array]
  ) -> None:
    """Notes a step: its number, its batch on the host, and its scalar results on the devices."""
    self._pending.append((step, batch, results))

  def read(self, *, checkpoint: str | None) -> dict[str, float]:
    """Waits for the steps since the last call and averages each of their results.

    Raises:
      NonFiniteLoss: the loss or the norm of the gradient of a step was NaN or infinite; the message
        names `checkpoint` as the last good one.
    """
    pending, self._pending = self._pending, []
    fetched = jax.device_get([results for _, _, results in pending])
    for (step, batch, _), results in zip(pending, fetched, strict=True):
      if not np.isfinite([results["loss"], results["gradient_norm"]]).all():
        raise NonFiniteLoss(
          step=step,
          loss=float(results["loss"]),
          fingerprint=batch_fingerprint(batch),
          checkpoint=checkpoint,
        )
    return {name: float(np.mean([results[name] for results in fetched])) for name in fetched[0]}


class StepTimer:
  """Speed in steady state, between two moments at which the loop waited for its results.

  JAX returns from a step before it has run, so only a window of steps that ends in reading a result
  can be timed. The first step, which compiles, is waited for and reported by itself.

      with timer.waiting_for_data():
        batch = next(batches)
      state, results = train_step(state, batch)
      timer.step_done(results)
      ...
      figures = {name: float(value) for name, value in results.items()} | timer.read()
      with timer.excluded():                            # after `read`, so that the devices are idle
        evaluate(...)

  Args:
    per_step: how many of what one step trains on, over all devices, such as {"tokens": 8192}; each
      is reported a second.
    flops_per_step: FLOP that one step needs by the formulas of the model, over all devices.
    peak_flops: FLOP/s of all devices together. Without either one no MFU is reported.
  """

  def __init__(
    self,
    *,
    per_step: Mapping[str, int],
    flops_per_step: float | None = None,
    peak_flops: float | None = None,
  ):
    self._per_step = dict(per_step)
    self._utilisation = flops_per_step / peak_flops if flops_per_step and peak_flops else None
    self._compile_seconds: float | None = None
    self._compiled = False
    self._start_window()

  def _start_window(self) -> None:
    self._started = perf_counter()
    self._steps = 0
    self._data_seconds = 0.0
    self._excluded_seconds = 0.0

  @contextlib.contextmanager
  def waiting_for_data(self) -> Iterator[None]:
    """Counts what happens inside as waiting for the data."""
    before = perf_counter()
    yield
    self._data_seconds += perf_counter() - before

  @contextlib.contextmanager
  def excluded(self) -> Iterator[None]:
    """Leaves what happens inside, such as an evaluation, out of the time of the steps."""
    before = perf_counter()
    yield
    self._excluded_seconds += perf_counter() - before

  def step_done(self, results: Any) -> None:
    """Counts a step. `results`: its arrays; they are waited for after the first step only."""
    if self._compiled:
      self._steps += 1
      return
    jax.block_until_ready(results)
    waited = self._data_seconds + self._excluded_seconds
    self._compile_seconds = perf_counter() - self._started - waited
    self._compiled = True
    self._start_window()

  def read(self) -> dict[str, float]:
    """The figures since the last call; call it right after a result of the last step was read.

    `tokens_per_second` or the like, `step_seconds`, `data_fraction` (the part of the time spent
    waiting for data) and `mfu` once a step was timed; `compile_seconds`, the whole first step,
    once.
    """
    figures = {}
    if self._compile_seconds is not None:
      figures["compile_seconds"], self._compile_seconds = self._compile_seconds, None
    if self._steps:
      seconds = perf_counter() - self._started - self._excluded_seconds
      for unit, count in self._per_step.items():
        figures[f"{unit}_per_second"] = count * self._steps / seconds
      figures["step_seconds"] = seconds / self._steps
      figures["data_fraction"] = self._data_seconds / seconds
      if self._utilisation is not None:
        figures["mfu"] = self._utilisation * self._steps / seconds
    self._start_window()
    return figures


class MetricsWriter:
  """Writes figures to `workdir/metrics.jsonl`, to the terminal, and to TensorBoard when asked.

  A line of the file is {"step": ..., "split": ..., <name>: <number>, ...}, with null for a number
  that is not finite. A terminal shows a progress bar, anything else plain lines.

  Args:
    workdir: the folder of the run, created when absent.
    total_steps: the step at which the run ends.
    start_step: the step that the run continues from. Lines of later steps, which a killed run left
      behind, are dropped; at 0 the file starts anew. So each step is in the file once.
    tensorboard: also write events to `workdir/tensorboard`, with tensorboardX.
    primary: whether this process writes at all; True for one process of a run.
    stream: where the terminal is; None means standard output.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    total_steps: int,
    start_step: int = 0,
    tensorboard: bool = False,
    primary: bool = True,
    stream: TextIO | None = None,
  ):
    self._total_steps = total_steps
    self._stream = sys.stdout if stream is None else stream
    self._primary = primary
    self._file = self._events = self._bar = None
    if not primary:
      return
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    _drop_lines_after(workdir / "metrics.jsonl", start_step)
    self._file = open(workdir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
    if tensorboard:
      from tensorboardX import SummaryWriter  # only for those who ask: it imports protobuf

      self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
    if self._stream.isatty():
      from tqdm import tqdm

      self._bar = tqdm(
        total=total_steps, initial=start_step, file=self._stream, dynamic_ncols=True, unit="step"
      )

  def write(self, step: int, values: Mapping[str, float], split: str = "train") -> None:
    """Reports the figures of one step: `values`, name -> number, of "train" or another split."""
    if not self._primary:
      return
    values = {name: float(value) for name, value in values.items()}
    finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
    self._file.write(json.dumps({"step": step, "split": split, **finite}) + "\n")
    self._file.flush()
    if self._events is not None:
      for name, value in values.items():
        self._events.add_scalar(f"{split}/{name}", value, step)
      self._events.flush()
    figures = "  ".join(_short(name, value) for name, value in values.items())
    if self._bar is not None and split == "train":
      self._bar.set_postfix_str(figures, refresh=False)
      self._bar.update(step - self._bar.n)
      self._bar.refresh()
      return
    label = "" if split == "train" else f"{split}  "
    self.note(f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}  {label}{figures}")

  def note(self, text: str) -> None:
    """Prints a line for the user, above the progress bar where there is one."""
    if self._bar is not None:
      self._bar.write(text, file=self._stream)
    elif self._primary:
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    """Closes the files and ends the progress bar."""
    for sink in (self._file, self._events, self._bar):
      if sink is not None:
        sink.close()


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
  """Keeps the lines up to `step`, none for 0; a line cut short by a kill goes too."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text(encoding="utf-8").splitlines():
    with contextlib.suppress(json.JSONDecodeError):
      if step and json.loads(line)["step"] <= step:
        kept.append(line + "\n")
  fresh = path.with_suffix(".tmp")
  fresh.write_text("".join(kept), encoding="utf-8")
  os.replace(fresh, path)


def _short(name: str, value: float) -> str:
  return _SHORT[name](value) if name in _SHORT else f"{name} {value:.4g}"


def _thousands(value: float) -> str:
  for limit, unit in ((1e6, "M"), (1e3, "k")):
    if value >= limit:
      return f"{value / limit:.3g}{unit}"
  return f"{value:.3g}"
