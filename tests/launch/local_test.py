"""launch/local.py: processes of this machine, with a stand-in for the trainer and with itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

WORKDIR = ("--workdir", "/tmp/a run")


@pytest.fixture
def local(script, cluster):
  return script("local")


def arguments(cluster, *more: str) -> list[str]:
  return ["--gin_file", cluster.gin_file, *WORKDIR, *more]


def test_cpu_processes_have_devices_of_their_own(local, cluster, train_options, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_dump_to=/tmp/x")
  assert local.main(arguments(cluster, "--target", "cpu:3x2", "--init_timeout", "7")) == 0
  calls = [(train_options(call["words"]), call["environment"]) for call in cluster.calls()]
  assert sorted(options["process"] for options, _ in calls) == [0, 1, 2]
  assert len({options["coordinator"] for options, _ in calls}) == 1
  for options, environment in calls:
    assert (options["processes"], options["init_timeout"]) == (3, 7)
    assert options["workdir"] == "/tmp/a run" and options["gin_file"] == [cluster.gin_file]
    assert environment["JAX_PLATFORMS"] == "cpu"
    flags = environment["XLA_FLAGS"].split()
    assert flags == ["--xla_dump_to=/tmp/x", "--xla_force_host_platform_device_count=2"]


def test_gpu_processes_have_a_gpu_each(local, cluster):
  assert local.main(arguments(cluster, "--target", "h100:4", "--skip_compile")) == 0
  seen = [call["environment"]["CUDA_VISIBLE_DEVICES"] for call in cluster.calls()]
  assert sorted(seen) == ["0", "1", "2", "3"]


def test_dry_run_prints_a_script_and_does_nothing(local, cluster, capsys, shellcheck):
  assert local.main(arguments(cluster, "--target", "cpu:2x1", "--dry_run")) == 0
  printed = capsys.readouterr().out
  assert not cluster.calls()
  shellcheck(f"#!/bin/bash\n{printed}")
  subprocess.run(["bash"], input=printed, text=True, check=True)
  assert len(cluster.calls()) == 2, "what was printed can be run"


def processes(local, *programs: str):
  return [local.launcher.Command((sys.executable, "-c", program)) for program in programs]


def test_lines_begin_with_the_number_of_their_process(local, capsys):
  assert local.run_all(processes(local, "print('a', flush=True)", "print('b')")) == 0
  assert sorted(capsys.readouterr().out.splitlines()) == ["0: a", "1: b"]


def test_the_others_are_stopped_some_time_after_one_has_failed(local, capsys, monkeypatch):
  monkeypatch.setattr(local, "GRACE", 0.5)
  stubborn = "import signal, time\nsignal.signal(15, lambda *_: print('no', flush=True))\n"
  stubborn += "print('here', flush=True)\nfor _ in range(600): time.sleep(0.1)"
  started = time.monotonic()
  code = local.run_all(processes(local, "import sys, time; time.sleep(0.6); sys.exit(3)", stubborn))
  assert code == 3 and time.monotonic() - started < 30
  said = capsys.readouterr()
  assert "process 0 ended first, with exit code 3" in said.err
  assert "SIGTERM to process 1, still running" in said.err and "1: no" in said.out
  assert "SIGKILL to process 1, still running" in said.err


def test_signals_reach_every_process_once(local, capsys):
  waiting = (
    "import signal, sys, time\nsignal.signal(15, lambda *_: (print('asked'), sys.exit(75)))\n"
  )
  waiting += "print('ready', flush=True)\nfor _ in range(600): time.sleep(0.1)"
  said = ""

  def ask():
    nonlocal said
    deadline = time.monotonic() + 20
    while said.count("ready") < 2 and time.monotonic() < deadline:
      said += capsys.readouterr().out
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)

  asking = threading.Thread(target=ask)
  asking.start()
  code = local.run_all(processes(local, waiting, waiting))
  asking.join()
  said += capsys.readouterr().out
  assert code == 75, "saved: to be run again"
  assert said.count("asked") == 2


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (
      ("--target", "cpu:2"),
      "--target cpu:2 — expected processes x devices of each — write cpu:2x1",
    ),
    (("--target", "h100:2x8"), "--target h100:2x8 is 2 hosts — expected this one — write h100:8"),
    (("--target", "cpu:2x2", "--gin_param", "make_mesh.data = 8"), "cpu:2x2 has 4 devices, and"),
  ],
)
def test_what_cannot_run_here_is_refused(local, cluster, capsys, more, message):
  assert local.main(arguments(cluster, "--skip_compile", *more)) == 1
  assert message in capsys.readouterr().err
  assert not cluster.calls()


def test_two_processes_train_one_run(script, trained, tmp_path, capsys):
  folder = tmp_path / "run"
  words = ["--gin_file", str(trained.gin_file), "--workdir", str(folder), "--target", "cpu:2x2"]
  code = script("local").main([*words, "--gin_file", "configs/mesh/fsdp_slices2.gin"])
  assert code == 0, capsys.readouterr()
  losses = [
    [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    for run in (folder, trained.workdir)
  ]
  # The same rows in sums of another order, over eight small updates.
  assert losses[0] == pytest.approx(losses[1], rel=1e-3)
