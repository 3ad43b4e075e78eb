"""launch/launcher.py: what is checked before anything is reserved, and commands as text."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys

import pytest

from jaxmix import compile_ahead


@pytest.fixture
def launcher(script):
  return importlib.import_module("launcher")


@pytest.fixture
def checked(launcher, repository):
  """`checked_target` for the quickstart with options."""

  def check(*words: str, platform: str = "cuda"):
    parser = argparse.ArgumentParser()
    launcher.add_run_options(parser, target="")
    run = ["--gin_file", str(repository / "configs/runs/quickstart.gin"), "--workdir", "/runs/a"]
    arguments = parser.parse_args([*run, "--gin_param", "train.batch_size = 32", *words])
    return launcher.checked_target(arguments, platform=platform, otherwise="another launcher")

  return check


@pytest.mark.parametrize(
  ("sizes", "target", "platform", "repair"),
  [
    ("make_mesh.data = 4", "v5e:4x4", "tpu", "make_mesh.data = 16"),
    ("make_mesh.data = 4; make_mesh.fsdp = 8", "v5e:4x4", "tpu", "make_mesh.fsdp = 4"),
    ("make_mesh.data = 1; make_mesh.fsdp = 8", "h100:2x8", "cuda", "make_mesh.fsdp = 16"),
    ("make_mesh.tensor = 4; make_mesh.data = 8", "h100:8", "cuda", "make_mesh.data = 2"),
    ("make_mesh.slices = 2; make_mesh.data = 4", "v5e:4x4:2", "tpu", "make_mesh.data = 16"),
    ("make_mesh.slices = 2", "v5e:4x4", "tpu", "make_mesh.slices = 1"),
    ("make_mesh.slices = 3", "v5e:4x4:2", "tpu", "make_mesh.slices = 2"),
  ],
)
def test_a_mesh_of_another_size_is_refused_with_what_would_do(
  checked, sizes, target, platform, repair
):
  params = [word for line in sizes.split("; ") for word in ("--gin_param", line)]
  words = [*params, "--target", target, "--skip_compile"]
  with pytest.raises(ValueError, match=f"{target} has \\d+|{target} has") as error:
    checked(*words, platform=platform)
  assert f"--gin_param '{repair}'" in str(error.value)
  assert checked(*words, "--gin_param", repair, platform=platform).name == target


def test_a_mesh_that_no_size_repairs_is_refused(checked):
  with pytest.raises(ValueError, match=r"h100:8 has 8 devices, .* -1 takes the rest$"):
    checked("--gin_param", "make_mesh.tensor = 3", "--target", "h100:8", "--skip_compile")


def test_rows_that_do_not_divide_among_the_devices_are_refused(checked):
  words = ["--target", "v5e:8x8", "--skip_compile"]
  with pytest.raises(ValueError, match="among the 64 devices along data and fsdp") as error:
    checked(*words, platform="tpu")
  assert "--gin_param 'train.batch_size = 64'" in str(error.value)
  checked(*words, "--gin_param", "make_mesh.tensor = 2", platform="tpu")
  with pytest.raises(ValueError, match=r"in 2 microbatches .* set .*'train.batch_size = 128'"):
    rows = ["--gin_param", "train.batch_size = 64", "--gin_param", "train.microbatches = 2"]
    checked(*words, *rows, platform="tpu")


def test_a_mistake_in_the_run_shows_before_anything_else(checked):
  with pytest.raises(ValueError, match="dims"):
    checked("--gin_param", "Decoder.dims = 3", "--target", "h100:8")


def test_the_run_is_compiled_for_the_target(checked, capsys):
  if (reason := compile_ahead.installed("cuda")) is not None:
    pytest.skip(reason)
  tiny = ('Decoder.pattern = ("linear_attention",)', "Decoder.depth = 1", "Decoder.mixers = None")
  params = [word for line in tiny for word in ("--gin_param", line)]
  assert checked(*params, "--target", "h100:2").device_count == 2
  said = capsys.readouterr()
  assert "h100:2: 2 x NVIDIA H100" in said.err and "fits, with" in said.err
  assert not said.out, "a dry run prints a script there"


@pytest.mark.parametrize(("code", "message"), [(3, "does not fit on"), (1, "was not compiled on")])
def test_what_does_not_fit_is_refused(checked, monkeypatch, code, message):
  asked = []
  script = importlib.import_module("compile_ahead")
  monkeypatch.setattr(script, "main", lambda words: asked.append(words) or code)
  with pytest.raises(ValueError, match=f"the run {message} h100:8.*or give --skip_compile"):
    checked("--target", "h100:8", "--vocab_size", "512", "--length", "64")
  (words,) = asked
  options = script.options().parse_args(words)
  assert options.target == ["h100:8"] and (options.vocab_size, options.length) == (512, 64)


@pytest.mark.parametrize("name", ["tpu_pod", "gke", "slurm", "local"])
def test_help_is_a_manual(script, name):
  text = script(name).options().format_help()
  for part in ("before anything is reserved:", "exit codes:", "examples:"):
    assert part in text


def test_scripts_of_this_folder_pass_the_lint_too(repository, shellcheck):
  scripts = [*(repository / "launch").glob("*.sh"), repository / ".ci" / "run"]
  assert len(scripts) >= 4
  for script in scripts:
    shellcheck(script.read_text())


def test_a_missing_program_is_named_before_anything_runs(launcher, tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  touch = launcher.Command((sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'w')"))
  with pytest.raises(FileNotFoundError, match=r"gcloud is not here — .* the Cloud CLI"):
    launcher.carry_out([touch], dry_run=False, installs={"gcloud": "the Cloud CLI"})
  assert not (tmp_path / "ran").exists()


def test_nothing_runs_after_a_command_that_failed(launcher, tmp_path, capsys):
  fail = launcher.Command((sys.executable, "-c", "raise SystemExit(5)"))
  touch = launcher.Command((sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'w')"))
  with pytest.raises(RuntimeError, match="ended with exit code 5"):
    launcher.carry_out([fail, touch], dry_run=False)
  assert not (tmp_path / "ran").exists()
  assert shlex.split(capsys.readouterr().out) == [*fail.words], "shown before it ran"
