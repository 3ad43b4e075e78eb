"""Several real processes that train one model: what they compute, and what they do when one fails.

Each test compares with the same run in one process, of which it continues a copy.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
STEPS = 24
EVERY = 6  # steps between checkpoints
HEARTBEAT = 8

# Rows are noted as they are read, by each process in a file of its own; SLOW is the time of a step.
RECORDED = """
import json, os, time
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
    time.sleep(float(os.environ.get("SLOW", 0)))
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
train.checkpoint_every = {every}
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
  (folder / "run.gin").write_text(RUN_FILE.format(folder=folder, steps=STEPS, every=EVERY))
  return folder


class Job:
  """Processes that train in one work directory.

  Args:
    options: of all of them.   own: process -> options of it alone.
    supervised: whether each runs under launch/supervise.py.
    slow: seconds that each step takes at least.
    file_size: process -> the bytes that a file which it writes may have.
    slurm: whether the processes find one another by the variables that Slurm sets for a step.
  """

  def __init__(
    self,
    folder,
    workdir,
    *options,
    processes=1,
    devices=2,
    own=None,
    supervised=False,
    slow=0,
    file_size=None,
    slurm=False,
  ):
    self.outputs = [workdir.with_suffix(f".{index}.txt") for index in range(processes)]
    self.processes = []
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{folder}",
      "SLOW": str(slow),
      "XLA_FLAGS": flags,
    }
    train = [sys.executable, LAUNCH / "train.py", "--gin_file", folder / "run.gin"]
    train += ["--workdir", workdir, *options]
    port = free_port()
    for index, output in enumerate(self.outputs):
      command = [*train, *(own or {}).get(index, ())]
      place = {}
      if slurm:
        place = {"SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost"}
        place |= {"SLURM_NTASKS": str(processes), "SLURM_PROCID": str(index), "SLURM_LOCALID": "0"}
        command += ["--distributed", "auto"]
      elif processes > 1:
        command += ["--coordinator", f"localhost:{port}", "--processes", processes]
        command += ["--process", index]
      if processes > 1:
        command += ["--init_timeout", 60, "--heartbeat_timeout", HEARTBEAT]
      if supervised:
        command = [sys.executable, LAUNCH / "supervise.py", "--wait", 0.1, "--", *command]
      limit = (file_size or {}).get(index)
      if limit is not None:
        command = ["bash", "-c", f'ulimit -f {limit // 1024}; exec "$@"', "-", *command]
      with open(output, "w") as file:
        self.processes.append(
          subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=environment | place
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
      if process.poll() is None:
        for child in children(process):
          os.kill(child, signal.SIGKILL)
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
  """A copy of that run with checkpoints of steps 6 and 12 alone, from which it goes on."""
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  for step in range(3 * EVERY, STEPS + 1, EVERY):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  return workdir


def children(process) -> list[int]:
  listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
  return [int(child) for child in listed.read_text().split()]


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("", 0))
    return probe.getsockname()[1]


def losses(workdir, split="train") -> dict[int, float]:
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {line["step"]: line["loss"] for line in lines if line["split"] == split}


def assert_same_losses(workdir, whole):
  for split in ("train", "validation"):
    expected, found = losses(whole, split), losses(workdir, split)
    assert list(found) == list(expected)
    # float32 sums in another order, carried through 24 updates.
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)


def rows(folder, index) -> list[np.ndarray]:
  return [np.array(json.loads(line)) for line in (folder / f"{index}.jsonl").open()]


def steps_saved(workdir) -> list[int]:
  names = (path.name for path in (workdir / "checkpoints").iterdir())
  return sorted(int(name) for name in names if name.isdecimal())


def assert_rows(folder, expected, *, readers):
  """What was read since the last start: by the processes of each reader the same, each row by one
  reader, in the order of one process."""
  for same in readers:
    for index in same[1:]:
      np.testing.assert_array_equal(rows(folder, index), rows(folder, same[0]))
  shares = [rows(folder, same[0]) for same in readers]
  batches = [np.concatenate(parts) for parts in zip(*shares, strict=True)]
  np.testing.assert_array_equal(batches, expected)


