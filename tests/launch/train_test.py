"""launch/train.py: what it prints, how it is stopped, and how it says no."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from jaxmix.training.metrics import MetricsWriter


@pytest.fixture(scope="module")
def train(script):
  """launch/train.py as a module."""
  return script("train")


def command_after(output: str, what: str) -> list[str]:
  """The options of the command that the output shows for a script."""
  (line,) = [line for line in output.splitlines() if f"{what}.py" in line]
  python, path, *options = shlex.split(line)
  assert os.path.samefile(python, sys.executable) and os.path.isfile(path)
  return options


def test_a_run_shows_its_configuration_and_the_commands_that_come_next(script, trained):
  assert trained.output.startswith((trained.workdir / "config.gin").read_text())
  for name, rest in (("evaluate", []), ("generate", ["--prompt", "The "])):
    options = command_after(trained.output, name)
    assert options == ["--workdir", str(trained.workdir), *rest]
    script(name).options().parse_args(options)


def test_a_stopped_run_shows_the_command_that_goes_on(
  train, trained, tmp_path, monkeypatch, capsys
):
  write = MetricsWriter.write

  def write_and_stop(self, step, *others, **named):
    write(self, step, *others, **named)
    if step == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  options = ["--gin_file", str(trained.gin_file), "--workdir", str(tmp_path / "a run")]
  with monkeypatch.context() as patch:
    patch.setattr(MetricsWriter, "write", write_and_stop)
    assert train.main([*options, "--gin_param", "train.seed = 1"]) == 75
  output = capsys.readouterr().out
  assert "stopped by SIGTERM and saved after step 3; to go on:" in output
  assert train.main(command_after(output, "train")) == 0
  output = capsys.readouterr().out
  assert "going on from the checkpoint of step 3" in output
  assert "trained 8 steps" in output


@pytest.mark.parametrize(
  "options, text",
  [
    (["--gin_file", "nowhere.gin"], "gin_file 'nowhere.gin': there is no such file"),
    (["--gin_param", "Decoder.dimm = 3"], "Decoder has no parameter 'dimm'; did you mean dim?"),
    (["--gin_param", "train.steps = 'many'"], "train.steps"),
    (["--gin_param", "LocalFiles.train = '/nowhere.txt'"], "/nowhere.txt"),
    (["--gin_param", "train.batch_size = 0"], "train: batch_size=0, expected at least 1"),
    (["--gin_param", "Decoder.remat = 'some'"], "remat names 'some', which is unknown"),
    (["--gin_param", "adamw.learning_rate = 1e38"], "the loss of step"),
    (["--workdir", "{gin_file}"], "run.gin"),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_1(train, trained, tmp_path, capsys, options, text):
  given = [option.format(gin_file=trained.gin_file) for option in options]
  files = [] if "--gin_file" in given else ["--gin_file", str(trained.gin_file)]
  assert train.main([*files, "--workdir", str(tmp_path / "run"), *given]) == 1
  errors = capsys.readouterr().err
  assert text in errors
  assert errors.count("\n") == 1 and " error: " in errors


def test_a_checkpoint_of_another_model_is_said_with_its_differences(
  train, trained, tmp_path, capsys
):
  shutil.copytree(trained.workdir, tmp_path / "run")
  config = (tmp_path / "run" / "config.gin").read_text()
  options = ["--gin_file", str(trained.gin_file), "--workdir", str(tmp_path / "run")]
  assert train.main([*options, "--gin_param", "Decoder.dim = 32"]) == 1
  errors = capsys.readouterr().err
  assert "checkpoint float32[257,16], the model wants float32[257,32]" in errors
  assert "Traceback" not in errors
  assert (tmp_path / "run" / "config.gin").read_text() == config, "the run keeps its own"


def test_traceback_shows_where_a_mistake_was_found(train, trained, tmp_path, capsys):
  options = ["--gin_file", str(trained.gin_file), "--workdir", str(tmp_path / "run")]
  assert train.main([*options, "--gin_param", "train.batch_size = 0", "--traceback"]) == 1
  errors = capsys.readouterr().err
  assert errors.startswith("Traceback") and "loop.py" in errors
  assert "error: train: batch_size=0" in errors.splitlines()[-1]


def test_a_defect_keeps_its_traceback(train, trained, tmp_path, monkeypatch):
  (tmp_path / "defective.py").write_text("def model(vocab_size, *, rngs):\n  return {}['layers']\n")
  run_file = tmp_path / "defective.gin"
  run_file.write_text(
    "from defective import model\nfrom jaxmix.training import train\ntrain.model = @model\n"
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  files = ["--gin_file", str(trained.gin_file), "--gin_file", str(run_file)]
  with pytest.raises(KeyError, match="layers"):
    train.main([*files, "--workdir", str(tmp_path / "run")])


@pytest.mark.parametrize(
  "options, text",
  [
    (["--workdir", "x"], "--gin_file"),
    (["--gin_file", "x"], "--workdir"),
    (["--gin_file", "x", "--workdir", "x", "--work", "y"], "unrecognized arguments: --work"),
  ],
)
def test_a_wrong_option_is_exit_code_2(train, capsys, options, text):
  with pytest.raises(SystemExit) as stopped:
    train.main(options)
  assert stopped.value.code == 2
  assert text in capsys.readouterr().err.splitlines()[-1]


def test_run_files_are_found_from_anywhere(train, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  options = ["--gin_file", "configs/runs/quickstart.gin", "--workdir", "run"]
  assert train.main([*options, "--gin_param", "train.stepz = 1"]) == 1
  assert "train has no parameter 'stepz'" in capsys.readouterr().err


def test_the_manuals_need_no_jax_and_name_every_exit_code(repository):
  code = "import sys, train, evaluate, generate; print('jax' in sys.modules)"
  environment = {**os.environ, "PYTHONPATH": str(repository / "launch")}
  run = {"env": environment, "text": True, "check": True, "capture_output": True}
  assert subprocess.run([sys.executable, "-c", code], **run).stdout == "False\n"
  for name, codes in (("train", "012"), ("evaluate", "012"), ("generate", "012")):
    command = [sys.executable, str(repository / "launch" / f"{name}.py"), "--help"]
    manual = subprocess.run(command, **run).stdout
    assert all(f"\n  {code} " in manual for code in codes)
    assert ("\n  75 " in manual) == (name == "train")


def test_an_interpreter_without_jaxmix_is_told_which_one_has_it(repository):
  environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  done = subprocess.run(
    [sys.executable, "-S", "launch/train.py", "--gin_file", "x", "--workdir", "y"],
    cwd=repository,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  assert done.stderr.count("\n") == 1 and "bash " in done.stderr
  assert "launch/environment.sh" in done.stderr
