"""launch/supervise.py: real commands that fail, stop and go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

# Saves a checkpoint of step `run` for each digit s, then ends with the code that follows.
COMMAND = """
import pathlib, sys, time
workdir, *plan = sys.argv[2:]
workdir = pathlib.Path(workdir)
runs = workdir / "runs"
run = len(runs.read_text().split()) if runs.exists() else 0
runs.open("a").write(f"{time.time()}\\n")
saves, code = plan[min(run, len(plan) - 1)].split(":")
if saves == "s":
  (workdir / "checkpoints" / str(run + 1)).mkdir(parents=True)
sys.exit(int(code))
"""


@pytest.fixture
def supervised(repository, tmp_path):
  """Supervises a command whose runs follow a plan such as "s:1": saves, ends with 1."""

  def start(*plan, options=("--wait", "0.1")):
    script = str(repository / "launch" / "supervise.py")
    command = [sys.executable, "-c", COMMAND, "--workdir", str(tmp_path), *plan]
    return subprocess.run(
      [sys.executable, script, *options, "--", *command], stderr=subprocess.PIPE, text=True
    )

  return start


def starts(folder) -> list[float]:
  return [float(line) for line in (folder / "runs").read_text().split()]


def test_a_run_that_gets_on_is_never_given_up(supervised, tmp_path):
  done = supervised("s:1", "s:1", "s:1", "n:0", options=("--wait", "0.01", "--failures", "2"))
  assert done.returncode == 0
  assert len(starts(tmp_path)) == 4
  assert "exit code 1, failure 1 of 2 at step 3; again in 0.01 s" in done.stderr


def test_failures_at_one_step_wait_twice_as_long_each_and_are_given_up(supervised, tmp_path):
  done = supervised("s:1", "n:3", options=("--wait", "0.2", "--failures", "4"))
  assert done.returncode == 3
  first, *_, last = times = starts(tmp_path)
  assert len(times) == 4
  assert last - first >= 0.2 + 0.4 + 0.8
  assert "exit code 3, failure 4 of 4 at step 1; giving up: " in done.stderr


@pytest.mark.parametrize(
  ("plan", "code", "runs"),
  [
    (("s:75", "s:75", "n:0"), 0, 3),  # interrupted and saved: at once
    (("n:75",), 75, 2),  # interrupted and nothing saved: as a failure
    (("n:2",), 2, 1),  # a wrong option
  ],
)
def test_exit_codes_decide(supervised, tmp_path, plan, code, runs):
  began = time.monotonic()
  done = supervised(*plan, options=("--wait", "5" if code == 0 else "0", "--failures", "2"))
  assert (done.returncode, len(starts(tmp_path))) == (code, runs)
  assert time.monotonic() - began < 5, "it waited after an interruption"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 75)])
def test_a_signal_is_passed_on_once_and_ends_it(repository, tmp_path, number, code):
  child = """
import signal, sys, time
got = []
for number in (signal.SIGTERM, signal.SIGINT):
  signal.signal(number, lambda number, frame: got.append(number))
print("ready", flush=True)
while not got:
  time.sleep(0.01)
time.sleep(0.3)
print(*got, flush=True)
sys.exit(75)
"""
  script = str(repository / "launch" / "supervise.py")
  process = subprocess.Popen(
    [sys.executable, script, "--", sys.executable, "-c", child, "--workdir", str(tmp_path)],
    stdout=subprocess.PIPE,
    text=True,
    process_group=0,
  )
  assert process.stdout.readline() == "ready\n"
  os.killpg(process.pid, number)  # as a terminal does
  output, _ = process.communicate(timeout=30)
  assert (process.returncode, output) == (code, f"{int(number)}\n")


def test_a_signal_while_it_waits_ends_it(repository, tmp_path):
  script = str(repository / "launch" / "supervise.py")
  process = subprocess.Popen(
    [sys.executable, script, "--wait", "60", "--", "false", "--workdir", str(tmp_path)],
    stderr=subprocess.PIPE,
    text=True,
  )
  assert "again in 60 s" in process.stderr.readline()
  process.terminate()
  process.communicate(timeout=30)
  assert process.returncode == 75


def test_a_command_that_cannot_be_run_is_told(script, capsys, tmp_path):
  command = ["--", str(tmp_path / "nothing"), "--workdir", str(tmp_path)]
  assert script("supervise").main(command) == 127
  assert f"check {tmp_path}/nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("argv", "text"),
  [
    (["--wait", "1"], "no command — expected one after --"),
    (["--", "train", "--gin_file", "x"], "train --gin_file x has no --workdir"),
    (["--failures", "0", "--", "x", "--workdir=y"], "--failures 0"),
  ],
)
def test_a_wrong_option_is_exit_code_2(script, capsys, argv, text):
  with pytest.raises(SystemExit) as stopped:
    script("supervise").main(argv)
  assert stopped.value.code == 2
  assert text in capsys.readouterr().err
