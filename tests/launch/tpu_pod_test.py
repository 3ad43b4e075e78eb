"""launch/tpu_pod.py: its commands, run by a stand-in for gcloud whose workers are folders here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time

import pytest

# ssh and scp reach the workers: folders that are the home of what runs there.
GCLOUD = """
import json, os, pathlib, shutil, subprocess, sys
assert sys.argv[1:4] == ["compute", "tpus", "queued-resources"]
verb, words = sys.argv[4], sys.argv[5:]
option = lambda name: words[words.index(name) + 1] if name in words else None
with open(os.environ["GCLOUD_CALLS"], "a") as calls:
  calls.write(json.dumps([verb, *words]) + "\\n")
workers = sorted(pathlib.Path(os.environ["WORKERS"]).iterdir())
if option("--worker") != "all":
  workers = workers[:1]
code = 0
for worker in workers:
  if verb == "scp":
    shutil.copy(words[0], worker / words[1].partition(":")[2])
  if verb == "ssh":
    shell = ["bash", "-c", option("--command")]
    code |= subprocess.run(shell, cwd=worker, env={**os.environ, "HOME": str(worker)}).returncode
sys.exit(code)
"""

# Makes environments that need no network, and whose interpreter is the one of the tests.
PYTHON = """
import os, pathlib, sys
if sys.argv[1:3] == ["-m", "venv"]:
  program = pathlib.Path(sys.argv[3], "bin", "python")
  program.parent.mkdir(parents=True)
  run = f'case "$1" in -m) echo "$@" >>pip.log;; *) exec {sys.executable} "$@";; esac'
  program.write_text(f"#!/bin/sh\\n{run}\\n")
  program.chmod(0o755)
"""

PLACE = ("--name", "pod", "--zone", "us-west4-a")


@pytest.fixture
def pod(script, cluster, tmp_path, monkeypatch):
  """tpu_pod.py with two workers."""
  for index in (0, 1):
    (tmp_path / "workers" / str(index)).mkdir(parents=True)
  cluster.program("gcloud", GCLOUD)
  cluster.program("python3.11", PYTHON)
  monkeypatch.setenv("WORKERS", str(tmp_path / "workers"))
  monkeypatch.setenv("GCLOUD_CALLS", str(tmp_path / "gcloud"))
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  return script("tpu_pod").main


def run(cluster, command: str, target: str = "v5e:2x4", *more: str) -> list[str]:
  words = ["--gin_file", cluster.gin_file, "--workdir", "/mnt/a", "--target", target]
  return [command, *PLACE, *words, "--skip_compile", *more]


def gcloud_calls(tmp_path) -> list[list[str]]:
  path = tmp_path / "gcloud"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def waited_for(condition) -> bool:
  """Whether a condition came true within ten seconds."""
  deadline = time.monotonic() + 10
  while not (found := condition()) and time.monotonic() < deadline:
    time.sleep(0.05)
  return bool(found)


@pytest.mark.parametrize(
  ("target", "nodes", "machine"),
  [
    ("v5e:4x4", "--node-id pod", "--type v5litepod --topology 4x4"),
    ("v5p:2x2x4", "--node-id pod", "--type v5p --topology 2x2x4"),
    ("v6e:8x8:3", "--node-count 3 --node-prefix pod", "--type v6e --topology 8x8"),
  ],
)
def test_slices_are_asked_for(pod, cluster, tmp_path, target, nodes, machine):
  slices = target[-1] if target.count(":") == 2 else "1"
  more = ["--gin_param", f"make_mesh.slices = {slices}", "--project", "mine", "--", "--spot"]
  assert pod(run(cluster, "create", target, *more)) == 0
  (call,) = gcloud_calls(tmp_path)
  text = " ".join(call)
  assert text.startswith("create pod --zone us-west4-a --project mine ")
  assert nodes in text and machine in text and text.endswith(" --spot")


def test_every_worker_gets_the_code_and_trains(pod, cluster, tmp_path, train_options):
  param = "Decoder.pattern = ('local', \"it's $HOME\")"
  more = ["--gin_param", param, "--env", "DATA=/mnt/my data", "--setup", "echo mounted >>setup.log"]
  assert pod(run(cluster, "train", "v5e:2x4", *more)) == 0
  assert waited_for(lambda: len(cluster.calls()) == 2)
  assert {call["folder"] for call in cluster.calls()} == {
    str(tmp_path / "workers" / str(index) / "jaxmix") for index in (0, 1)
  }
  for call in cluster.calls():
    options = train_options(call["words"])
    assert options["gin_file"] == ["configs/runs/quickstart.gin"]
    assert options["gin_param"] == [param] and options["workdir"] == "/mnt/a"
    assert options["distributed"] == "auto"
    assert call["environment"]["DATA"] == "/mnt/my data"
  for index in (0, 1):
    folder = tmp_path / "workers" / str(index) / "jaxmix"
    assert (folder / "configs" / "runs" / "quickstart.gin").is_file()
    assert (folder / "setup.log").read_text() == "mounted\n"
    assert "install --quiet --editable .[tpu,hf]" in (folder / "pip.log").read_text()


# Ends, when it is asked to, after it has said so.
WAITING = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("stopped").touch(), sys.exit(0)))
pathlib.Path("started").touch()
time.sleep(60)
"""


