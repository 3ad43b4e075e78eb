"""What run files and overrides mean."""

from __future__ import annotations

import importlib
import inspect

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxmix.configuration import ConfigurationError, load


def test_the_root_is_called_with_bindings_macros_references_and_scopes(read, run, library):
  arguments = read(run).call(workdir="here")
  assert (arguments["workdir"], arguments["steps"], arguments["rate"]) == ("here", 10, 1e-3)
  decoder = arguments["model"]()
  assert type(decoder) is library.Decoder and decoder.depth == 2
  plain, wide = decoder.mixers["plain"](), decoder.mixers["wide"](norm=library.Norm)
  assert (plain.dim, plain.heads, wide.dim, wide.heads) == (16, 2, 16, 8)


def test_arguments_of_the_caller_win(read, run):
  configuration = read(run)
  assert configuration.call(workdir="w", steps=3)["steps"] == 3
  assert configuration.value("model")(5).depth == 5
  assert configuration.value("model")(depth=6).depth == 6
  scaled = read(run + "Decoder.activation = @scale\nscale.by = 3.0").value("model")().activation
  assert scaled(1.0, 2.0) == 9.0, (
    "an argument by position must not hide a binding that has another name"
  )


def test_a_scope_reaches_what_is_referred_to_inside_it(read, run):
  text = run + "Mixer.norm = @Norm\nwide/Norm.epsilon = 0.5\nNorm.epsilon = 0.25"
  mixers = read(text).value("model")().mixers
  assert mixers["plain"]().norm.epsilon == 0.25 and mixers["wide"]().norm.epsilon == 0.5


def test_values_resolve_and_defaults_are_known(read, run, library):
  configuration = read(run + 'train.data = @Files()\nFiles.path = "a.txt"\ntrain.window = %DIM')
  assert configuration.value("data") == library.Files("a.txt")
  assert configuration.value("window") == 16
  assert configuration.value("schedule") == "cosine"
  assert configuration.value("path", of=library.Files) == "a.txt"
  with pytest.raises(
    ConfigurationError, match=r"train has no parameter 'step'; did you mean steps\?"
  ):
    configuration.value("step")
  with pytest.raises(ConfigurationError, match=r"train\.workdir has no value; the caller gives it"):
    configuration.value("workdir")


def test_a_reference_without_bindings_is_the_object_itself(read, run, library):
  configuration = read(run + "Decoder.activation = @Rotary\nDecoder.anything = @scale")
  decoder = configuration.value("model")()
  assert decoder.activation is library.Rotary and decoder.anything is library.scale
  assert inspect.signature(configuration.value("model")) == inspect.signature(library.Decoder)


def test_two_readings_of_a_reference_are_equal_and_hash_alike(read, run):
  configuration = read(run)
  first, second = configuration.value("model"), configuration.value("model")
  assert first == second and hash(first) == hash(second)
  assert first != read(run).value("model"), "another configuration may bind other values"


def test_an_evaluated_reference_is_made_anew_at_each_call(read, run):
  model = read(run + "Decoder.anything = [@Norm(), @Norm()]").value("model")
  first, second = model(), model()
  assert len({id(norm) for norm in (*first.anything, *second.anything)}) == 4


def test_later_files_and_overrides_win(read, run, tmp_path, library):
  (tmp_path / "second.gin").write_text(
    "from toy_library import train\ntrain.steps = 20\nDIM = 32\ninclude 'third.gin'\n"
  )
  (tmp_path / "third.gin").write_text("import toy_library\ntoy_library.train.rate = 0.5\n")
  (tmp_path / "run.gin").write_text(run)
  names = [tmp_path / "run.gin", "second.gin"]
  configuration = load(names, ["train.rate = 2"], root=library.train, supplied=["workdir"])
  assert configuration.value("steps") == 20 and configuration.value("rate") == 2
  assert configuration.value("model")().mixers["plain"]().dim == 32
  assert read(run, "train.steps = 5", "train.steps = 6").value("steps") == 6


