"""The classifier of pairs of sentences: its head by hand, padding, gradients, sizes; and the head
that was published, which compares nothing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmix.layers import Linear, LinearHead
from jaxmix.mixers import Attention, Grassmann
from jaxmix.models import Encoder, PairHead, SentencePairClassifier, Stack, abstract_parameters
from jaxmix.objectives import classification_loss

VOCABULARY, CLASSES, FEATURES, DIM, LENGTH = 40, 3, 12, 16, 10
WINDOW, WINDOWS = 4, 3
HEADS = {  # the head's own mixers, small
  "grassmann": {
    "mixers": {"grassmann": functools.partial(Grassmann, rank=8, heads=2, offsets=(1, -1, 3, -3))}
  },
  "attention": {
    "pattern": ("attention",),
    "mixers": {"attention": functools.partial(Attention, heads=2, visibility="full")},
    "placement": "post_norm",
  },
}
ENCODER = functools.partial(
  Encoder, dim=FEATURES, depth=1, mlp_dim=16,
  mixers={"attention": functools.partial(Attention, heads=2, visibility="full")},
)  # fmt: skip


def make_head(name: str, **options) -> functools.partial:
  sizes = {"dim": DIM, "mlp_dim": 24, "window": WINDOW, "length": LENGTH}
  return functools.partial(PairHead, **{**sizes, **HEADS[name], **options})


@functools.cache
def classifier(name: str = "grassmann", encoder_training: str = "trained"):
  return SentencePairClassifier(
    VOCABULARY, CLASSES, encoder=ENCODER, head=make_head(name), encoder_training=encoder_training,
    rngs=nnx.Rngs(params=0),
  )  # fmt: skip


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
  """Pairs of sentences of 1 to 10 tokens."""
  random = np.random.default_rng(0)
  sentences = random.integers(1, VOCABULARY, (2, 4, LENGTH)).astype(np.int32)
  lengths = np.array([[10, 5, 1, 8], [3, 10, 4, 9]])
  sentences[np.arange(LENGTH) >= lengths[..., None]] = 0
  return {
    "premise": sentences[0],
    "hypothesis": sentences[1],
    "label": np.array([0, 1, 2, 1], np.int32),
    "weights": np.ones(4, np.float32),
  }


@jax.jit
def logits(model, premise, hypothesis, key=None):
  return model(premise=premise, hypothesis=hypothesis, dropout_key=key)


@jax.jit
def gradients(model, batch):
  return jax.grad(lambda model: classification_loss(model, batch)[0])(model)


@pytest.mark.parametrize("name", HEADS)
def test_head_by_hand(name, batch, close, rounding):
  """Token by token and window by window, as the docstring of the head says."""
  head = make_head(name)(FEATURES, CLASSES, rngs=nnx.Rngs(params=1))
  live = np.stack([batch["premise"], batch["hypothesis"]], 1) != 0
  features = np.random.default_rng(1).normal(size=(*live.shape, FEATURES)).astype(np.float32)
  projected = np.asarray(head.project(features))
  windows, counted = np.zeros((4, 2 * WINDOWS, DIM), np.float32), np.zeros((4, 2 * WINDOWS), bool)
  for row, sentence, window in np.ndindex(4, 2, WINDOWS):
    inside = slice(window * WINDOW, (window + 1) * WINDOW)
    chosen = projected[row, sentence, inside][live[row, sentence, inside]]
    place = sentence * WINDOWS + window
    counted[row, place] = len(chosen) > 0
    windows[row, place] = chosen.mean(0) if len(chosen) else 0
    windows[row, place] += head.sentence_embedding.table[sentence]
  assert not counted.all()
  y, _ = head.apply_layers(
    windows, None, None, segment_ids=None, positions=jnp.broadcast_to(np.arange(6), (4, 6))
  )
  pairs = []
  for row in range(4):
    a, b = (
      np.asarray(y)[row, part][counted[row, part]].mean(0)
      for part in (slice(0, WINDOWS), slice(WINDOWS, 2 * WINDOWS))
    )
    pairs.append(np.concatenate([a, b, np.abs(a - b), a * b]))
  expected = head.output(jax.nn.gelu(head.compare(np.stack(pairs))))
  close(head(features, live), expected, tolerance=rounding(np.float32, 4 * (2 * DIM + 24 + 12)))


@pytest.mark.parametrize("name", HEADS)
def test_padding_does_not_matter(name, batch):
  """Neither how long the rows are filled up, nor what is computed for padding."""
  model = classifier(name)
  whole = np.asarray(logits(model, batch["premise"], batch["hypothesis"]))
  assert whole.shape == (4, CLASSES) and whole.dtype == np.float32
  short = [batch[each][2:3, :5] for each in ("premise", "hypothesis")]
  np.testing.assert_allclose(logits(model, *short), whole[2:3], rtol=1e-5, atol=1e-6)  # float32
  live = np.stack(short, 1) != 0
  features = np.random.default_rng(1).normal(size=(*live.shape, FEATURES)).astype(np.float32)
  other = np.where(live[..., None], features, 9)
  np.testing.assert_array_equal(model.head(features, live), model.head(other, live))


def test_sentences_are_read_apart_and_told_apart(batch):
  """The encoder sees one sentence at a time; the head knows which is the premise."""
  model = classifier()
  ids = (batch["premise"] != 0).astype(np.int32)
  alone = model.encoder(batch["premise"], segment_ids=ids)
  seen = []

  class Spy(nnx.Module):
    def __call__(self, features, live, *, dropout_key=None):
      seen.append(features)

  spying = nnx.merge(*nnx.split(model))
  spying.head = Spy()
  spying(premise=batch["premise"], hypothesis=batch["hypothesis"])
  np.testing.assert_allclose(seen[0][:, 0], alone, rtol=1e-5, atol=1e-6)  # float32
  pair = batch["premise"], batch["hypothesis"]
  assert np.abs(np.asarray(logits(model, *pair)) - logits(model, *pair[::-1])).max() > 1e-3


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("encoder_training", ["trained", "frozen"])
def test_gradients_reach_what_is_trained(name, encoder_training, batch):
  found = gradients(classifier(name, encoder_training), batch)
  for path, gradient in jax.tree_util.tree_leaves_with_path(found):
    path = jax.tree_util.keystr(path)
    trained = encoder_training == "trained" or "encoder" not in path
    assert np.any(gradient != 0) == trained, path


def test_frozen_is_declared():
  make = functools.partial(
    SentencePairClassifier, VOCABULARY, CLASSES, encoder=ENCODER, head=make_head("grassmann")
  )
  for encoder_training, expected in (("trained", {False}), ("frozen", {True})):
    _, _, axes = abstract_parameters(functools.partial(make, encoder_training=encoder_training))
    assert {axis.frozen for axis in jax.tree.leaves(axes["encoder"])} == expected
    assert {axis.frozen for axis in jax.tree.leaves(axes["head"])} == {False}


def test_dropout(batch):
  """Off without a key, the same for a key, another for another."""
  model = SentencePairClassifier(
    VOCABULARY, CLASSES, encoder=ENCODER, head=make_head("grassmann", dropout_rate=0.5),
    rngs=nnx.Rngs(params=0),
  )  # fmt: skip
  pair = batch["premise"], batch["hypothesis"]
  one, again, two = (np.asarray(logits(model, *pair, jax.random.key(seed))) for seed in (0, 0, 1))
  np.testing.assert_array_equal(one, again)
  assert np.any(one != two) and np.any(one != logits(model, *pair))


def test_parameter_counts():
  """Of the sizes of the paper, by hand; attention's head is within 2 % as large."""
  common = (64 * 256 + 256) + 2 * 256 + (1024 * 256 + 256) + (256 * 3 + 3)
  mlp = 2 * 256 * 512 + 512 + 256 + 2 * (2 * 256)
  grassmann = (256 * 64 + 64) + (4 * 120 * 256 + 256) + (2 * 256 * 256 + 256)
  expected = {
    "grassmann": common + 2 * (mlp + grassmann) + 2 * 256,
    "attention": common + 2 * (mlp + 4 * 256 * 256),
  }
  options = {"grassmann": {}, "attention": {"pattern": ("attention",), "placement": "post_norm"}}
  for name, count in expected.items():
    _, parameters, _ = abstract_parameters(functools.partial(PairHead, 64, 3, **options[name]))
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) == count
  assert expected == {"grassmann": 1_350_531, "attention": 1_332_483}
  assert abs(expected["attention"] / expected["grassmann"] - 1) < 0.02


