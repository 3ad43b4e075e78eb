"""Flops, HBM bytes, saved activations and kernels of compiled programs against counts by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from jaxmix.compile_ahead import cost, hlo, installed
from jaxmix.compile_ahead.compilers import environment

LAYERS, ROWS, WIDTH = 6, 256, 512  # bfloat16 [ROWS, WIDTH] through LAYERS matmuls
WEIGHTS = LAYERS * WIDTH * WIDTH * 2
MATMULS = LAYERS * 2 * ROWS * WIDTH * WIDTH
# What loops write beside their arrays: counters and conditions, some bytes a turn.
SCALARS = 256
DECODER = {"vocab": 512, "dim": 256, "depth": 4, "heads": 2, "rows": 8, "length": 256}
CHUNK = 64  # of linear attention

# One process compiles them all: the compilers take seconds to start.
PROGRAM = """
import functools, json, math, sys
import jax, jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import partial_eval
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxmix.compile_ahead import target

devices = target(sys.argv[1]).devices()
one = Mesh(np.array(devices[:1]), ("x",))
layers, rows, width, vocab, dim, depth, heads, batch_rows, length = map(int, sys.argv[2:11])
small, steps = {}, {}

def array(shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(one, P()))

def compile(name, function, *arguments, **options):
  with jax.set_mesh(one):
    small[name] = jax.jit(function, **options).lower(*arguments).compile().as_text()
x, ws = array((rows, width)), array((layers, width, width))

def scan(x, ws):
  return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

def unrolled(x, ws):
  for index in range(layers):
    x = jnp.tanh(x @ ws[index])
  return x

def put(a, row, index):
  return lax.dynamic_update_slice(a, row, (index, 0))

compile("scan", scan, x, ws)
compile("twice as long", scan, x, array((2 * layers, width, width)))
compile("unrolled", unrolled, x, ws)
compile("nested", lambda x, ws: lax.fori_loop(0, 3, lambda i, x: scan(x, ws), x), x, ws)
compile("unknown", lambda x, ws, n: lax.fori_loop(0, n, lambda i, x: scan(x, ws), x),
  x, ws, array((), jnp.int32))
large = array((8192, 4096))
compile("add", jnp.add, large, large)
compile("copy", jnp.transpose, large)
compile("matmul", jnp.matmul, array((4096, 4096)), array((4096, 8192)))
compile("batched", lambda a, b: jnp.einsum("bthk,bshk->bhts", a, b),
  array((4, 256, 8, 128)), array((4, 256, 8, 128)))
table, row = array((65536, 1024), jnp.float32), array((1, 1024), jnp.float32)
compile("row", put, table, row, array((), jnp.int32), donate_argnums=0)
compile("rows", lambda a, row: lax.fori_loop(0, 7, lambda i, a: put(a, row + i, i), a), table, row,
  donate_argnums=0)

if sys.argv[1].startswith("v"):
  from jax.experimental import pallas as pl

  def double(x_ref, y_ref):
    y_ref[...] = 2 * x_ref[...]

  def kernels(x):
    def step(x, _):
      priced = pl.CostEstimate(flops=1234, bytes_accessed=0, transcendentals=0)
      x = pl.pallas_call(double, out_shape=x, name="priced_kernel", cost_estimate=priced)(x)
      return pl.pallas_call(double, out_shape=x, name="silent_kernel")(x), None
    return lax.scan(step, x, length=3)[0]

  compile("kernels", kernels, x)
else:
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton

  def double(x_ref, y_ref):
    y_ref[...] = 2 * x_ref[...]

  def kernels(x):
    def step(x, _):
      return pl.pallas_call(double, out_shape=x, name="silent_kernel",
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1))(x), None
    return lax.scan(step, x, length=3)[0]

  compile("kernels", kernels, array((64, 64), jnp.float32))
from jaxmix import sharding
from jaxmix.mixers import LinearAttention
from jaxmix.models import Decoder
from jaxmix.training import TrainStep, adamw
from flax import nnx

mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=devices)

def matmul_flops(jaxpr):
  # of the program as traced, before any compiler: an independent count
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      lhs = equation.invars[0].aval.shape
      total += 2 * equation.outvars[0].aval.size * math.prod(lhs[axis] for axis in contracted)
    times = equation.params["length"] if equation.primitive.name == "scan" else 1
    if equation.primitive.name == "shard_map":  # written for one device
      times = equation.params["mesh"].size
    values = list(equation.params.values())
    if equation.primitive.name == "cond":  # by platform, the default one last
      values = [equation.params["branches"][-1]]
    for value in values:
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        total += times * matmul_flops(inner)
  return total

