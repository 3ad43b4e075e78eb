"""What the loader refuses, by the text of the error."""

from __future__ import annotations

import pytest

from jaxmix.configuration import ConfigurationError, load

# Each line is appended to a run file in which everything is right, as line 18.
REFUSED = {
  # grammar
  "x": "run.gin:18: cannot read 'x' (Couldn't parse statement, expected ':' or '='); expected one",
  "train.rate = hello": "cannot read 'train.rate = hello' (Failed to parse token 'hello')",
  "train.rate = 1 2": "cannot read 'train.rate = 1 2' (Expected newline); expected one `name.par",
  "import os, sys": "cannot read 'import os, sys' (Expected newline); expected `import module` or",
  "from __gin__ import magic": "unknown gin feature 'magic'; expected dynamic_registration",
  # names
  "import nowhere": "run.gin:18: there is no module 'nowhere'; correct the name, or install",
  "import toy_broken": "importing toy_broken failed: No module named 'a_package_that_is_missing'",
  "from toy_library import Nrom": "toy_library has no 'Nrom'; did you mean Norm?",
  "from jaxmix import configuratoin": "has no 'configuratoin'; did you mean configuration?",
  "import toy_other\ntoy_other.x = 1": "toy_other is a module; expected a function or a class",
  "Mixre.dim = 1": "run.gin:18: 'Mixre' is not imported; did you mean Mixer?",
  "Unknown.dim = 1": "'Unknown' is not imported; import it first: from ... import Unknown",
  "Decoder.anything = @Filse": "run.gin:18: 'Filse' is not imported; did you mean Files?",
  "Mixer.haeds = 1": "run.gin:18: Mixer has no parameter 'haeds'; did you mean heads?",
  "Norm.xyz = 1": "Norm has no parameter 'xyz'; it takes epsilon",
  "train.steps = 3": "run.gin:18: train.steps is set a second time, after run.gin:12; delete one",
  # macros
  "HEDS = 8\nHEADS = 4\nwide/Mixer.dim = %HEADS": "which no file reads; did you mean HEADS?",
  "window = 8": "sets window, which no file reads; did you mean train.window?",
  "QQ = 8": "sets QQ, which no file reads; delete the line, or use it as %QQ",
  "train.window = %DMI": "%DMI is used, but no file sets DMI; did you mean DIM?",
  "A = [%B]\nB = %A\ntrain.window = %A": "run.gin:18: A has no value: %A -> %B -> %A; give one",
  # lines that nobody reads, and values that nobody gives
  "Norm.epsilon = 1.0": "which nothing reads: no reference leads from train to Norm; write @Norm",
  "wdie/Mixer.dim = 1": "nothing refers to Mixer in the scope 'wdie'; did you mean wide?",
  'train.workdir = "w"': "sets train.workdir, which is given on the command line; delete the line",
  "train.window = %gin.REQUIRED": "train.window must be given a value; set it in the run file, or",
  "Decoder.anything = @Files()": "Files is called without path; add a line `Files.path = ...`",
  # includes
  "include 'nowhere.gin'": "run.gin:18: include 'nowhere.gin': there is no such file in ., ",
  "include 'run.gin'": "run.gin includes itself: run.gin -> run.gin; delete one of the includes",
}

WRONG_TYPES = {
  'train.window = "4"': "train.window = '4' (str), expected int | None; write train.window = 4",
  "train.window = 1e3": "= 1000.0 (float), expected int | None; write train.window = 1000",
  "train.window = True": "train.window = True (bool), expected int | None",
  "Files.path = 3\ntrain.data = @Files()": "= 3 (int), expected str; write Files.path = '3'",
  'train.schedule = "cosin"': "Literal['cosine', 'constant']; write train.schedule = 'cosine'",
  'train.notes = "abc"': "(str), expected Sequence[str]; write train.notes = ('abc',)",
  'train.notes = ["a", 3]': "train.notes = ['a', 3] (list), expected Sequence[str]",
  'Decoder.pattern = ["a"]': "expected tuple[str, ...]; write Decoder.pattern = ('a',)",
  "train.pair = (1, 2, 3)": "train.pair = (1, 2, 3) (tuple), expected tuple[int, float]",
  'train.table = {"a": ["b"]}': "train.table = {'a': ['b']} (dict), expected dict[str, list[int]]",
  "train.flag = 1": "train.flag = 1 (int), expected bool; write train.flag = True",
  "train.flag = None": "train.flag = None (NoneType), expected bool",
  "TEXT = '8'\ntrain.window = %TEXT": "train.window = %TEXT = '8' (str), expected int | None",
  "train.window = @scale": "train.window = @scale (a function or class), expected int | None",
  "train.window = @scale()": "= @scale() (what a call returns), expected int | None",
  'train.data = "a.txt"': "train.data = 'a.txt' (str), expected Source | None",
  "Files.path = 'a'\ntrain.data = @Files": "expected Source | None; write train.data = @Files()",
  "Mixer.norm = @Norm()": "expected Callable[[], Norm]; write Mixer.norm = @Norm",
}

