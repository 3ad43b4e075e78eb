"""A configuration as text: it loads again to the same, and gin itself reads it alike."""

from __future__ import annotations

import re

import gin
import pytest

MORE = (
  "train.data = @Files()\n"
  'Files.path = "it\'s a \\"path\\" \\n"\n'
  f'train.notes = ("{"words " * 40}",)\n'
  'train.table = {"numbers": [1, 2, 3], "more": [%DIM]}\n'
  "train.rate = 1e999\n"
  "PAIR = (%DIM, -0.5)\n"
  "train.pair = %PAIR\n"
  'Decoder.anything = (None, True, b"bytes", {1: @wide/Mixer}, @built_in())\n'
)


@pytest.fixture
def rich(run) -> str:
  """A run file with every kind of value."""
  return run + MORE


def described(value):
  """A result of `train` without identities, to compare two loads."""
  if isinstance(value, dict):
    return {key: described(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return type(value)(described(item) for item in value)
  if callable(value):
    return described(value())
  if hasattr(value, "__dict__"):
    return type(value).__name__, described(vars(value))
  return value


def test_the_text_loads_to_the_same_configuration(read, rich):
  configuration = read(rich)
  again = read(configuration.text())
  assert described(again.call(workdir="w")) == described(configuration.call(workdir="w"))
  assert again.text() == configuration.text(), "writing is a fixed point"
  assert "DIM = 16\n" in again.text() and "Mixer.dim = %DIM\n" in again.text(), "macros are kept"


def test_the_operative_text_pins_the_defaults(read, rich):
  configuration = read(rich)
  text = configuration.operative_text()
  for line in (
    "train.schedule = 'cosine'",
    "Decoder.rate = 0.0",
    "Mixer.heads = 2",
    "Files.length = 128",
  ):
    assert line in text.splitlines()
  assert "workdir" not in text, "what the caller gives is not written"
  again = read(text)
  assert described(again.call(workdir="w")) == described(configuration.call(workdir="w"))
  assert again.operative_text() == text


def test_the_text_leaves_out_what_an_override_has_replaced(read, run):
  other = ("from toy_library import Rotary\nDecoder.mixers = {'r': @Rotary}\nRotary.dim = 4",)
  text = read(run, *other).text()
  assert "wide" not in text and "DIM" not in text and "Rotary.dim = 4" in text
  assert read(text).value("model")().mixers["r"]().dim == 4


def test_the_text_tells_equal_names_apart(read, run):
  run += "import toy_other\nDecoder.anything = @toy_other.Mixer()\ntoy_other.Mixer.width = 3\n"
  configuration = read(run)
  text = configuration.text()
  assert re.search(r"^from toy_\w+ import Mixer as Mixer_2$", text, re.MULTILINE)
  again = read(text)
  assert described(again.call(workdir="w")) == described(configuration.call(workdir="w"))
  assert again.text() == text


def test_gin_itself_gives_the_same(read, rich):
  text = rich.replace("%PAIR", "(%DIM, -0.5)").replace("PAIR = (%DIM, -0.5)\n", "")
  text = re.sub(r"from toy_library import \w+\n", "", text)
  text = text.replace("dynamic_registration\n", "dynamic_registration\nimport toy_library\n")
  text = re.sub(r"(?<![\w./'\"])(train|Decoder|Mixer|Files|built_in)\b", r"toy_library.\1", text)
  text = text.replace("wide/Mixer", "wide/toy_library.Mixer")
  gin.clear_config()
  gin.parse_config(text)
  expected = described(gin.get_configurable("toy_library.train")(workdir="w"))
  gin.clear_config()
  assert described(read(text).call(workdir="w")) == expected
