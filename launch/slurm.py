"""Trains a run on a GPU cluster under Slurm. The manual: --help"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import command_line
import launcher

DESCRIPTION = """Submits a run to Slurm: one process a GPU, on as many nodes as --target has hosts.

the job:
  Nodes share this checkout and the work directory. Each process has its supervise.py, so that a
  run that fails begins again. Before the time limit the run saves and ends with exit code 75, and
  the job puts itself back into the queue: it goes on where it stopped.
  Lines of the log begin with the number of their process; a process that does not come within
  --init_timeout is named with those that did, and their hosts."""

EPILOG = f"""{launcher.MANUAL}

sbatch options:
  What comes after -- goes to sbatch: the partition, the account, the time limit.

{command_line.EXIT_CODES}

examples:
  python launch/slurm.py --gin_file configs/runs/corpus_gla_1b.gin --workdir /shared/runs/gla_1b \\
      --target h100:4x8 -- --partition=gpu --time=24:00:00
  python launch/slurm.py --gin_file configs/runs/corpus_gla_1b.gin --workdir /shared/runs/gla_1b \\
      --target a100:8 --dry_run"""

# The log is one file over all turns of the job, since a requeued job keeps its number.
SCRIPT = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks={processes}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@{notice}
set -u

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
place=(--coordinator "$first:$((20000 + SLURM_JOB_ID % 10000))" --processes {processes})
# srun does not take the processors of a task over from sbatch.
srun --label --wait=300 ${{SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"}} \
  bash -c 'exec "$@" --process "$SLURM_PROCID"' task \
  {supervise} -- \
  {train} "${{place[@]}}"
code=$?
if [ "$code" -eq {interrupted} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""

NOTICE = 300  # seconds before the time limit in which a run has to save


def options() -> argparse.ArgumentParser:
  """The options, with the manual."""
  parser = command_line.parser(DESCRIPTION, EPILOG)
  launcher.add_run_options(
    parser, target="h100:4x8 is four nodes of eight H100; the others: compile_ahead.py --help"
  )
  parser.add_argument("--name", help="of the job; default the name of the work directory")
  parser.add_argument("sbatch", nargs="*", metavar="-- OPTION", help="of sbatch")
  return parser


def submit(arguments: argparse.Namespace) -> int:
  """Checks, shows and submits the job; returns the exit code."""
  chip = launcher.checked_target(
    arguments, platform="cuda", otherwise="launch/tpu_pod.py or launch/gke.py"
  )
  script = job_script(arguments, nodes=chip.hosts, gpus=chip.device_count // chip.hosts)
  command = launcher.Command(("sbatch", *arguments.sbatch), script)
  launcher.carry_out([command], dry_run=arguments.dry_run, installs={"sbatch": "Slurm's client"})
  return 0


def job_script(arguments: argparse.Namespace, *, nodes: int, gpus: int) -> str:
  """The batch script of a job on so many nodes, with so many GPUs each."""
  from jaxmix.training.interruption import EXIT_CODE

  workdir = Path(arguments.workdir).resolve()
  name = re.sub(r"[^\w.-]", "_", arguments.name or workdir.name)
  arguments = argparse.Namespace(**{**vars(arguments), "workdir": str(workdir)})
  words = launcher.train_words(arguments, launcher.gin_files_here(arguments))
  launch = launcher.ROOT / "launch"
  return SCRIPT.format(
    name=name,
    nodes=nodes,
    gpus=gpus,
    processes=nodes * gpus,
    notice=NOTICE,
    interrupted=EXIT_CODE,
    supervise=shlex.join([sys.executable, str(launch / "supervise.py")]),
    train=shlex.join([sys.executable, str(launch / "train.py"), *words]),
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  return command_line.exit_code(submit, options().parse_args(argv))


if __name__ == "__main__":
  sys.exit(main())
