"""launch/slurm.py: its job, run by stand-ins for Slurm's programs as processes of this machine."""

from __future__ import annotations

import subprocess

import pytest

SBATCH = """
import os, pathlib, re, subprocess, sys
script = sys.stdin.read()
pathlib.Path(os.environ["RECORDS"], "..", "submitted").write_text(" ".join(sys.argv[1:]))
directive = lambda name: re.search(rf"^#SBATCH --{name}=(.*)$", script, re.M)[1]
os.environ.update(SLURM_JOB_ID="4711", SLURM_JOB_NODELIST="node[7-8]",
                  SLURM_NTASKS=directive("ntasks"), SLURM_NNODES=directive("nodes"))
sys.exit(subprocess.run(["bash"], input=script, text=True).returncode)
"""

SRUN = """
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
  words.pop(0)
total, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NNODES"])
tasks = [
  subprocess.Popen(words, env={**os.environ, "SLURM_PROCID": str(index),
                               "SLURM_LOCALID": str(index % (total // nodes))})
  for index in range(total)
]
sys.exit(max(task.wait() for task in tasks))
"""

SCONTROL = """
import os, pathlib, sys
if sys.argv[1:3] == ["show", "hostnames"]:
  assert sys.argv[3] == "node[7-8]"
  print("node7\\nnode8")
else:
  pathlib.Path(os.environ["RECORDS"], "..", "requeued").write_text(" ".join(sys.argv[1:]))
"""


@pytest.fixture
def slurm(script, cluster):
  for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
    cluster.program(name, text)
  return script("slurm").main


def arguments(cluster, *more: str) -> list[str]:
  return ["--gin_file", cluster.gin_file, "--target", "h100:2x2", "--skip_compile", *more]


def test_every_gpu_gets_a_process_that_knows_its_place(slurm, cluster, train_options, tmp_path):
  param = "Decoder.pattern = (\"linear_attention\", 'local')  # it's $HOME"
  folder = tmp_path / "a run's folder"
  code = slurm(
    arguments(cluster, "--workdir", str(folder), "--gin_param", param, "--", "--partition=gpu")
  )
  assert code == 0
  assert (tmp_path / "submitted").read_text() == "--partition=gpu"
  calls = [train_options(call["words"]) for call in cluster.calls()]
  assert sorted(call["process"] for call in calls) == [0, 1, 2, 3]
  for call in calls:
    assert (call["coordinator"], call["processes"]) == ("node7:24711", 4)
    assert call["gin_param"] == [param] and call["workdir"] == str(folder)
    assert call["gin_file"] == [cluster.gin_file] and call["init_timeout"] == 300
  assert not (tmp_path / "requeued").exists()


def test_a_run_that_was_stopped_and_saved_goes_back_into_the_queue(
  slurm, cluster, tmp_path, monkeypatch
):
  monkeypatch.setenv("EXIT_CODE", "75")
  assert slurm(arguments(cluster, "--workdir", str(tmp_path / "run"))) == 1  # that of the stand-in
  assert (tmp_path / "requeued").read_text() == "requeue 4711"


def test_a_run_that_failed_does_not(slurm, cluster, tmp_path, monkeypatch):
  monkeypatch.setenv("EXIT_CODE", "1")
  assert slurm(arguments(cluster, "--workdir", str(tmp_path / "run"))) == 1
  assert cluster.calls() and not (tmp_path / "requeued").exists()


def test_dry_run_prints_a_script_and_does_nothing(slurm, cluster, tmp_path, capsys, shellcheck):
  code = slurm(arguments(cluster, "--workdir", str(tmp_path / "it's"), "--dry_run"))
  printed = capsys.readouterr().out
  assert code == 0 and not cluster.calls()
  shellcheck(printed)
  job = printed.split("<<'END_OF_TEXT'\n")[1].removesuffix("END_OF_TEXT\n")
  shellcheck(job)
  for line in ("--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--gpus-per-node=2", "--requeue"):
    assert f"#SBATCH {line}\n" in job
  assert subprocess.run(["bash"], input=printed, text=True, check=False).returncode == 0
  assert len(cluster.calls()) == 4, "what was printed can be run"


def test_a_machine_that_is_no_gpu_cluster_is_refused(slurm, cluster, capsys):
  words = ["--gin_file", cluster.gin_file, "--workdir", "/runs/a", "--target", "v5e:4x4"]
  assert slurm(words) == 1
  assert "--target v5e:4x4 is no GPU — expected one such as h100:4x8" in capsys.readouterr().err
