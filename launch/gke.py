"""Trains a run on TPU slices of Google Kubernetes Engine. The manual: --help"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import command_line
import launcher

if TYPE_CHECKING:
  from jaxmix.compile_ahead.targets import Target

DESCRIPTION = """Trains a run on TPU slices of a GKE cluster, as a JobSet: one pod a host, one job a
slice.

  image    builds an image with this checkout and pushes it
  train    makes the JobSet from the run and gives it to the cluster
  logs     the pods with their hosts, and what the first says; the one to look at when some are
           missing
  delete   ends the run and deletes the JobSet; what is in the work directory stays

the cluster:
  It has JobSet (v0.6 or newer) and node pools of the slice's topology, one a slice, with 4 chips a
  node: e.g. ct5lp-hightpu-4t or ct6e-standard-4t machines. kubectl is connected to it. The work
  directory lies on a claim that every pod can write (ReadWriteMany): Filestore, or a bucket.

when it fails:
  All pods begin again together, --max_restarts times, and go on where the run has saved. Pods that
  are taken away, and runs that were stopped and have saved, do not count."""

EPILOG = f"""{launcher.MANUAL}

{command_line.EXIT_CODES}

examples:
  python launch/gke.py image --image us-docker.pkg.dev/me/jaxmix/train:1
  python launch/gke.py train --name gla-1b --gin_file configs/runs/corpus_gla_1b.gin \\
      --gin_file configs/mesh/fsdp_slices2.gin --workdir /runs/gla_1b --target v5e:4x4:2 \\
      --image us-docker.pkg.dev/me/jaxmix/train:1 --volume my-claim:/runs \\
      --env JAXMIX_DATA=/runs/data
  python launch/gke.py logs --name gla-1b"""

# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
ACCELERATORS = {
  "v4": "tpu-v4-podslice",
  "v5e": "tpu-v5-lite-podslice",
  "v5p": "tpu-v5p-slice",
  "v6e": "tpu-v6e-slice",
  "tpu7x": "tpu7x",
}

# Folders that do not change often come first, so that docker can keep them.
DOCKERFILE = """FROM python:3.12-slim
WORKDIR /jaxmix
COPY LICENSE README.md pyproject.toml ./
COPY pallas_kernels pallas_kernels
COPY jaxmix jaxmix
RUN pip install --no-cache-dir --editable '.[tpu,hf]'
COPY launch launch
COPY configs configs
"""

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_GRACE = 300  # seconds from SIGTERM to SIGKILL, in which a run saves


def options() -> argparse.ArgumentParser:
  """The options, with the manual."""
  parser = command_line.parser(DESCRIPTION, EPILOG)
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  image = commands.add_parser("image", allow_abbrev=False)
  train = commands.add_parser("train", allow_abbrev=False)
  logs = commands.add_parser("logs", allow_abbrev=False)
  delete = commands.add_parser("delete", allow_abbrev=False)
  for each in (train, logs, delete):
    each.add_argument("--name", required=True, help="of the JobSet")
  for each in (image, train):
    each.add_argument("--image", required=True, metavar="NAME", help="of the image, with its tag")
  for each in (image, logs, delete):
    launcher.add_dry_run(each)
  launcher.add_run_options(train, target="a TPU slice, v5e:4x4, or two such, v5e:4x4:2")
  train.add_argument(
    "--volume",
    required=True,
    action="append",
    metavar="CLAIM:PATH",
    help="a persistent volume claim, and where all pods see it; repeatable",
  )
  train.add_argument(
    "--env", action="append", default=[], metavar="NAME=VALUE", help="of the trainer; repeatable"
  )
  train.add_argument(
    "--max_restarts", type=int, default=10, metavar="N", help="after failures; default %(default)s"
  )
  return parser


def work(arguments: argparse.Namespace) -> int:
  """Checks, shows and runs the commands; returns the exit code."""
  steps = {"image": _image, "train": _train, "logs": _logs, "delete": _delete}
  commands = steps[arguments.command](arguments)
  installs = {"docker": "Docker"} if arguments.command == "image" else {"kubectl": "kubectl"}
  launcher.carry_out(commands, dry_run=arguments.dry_run, installs=installs)
  return 0


def _image(arguments: argparse.Namespace) -> list[launcher.Command]:
  build = ("docker", "build", "--tag", arguments.image, "--file", "-", str(launcher.ROOT))
  return [
    launcher.Command(build, DOCKERFILE),
    launcher.Command(("docker", "push", arguments.image)),
  ]


def _train(arguments: argparse.Namespace) -> list[launcher.Command]:
  volumes = _volumes(arguments.volume)
  launcher.check_shared_folder(arguments.workdir)
  workdir = PurePosixPath(arguments.workdir)
  if not any(workdir.is_relative_to(path) for path in volumes.values()):
    raise ValueError(
      f"--workdir {workdir} is on no volume: {', '.join(arguments.volume)} — expected it there, or "
      "it goes with the pods — give a folder under the path of a --volume"
    )
  if not _NAME.fullmatch(arguments.name):
    raise ValueError(
      f"--name {arguments.name!r} — expected up to 40 small letters, digits and hyphens, a letter "
      f"first — e.g. {re.sub('[^a-z0-9]+', '-', arguments.name.lower()).strip('-')[:40] or 'run'}"
    )
  words = launcher.train_words(
    arguments, launcher.gin_files_in_checkout(arguments), "--distributed", "auto"
  )
  env = launcher.environment(arguments.env)
  chip = launcher.checked_target(arguments, platform="tpu", otherwise="launch/slurm.py")
  if chip.slices > 1 and chip.hosts == chip.slices:
    raise ValueError(
      f"--target {chip.name} has slices of one host — expected several hosts a slice, GKE joins no "
      "others — take larger slices"
    )
  manifest = jobset(
    arguments.name,
    chip,
    image=arguments.image,
    command=("python", "launch/train.py", *words),
    env=env,
    volumes=volumes,
    max_restarts=arguments.max_restarts,
  )
  # Not `apply`: a name that is taken is another run.
  text = json.dumps(manifest, indent=1) + "\n"
  return [launcher.Command(("kubectl", "create", "--filename", "-"), text)]


def jobset(
  name: str,
  chip: Target,
  *,
  image: str,
  command: Sequence[str],
  env: dict[str, str],
  volumes: dict[str, str],
  max_restarts: int,
) -> dict[str, Any]:
  """The JobSet that runs a command on every host of TPU slices; kubectl reads JSON as well as YAML.

  GKE tells each pod of its slice, its place there and, of several slices, where they meet: what
  `--distributed auto` reads.

  Args:
    volumes: persistent volume claim -> where it is mounted.
  """
  from jaxmix.training.interruption import EXIT_CODE

  hosts = chip.hosts // chip.slices
  chips = chip.device_count // chip.devices_per_chip // chip.hosts
  container = {
    "name": "train",
    "image": image,
    "workingDir": "/jaxmix",
    "command": [word.replace("$(", "$$(") for word in command],  # $(X) would be a variable
    "env": [{"name": key, "value": value} for key, value in env.items()],
    "ports": [{"containerPort": 8471}, {"containerPort": 8080}],  # within a slice, and across
    "resources": {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}},
    "volumeMounts": [{"name": claim, "mountPath": path} for claim, path in volumes.items()],
  }
  pod = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": _GRACE,
    "nodeSelector": {
      "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[chip.chip],
      "cloud.google.com/gke-tpu-topology": chip.topology,
    },
    "containers": [container],
    "volumes": [
      {"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in volumes
    ],
  }
  job = {
    "parallelism": hosts,
    "completions": hosts,
    "completionMode": "Indexed",
    "backoffLimit": 0,
    "podFailurePolicy": {
      "rules": [
        {
          "action": "FailJob",
          "onExitCodes": {"containerName": "train", "operator": "In", "values": [EXIT_CODE]},
        },
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
      ]
    },
    "template": {"spec": pod},
  }
  uncounted = {
    "name": "saved-or-disrupted",
    "action": "RestartJobSetAndIgnoreMaxRestarts",
    "onJobFailureReasons": ["PodFailurePolicy"],
  }
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {
      "name": name,
      "annotations": {
        # A slice is a node pool: the pods of one job have one to themselves.
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
      },
    },
    "spec": {
      "failurePolicy": {"maxRestarts": max_restarts, "rules": [uncounted]},
      "replicatedJobs": [{"name": "slice", "replicas": chip.slices, "template": {"spec": job}}],
    },
  }


def _volumes(texts: Sequence[str]) -> dict[str, str]:
  result = {}
  for text in texts:
    claim, _, path = text.partition(":")
    if not claim or not path.startswith("/"):
      raise ValueError(
        f"--volume {text} — expected CLAIM:PATH — write e.g. {claim or 'claim'}:/runs"
      )
    result[claim] = path
  return result


def _logs(arguments: argparse.Namespace) -> list[launcher.Command]:
  of_set = f"jobset.sigs.k8s.io/jobset-name={arguments.name}"
  first = f"{of_set},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
  return [
    launcher.Command(("kubectl", "get", "pods", "--output", "wide", "--selector", of_set)),
    launcher.Command(("kubectl", "logs", "--follow", "--tail", "-1", "--selector", first)),
  ]


def _delete(arguments: argparse.Namespace) -> list[launcher.Command]:
  return [launcher.Command(("kubectl", "delete", "jobset", arguments.name))]


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  return command_line.exit_code(work, options().parse_args(argv))


if __name__ == "__main__":
  sys.exit(main())
