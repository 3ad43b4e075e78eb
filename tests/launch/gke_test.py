"""launch/gke.py: its manifest, and the pods that it describes run as processes of this machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

# What a cluster does with a JobSet: one process for each place of each job, with the variables of
# GKE, in the folder that stands for the one in the image.
KUBECTL = """
import json, os, subprocess, sys
if sys.argv[1] != "create":
  print(" ".join(sys.argv[1:]))
  sys.exit(0)
spec = json.load(sys.stdin)["spec"]
(jobs,) = spec["replicatedJobs"]
job = jobs["template"]["spec"]
(container,) = job["template"]["spec"]["containers"]
words = [word.replace("$$(", "$(") for word in container["command"]]
pods = []
for number in range(jobs["replicas"]):
  for index in range(job["completions"]):
    variables = {each["name"]: each["value"] for each in container["env"]}
    variables |= {"TPU_WORKER_ID": str(index), "MEGASCALE_SLICE_ID": str(number)}
    folder = os.environ["CHECKOUT"] if container["workingDir"] == "/jaxmix" else None
    pods.append(subprocess.Popen(words, cwd=folder, env={**os.environ, **variables}))
sys.exit(max(pod.wait() for pod in pods))
"""

# What is in a JobSet of v1alpha2, and in the job and pod of Kubernetes within it: field -> type,
# fields of an object, or what the elements of a list are. A ? marks what may be left out.
RULE = {"name": str, "action": str, "onJobFailureReasons": [str]}
POD_RULE = {
  "action": str,
  "onExitCodes?": {"containerName": str, "operator": str, "values": [int]},
  "onPodConditions?": [{"type": str, "status": str}],
}
CONTAINER = {
  "name": str,
  "image": str,
  "workingDir": str,
  "command": [str],
  "env": [{"name": str, "value": str}],
  "ports": [{"containerPort": int}],
  "resources": {"requests": {"google.com/tpu": int}, "limits": {"google.com/tpu": int}},
  "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
  "restartPolicy": str,
  "terminationGracePeriodSeconds": int,
  "nodeSelector": {
    "cloud.google.com/gke-tpu-accelerator": str,
    "cloud.google.com/gke-tpu-topology": str,
  },
  "containers": [CONTAINER],
  "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
}
JOB = {
  "parallelism": int,
  "completions": int,
  "completionMode": str,
  "backoffLimit": int,
  "podFailurePolicy": {"rules": [POD_RULE]},
  "template": {"spec": POD},
}
JOBSET = {
  "apiVersion": str,
  "kind": str,
  "metadata": {"name": str, "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": str}},
  "spec": {
    "failurePolicy": {"maxRestarts": int, "rules": [RULE]},
    "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
  },
}


def check(value, schema, where: str = "") -> None:
  """Fails where a value is not of a schema."""
  if isinstance(schema, dict):
    assert isinstance(value, dict), where
    wanted = {name.rstrip("?"): name for name in schema}
    assert {*value} <= {*wanted}, f"{where}: {[*value]}"
    assert {name for name in schema if not name.endswith("?")} <= {*value}, where
    for name, each in value.items():
      check(each, schema[wanted[name]], f"{where}.{name}")
  elif isinstance(schema, list):
    assert isinstance(value, list), where
    for index, each in enumerate(value):
      check(each, schema[0], f"{where}[{index}]")
  else:
    assert type(value) is schema, f"{where}: {value!r}"


@pytest.fixture
def gke(script, cluster, monkeypatch):
  cluster.program("kubectl", KUBECTL)
  (cluster.programs / "python").symlink_to(sys.executable)
  monkeypatch.setenv("CHECKOUT", str(cluster.checkout))
  return script("gke").main


def train(cluster, target: str = "v5e:4x4:2", *more: str) -> list[str]:
  mesh = str(cluster.checkout / "configs" / "mesh" / "fsdp_slices2.gin")
  run = ["--gin_file", cluster.gin_file, "--workdir", "/runs/a", "--target", target]
  run += ["--gin_file", mesh] if target.endswith(":2") else []
  place = ["--name", "a", "--image", "registry/jaxmix:1", "--volume", "claim:/runs"]
  return ["train", *place, *run, "--skip_compile", *more]


def manifest(printed: str) -> dict:
  command, text = printed.split(" <<'END_OF_TEXT'\n")
  assert command == "kubectl create --filename -"
  return json.loads(text.removesuffix("END_OF_TEXT\n"))


@pytest.mark.parametrize(
  ("target", "accelerator", "topology", "slices", "hosts", "chips"),
  [
    ("v5e:4x4:2", "tpu-v5-lite-podslice", "4x4", 2, 4, 4),
    ("v6e:8x8", "tpu-v6e-slice", "8x8", 1, 16, 4),
    ("v6e", "tpu-v6e-slice", "1x1", 1, 1, 1),
    ("v4:2x2x4", "tpu-v4-podslice", "2x2x4", 1, 4, 4),
    ("v5p:4x4x4", "tpu-v5p-slice", "4x4x4", 1, 16, 4),
    ("tpu7x:2x2x2", "tpu7x", "2x2x2", 1, 2, 4),
  ],
)
def test_manifest_is_a_jobset_for_the_target(
  gke, cluster, capsys, target, accelerator, topology, slices, hosts, chips
):
  assert gke(train(cluster, target, "--dry_run")) == 0
  found = manifest(capsys.readouterr().out)
  check(found, JOBSET)
  assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  (jobs,) = found["spec"]["replicatedJobs"]
  job = jobs["template"]["spec"]
  assert (jobs["replicas"], job["parallelism"], job["completions"]) == (slices, hosts, hosts)
  assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
  pod = job["template"]["spec"]
  assert [*pod["nodeSelector"].values()] == [accelerator, topology]
  assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
  mounts, volumes = pod["containers"][0]["volumeMounts"], pod["volumes"]
  assert [each["name"] for each in mounts] == [each["name"] for each in volumes] == ["claim"]
  # A policy on pods is only for pods that are not started again in place.
  assert pod["restartPolicy"] == "Never"


def test_only_what_was_saved_or_taken_away_is_not_counted(gke, cluster, capsys):
  gke(train(cluster, "v5e:4x4:2", "--max_restarts", "3", "--dry_run"))
  spec = manifest(capsys.readouterr().out)["spec"]
  assert spec["failurePolicy"]["maxRestarts"] == 3
  (rule,) = spec["failurePolicy"]["rules"]
  assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
  saved, taken = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
  assert saved["onExitCodes"]["values"] == [75]
  assert taken["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_every_host_of_every_slice_trains(gke, cluster, train_options):
  param = "Decoder.pattern = ('$(HOME)', \"it's\")"
  assert gke(train(cluster, "v5e:4x4:2", "--gin_param", param, "--env", "DATA=/runs/my data")) == 0
  calls = cluster.calls()
  places = {
    (call["environment"]["MEGASCALE_SLICE_ID"], call["environment"]["TPU_WORKER_ID"])
    for call in calls
  }
  assert len(calls) == len(places) == 8
  for call in calls:
    assert call["environment"]["DATA"] == "/runs/my data"
    options = train_options(call["words"])
    assert options["gin_file"] == ["configs/runs/quickstart.gin", "configs/mesh/fsdp_slices2.gin"]
    assert options["gin_param"] == [param] and options["workdir"] == "/runs/a"
    assert options["distributed"] == "auto"


def test_dry_run_prints_a_script(gke, cluster, capsys, shellcheck):
  assert gke(train(cluster, "v5e:4x4:2", "--dry_run")) == 0
  assert gke(["image", "--image", "registry/jaxmix:1", "--dry_run"]) == 0
  assert gke(["logs", "--name", "a", "--dry_run"]) == 0
  assert gke(["delete", "--name", "a", "--dry_run"]) == 0
  printed = capsys.readouterr().out
  shellcheck(f"#!/bin/bash\n{printed}")
  assert not cluster.calls()
  first = printed.split("docker build")[0]
  assert subprocess.run(["bash"], input=first, text=True, check=False).returncode == 0
  assert len(cluster.calls()) == 8, "what was printed can be run"
  assert printed.rstrip().endswith("kubectl delete jobset a")


def test_the_image_holds_what_a_machine_needs(script, cluster):
  copied = script("gke").DOCKERFILE
  code = sys.modules["launcher"].CODE
  words = {word for line in copied.splitlines() if line.startswith("COPY") for word in line.split()}
  assert {*code} <= words


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (["--workdir", "/tmp/a"], "--workdir /tmp/a is on no volume: claim:/runs — expected it there"),
    (["--workdir", "gs://b/a"], "--workdir gs://b/a — expected the absolute path of a folder"),
    (["--volume", "claim"], "--volume claim — expected CLAIM:PATH — write e.g. claim:/runs"),
    (["--name", "My run"], "small letters, digits and hyphens, a letter first — e.g. my-run"),
    (["--env", "DATA"], "--env DATA — expected NAME=VALUE — write --env DATA=..."),
    (["--target", "h100:8"], "--target h100:8 is no TPU .* for h100 use launch/slurm.py"),
    (["--target", "v5e:2x2:2"], "has slices of one host — expected several hosts a slice"),
    (
      ["--gin_file", "/dev/null"],
      "--gin_file /dev/null is not in .*configs — expected a file that",
    ),
  ],
)
def test_what_cannot_run_there_is_refused(gke, cluster, capsys, change, message):
  assert gke(train(cluster, "v5e:4x4:2", *change)) == 1
  assert re.search(message, capsys.readouterr().err)
  assert not cluster.calls()
