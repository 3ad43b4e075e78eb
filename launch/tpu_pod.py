"""Trains a run on a TPU pod of Google Cloud, by gcloud. The manual: --help"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import command_line
import launcher

if TYPE_CHECKING:
  from jaxmix.compile_ahead.targets import Target

DESCRIPTION = """Trains a run on TPU VMs of Google Cloud: one slice, or several that are joined over
the data centre network.

  create   asks for the slices, as a queued resource; they are there when its state is ACTIVE:
           gcloud compute tpus queued-resources list --zone ZONE
  train    copies this checkout to every worker, makes its environment, and starts the run there,
           under supervise.py, which starts it again when it fails
  logs     what worker 0 says as the run goes on; --worker all: the last lines of every worker,
           beside the name of its host
  stop     lets the run save and stop
  delete   deletes the slices, after gcloud has asked; nothing else here deletes anything

the workers:
  The work directory, and data that the run reads, lie on a folder that all workers mount; --setup
  gives the commands for that. A worker that gcloud does not reach is named at once. One that does
  not join the others within --init_timeout is the one that does not say so in logs --worker all."""

EPILOG = f"""{launcher.MANUAL}

gcloud options:
  What comes after -- in create goes to gcloud: --spot, --reserved, --network, --service-account.

{command_line.EXIT_CODES}

examples:
  run="--gin_file configs/runs/corpus_gla_1b.gin --workdir /mnt/runs/gla_1b --target v5e:4x8"
  python launch/tpu_pod.py create --name gla --zone us-west4-a $run -- --spot
  python launch/tpu_pod.py train --name gla --zone us-west4-a $run \\
      --env JAXMIX_DATA=/mnt/data --setup 'sudo mount -m -t nfs 10.0.0.2:/share /mnt'
  python launch/tpu_pod.py logs --name gla --zone us-west4-a
  python launch/tpu_pod.py delete --name gla --zone us-west4-a"""

# Chip -> what gcloud calls it, and the software of its VMs: docs.cloud.google.com/tpu/docs/runtimes
CHIPS = {
  "v4": ("v4", "tpu-ubuntu2204-base"),
  "v5e": ("v5litepod", "v2-alpha-tpuv5-lite"),
  "v5p": ("v5p", "v2-alpha-tpuv5"),
  "v6e": ("v6e", "v2-alpha-tpuv6e"),
}

PREPARE = """set -eu
if kill -0 "$(cat jaxmix/train.pid 2>/dev/null)" 2>/dev/null; then
  echo "$(hostname): a run goes on here already; stop it first" >&2
  exit 1
fi
mkdir -p jaxmix
cd jaxmix
rm -rf configs jaxmix launch pallas_kernels
tar --extract --gzip --file ../jaxmix.tar.gz
if ! {python} -c 'import ensurepip, venv' 2>/dev/null; then
  sudo apt-get update -q
  sudo apt-get install -q -y {python}-venv
fi
if [ ! -x .venv/bin/python ]; then {python} -m venv .venv; fi
.venv/bin/python -m pip install --quiet --editable '.[tpu,hf]'
{setup}"""

START = """set -eu
cd jaxmix
{exports}nohup .venv/bin/python launch/supervise.py -- .venv/bin/python launch/train.py {words} \\
  >>train.log 2>&1 </dev/null &