def test_a_signal_to_one_process_stops_all_and_others_go_on(train, folder, tmp_path, whole):
  workdir, expected = tmp_path / "run", rows(whole / "rows", 0)
  job = train("--gin_param", "make_mesh.fsdp = 2", processes=2, slow=0.1, slurm=True)
  job.wait_for(lambda: "step  3/24" in job.text(0), "step 3")
  job.processes[1].send_signal(signal.SIGTERM)
  assert job.wait() == [75, 75], job.text()
  stopped = max(losses(workdir))
  assert steps_saved(workdir)[-1] == stopped < STEPS
  assert f"stopped by SIGTERM and saved after step {stopped}" in job.text(0)
  assert "step " not in job.text(1), "only process 0 reports"
  assert_rows(folder / "rows", expected[:stopped], readers=[[0], [1]])

  # Twice as many processes, two of which hold the same rows.
  job = train("--gin_param", "make_mesh.tensor = 4", processes=4)
  assert job.wait() == [0] * 4, job.text()
  assert f"going on from the checkpoint of step {stopped}" in job.text(0)
  assert_rows(folder / "rows", expected[stopped:], readers=[[0, 1], [2, 3]])
  assert_same_losses(workdir, whole)


def test_the_others_stop_when_one_is_killed_and_its_damaged_checkpoint_is_passed_over(
  train, tmp_path, whole
):
  workdir = tmp_path / "run"
  job = train("--gin_param", "make_mesh.fsdp = 4", processes=2, slow=0.1, supervised=True)
  job.wait_for((workdir / "checkpoints" / "12").exists, "second checkpoint")
  first, second = (children(process) for process in job.processes)
  os.kill(second[0], signal.SIGKILL)
  killed = time.monotonic()
  newest = steps_saved(workdir)[-1]
  for file in (workdir / "checkpoints" / str(newest)).glob("state/ocdbt.process_1/d/*"):
    os.truncate(file, file.stat().st_size // 2)  # of what only the second process reads
  job.wait_for(lambda: children(job.processes[0]) != first, "end of the first process")
  assert time.monotonic() - killed < 2 * HEARTBEAT + 10
  assert "tasks are unhealthy (stopped sending heartbeats):\n1\n" in job.text(0)
  assert "exit code 137, failure 1 of 5" in job.text(1)

  assert job.wait() == [0, 0], job.text()
  for index in (0, 1):
    assert f"it is now {newest}.damaged, and the one before it is read" in job.text(index)
  assert f"going on from the checkpoint of step {newest - EVERY}" in job.text(0)
  assert (workdir / "checkpoints" / f"{newest}.damaged").is_dir()
  assert_same_losses(workdir, whole)


def test_a_disk_that_is_full_for_one_process_leaves_the_earlier_checkpoints(train, begun, whole):
  fsdp = ("--gin_param", "make_mesh.fsdp = 4")
  job = train(*fsdp, processes=2, file_size={1: 40 << 10}, slow=0.02)
  codes = job.wait()
  assert codes[1] == 1 and codes[0] != 0, job.text()
  assert f"process 1 of 2 on {socket.gethostname()}: error: checkpoint " in job.text(1)
  assert "/18 was not written: " in job.text(1) and "intact: steps [6, 12]" in job.text(1)
  assert job.text(1).splitlines()[-1].startswith("train.py: process 1"), job.text(1)
  assert train(*fsdp, processes=1, devices=4).wait() == [0]
  assert_same_losses(begun, whole)


def test_a_host_without_the_data_is_named_and_the_others_stop(train, tmp_path):
  missing = ("--gin_param", f"LocalFiles.train = '{tmp_path}/absent/train.txt'")
  began = time.monotonic()
  job = train(processes=2, own={1: missing})
  codes = job.wait()
  assert codes[1] == 1 and codes[0] != 0, job.text()
  assert time.monotonic() - began < 60
  last = job.text(1).splitlines()[-1]
  assert last.startswith(f"train.py: process 1 of 2 on {socket.gethostname()}: error: ")
  assert f"{tmp_path}/absent" in last
  assert "tasks are unhealthy (stopped sending heartbeats):\n1\n" in job.text(0)


def test_evaluation_by_several_processes_is_that_of_one(folder, whole, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("PYTHONPATH", f"{os.environ.get('PYTHONPATH', '')}:{folder}")
  command = [sys.executable, str(LAUNCH / "evaluate.py"), "--workdir", str(whole), "--json"]

  def start(*options, devices=4):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    monkeypatch.setenv("XLA_FLAGS", flags)
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)

  streams = ("--carry_state", "--batch_size", "6")  # no multiple of the devices
  place = (*streams, "--coordinator", f"localhost:{free_port()}", "--processes", "2", "--process")
  jobs = [start(*streams), start(*place, "0", devices=2), start(*place, "1", devices=2)]
  one, first, second = (job.communicate(timeout=120)[0] for job in jobs)
  assert [job.returncode for job in jobs] == [0, 0, 0] and "loss" not in second
  one, first = json.loads(one), json.loads(first.splitlines()[-1])
  assert first["loss"] == pytest.approx(one["loss"], rel=1e-5)
  assert first["targets"] == one["targets"]
  noted = (whole / "evaluations.jsonl").read_text().splitlines()
  assert len(noted) == 2, "one line of each evaluation"