def test_a_run_is_not_started_over_another_and_can_be_stopped(pod, cluster, tmp_path, capfd):
  (cluster.checkout / "launch" / "supervise.py").write_text(WAITING)
  folders = [tmp_path / "workers" / str(index) / "jaxmix" for index in (0, 1)]
  assert pod(run(cluster, "train")) == 0
  pids = [int((folder / "train.pid").read_text()) for folder in folders]
  try:
    assert waited_for(lambda: all((folder / "started").exists() for folder in folders))
    assert pod(run(cluster, "train")) == 1
    assert "a run goes on here already; stop it first" in capfd.readouterr().err
    assert gcloud_calls(tmp_path)[-1][-1].startswith("set -eu\nif kill"), "it got no further"
    assert pod(["stop", *PLACE]) == 0
    assert waited_for(lambda: all((folder / "stopped").exists() for folder in folders))
  except BaseException:
    for pid in pids:
      os.kill(pid, signal.SIGKILL)
    raise


def test_logs_name_their_hosts(pod, cluster, tmp_path, capfd):
  for index in (0, 1):
    folder = tmp_path / "workers" / str(index) / "jaxmix"
    folder.mkdir()
    (folder / "train.log").write_text(f"worker {index} is ready\n")
  assert pod(["logs", *PLACE, "--worker", "all"]) == 0
  said = capfd.readouterr().out
  assert all(f"{os.uname().nodename}: worker {index} is ready" in said for index in (0, 1))


def test_dry_run_prints_a_script_and_does_nothing(pod, cluster, tmp_path, capsys, shellcheck):
  commands = [run(cluster, name, "v5e:2x4", "--dry_run") for name in ("create", "train")]
  commands += [[name, *PLACE, "--dry_run"] for name in ("logs", "stop", "delete")]
  commands += [["logs", *PLACE, "--worker", "all", "--dry_run"]]
  for words in commands:
    assert pod(words) == 0
  printed = capsys.readouterr().out
  assert not gcloud_calls(tmp_path) and not cluster.calls()
  shellcheck(f"#!/bin/bash\n{printed}")
  for call in _parsed(printed):
    if "--command" in call:
      shellcheck(f"#!/bin/bash\n{call[call.index('--command') + 1]}")
  deleting = [call for call in _parsed(printed) if "delete" in call]
  assert len(deleting) == 1 and "--quiet" not in deleting[0], "gcloud asks, and only when told to"


def _parsed(printed: str) -> list[list[str]]:
  """The words of each command, as a shell reads them."""
  shell = 'gcloud() { printf "%s\\0" gcloud "$@"; printf "\\n\\0"; }; tar() { :; }\n' + printed
  said = subprocess.run(["bash"], input=shell, capture_output=True, text=True, check=True).stdout
  return [call.split("\0") for call in said.split("\0\n\0") if call]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (["--workdir", "runs/a"], "--workdir runs/a — expected the absolute path of a folder that all"),
    (["--target", "tpu7x:2x2x1"], "has no VMs of tpu7x outside of GKE .* use launch/gke.py"),
    (
      ["--target", "v5e:2x4:2"],
      "the mesh of the run has slices=1, and v5e:2x4:2 has 2 .*slices = 2'",
    ),
    (
      ["--gin_param", "make_mesh.data = 16"],
      "v5e:2x4 has 8 devices, .* 'make_mesh.data = 8' would",
    ),
  ],
)
def test_what_cannot_run_there_is_refused(pod, cluster, tmp_path, capsys, change, message):
  assert pod(run(cluster, "train", "v5e:2x4", *change)) == 1
  assert re.search(message, capsys.readouterr().err)
  assert not gcloud_calls(tmp_path)
