"""Several real processes that train one model: what they compute, and what they do when one fails.

Each test compares with the same run in one process, of which it continues a copy.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

STEPS = 12
HEARTBEAT = 5

# Rows are noted as they are read, by each process in a file of its own.
RECORDED = """
import json, os
import jax
from jaxmix.data import TextDataset

class Recorded(TextDataset):
  def __init__(self, source, tokenizer, *, rows, length, cache_dir):
    super().__init__(source, tokenizer, length=length, cache_dir=cache_dir, num_threads=0)
    self.rows = rows

  def batches(self, split, **options):
    return Noted(super().batches(split, **options), self.rows)

class Noted:
  def __init__(self, batches, folder):
    self.batches = batches
    os.makedirs(folder, exist_ok=True)
    self.file = open(os.path.join(folder, f"{jax.process_index()}.jsonl"), "w")

  def __next__(self):
    batch = next(self.batches)
    self.file.write(json.dumps(batch["inputs"].tolist()) + "\\n")
    self.file.flush()
    return batch

  def __getattr__(self, name):
    return getattr(self.batches, name)
"""

RUN_FILE = """
from jaxmix.data import ByteTokenizer
from jaxmix.data import LocalFiles
from jaxmix.mixers import LinearAttention
from jaxmix.models import Decoder
from jaxmix.sharding import make_mesh
from jaxmix.training import adamw
from jaxmix.training import train
from recorded import Recorded

train.model = @Decoder
Decoder.dim = 32
Decoder.depth = 1
Decoder.pattern = ("linear_attention",)
Decoder.mixers = {{"linear_attention": @LinearAttention}}
Decoder.dropout_rate = 0.1
LinearAttention.heads = 4
train.data = @Recorded()
Recorded.source = @LocalFiles()
Recorded.tokenizer = @ByteTokenizer()
Recorded.rows = "{folder}/rows"
Recorded.length = 32
Recorded.cache_dir = "{folder}/cache"
LocalFiles.train = "{folder}/train.txt"
LocalFiles.validation = "{folder}/validation.txt"
train.mesh = @make_mesh
train.optimizer = @adamw
adamw.learning_rate = 0.003
train.steps = {steps}
train.batch_size = 16
train.log_every = 1
train.evaluate_every = 0
train.checkpoint_every = 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with a corpus, the run file and the module that it imports."""
  folder = tmp_path_factory.mktemp("processes")
  random = np.random.default_rng(0)
  for split, count in (("train", 400), ("validation", 40)):
    numbers = (random.integers(0, 10**6, random.integers(2, 12)) for _ in range(count))
    text = "\n\n".join(" ".join(map(str, line)) for line in numbers)
    (folder / f"{split}.txt").write_text(text)
  (folder / "recorded.py").write_text(RECORDED)
  (folder / "run.gin").write_text(RUN_FILE.format(folder=folder, steps=STEPS))
  return folder


class Job:
  """Processes that train in one work directory; `options` go to all of them."""

  def __init__(
    self, folder, workdir, *options, processes=1, devices=2, before=(), environment=None
  ):
    self.outputs = [workdir.with_suffix(f".{index}.txt") for index in range(processes)]
    self.processes = []
    script = str(Path(__file__).resolve().parents[2] / "launch" / "train.py")
    run = [sys.executable, script, "--gin_file", str(folder / "run.gin"), "--workdir", str(workdir)]
    port = free_port()
    for index, output in enumerate(self.outputs):
      place = ["--coordinator", f"localhost:{port}", "--processes", processes, "--process", index]
      place += ["--init_timeout", 60, "--heartbeat_timeout", HEARTBEAT]
      with open(output, "w") as file:
        self.processes.append(
          subprocess.Popen(
            [*before, *run, *options, *(map(str, place) if processes > 1 else ())],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={
              **os.environ,
              "JAX_PLATFORMS": "cpu",
              "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{folder}",
              "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
              "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
              "--xla_backend_optimization_level=0",
              **(environment or {}).get(index, {}),
            },
          )
        )

  def wait(self, seconds=120) -> list[int]:
    """The exit codes, in the order of the processes."""
    until = time.monotonic() + seconds
    try:
      return [process.wait(max(until - time.monotonic(), 0.1)) for process in self.processes]
    except subprocess.TimeoutExpired:
      self.kill()
      pytest.fail(f"not over after {seconds} seconds:\n{self.text()}")

  def wait_for(self, condition, what):
    until = time.monotonic() + 120
    while not condition():
      if time.monotonic() > until or all(each.poll() is not None for each in self.processes):
        self.kill()
        pytest.fail(f"no {what}:\n{self.text()}")
      time.sleep(0.005)

  def kill(self):
    for process in self.processes:
      process.kill()

  def text(self, index=None) -> str:
    chosen = self.outputs if index is None else self.outputs[index : index + 1]
    return "\n".join(f"--- {output.name}\n{output.read_text()}" for output in chosen)


@pytest.fixture
def train(folder, tmp_path):
  """Starts `Job`s in the folder of the test; none is left behind."""
  jobs = []

  def start(*options, **settings) -> Job:
    jobs.append(Job(folder, tmp_path / "run", *options, **settings))
    return jobs[-1]

  yield start
  for job in jobs:
    job.kill()


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
  """The work directory of a run of one process with four devices."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  job = Job(folder, workdir, "--gin_param", "train.keep = 5", devices=4)
  assert job.wait() == [0], job.text()
  shutil.copytree(folder / "rows", workdir / "rows")
  return workdir


@pytest.fixture
def begun(whole, tmp_path):
  """A copy of that run as it was after step 8, with checkpoints of steps 4 and 8."""
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  shutil.rmtree(workdir / "checkpoints" / "12")
  return workdir


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("", 0))
    return probe.getsockname()[1]


def losses(workdir, split="train") -> dict[int, float]:
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {line["step"]: line["loss"] for line in lines if line["split"] == split}


def assert_same_losses(workdir, whole, *, steps=STEPS):
  for split in ("train", "validation"):
    expected = {step: loss for step, loss in losses(whole, split).items() if step <= steps}
    found = losses(workdir, split)
    assert list(found) == list(expected)
    # float32 sums in another order, carried through twelve updates.
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=2e-5)


def rows(folder, index) -> list[np.ndarray]:
  return [np.array(json.loads(line)) for line in (folder / f"{index}.jsonl").open()]


def steps_saved(workdir) -> list[int]:
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize(
  ("processes", "mesh", "readers"),
  [
    (2, "fsdp = 2", [[0], [1]]),
    (4, "tensor = 4", [[0, 1], [2, 3]]),  # two processes hold the same rows
  ],
)
def test_several_processes_are_one(train, folder, tmp_path, whole, processes, mesh, readers):
  job = train("--gin_param", f"make_mesh.{mesh}", processes=processes)
  assert job.wait() == [0] * processes, job.text()
  assert_same_losses(tmp_path / "run", whole)
  assert "trained 12 steps" in job.text(0)
  assert "step " not in job.text(1)

  expected = rows(whole / "rows", 0)
  for same in readers:
    for index in same[1:]:
      np.testing.assert_array_equal(rows(folder / "rows", index), rows(folder / "rows", same[0]))
  shares = [rows(folder / "rows", same[0]) for same in readers]
  for step, batch in enumerate(expected):
    np.testing.assert_array_equal(np.concatenate([share[step] for share in shares]), batch)