def test_default_offsets_pair_the_sentences():
  head = functools.partial(PairHead, 64, 3)
  for length, last in ((48, 6), (24, 3), (32, 4)):
    model = jax.eval_shape(lambda length=length: head(length=length, rngs=nnx.Rngs(params=0)))
    assert set(model.layers["0_grassmann"].mixer.offsets) == {
      sign * d for d in (1, 2, 4, last) for sign in (1, -1)
    }
    assert len(model.layers["0_grassmann"].mixer.offsets) == len({1, 2, 4, last}) * 2
  attention = head(pattern=("attention",), placement="post_norm", rngs=nnx.Rngs(params=0))
  assert attention.layers["0_attention"].mixer.visibility == "full"


def test_flops(batch):
  model = classifier("attention")
  head = 2 * (6 * 2 * (4 * DIM * DIM + 2 * DIM * 24) + 4 * 6 * 6 * DIM)
  head += 6 * 2 * FEATURES * DIM + 2 * 4 * DIM * DIM + 2 * DIM * CLASSES
  assert model.flops(5, LENGTH) == model.encoder.flops(10, LENGTH) + 5 * head


class Probe(Stack):
  """The published head: the mean of a pair's tokens is a sequence of one, and is mixed."""

  def __init__(self, features, classes, dim, depth, *, rank, mlp_dim, rngs):
    self.project = Linear({"embed": features}, {"mlp": dim}, bias=True, rngs=rngs)
    grassmann = functools.partial(Grassmann, rank=rank, offsets=(1,), unpaired="bias")
    super().__init__(
      dim, depth, pattern=("grassmann",), mixers={"grassmann": grassmann}, mlp="dense",
      mlp_dim=mlp_dim, activation="exact_gelu", norm="layer", placement="post_norm", bias=True,
      dropout_rate=0.0, remat="none", dtype="float32", init_std=None, rngs=rngs,
    )  # fmt: skip
    self.output = LinearHead(dim, classes, rngs=rngs)

  def __call__(self, pooled):
    x = self.project(pooled)[:, None]
    y, _ = self.apply_layers(x, None, None, segment_ids=None, positions=None)
    return self.output(y[:, 0])