for remat in sys.argv[11:]:
  model = functools.partial(Decoder, vocab, dim, depth, pattern=("linear_attention",), remat=remat,
    dtype="bfloat16",
    mixers={"linear_attention":
      functools.partial(LinearAttention, heads=heads, normalizer="none", implementation="xla")})
  with jax.set_mesh(mesh):
    step = TrainStep(model, functools.partial(adamw, learning_rate=1e-3), mesh=mesh)
    place = sharding.named_sharding(("batch", None), (batch_rows, length), mesh)
    integers = jax.ShapeDtypeStruct((batch_rows, length), jnp.int32, sharding=place)
    batch = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), integers)
    batch["weights"] = jax.ShapeDtypeStruct((batch_rows, length), jnp.float32, sharding=place)
    state = step.abstract_state()
    traced = step.update.trace(state, batch)
    compiled = traced.lower().compile()
    jaxpr = traced.jaxpr.jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  whole = nnx.eval_shape(lambda: model(rngs=nnx.Rngs(0)))
  block = next(iter(whole.layers.values()))
  steps[remat] = {
    "text": compiled.as_text(),
    "traced": matmul_flops(used),
    "forward": whole.flops(batch_rows, length),
    "logits": 2 * batch_rows * length * dim * vocab,
    "down": depth * batch_rows * length * block.mlp.down.flops_per_token,
    "state": sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
      for x in jax.tree.leaves(state)),
  }
