"""Processes that call one another before jax starts: who is missing is named."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
STRANGER = """
import socket, sys, time
for text in (b"GET / HTTP/1.1\\r\\n\\r\\n", b"[1]\\n", b'[1, "gone"]\\n'):
  for _ in range(100):
    try:
      with socket.create_connection(("localhost", int(sys.argv[1]))) as stranger:
        stranger.sendall(text)
        break
    except OSError:
      time.sleep(0.02)
"""


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("", 0))
    return probe.getsockname()[1]


def calls(*places, processes, seconds, port=None):
  """Starts train.py at these places and returns its exit codes and what they said."""
  port = port or free_port()
  options = ["--gin_file", "x", "--workdir", "y", "--processes", str(processes)]
  options += ["--coordinator", f"localhost:{port}", "--init_timeout", str(seconds)]
  jobs = [
    subprocess.Popen(
      [sys.executable, str(LAUNCH / "train.py"), *options, "--process", str(place)],
      stderr=subprocess.PIPE,
      text=True,
    )
    for place in places
  ]
  errors = [job.communicate(timeout=60)[1] for job in jobs]
  return [job.returncode for job in jobs], errors


def test_processes_that_do_not_come_are_named_by_all_that_did():
  codes, errors = calls(0, 2, processes=4, seconds=2)
  assert codes == [1, 1]
  for error in errors:
    assert "train.py: error: process 1, 3 of 4 did not call localhost:" in error
    host = socket.gethostname()
    assert f"within 2 seconds; there are 0 on {host}, 2 on {host} — " in error


def test_without_process_0_the_others_say_so():
  codes, (error,) = calls(1, processes=2, seconds=1)
  assert codes == [1]
  assert "train.py: error: process 0 did not answer at localhost:" in error


def test_a_place_that_is_taken_twice_is_an_error_of_all():
  codes, errors = calls(0, 1, 1, processes=3, seconds=20)
  assert codes == [1, 1, 1]
  assert all("error: two processes have --process 1 — expected each of 0 to 2" in e for e in errors)


def test_what_is_no_process_of_the_run_is_not_counted():
  port = free_port()
  with subprocess.Popen(
    [sys.executable, "-c", STRANGER, str(port)], stdout=subprocess.DEVNULL
  ) as stranger:
    codes, (error,) = calls(0, processes=2, seconds=3, port=port)
    stranger.kill()
  assert codes == [1] and "process 1 of 2 did not call" in error


@pytest.mark.parametrize(
  ("options", "text"),
  [
    (["--process", "1"], "--process alone — expected --coordinator, --processes and --process"),
    (["--distributed", "auto", "--process", "1"], "--distributed auto with --process"),
    (["--coordinator", "here", "--processes", "2", "--process", "1"], "--coordinator here —"),
    (
      ["--coordinator", "a:1", "--processes", "2", "--process", "2"],
      "--process 2 of --processes 2",
    ),
  ],
)
def test_a_place_that_cannot_be_is_one_line(script, tmp_path, capsys, options, text):
  run = ["--gin_file", "x.gin", "--workdir", str(tmp_path), *options]
  assert script("train").main(run) == 1
  errors = capsys.readouterr().err
  assert text in errors and errors.count("\n") == 1
