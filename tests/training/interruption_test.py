"""Signals become requests, a second Ctrl-C ends at once, and the former handlers come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from jaxmix.training.interruption import EXIT_CODE, Interruption

LOOP = """
import sys, time
from jaxmix.training.interruption import EXIT_CODE, Interruption

with Interruption() as interruption:
  print("ready", flush=True)
  while not interruption.requested:
    time.sleep(0.01)
  print(interruption.requested, flush=True)
  time.sleep(float(sys.argv[1]))                                   # the save
  print("saved", flush=True)
sys.exit(EXIT_CODE)
"""


def start(code: str, *arguments: str) -> subprocess.Popen:
  process = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(code), *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "ready\n", process.communicate(timeout=30)
  return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_lets_the_process_save_and_leave_with_its_own_code(name):
  process = start(LOOP, "0.05")
  process.send_signal(signal.Signals[name])
  output, _ = process.communicate(timeout=30)
  assert output.splitlines() == [name, "saved"]
  assert process.returncode == EXIT_CODE == os.EX_TEMPFAIL


def test_a_second_interrupt_does_not_wait_for_the_save():
  process = start(LOOP, "30")
  process.send_signal(signal.SIGTERM)
  assert process.stdout.readline() == "SIGTERM\n"
  process.send_signal(signal.SIGTERM)  # changes nothing: a scheduler may repeat itself
  process.send_signal(signal.SIGINT)
  output, errors = process.communicate(timeout=10)
  assert "saved" not in output
  assert "KeyboardInterrupt" in errors
  assert process.returncode not in (0, EXIT_CODE)


def test_the_former_handlers_come_back_even_after_an_error():
  former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
  with pytest.raises(OSError, match="disk"), Interruption() as interruption:
    assert signal.getsignal(signal.SIGTERM) != former[signal.SIGTERM]
    assert interruption.requested is None
    raise OSError("disk")
  assert {number: signal.getsignal(number) for number in former} == former


def test_entering_outside_the_main_thread_is_refused():
  caught = []

  def enter():
    with pytest.raises(RuntimeError) as error:
      Interruption().__enter__()
    caught.append(str(error.value))

  thread = threading.Thread(target=enter, name="loader")
  thread.start()
  thread.join()
  assert "entered in thread 'loader' — expected the main thread" in caught[0]