print("RESULT", json.dumps([small, steps]))
"""


@pytest.fixture(scope="module", params=["v5e:2x4", "h100:8"])
def programs(request, repository) -> tuple[dict, dict]:
  """Small programs for one chip, by name; the training step of a small decoder on eight, by remat
  policy, with counts of the same step, of all devices, that no compiler was asked for."""
  on_tpu = request.param.startswith("v")
  platform = "tpu" if on_tpu else "cuda"
  reason = installed(platform)
  if reason is not None:
    pytest.skip(reason)
  sizes = map(str, (LAYERS, ROWS, WIDTH, *DECODER.values()))
  policies = ("none", "full") if on_tpu else ("none",)
  command = [sys.executable, "-c", PROGRAM, request.param, *sizes, *policies]
  run = subprocess.run(
    command, env=environment(platform), capture_output=True, text=True, timeout=600
  )
  assert run.returncode == 0, run.stderr[-4000:]
  small, steps = json.loads(re.search("^RESULT (.*)$", run.stdout, re.MULTILINE)[1])
  modules = {name: hlo.parse(text) for name, text in small.items()}
  assert [name for name, module in modules.items() if module.unknown_loops] == ["unknown"]
  for step in steps.values():
    step["cost"] = cost.count(hlo.parse(step.pop("text")))
  return {name: cost.count(module) for name, module in modules.items()}, steps


@pytest.fixture
def small(programs) -> dict[str, cost.Cost]:
  """What the small programs cost."""
  return programs[0]


@pytest.fixture
def steps(programs) -> dict[str, dict]:
  """What the training step costs, and what to hold that against."""
  return programs[1]


def test_a_loop_costs_its_turns(small):
  assert small["scan"].flops == small["unrolled"].flops == MATMULS
  assert small["twice as long"].flops == 2 * MATMULS
  assert small["nested"].flops == 3 * MATMULS
  assert small["unknown"].flops == MATMULS  # the outer loop counts once


def test_a_loop_reads_the_weights_that_it_slices(small):
  """Twice the layers: twice the weights, and of the activations what they cost before."""
  scan, double = small["scan"].hbm_bytes, small["twice as long"].hbm_bytes
  activations = scan - WEIGHTS
  assert 0 < activations < 12 * WEIGHTS
  turns = double - scan
  assert WEIGHTS <= turns <= WEIGHTS + activations + LAYERS * SCALARS
  assert turns >= small["unrolled"].hbm_bytes // LAYERS


def test_elementary_operations_move_their_arrays(small):
  assert small["add"].hbm_bytes == 3 * 8192 * 4096 * 2
  assert small["copy"].hbm_bytes == 2 * 8192 * 4096 * 2
  assert small["matmul"].hbm_bytes == 2 * (4096 * 4096 + 2 * 4096 * 8192)
  assert small["matmul"].flops == 2 * 4096 * 4096 * 8192
  assert small["add"].flops == small["copy"].flops == 0


def test_batch_dimensions_are_no_work_of_their_own(small):
  assert small["batched"].flops == 2 * 4 * 8 * 256 * 256 * 128


def test_an_update_in_place_costs_the_update(small):
  row = 1024 * 4
  assert 2 * row <= small["row"].hbm_bytes <= 2 * row + SCALARS
  assert 7 * 2 * row <= small["rows"].hbm_bytes <= 7 * (2 * row + SCALARS)


def test_kernels_by_name(small):
  """Each runs three times; what none estimates is not made up. On a GPU jax hands the compiler no
  estimate at all."""
  kernels = small["kernels"]
  assert kernels.kernels["silent_kernel"] == 3
  assert kernels.unpriced == ("silent_kernel",)
  assert kernels.xla_flops == {}
  assert kernels.flops == 3 * 1234 * ("priced_kernel" in kernels.kernels)


def test_flops_are_those_of_the_program_as_traced(steps):
  for remat, step in steps.items():
    counted = 8 * step["cost"].flops
    # The backward pass computes the scores of a chunk again, once more where all is recomputed: the
    # compiler merges these two.
    merged = DECODER["depth"] * chunk_terms(keys=1, values=0) if remat == "full" else 0
    assert step["traced"] - merged <= counted <= step["traced"]


def chunk_terms(*, keys: int, values: int) -> int:
  """Flops of one layer in products of a chunk's tokens with one another: of so many over keys, and
  over values, which are as wide."""
  key_dim = DECODER["dim"] // DECODER["heads"]
  tokens = DECODER["rows"] * DECODER["length"] * DECODER["heads"]
  return tokens * 2 * CHUNK * (keys + values) * key_dim


def test_a_step_is_three_forward_passes(steps):
  """The backward pass has two matmuls for each of the forward pass. The cross-entropy forms its
  gradient in the forward pass, which makes three there as well. `Decoder.flops` counts the
  recurrence; its chunked form adds a product over keys and one over values forward, three and two
  backward."""
  step = steps["none"]
  chunks = DECODER["depth"] * chunk_terms(keys=4, values=3)
  assert 8 * step["cost"].flops == pytest.approx(3 * step["forward"] + chunks, rel=0.005)


def test_recomputation_is_a_fourth(steps):
  """But for the logits, which are not in the layers, and for the MLP's last matmul, whose result
  only the next layer reads."""
  if "full" not in steps:
    pytest.skip("compiled for the TPU only, to save time")
  step = steps["full"]
  chunks = DECODER["depth"] * chunk_terms(keys=5, values=4)
  expected = 4 * step["forward"] - step["logits"] - step["down"] + chunks
  assert 8 * step["cost"].flops == pytest.approx(expected, rel=0.02)


def test_saved_activations(steps):
  """With full remat the inputs of the layers, in bfloat16, and nothing else; without, more."""
  rows = DECODER["rows"] // 4  # data and fsdp cut the batch
  inputs = DECODER["depth"] * rows * DECODER["length"] * DECODER["dim"] * 2
  if "full" in steps:
    assert steps["full"]["cost"].saved_activations == inputs
  assert steps["none"]["cost"].saved_activations > 10 * inputs


def test_a_step_reads_and_writes_its_state(steps):
  for step in steps.values():
    assert step["cost"].hbm_bytes >= 2 * step["state"]


def counted(line: str, before: str = "", config: str = "") -> cost.Cost:
  """The cost of a program of one instruction; there are float32 [4, 8, 16] %a, [4, 16, 32] %b."""
  text = f"""HloModule one
{before}
ENTRY %main (a: f32[4,8,16], b: f32[4,16,32]) -> f32[4,8,32] {{
  %a = f32[4,8,16]{{2,1,0}} parameter(0)
  %b = f32[4,16,32]{{2,1,0}} parameter(1)
  ROOT %r = {line}{config}
}}
"""
  return cost.count(hlo.parse(text))


def test_library_matmuls_are_counted():
  config = (
    ', backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":'
    '{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],'
    '"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}'
  )
  call = "(f32[4,8,32]{2,1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="
  for target in ("__cublas$gemm", "__cublas$lt$matmul"):
    matmul = counted(f'{call}"{target}"', config=config)
    assert matmul.flops == 2 * 4 * 8 * 16 * 32
    assert matmul.hbm_bytes == 4 * 4 * (8 * 16 + 16 * 32 + 8 * 32)  # and no scratch
  silent = counted(f'{call}"__cudnn$fmhaSoftmax"')
  assert (silent.flops, silent.unpriced) == (0, ("__cudnn$fmhaSoftmax",))


def test_convolutions_count_what_meets_the_input():
  """A window of 3 over 8 positions padded by 1 at both ends: 22 products, not 24; 16 features in
  and, of 4 kernels, 2 of each of 2 groups out."""
  line = (
    "f32[4,8,2]{2,1,0} convolution(%a, %k), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f"
    "\n  %k = f32[3,16,2]{2,1,0} parameter(2)"
  )
  assert counted(line).flops == 2 * 4 * 2 * 16 * 22
  strided = line.replace("pad=1_1", "stride=2 pad=0_1 rhs_dilate=1").replace(
    "f32[4,8,2]", "f32[4,4,2]"
  )
  assert counted(strided).flops == 2 * 4 * 2 * 16 * 11


def test_batch_as_a_dilated_axis_is_no_work():
  line = (
    "f32[4,8,32]{2,1,0} convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, "
    "dim_labels=0bf_0io->0bf"
  )
  assert counted(line).flops == 2 * 4 * 8 * 16 * 32


def test_only_hbm_counts():
  """One operand in VMEM, the result in the host's memory."""
  line = "f32[4,8,16]{2,1,0:S(5)} add(%v, %a)\n  %v = f32[4,8,16]{2,1,0:T(8,128)S(1)} parameter(2)"
  assert counted(line).hbm_bytes == 4 * 8 * 16 * 4


