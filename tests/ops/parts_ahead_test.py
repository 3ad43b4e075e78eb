"""What rows cut along their length send: compiled for pods, the collectives of each op counted and
their bytes found by hand."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import pytest

from jaxmix.compile_ahead import hlo, installed
from jaxmix.compile_ahead.communication import collectives
from jaxmix.compile_ahead.compilers import environment

BATCH, LENGTH, HEADS, DIM, WIDTH = 2, 2048, 2, 64, 3
OFFSETS = (1, 4, 16)
CHANNELS = HEADS * DIM
SHORTER = {"linear_attention": 1024}  # for which the payload must be the same

# One process compiles them all: libtpu and the GPU's compiler take seconds to start.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from jaxmix import ops, sharding
from jaxmix.compile_ahead import target

name, sizes, offsets = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
batch, heads, dim, width = (sizes[key] for key in ("batch", "heads", "dim", "width"))
channels = heads * dim
devices = target(name).devices()
mesh = sharding.make_mesh(data=1, sequence=len(devices), devices=devices)

def array(axes, shape, dtype):
  place = sharding.named_sharding(axes, shape, mesh)
  return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

def rows(length, *shape, dtype=jnp.bfloat16):
  axes = ("batch", "length", *(None,) * len(shape))
  return array(axes, (batch, length, *shape), dtype)

def parameter(*shape):
  return array((None,) * len(shape), shape, jnp.float32)

def grassmann(z, weight, bias, ids):
  return ops.grassmann_mix(z, weight, bias, offsets=offsets, segment_ids=ids, implementation="xla")

def matrices(length):
  return [rows(length, heads, dim)] * 3

def numbers(length):
  return rows(length, heads, dtype=jnp.float32)

CASES = {
  "linear_attention": (
    lambda q, k, v, g, ids: ops.linear_attention(
      q, k, v, g=g, segment_ids=ids, implementation="xla"),
    lambda length: [*matrices(length), numbers(length)]),
  "delta_rule": (
    lambda q, k, v, beta, ids: ops.delta_rule(
      q, k, v, beta, segment_ids=ids, implementation="xla"),
    lambda length: [*matrices(length), numbers(length)]),
  "short_convolution": (
    lambda x, weight, ids: ops.short_convolution(x, weight, segment_ids=ids, implementation="xla"),
    lambda length: [rows(length, channels), parameter(channels, width)]),
  "grassmann_mix": (
    grassmann,
    lambda length: [
      rows(length, 8, dtype=jnp.float32), parameter(28, channels), parameter(channels)]),
  "long_convolution": (
    lambda u, kernel, ids: ops.long_convolution(u, kernel, segment_ids=ids, implementation="xla"),
    lambda length: [rows(length, channels), parameter(channels, 64)]),
  "attention": (
    lambda q, k, v, ids: ops.attention(q, k, v, segment_ids=ids, implementation="xla"),
    matrices),
}

def gradients(run):
  def loss(arrays, ids):
    y = run(*arrays, ids)[0]
    y = sharding.constrain(y, "batch", "length", *(None,) * (y.ndim - 2))
    return jnp.sum(jnp.square(y.astype(jnp.float32)))
  return jax.jit(jax.grad(loss))

texts = {}
with jax.set_mesh(mesh):
  for case, length, packed in json.loads(sys.argv[4]):
    run, arrays = CASES[case]
    ids = rows(length, dtype=jnp.int32) if packed else None
    arrays = arrays(length)
    program = jax.jit(
      gradients(run), out_shardings=[x.sharding for x in arrays]).lower(arrays, ids)
    texts[f"{case} {length} {packed}"] = program.compile().as_text()
print("RESULT", json.dumps(texts))
"""

WHOLE = ["linear_attention", "delta_rule", "short_convolution", "grassmann_mix"]
WHOLE += ["long_convolution", "attention"]
PROGRAMS = [
  *((case, LENGTH, False) for case in WHOLE),
  ("linear_attention", LENGTH, True),
  *((case, length, False) for case, length in SHORTER.items()),
]


