"""Several processes that are one program: how they find one another, and how they leave.

Each runs the same script with the same options but for --process. jax.distributed connects them and
watches over them: when one is lost, it ends the others.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

MANUAL = ""


def add_options(to: argparse.ArgumentParser) -> None:
  """The options that make several processes one program."""
  group = to.add_argument_group("several processes, one on each host")
  group.add_argument("--distributed", choices=["auto"])
  group.add_argument("--coordinator", metavar="HOST:PORT")
  group.add_argument("--processes", type=int, metavar="N")
  group.add_argument("--process", type=int, metavar="I")
  group.add_argument("--init_timeout", type=int, default=300, metavar="SECONDS")
  group.add_argument("--heartbeat_timeout", type=int, default=100, metavar="SECONDS")


def joined(work):
  def run(arguments):
    if arguments.coordinator:
      import jax
      jax.config.update("jax_cpu_collectives_implementation", "gloo")
      jax.distributed.initialize(arguments.coordinator, arguments.processes, arguments.process,
        initialization_timeout=arguments.init_timeout, heartbeat_timeout_seconds=arguments.heartbeat_timeout)
    return work(arguments)
  return run