def test_prefetch_counts_its_side_in_hbm_once():
  line = (
    "f32[1,8,16]{2,1,0:S(1)} slice-done(%s)\n  %s = ((f32[4,8,16]{2,1,0}), f32[1,8,16]{2,1,0:S(1)},"
    " s32[]{:S(2)}) slice-start(%a), slice={[0:1], [0:8], [0:16]}"
  )
  assert counted(line).hbm_bytes == 8 * 16 * 4


SLICED = """
%inner (p: f32[4,16,32], i: s32[]) -> f32[1,16,32] {
  %p = f32[4,16,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %twice = f32[4,16,32]{2,1,0} add(%p, %p)
  ROOT %s = f32[1,16,32]{2,1,0} dynamic-slice(%twice, %i, %zero, %zero)
}

%outer (q: f32[4,16,32], r: f32[4,8,16], j: s32[]) -> (f32[4,16,32], f32[4,8,16], f32[16,32]) {
  %q = f32[4,16,32]{2,1,0} parameter(0)
  %r = f32[4,8,16]{2,1,0} parameter(1)
  %j = s32[] parameter(2)
  %row = f32[1,16,32]{2,1,0} fusion(%q, %j), kind=kLoop, calls=%inner
  %none = s32[] constant(0)
  %flat = f32[16,32]{1,0} bitcast(%row)
  %u = f32[4,16,32]{2,1,0} dynamic-update-slice(%q, %row, %j, %none, %none)
  ROOT %t = (f32[4,16,32]{2,1,0}, f32[4,8,16]{2,1,0}, f32[16,32]{1,0}) tuple(%u, %r, %flat)
}
"""


def test_fusions_read_slices_and_write_updates():
  """A row is read in a fusion within the fusion, put back in place, and returned as well; what is
  handed through costs nothing."""
  line = (
    "(f32[4,16,32]{2,1,0}, f32[4,8,16]{2,1,0}, f32[16,32]{1,0}) fusion(%b, %a, %n), kind=kLoop, "
    "calls=%outer\n  %n = s32[] parameter(2)"
  )
  row = 16 * 32 * 4
  assert counted(line, SLICED).hbm_bytes == row + row + row + 4
  elsewhere = line.replace("(f32[4,16,32]{2,1,0}", "(f32[4,16,32]{2,1,0:S(1)}")  # not in place
  assert counted(elsewhere, SLICED).hbm_bytes == 4 * row + row + 4