@pytest.fixture(scope="module", params=["v5e:4x4", "h100:8"])
def programs(request) -> tuple[int, dict[str, dict[str, tuple[int, int]]]]:
  """Devices, and of each program the kind of its collectives -> how many, and their bytes."""
  platform = "tpu" if request.param.startswith("v") else "cuda"
  reason = installed(platform)
  if reason is not None:
    pytest.skip(reason)
  sizes = {"batch": BATCH, "heads": HEADS, "dim": DIM, "width": WIDTH}
  settings = map(json.dumps, (sizes, OFFSETS, PROGRAMS))
  command = [sys.executable, "-c", PROGRAM, request.param, *settings]
  run = subprocess.run(
    command, env=environment(platform), capture_output=True, text=True, timeout=900
  )
  assert run.returncode == 0, run.stderr[-4000:]
  texts = json.loads(re.search("^RESULT (.*)$", run.stdout, re.MULTILINE)[1])
  devices = 16 if platform == "tpu" else 8
  mesh = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": devices}

  def sent(text: str) -> dict[str, tuple[int, int]]:
    kinds: dict[str, tuple[int, int]] = {}
    for row in collectives(hlo.parse(text), mesh):
      count, size = kinds.get(row.kind, (0, 0))
      kinds[row.kind] = count + row.count, size + row.bytes
    return kinds

  return devices, {name: sent(text) for name, text in texts.items()}


@pytest.mark.parametrize("case", ["linear_attention", "delta_rule"])
def test_recurrences_send_states(programs, case):
  """In each of log2(parts) rounds and one more a state and what is kept of it, and back; the last
  step needs no more than the state."""
  devices, sent = programs
  rounds = int(math.log2(devices))
  state = 4 * BATCH * HEADS * DIM * DIM
  keep = state if case == "delta_rule" else 4 * BATCH * HEADS
  assert set(sent[f"{case} {LENGTH} False"]) == {"collective-permute"}
  count, size = sent[f"{case} {LENGTH} False"]["collective-permute"]
  assert size == 2 * (rounds + 1) * state + 2 * (rounds - 1) * keep
  assert 2 * (rounds + 1) <= count <= 2 * (rounds + 1) + 2 * (rounds - 1), "GPUs send both at once"


def test_payload_does_not_grow_with_length(programs):
  _, sent = programs
  for case, length in SHORTER.items():
    assert sent[f"{case} {length} False"] == sent[f"{case} {LENGTH} False"]


def test_documents_cost_three_numbers_a_row(programs):
  """Whether a document goes on in the next part is said with each state."""
  devices, sent = programs
  steps = int(math.log2(devices)) + 1
  packed, whole = (
    sent[f"linear_attention {LENGTH} {packed}"]["collective-permute"] for packed in (True, False)
  )
  assert packed[1] - whole[1] == steps * 3 * 4 * BATCH


@pytest.mark.parametrize(
  ("case", "tokens"),
  [
    ("short_convolution", 2 * CHANNELS * (WIDTH - 1)),
    ("grassmann_mix", 4 * 8 * max(OFFSETS)),
  ],
)
def test_windows_send_their_last_tokens(programs, case, tokens):
  """To the neighbour, and the gradients back; parameters' gradients are summed."""
  _, sent = programs
  sent = sent[f"{case} {LENGTH} False"]
  assert set(sent) == {"collective-permute", "all-reduce"}
  count, size = sent["collective-permute"]
  assert size == 2 * BATCH * tokens + 4 * BATCH, "and how many tokens there were"
  assert count <= 3
  parameters = {"short_convolution": WIDTH * CHANNELS, "grassmann_mix": 29 * CHANNELS}[case]
  assert sent["all-reduce"][1] == 4 * parameters


def test_long_convolution_transposes(programs):
  """Rows to channels and back, in both passes, each device its part."""
  devices, sent = programs
  sent = sent[f"long_convolution {LENGTH} False"]
  part = 2 * BATCH * LENGTH * CHANNELS // devices
  assert sent["all-to-all"][1] % part == 0
  assert 3 * part <= sent["all-to-all"][1] <= 4 * part
  assert "collective-permute" not in sent


def test_attention_gathers_keys_and_values(programs):
  _, sent = programs
  sent = sent[f"attention {LENGTH} False"]
  rows = 2 * BATCH * LENGTH * CHANNELS
  assert sent["all-gather"][1] == 2 * rows
  assert sent.get("reduce-scatter", sent.get("all-reduce"))[1] in (2 * rows, 4 * rows)