def from_published(values: dict[str, np.ndarray]) -> dict:
  """The parameters of a `Probe` from those of the published head."""

  def linear(name):
    return {"kernel": values[f"{name}.weight"].T, "bias": values[f"{name}.bias"]}

  def layer(index):
    name = f"mixing_layers.{index}"
    gate = linear(f"{name}.gate.0")
    gate_x, gate_g = np.split(gate["kernel"], 2)
    reduce = linear(f"{name}.to_reduced")
    norms = [
      {"scale": values[f"{name}.{norm}.weight"], "bias": values[f"{name}.{norm}.bias"]}
      for norm in ("ln1", "ln2")
    ]
    return {
      "mixer": {
        "reduce": {"kernel": reduce["kernel"][:, None], "bias": reduce["bias"][None]},
        "expand": linear(f"{name}.from_plucker"),
        "gate_x": {"kernel": gate_x, "bias": gate["bias"]},
        "gate_g": {"kernel": gate_g},
      },
      "mixer_norm": norms[0],
      "mlp": {"up": linear(f"{name}.ffn.0"), "down": linear(f"{name}.ffn.3")},
      "mlp_norm": norms[1],
    }

  layers = jax.tree.map(lambda *x: np.stack(x), layer(0), layer(1))
  return {
    "project": linear("input_projection"),
    "layers": {"0_grassmann": layers},
    "output": {"linear": linear("classifier")},
  }


def test_the_published_head_compares_nothing(golden, close):
  """Its logits and gradients are ours where no token has a partner: since z ∧ z = 0, what it mixes
  in is a bias, no gradient reaches the reduced states, and what is left is an MLP of the mean."""
  data = dict(np.load(golden / "grassmann" / "nli_head_degenerate.npz"))
  with jax.enable_x64(True):
    data = {key: x.astype(np.float64) if x.dtype == np.float32 else x for key, x in data.items()}

    def ours(prefix):
      start = len(prefix)
      return from_published({key[start:]: x for key, x in data.items() if key.startswith(prefix)})

    probe = Probe(
      20, 3, int(data["cfg/dmodel"]), int(data["cfg/n_layers"]), rank=int(data["cfg/dproj"]),
      mlp_dim=int(data["cfg/d_ff"]), rngs=nnx.Rngs(params=0),
    )  # fmt: skip
    graph = nnx.graphdef(probe)

    def loss(parameters, pooled):
      y = nnx.merge(graph, parameters)(pooled)
      return jnp.sum(y * data["cot"]), y

    parameters = ours("param/")
    (found, dpooled), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
      parameters, data["pooled"]
    )
  close(y, data["out64"], tolerance=1e-10)  # with which the golden files are published
  # Behind z ∧ z their gradients are rounding noise, divided by the 1e-8 of their clamp.
  noise = np.finfo(np.float64).eps / 1e-8
  close(dpooled, data["grad64/pooled"], tolerance=noise)
  expected = ours("grad64/param/")
  ours_mixer, their_mixer = (x["layers"]["0_grassmann"]["mixer"] for x in (found, expected))
  reduce, wasted = ours_mixer.pop("reduce"), their_mixer.pop("reduce")
  assert not any(np.any(x) for x in (*reduce.values(), ours_mixer["expand"]["kernel"]))
  largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  assert all(np.abs(x).max() <= noise * largest for x in wasted.values())
  close(found, expected, tolerance=noise)


@pytest.mark.parametrize(
  ("run", "text"),
  [
    (lambda: classifier(encoder_training="fixed"),
     "SentencePairClassifier: encoder_training='fixed' is unknown; expected one of trained, "
     "frozen"),
    (lambda: classifier()(premise=np.ones((2, 5), int), hypothesis=np.ones((2, 4), int)),
     "SentencePairClassifier: premise has shape (2, 5), hypothesis (2, 4) — expected [B, T] of "
     "both — fill the shorter rows up with 0"),
    (lambda: classifier()(premise=np.ones((2, 11), int), hypothesis=np.ones((2, 11), int)),
     "PairHead: features have shape (2, 2, 11, 12), live (2, 2, 11) — expected [B, 2, T, F] and "
     "[B, 2, T] with T at most length=10 — cut the sentences, or set PairHead.length=11"),
    (lambda: make_head("grassmann", window=0)(FEATURES, CLASSES, rngs=nnx.Rngs(params=0)),
     "PairHead: window=0, length=10 — expected at least 1 token each — set window=8, length=48, or "
     "what your sentences have"),
  ],
)  # fmt: skip
def test_errors(run, text):
  with pytest.raises(ValueError) as error:
    jax.eval_shape(run)
  assert str(error.value) == text
