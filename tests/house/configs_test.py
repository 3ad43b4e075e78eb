"""Every run file parses, builds a model without arrays, and lowers its training step."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import pytest

from jaxmix import configuration
from jaxmix.models import abstract_parameters
from jaxmix.training import train
from jaxmix.training.run import SUPPLIED, abstract_run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RUNS = sorted(CONFIGS.glob("runs/*.gin"))
PARAMETERS = {
  "corpus_gated_deltanet_1b": 1_359_203_068,
  "corpus_gla_1b": 1_337_368_576,
  "corpus_kda_1b": 1_362_795_904,
  "corpus_mamba2_1b": 1_343_693_824,
  "corpus_bert_110m": 109_219_386,
  "corpus_monarch_bert_80m": 80_267_328 + 12 * 2 * 768 - 6 * 769,
  "corpus_monarch_gpt_360m": 367_313_024,
  # The Transformers and Grassmann models of arXiv 2512.19428, to the last parameter.
  "wikitext2_attention_17m": 17_356_800,
  "wikitext2_grassmann_13m": 13_001_920,
  "wikitext2_grassmann_13m_near": 13_001_920,
  "wikitext2_grassmann_18m": 18_189_696,
  "wikitext2_grassmann_published_13m": 12_607_168,
  "wikitext2_grassmann_published_17m": 17_400_192,
  "mnist_attention_linear_head": 104_458,
  "mnist_attention_subspace_head": 108_928,
  "snli_attention_head": 3_335_619,
  "snli_grassmann_head": 3_353_667,
  "wikitext2_attention_small": 12_585_472,
  "wikitext2_deltanet_small": 12_604_288,
  "wikitext2_gated_deltanet_small": 12_604_336,
  "wikitext2_gla_small": 12_617_344,
  "wikitext2_grassmann_attention_small": 12_489_600,
  "wikitext2_grassmann_linear_attention_small": 12_514_944,
  "wikitext2_grassmann_small": 12_540_928,
  "wikitext2_hgrn2_small": 12_581_248,
  "wikitext2_hla_small": 12_591_232,
  "wikitext2_kda_small": 12_606_616,
  "wikitext2_lightning_small": 12_578_968,
  "wikitext2_linear_attention_small": 12_585_472,
  "wikitext2_mamba2_small": 12_612_112,
  "wikitext2_monarch_small": 12_644_704,
  "wikitext2_retnet_small": 12_578_944,
  "wikitext2_simple_gla_small": 12_585_088,
}
TEXT, BERT = {"vocab_size": 50_257}, {"vocab_size": 30_522}
IMAGES = {"image_shape": (224, 224, 3), "classes": 1_000}
OTHER_SIZES = {  # model file -> the run in the place of whose model it stands, sizes, parameters
  "gated_deltanet_340m": ("corpus_gated_deltanet_1b", TEXT, 365_815_292),
  "gated_deltanet_7b": ("corpus_gated_deltanet_1b", TEXT, 6_816_258_720),
  "gla_340m": ("corpus_gla_1b", TEXT, 360_402_944),
  "gla_7b": ("corpus_gla_1b", TEXT, 6_685_343_744),
  "kda_340m": ("corpus_kda_1b", TEXT, 372_921_536),
  "kda_7b": ("corpus_kda_1b", TEXT, 6_755_267_584),
  "mamba2_340m": ("corpus_mamba2_1b", TEXT, 368_314_880),
  "mamba2_7b": ("corpus_mamba2_1b", TEXT, 7_222_820_864),
  "monarch_bert_110m": ("corpus_monarch_bert_80m", BERT, 115_583_616 - 6 * 961),
  "monarch_bert_260m": ("corpus_monarch_bert_80m", BERT, 259_133_760 - 6 * 1_537),
  "monarch_bert_341m": ("corpus_monarch_bert_80m", BERT, 341_038_144 - 6 * 1_793),
  "monarch_gpt_125m": ("corpus_monarch_gpt_360m", TEXT, 128_281_920),
  "monarch_vit_b": ("cifar_monarch", IMAGES, 47_176_216),
  "monarch_vit_s": ("cifar_monarch", IMAGES, 13_261_720),
}


@pytest.fixture
def load(shared, monkeypatch):
  """Loads a run file with JAXMIX_DATA at the shared data."""
  monkeypatch.setenv("JAXMIX_DATA", str(shared / "data"))
  return lambda path, params=(): configuration.load([path], params, root=train, supplied=SUPPLIED)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_run_builds_and_lowers(load, path):
  run = load(path)
  data = run.value("data")
  model = functools.partial(run.value("model"), **data.outline.sizes)
  mesh = run.value("mesh")()
  with jax.set_mesh(mesh):
    program, batch = abstract_run(run, mesh, outline=data.outline)
    lowered = program.update.lower(program.abstract_state(), batch)
  assert "stablehlo.dot_general" in lowered.as_text()
  if path.stem in PARAMETERS:
    _, parameters, _ = abstract_parameters(model)
    assert sum(x.size for x in jax.tree.leaves(parameters)) == PARAMETERS[path.stem]


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_other_sizes(name):
  """A model file given after a run file takes the place of its model."""
  run, sizes, count = OTHER_SIZES[name]
  files = [CONFIGS / "runs" / f"{run}.gin", CONFIGS / "models" / f"{name}.gin"]
  model = configuration.load(files, root=train, supplied=SUPPLIED).value("model")
  _, parameters, _ = abstract_parameters(functools.partial(model, **sizes))
  assert sum(x.size for x in jax.tree.leaves(parameters)) == count


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_run_file_says_what_it_is(path):
  head = path.read_text().split("include")[0]
  for wanted in ("launch/train.py --gin_file", "Hardware", "Time", "Result", "Source"):
    assert wanted in head, f"the head of {path.name} does not give: {wanted}"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("mesh/*.gin")), ids=lambda path: path.stem)
def test_mesh_fits_eight_devices(load, path):
  if jax.device_count() != 8:
    pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
  run = load(CONFIGS / "runs" / "quickstart.gin", [])
  assert run.value("mesh")().size == 8
  both = configuration.load(
    [CONFIGS / "runs" / "quickstart.gin", path], root=train, supplied=SUPPLIED
  )
  assert both.value("mesh")().size == 8


def test_every_part_is_in_use():
  included = "".join(path.read_text() for path in [*RUNS, CONFIGS.parent / "README.md"])
  parts = [path for path in CONFIGS.rglob("*.gin") if path.parent.name != "runs"]
  assert len(parts) >= 8
  unused = [str(path.relative_to(CONFIGS)) for path in parts if path.name not in included]
  # Meshes to choose, as fsdp.gin is; and what a test above puts in the place of a run's model.
  meshes = {"mesh/fsdp_tensor4.gin", "mesh/fsdp_slices2.gin"}
  chosen = meshes | {f"models/{name}.gin" for name in OTHER_SIZES}
  assert set(unused) <= chosen, unused