RIGHT_TYPES = [
  "train.rate = 3",
  "train.window = None",
  "train.notes = ['a', 'b']",
  "train.pair = (1, 2)",
  "train.table = {'a': []}",
  "train.data = @built_in()",
  "train.data = @Files()\nFiles.path = 'a'",
  "Mixer.absent = 'its annotation is for type checkers only'",
  "Decoder.activation = @Rotary\nRotary.dim = 3",
  "Decoder.anything = {1: [None]}",
]


def refusal(load_it, *arguments, **named) -> str:
  with pytest.raises(ConfigurationError) as caught:
    load_it(*arguments, **named)
  assert "\n" not in str(caught.value), "an error is one line"
  return str(caught.value)


@pytest.mark.parametrize("line", REFUSED)
def test_a_wrong_line_says_where_what_and_how_to_repair(read, run, line):
  assert REFUSED[line] in refusal(read, run + line + "\n")


@pytest.mark.parametrize("line", ["train.notes = (1,", 'train.rate = "a', 'train.notes = """a'])
def test_an_open_bracket_or_quote_is_refused_on_its_line_or_the_next(read, run, line):
  message = refusal(read, run + line + "\n")  # the words are Python's own, other in each version
  assert message.startswith(("run.gin:18: ", "run.gin:19: ")), message


@pytest.mark.parametrize("line", WRONG_TYPES)
def test_a_value_of_the_wrong_type_is_refused(read, run, line):
  assert WRONG_TYPES[line] in refusal(read, run + line)


@pytest.mark.parametrize("line", RIGHT_TYPES)
def test_a_value_of_the_right_type_is_accepted(read, run, line):
  read(run + line)


def test_required_arguments_of_the_root_must_be_set_or_supplied(read, run, library):
  message = refusal(read, run.replace("train.steps = 10\n", ""))
  assert message == "train is called without steps; add a line `train.steps = ...`"
  message = refusal(load, ["run.gin"], ["train.steps = 1"], root=library.train)
  assert "train is called without workdir" in message


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("train.step = 1", "train has no parameter 'step'; did you mean steps?"),
    ("train.steps", "cannot read 'train.steps' (Couldn't parse statement, expected ':' or '='); e"),
    ("DMI = 1", "sets DMI, which no file reads; did you mean DIM?"),
    ("Decodr.depth = 1", "'Decodr' is not imported; did you mean Decoder?"),
  ],
)
def test_an_override_is_checked_like_a_line_and_named(read, run, override, message):
  assert refusal(read, run, override).startswith(f"--gin_param {override!r}: {message}")


def test_an_override_cannot_use_a_name_that_means_two_things(read, run):
  run += "import toy_other\nDecoder.anything = @toy_other.Mixer()\n"
  assert "'Mixer' means toy_library.Mixer and toy_other.Mixer in the files; import one" in refusal(
    read, run, "Mixer.heads = 3"
  )


@pytest.mark.parametrize(
  "name", ["configs/runs/quickstrat.gin", "configs/run/quickstart.gin", "configs/runs/quickstart"]
)
def test_a_missing_file_names_the_nearest(read, run, library, tmp_path, name):
  read(run)
  (tmp_path / "configs" / "runs").mkdir(parents=True)
  (tmp_path / "configs" / "runs" / "quickstart.gin").write_text("")
  message = refusal(load, [name], root=library.train)
  assert message.startswith(f"gin_file {name!r}: there is no such file in ., ")
  assert message.endswith("; did you mean configs/runs/quickstart.gin?")


def test_a_missing_absolute_path_names_the_nearest(library, tmp_path):
  (tmp_path / "quickstart.gin").write_text("")
  message = refusal(load, [tmp_path / "quickstar.gin"], root=library.train)
  assert message.endswith(f": there is no such file; did you mean {tmp_path / 'quickstart.gin'}?")


def test_a_file_that_is_not_utf_8_is_refused(library, tmp_path):
  (tmp_path / "latin.gin").write_bytes("NAME = 'é'".encode("latin-1"))
  message = refusal(load, [tmp_path / "latin.gin"], root=library.train)
  assert "codec can't decode byte" in message and message.endswith("gin file in UTF-8")
