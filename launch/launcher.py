"""What the launchers share: the run and its machine, checked before anything is reserved, and
commands, which are shown before they run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import command_line

if TYPE_CHECKING:
  from jaxmix.compile_ahead.targets import Target
  from jaxmix.configuration import Configuration

ROOT = Path(__file__).resolve().parent.parent

# What a machine needs of this checkout to train.
CODE = ("LICENSE", "README.md", "configs", "jaxmix", "launch", "pallas_kernels", "pyproject.toml")

MANUAL = """before anything is reserved:
  the run files are read, their mesh has to be of the size of --target and to divide the rows of
  a batch, and the training step is compiled for it, as by compile_ahead.py: that takes minutes,
  once, and --skip_compile leaves it out. The report goes to stderr. --dry_run prints the commands
  and runs none: what it prints is a shell script."""


def add_run_options(to: argparse.ArgumentParser, *, target: str) -> None:
  """The options of a run to launch; `target` says in the manual which machines there are."""
  command_line.add_gin_options(to)
  to.add_argument(
    "--workdir", required=True, metavar="DIR", help="folder of the run, the same for all processes"
  )
  to.add_argument("--target", required=True, metavar="NAME", help=target)
  to.add_argument(
    "--init_timeout",
    type=int,
    default=300,
    metavar="SECONDS",
    help="how long the processes wait for one another at the start; default %(default)s",
  )
  to.add_argument(
    "--skip_compile", action="store_true", help="do not compile the run for the target first"
  )
  to.add_argument(
    "--vocab_size", type=int, metavar="N", help="to compile where the data is not: its vocabulary"
  )
  to.add_argument("--length", type=int, metavar="T", help="likewise, tokens of a row")
  add_dry_run(to)


def add_dry_run(to: argparse.ArgumentParser) -> None:
  """The option --dry_run."""
  to.add_argument("--dry_run", action="store_true", help="print the commands, and run none")


def checked_target(arguments: argparse.Namespace, *, platform: str, otherwise: str) -> Target:
  """The machine of --target, after the run was found to be one for it.

  Args:
    platform: "tpu" or "cuda", what the launcher is for.
    otherwise: the launchers for others.
  Raises:
    ValueError: the target is of another platform, the mesh is not of its size, or the run does not
      fit there.
    ConfigurationError: a run file or an override is wrong.
  """
  from jaxmix.compile_ahead.targets import target

  chip = target(arguments.target)
  if chip.platform != platform:
    raise ValueError(
      f"--target {chip.name} is no {'TPU' if platform == 'tpu' else 'GPU'} — expected one such as "
      f"{'v5e:4x4' if platform == 'tpu' else 'h100:4x8'} — for {chip.chip} use {otherwise}"
    )
  settings = configuration_of(arguments)
  check_mesh(settings, chip.name, devices=chip.device_count, slices=chip.slices)
  if not arguments.skip_compile:
    _check_fit(arguments)
  return chip


def configuration_of(arguments: argparse.Namespace) -> Configuration:
  """The checked configuration of the run. Raises ConfigurationError."""
  from jaxmix.compile_ahead.run import Run

  return Run(tuple(arguments.gin_file), tuple(arguments.gin_param)).configuration()


def check_mesh(
  settings: Configuration, name: str, *, devices: int, slices: int | None = None
) -> None:
  """Raises ValueError where the mesh of a run is not of the size of a machine, or does not divide
  the rows of a batch.

  Args:
    name: of the machine, for the message.
    devices: of the machine.
    slices: of the machine; None where any number will do.
  """
  from jaxmix.sharding import make_mesh, mesh_shape

  if inspect.unwrap(settings.value("mesh")) is not make_mesh:
    return  # a mesh of one's own, about which only compiling tells
  defaults = inspect.signature(make_mesh).parameters.values()
  sizes = {each.name: each.default for each in defaults if each.name != "devices"}
  sizes.update(settings.arguments(make_mesh, (), given=("devices",)))
  if slices not in (None, sizes["slices"]):
    raise ValueError(
      f"the mesh of the run has slices={sizes['slices']}, and {name} has {slices} — expected as "
      f"many — set --gin_param 'make_mesh.slices = {slices}', or name another --target"
    )
  try:
    data, fsdp, *_ = mesh_shape(devices, **sizes)
  except ValueError as error:
    raise ValueError(
      f"{name} has {devices} devices, and {error}{_repair(sizes, devices)}"
    ) from None
  rows, parts = settings.value("batch_size"), settings.value("microbatches")
  step = data * fsdp * parts
  if rows % step:
    raise ValueError(
      f"train.batch_size={rows} in {parts} microbatches does not divide among the {data * fsdp} "
      f"devices along data and fsdp of {name}: each would work on all rows — expected a multiple "
      f"of {step} — set --gin_param 'train.batch_size = {-(-rows // step) * step}', or give "
      "devices to make_mesh.tensor"
    )


def _repair(sizes: dict[str, int], devices: int) -> str:
  """The override with which a mesh would fit so many devices, where there is one."""
  from jaxmix.sharding import mesh_shape

  for axis in sorted(("data", "fsdp"), key=lambda axis: -abs(sizes[axis])):
    with contextlib.suppress(ValueError):
      shape = mesh_shape(devices, **{**sizes, axis: -1})
      size = dict(zip(("data", "fsdp"), shape, strict=False))[axis]
      size //= sizes["slices"] if axis == "data" else 1
      return f"; here --gin_param 'make_mesh.{axis} = {size}' would do"
  return ""


def _check_fit(arguments: argparse.Namespace) -> None:
  import compile_ahead

  words = [*run_words(arguments, arguments.gin_file), "--target", arguments.target]
  for option in ("vocab_size", "length"):
    if (value := getattr(arguments, option)) is not None:
      words += [f"--{option}", str(value)]
  with contextlib.redirect_stdout(sys.stderr):
    code = compile_ahead.main(words)
  if code:
    reason = "does not fit" if code == compile_ahead.DOES_NOT_FIT else "was not compiled"
    raise ValueError(
      f"the run {reason} on {arguments.target}, see above — expected it to fit before anything is "
      "reserved — change the run or the target, or give --skip_compile"
    )


def run_words(arguments: argparse.Namespace, gin_files: Sequence[str]) -> list[str]:
  """The options that say which run: --gin_file and --gin_param."""
  files = [word for name in gin_files for word in ("--gin_file", name)]
  return files + [word for line in arguments.gin_param for word in ("--gin_param", line)]


def train_words(
  arguments: argparse.Namespace, gin_files: Sequence[str], *place: str
) -> tuple[str, ...]:
  """The options of train.py: the run, its folder, and the place of the process among others."""
  run = run_words(arguments, gin_files)
  timeout = ("--init_timeout", str(arguments.init_timeout))
  return (*run, "--workdir", arguments.workdir, *place, *timeout)


def gin_files_here(arguments: argparse.Namespace) -> list[str]:
  """The run files as absolute paths, looked up as `jaxmix.configuration` does."""
  files = (Path(name) for name in arguments.gin_file)
  return [str((path if path.exists() else ROOT / path).resolve()) for path in files]


def gin_files_in_checkout(arguments: argparse.Namespace) -> list[str]:
  """The run files relative to the checkout, which is what other machines get.

  Raises:
    ValueError: one lies elsewhere.
  """
  found = []
  for path in map(Path, gin_files_here(arguments)):
    if not path.is_relative_to(ROOT / "configs"):
      raise ValueError(
        f"--gin_file {path} is not in {ROOT / 'configs'} — expected a file that is copied with the "
        "code — put it there"
      )
    found.append(str(path.relative_to(ROOT)))
  return found


def check_shared_folder(workdir: str) -> None:
  """Raises ValueError where a work directory is no absolute path, the same on every machine."""
  if "://" in workdir or not os.path.isabs(workdir):
    raise ValueError(
      f"--workdir {workdir} — expected the absolute path of a folder that all hosts share — mount "
      "one there: Filestore, or a bucket by gcsfuse"
    )


def environment(assignments: Sequence[str]) -> dict[str, str]:
  """NAME=VALUE texts as a dictionary.

  Raises:
    ValueError: one is something else.
  """
  result = {}
  for text in assignments:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
      raise ValueError(f"--env {text} — expected NAME=VALUE — write --env {name}=...")
    result[name] = value
  return result


@dataclasses.dataclass(frozen=True)
class Command:
  """A command to run: its words, and what it reads on standard input. As text, a line of shell."""

  words: tuple[str, ...]
  text: str | None = None

  def __str__(self) -> str:
    line = shlex.join(self.words)
    return line if self.text is None else f"{line} <<'END_OF_TEXT'\n{self.text}END_OF_TEXT"


def carry_out(
  commands: Sequence[Command], *, dry_run: bool, installs: Mapping[str, str] | None = None
) -> None:
  """Shows each command and runs it; stops at the first that fails.

  Args:
    dry_run: only show them.
    installs: program -> what brings it, for the message where it is missing.
  Raises:
    FileNotFoundError: a program is not installed; nothing was run.
    RuntimeError: a command failed.
  """
  for program, what in (installs or {}).items():
    if not dry_run and shutil.which(program) is None:
      raise FileNotFoundError(
        f"{program} is not here — expected it on PATH — install {what}, or give --dry_run and run "
        "the commands elsewhere"
      )
  for command in commands:
    print(command, flush=True)
    if dry_run:
      continue
    done = subprocess.run(command.words, input=command.text, text=True, check=False)
    if done.returncode:
      raise RuntimeError(
        f"{' '.join(command.words[:5])} ... ended with exit code {done.returncode} — expected 0 — "
        "its own message is above; what is after it did not run"
      )
