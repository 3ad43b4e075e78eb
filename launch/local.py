"""Trains a run in several processes on this machine. The manual: --help"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import command_line
import launcher

DESCRIPTION = """Trains a run in several processes on this machine, as hosts of a pod would: to use
its GPUs, one process each, or to rehearse a pod on CPUs.

targets:
  h100:8 rtx4090:2   so many processes, each with one GPU
  cpu:2x4            two processes, each with four virtual CPU devices

the processes:
  Their lines begin with their number. Ctrl-C and SIGTERM are passed on to all: the run saves and
  stops. When one fails, the others are given time to say so too, and are then stopped."""

EPILOG = f"""{launcher.MANUAL}
  Nothing is compiled for a CPU.

{command_line.EXIT_CODES}
  75   stopped by a signal, and saved: run the same command again

examples:
  python launch/local.py --gin_file configs/runs/quickstart.gin --workdir runs/two --target cpu:2x2
  python launch/local.py --gin_file configs/runs/wikitext2_gla_small.gin --workdir runs/gla \\
      --target rtx4090:2"""

GRACE = 20  # seconds for the others, after one has failed, to end by themselves, then by SIGTERM
_CPU = re.compile(r"cpu:([1-9]\d*)x([1-9]\d*)")


def options() -> argparse.ArgumentParser:
  """The options, with the manual."""
  parser = command_line.parser(DESCRIPTION, EPILOG)
  launcher.add_run_options(parser, target="cpu:PROCESSESxDEVICES, or the GPUs of this host")
  return parser


def launch(arguments: argparse.Namespace) -> int:
  """Checks, shows and runs the processes; returns the exit code."""
  commands = process_commands(arguments)
  for command in commands:
    print(f"{command} &", flush=True)
  if arguments.dry_run:
    print("wait")
    return 0
  return run_all(commands)


def process_commands(arguments: argparse.Namespace) -> list[launcher.Command]:
  """The command of each process. Raises ValueError where the run is not one for the target."""
  if cpu := _CPU.fullmatch(arguments.target):
    processes, devices = map(int, cpu.groups())
    settings = launcher.configuration_of(arguments)
    launcher.check_mesh(settings, arguments.target, devices=processes * devices)
    others = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in others if "host_platform_device_count" not in flag]
    flags = " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"])
    places = [("JAX_PLATFORMS=cpu", f"XLA_FLAGS={flags}")] * processes
  elif arguments.target.startswith("cpu"):
    raise ValueError(
      f"--target {arguments.target} — expected processes x devices of each — write cpu:2x1"
    )
  else:
    chip = launcher.checked_target(
      arguments, platform="cuda", otherwise="launch/tpu_pod.py or launch/gke.py"
    )
    if chip.hosts > 1:
      raise ValueError(
        f"--target {chip.name} is {chip.hosts} hosts — expected this one — write "
        f"{chip.chip}:{chip.device_count // chip.hosts}, or use launch/slurm.py"
      )
    processes = chip.device_count
    places = [(f"CUDA_VISIBLE_DEVICES={index}",) for index in range(processes)]
  train = (sys.executable, str(launcher.ROOT / "launch" / "train.py"))
  coordinator = ("--coordinator", f"localhost:{_free_port()}", "--processes", str(processes))
  return [
    launcher.Command(
      (
        *("env", *place, *train),
        *launcher.train_words(arguments, arguments.gin_file, *coordinator, "--process", str(index)),
      )
    )
    for index, place in enumerate(places)
  ]


def run_all(commands: Sequence[launcher.Command]) -> int:
  """Runs commands side by side to their end; returns the exit code of the first that failed."""
  # In sessions of their own, so that Ctrl-C of a terminal reaches them once, through this process.
  running = {
    index: subprocess.Popen(
      command.words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    for index, command in enumerate(commands)
  }
  readers = [
    threading.Thread(target=_relay, args=(index, process)) for index, process in running.items()
  ]
  for reader in readers:
    reader.start()

  def pass_on(number: int, _) -> None:
    _send(running, number)

  former = {each: signal.signal(each, pass_on) for each in (signal.SIGINT, signal.SIGTERM)}
  try:
    code = _wait(running)
  finally:
    for number, handler in former.items():
      signal.signal(number, handler)
  for reader in readers:
    reader.join()
  return code


def _wait(running: dict[int, subprocess.Popen]) -> int:
  """Waits for all; stops the others some time after one has failed. `running` is emptied."""
  from jaxmix.training.interruption import EXIT_CODE

  first, steps = 0, [(GRACE, signal.SIGTERM), (2 * GRACE, signal.SIGKILL)]
  failed_at = None
  while running:
    for index, process in list(running.items()):
      if (code := process.poll()) is None:
        continue
      del running[index]
      code = 128 - code if code < 0 else code  # as a shell has the death by a signal
      first = first or code
      if code not in (0, EXIT_CODE) and failed_at is None:
        failed_at = time.monotonic()
        print(f"local.py: process {index} ended first, with exit code {code}", file=sys.stderr)
    if failed_at is not None and steps and time.monotonic() - failed_at > steps[0][0]:
      _, number = steps.pop(0)
      names = ", ".join(map(str, running))
      if names:
        print(f"local.py: {number.name} to process {names}, still running", file=sys.stderr)
      _send(running, number)
    time.sleep(0.05)
  return first


def _send(running: dict[int, subprocess.Popen], number: int) -> None:
  for process in list(running.values()):
    process.send_signal(number)


def _relay(index: int, process: subprocess.Popen) -> None:
  """Writes the lines of a process, each with its number in front."""
  for line in process.stdout:
    sys.stdout.write(f"{index}: {line.decode(errors='replace')}")
    sys.stdout.flush()


def _free_port() -> int:
  with socket.create_server(("localhost", 0)) as server:
    return server.getsockname()[1]


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  return command_line.exit_code(launch, options().parse_args(argv))


if __name__ == "__main__":
  sys.exit(main())