echo "$!" >train.pid
"""

FOLLOW = "tail --lines=+1 --follow jaxmix/train.log"
NEWEST = """tail --lines=20 jaxmix/train.log | sed "s/^/$(hostname): /" """
STOP = """kill -TERM "$(cat jaxmix/train.pid)" """


def options() -> argparse.ArgumentParser:
  """The options, with the manual."""
  parser = command_line.parser(DESCRIPTION, EPILOG)
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  parts = {
    name: commands.add_parser(name, allow_abbrev=False)
    for name in ("create", "train", "logs", "stop", "delete")
  }
  for each in parts.values():
    each.add_argument("--name", required=True, help="of the queued resource")
    each.add_argument("--zone", required=True, help="of Google Cloud")
    each.add_argument("--project", help="of Google Cloud; default that of gcloud")
  for name in ("create", "train"):
    launcher.add_run_options(parts[name], target="a TPU slice, v5e:4x4, or two such, v5e:4x4:2")
  for name in ("logs", "stop", "delete"):
    launcher.add_dry_run(parts[name])
  create, train, logs = parts["create"], parts["train"], parts["logs"]
  create.add_argument("--runtime_version", help="of the VMs; default the usual one of the chip")
  create.add_argument("gcloud", nargs="*", metavar="-- OPTION", help="of gcloud")
  train.add_argument(
    "--env", action="append", default=[], metavar="NAME=VALUE", help="of the trainer; repeatable"
  )
  train.add_argument(
    "--setup",
    action="append",
    default=[],
    metavar="COMMAND",
    help="run on every worker before the run is started, such as a mount; repeatable",
  )
  train.add_argument(
    "--python",
    default="python3.11",
    metavar="NAME",
    help="of the workers, 3.11 or newer, installed by apt where it is missing; default %(default)s",
  )
  logs.add_argument(
    "--worker", choices=["0", "all"], default="0", help="whose log; default %(default)s"
  )
  return parser


def work(arguments: argparse.Namespace) -> int:
  """Checks, shows and runs the commands; returns the exit code."""
  steps = {"create": _create, "train": _train, "logs": _logs, "stop": _stop, "delete": _delete}
  launcher.carry_out(
    steps[arguments.command](arguments),
    dry_run=arguments.dry_run,
    installs={"gcloud": "the Google Cloud CLI"},
  )
  return 0


def _checked(arguments: argparse.Namespace) -> Target:
  chip = launcher.checked_target(arguments, platform="tpu", otherwise="launch/slurm.py")
  if chip.chip not in CHIPS:
    raise ValueError(
      f"--target {chip.name}: Google Cloud has no VMs of {chip.chip} outside of GKE — expected one "
      f"of {', '.join(CHIPS)} — use launch/gke.py"
    )
  return chip


def _create(arguments: argparse.Namespace) -> list[launcher.Command]:
  chip = _checked(arguments)
  kind, version = CHIPS[chip.chip]
  nodes = ("--node-id", arguments.name)
  if chip.slices > 1:
    nodes = ("--node-count", str(chip.slices), "--node-prefix", arguments.name)
  return [
    _gcloud(
      arguments, "create", *nodes, "--type", kind, "--topology", chip.topology,
      "--runtime-version", arguments.runtime_version or version, *arguments.gcloud,
    )
  ]  # fmt: skip


def _train(arguments: argparse.Namespace) -> list[launcher.Command]:
  launcher.check_shared_folder(arguments.workdir)
  words = launcher.train_words(
    arguments, launcher.gin_files_in_checkout(arguments), "--distributed", "auto"
  )
  env = launcher.environment(arguments.env)
  _checked(arguments)
  archive = str(Path(tempfile.gettempdir()) / f"jaxmix-{arguments.name}.tar.gz")
  pack = ("tar", "--create", "--gzip", "--file", archive, "--directory", str(launcher.ROOT))
  exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items())
  setup = "".join(f"{line}\n" for line in arguments.setup)
  return [
    launcher.Command((*pack, "--exclude", "__pycache__", *launcher.CODE)),
    _gcloud(arguments, "scp", archive, everywhere=True),
    _ssh(arguments, PREPARE.format(python=shlex.quote(arguments.python), setup=setup)),
    _ssh(arguments, START.format(exports=exports, words=shlex.join(words))),
  ]


def _logs(arguments: argparse.Namespace) -> list[launcher.Command]:
  if arguments.worker == "all":
    return [_ssh(arguments, NEWEST.strip())]
  return [_gcloud(arguments, "ssh", "--command", FOLLOW)]


def _stop(arguments: argparse.Namespace) -> list[launcher.Command]:
  return [_ssh(arguments, STOP.strip())]


def _delete(arguments: argparse.Namespace) -> list[launcher.Command]:
  return [_gcloud(arguments, "delete", "--force")]  # with its nodes


def _ssh(arguments: argparse.Namespace, script: str) -> launcher.Command:
  return _gcloud(arguments, "ssh", "--command", script, everywhere=True)


def _gcloud(
  arguments: argparse.Namespace, verb: str, *words: str, everywhere: bool = False
) -> launcher.Command:
  """A gcloud command on the queued resource; `everywhere`: on all workers of all slices."""
  what = (arguments.name,)
  if verb == "scp":
    words, what = (), (*words, f"{arguments.name}:jaxmix.tar.gz")
  place = ("--zone", arguments.zone)
  if arguments.project:
    place += ("--project", arguments.project)
  if everywhere:
    place += ("--node", "all", "--worker", "all")
  return launcher.Command(
    ("gcloud", "compute", "tpus", "queued-resources", verb, *what, *place, *words)
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  return command_line.exit_code(work, options().parse_args(argv))


if __name__ == "__main__":
  sys.exit(main())
