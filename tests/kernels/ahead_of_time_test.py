"""The training step compiled for a TPU pod slice that is not here: it fits, and holds the
kernels."""

from __future__ import annotations

import pytest

PROGRAM = """
import functools, json
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jaxmix import sharding
from jaxmix.mixers import Attention, LinearAttention
from jaxmix.models import Decoder
from jaxmix.training import TrainStep, adamw

devices = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=devices)
model = functools.partial(
  Decoder, 1024, 256, 2, pattern=("linear_attention", "attention"), remat="full", dtype="bfloat16",
  mixers={"linear_attention": functools.partial(LinearAttention, heads=2),
          "attention": functools.partial(Attention, heads=2)},
)
with jax.set_mesh(mesh):
  step = TrainStep(model, functools.partial(adamw, learning_rate=1e-3), mesh=mesh)
  place = sharding.named_sharding(("batch", None), (8, 512), mesh)
  integers = jax.ShapeDtypeStruct((8, 512), jnp.int32, sharding=place)
  batch = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), integers)
  batch["weights"] = jax.ShapeDtypeStruct((8, 512), jnp.float32, sharding=place)
  state = step.abstract_state()
  compiled = step.update.lower(state, batch).compile()

def bytes_of(x):
  return x.dtype.itemsize * functools.reduce(int.__mul__, x.sharding.shard_shape(x.shape), 1)

memory, lines = compiled.memory_analysis(), compiled.as_text().splitlines()
print("RESULT", json.dumps({
  "calls": [line.split(" = ")[0] for line in lines if "tpu_custom_call" in line],
  "state": sum(map(bytes_of, jax.tree.leaves(state))),
  "batch": sum(map(bytes_of, jax.tree.leaves(batch))),
  "arguments": memory.argument_size_in_bytes,
  "aliased": memory.alias_size_in_bytes,
  "temporaries": memory.temp_size_in_bytes,
}))
"""


@pytest.fixture(scope="module")
def compiled(compile_for_tpus) -> dict:
  """What the compiler says of a hybrid of both mixers, in bfloat16, rematerialised, cut three ways
  over v5e:2x4."""
  (found,) = compile_for_tpus(PROGRAM)
  return found


def test_kernel_is_present(compiled):
  """Attention runs in the splash kernel and linear attention in ours, forward and backward."""
  names = " ".join(compiled["calls"])
  assert "splash_mqa_fwd" in names and "splash_mqa_dkv" in names and "splash_mqa_dq" in names
  assert "linear_attention_forward" in names and "linear_attention_backward" in names


def test_memory(compiled):
  """A device holds its part of the state, updated in place, and needs no more than its part of the
  activations."""
  # The compiler pads small arrays to whole tiles of 4 KiB; there are about 100 arrays.
  padding = 100 * 4096
  assert compiled["arguments"] <= compiled["state"] + compiled["batch"] + padding
  assert compiled["aliased"] >= compiled["state"]
  # 2 rows of 512 a device: logits in float32 and their gradient in bfloat16; one layer, recomputed,
  # with about 20
  # arrays as wide as the model in float32 and 3 as wide as the MLP (of width 704) forward and
  # backward; gradients.
  tokens = 2 * 512
  budget = tokens * (1024 * 6 + 20 * 256 * 4 + 2 * 3 * 704 * 4) + compiled["state"]
  assert compiled["temporaries"] <= budget, f"{compiled['temporaries']:,} bytes, budget {budget:,}"