def test_blocks_long_values_and_modules_by_name_are_read(read):
  text = """
    from __gin__ import dynamic_registration
    import toy_library as toys
    toys.train:
      steps = 3  # a comment
      model = @toys.Decoder
      notes = (
        "one "
        "and the same",
        'two',
      )
      table = {"a": [1, -2], "b": []}
  """
  configuration = read(text)
  assert configuration.value("notes") == ("one and the same", "two")
  assert configuration.value("table") == {"a": [1, -2], "b": []}


def test_includes_are_found_beside_the_file_in_the_working_directory_and_in_the_checkout(
  read, tmp_path, library, repository
):
  (tmp_path / "models" / "sizes").mkdir(parents=True)
  (tmp_path / "models" / "small.gin").write_text(
    'include "sizes/two.gin"\ninclude "models/sizes/three.gin"\n'
  )
  (tmp_path / "models" / "sizes" / "two.gin").write_text(
    "from toy_library import Decoder\nDecoder.depth = 2\n"
  )
  (tmp_path / "models" / "sizes" / "three.gin").write_text(
    "from toy_library import Decoder\nDecoder.rate = 3\n"
  )
  decoder = read(
    "from toy_library import train\ntrain.steps = 1\ninclude 'models/small.gin'\n"
    "from toy_library import Decoder\ntrain.model = @Decoder"
  ).value("model")()
  assert (decoder.depth, decoder.rate) == (2, 3)
  with pytest.raises(ConfigurationError) as caught:
    load(["nowhere.gin"], root=library.train)
  assert f" in ., {repository}" in str(caught.value), (
    "the checkout is where files are looked for last"
  )


def test_what_a_shared_file_requires_can_come_from_an_override(read, run):
  text = run.replace("train.steps = 10", "train.steps = %gin.REQUIRED")
  assert read(text, "train.steps = 7").value("steps") == 7
  assert read(text.replace("DIM = 16", "DIM = %gin.REQUIRED"), "train.steps = 7", "DIM = 4").text()


def test_two_loads_in_one_process_do_not_mix(read, run):
  first = read(run)
  with pytest.raises(ConfigurationError):
    read(run, "train.nothing = 1")
  second = read(run, "DIM = 99", "train.rate = 7.0")
  assert first.value("model")().mixers["plain"]().dim == 16 and first.value("rate") == 1e-3
  assert second.value("model")().mixers["plain"]().dim == 99


def test_classes_of_flax_and_functions_of_jax_can_be_configured(tmp_path, monkeypatch):
  (tmp_path / "toy_flax.py").write_text(
    "from flax import nnx\n"
    "class Block(nnx.Module):\n"
    "  def __init__(self, dim: int, *, activation=nnx.relu, rngs: nnx.Rngs):\n"
    "    self.linear, self.activation = nnx.Linear(dim, dim, rngs=rngs), activation\n"
    "  def __call__(self, x):\n"
    "    return self.activation(self.linear(x))\n"
    "def build(block):\n"
    "  return block(rngs=nnx.Rngs(0))\n"
  )
  (tmp_path / "run.gin").write_text(
    "from toy_flax import build\nfrom toy_flax import Block\nfrom jax.nn import gelu\n"
    "build.block = @Block\nBlock.dim = 3\nBlock.activation = @gelu\ngelu.approximate = False\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  build = importlib.import_module("toy_flax").build
  block = load([tmp_path / "run.gin"], root=build).call()
  graph, parameters = nnx.split(block)
  x = jnp.ones((1, 3))
  y = jax.jit(lambda parameters, x: nnx.merge(graph, parameters)(x))(parameters, x)
  expected = jax.nn.gelu(block.linear(x), approximate=False)
  assert jnp.allclose(y, expected, rtol=1e-6)
  assert hash(graph) == hash(nnx.graphdef(block)), "configured functions can stand in a graph"
