"""compile_ahead as a library: what tests and users ask of a function, and what is kept."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jaxmix import compile_ahead
from jaxmix.compile_ahead import compilers, process

MIB = 2**20


@pytest.fixture(scope="module", autouse=True)
def compiler():
  if (reason := compile_ahead.installed("tpu")) is not None:
    pytest.skip(reason)


def shaped(*shape: int, dtype=jnp.float32, sharding=None) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def scale(x, by):
  return x * by


def add_one(x):
  return x + 1


def mean(x):
  return x - x.mean(axis=0, keepdims=True)


def test_memory_of_a_function():
  found = compile_ahead.memory(scale, (shaped(1024, 1024), shaped()), "v5e")
  assert 4 * MIB <= found.arguments <= 4 * MIB + 4096  # a scalar takes a tile
  assert found.outputs == 4 * MIB
  assert 8 * MIB <= found.needed < 9 * MIB
  assert found.fits and found.headroom == found.capacity - found.needed > 15 * 1024 * MIB


def test_memory_of_what_does_not_fit_is_told():
  side = 49_152  # 9 GiB of float32, and as much for the result alone
  try:
    found = compile_ahead.memory(add_one, (shaped(side, side),), "v5e")
  except compile_ahead.CompileError as error:  # of libtpu 0.0.50: it says so, and no more
    assert "18.00G) exceeds available HBM (15.75G)" in str(error)
    return
  assert not found.fits and found.headroom < 0
  assert found.arguments == found.outputs == 4 * side**2
  assert found.needed >= found.arguments + found.outputs


def test_collectives_of_a_function_on_a_mesh():
  mesh = AbstractMesh((2, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
  place = NamedSharding(mesh, PartitionSpec("rows", "columns"))
  (found,) = compile_ahead.collectives(mean, (shaped(64, 512, sharding=place),), "v5e:2x2")
  assert (found.kind, found.axes, found.group_size, found.count) == ("all-reduce", ("rows",), 2, 1)
  assert found.bytes == found.wire_bytes == 256 * 4  # each device's columns of the mean


def double(x):
  def kernel(x_ref, y_ref):
    y_ref[...] = 2 * x_ref[...]

  return pl.pallas_call(kernel, out_shape=x, name="double")(x)


def thrice_double(x):
  return jax.lax.scan(lambda x, _: (double(x), None), x, length=3)[0]


def test_kernels_of_a_function():
  assert compile_ahead.kernels(thrice_double, (shaped(8, 128),), "v5e") == {"double": 3}


def test_what_is_donated_is_updated_in_place():
  x = (shaped(1024, 1024),)
  assert compile_ahead.memory(add_one, x, "v5e", donate_argnums=(0,)).aliased == 4 * MIB
  with pytest.raises(ValueError, match=r"as jax.jit returned it.* give what was jitted"):
    compile_ahead.memory(jax.jit(add_one), x, "v5e")


def test_a_report_is_kept_and_outlives_the_process(tmp_path, monkeypatch):
  """The second time nothing is compiled: the report, its times included, is the first one."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  task = compile_ahead.task(scale, (shaped(256, 256), shaped()), "v5e")
  first = process.compile_one(task)
  (kept,) = (tmp_path / "jaxmix" / "compile_ahead").iterdir()
  assert compile_ahead.Report.from_json(kept.read_text()) == first
  assert process.compile_one(task) == first
  other = compile_ahead.task(scale, (shaped(256, 512), shaped()), "v5e")
  assert process.compile_one(other).memory != first.memory
  assert len(list(kept.parent.iterdir())) == 2


def test_a_question_asked_again_starts_no_process(monkeypatch):
  asked = (shaped(8, 128), shaped())
  first = compile_ahead.report(scale, asked, "v5e")
  monkeypatch.setattr(process.subprocess, "run", lambda *_, **__: pytest.fail("a new process"))
  started = time.perf_counter()
  assert compile_ahead.report(scale, asked, "v5e") == first
  assert time.perf_counter() - started < 1


def too_much_vmem(x):
  def kernel(x_ref, y_ref, wide_ref):
    wide_ref[:8, :128] = x_ref[...]
    y_ref[...] = wide_ref[:8, :128] + 1

  scratch = [pltpu.VMEM((16_384, 8192), jnp.float32)]  # 512 MiB
  return pl.pallas_call(kernel, out_shape=x, scratch_shapes=scratch)(x)


def test_what_the_compiler_refuses_is_said_in_its_words():
  with pytest.raises(compile_ahead.CompileError, match=r"v5e: .*(vmem|memory space)"):
    compile_ahead.memory(too_much_vmem, (shaped(8, 128),), "v5e")


def test_one_refusal_does_not_cost_the_others():
  good = compile_ahead.task(scale, (shaped(8, 128), shaped()), "v5e")
  bad = compile_ahead.task(too_much_vmem, (shaped(8, 128),), "v5e")
  found = list(compile_ahead.compile_all([bad, good]))
  assert isinstance(found[0], compile_ahead.CompileError)
  assert found[1].memory.fits


def test_a_mesh_of_another_size_is_refused():
  mesh = AbstractMesh((8,), ("data",))
  place = NamedSharding(mesh, PartitionSpec("data"))
  message = r"mesh of 8 devices {'data': 8}, and v5e:2x2 has 4 — expected as many — give them"
  with pytest.raises(ValueError, match=message):
    compile_ahead.memory(mean, (shaped(64, 64, sharding=place),), "v5e:2x2")
  with pytest.raises(ValueError, match=r"mesh of 1 devices"):
    compile_ahead.memory(mean, (shaped(64, 64),), "v5e:2x2")
  with pytest.raises(ValueError, match=r"v5e:2x2:2 has 2 slices — expected one.* name v5e:2x2, or"):
    compile_ahead.memory(mean, (shaped(64, 64, sharding=place),), "v5e:2x2:2")


@pytest.mark.parametrize(
  ("target", "extra"), [("v5e", r"jaxmix\[tpu\]"), ("h100", r"jaxmix\[gpu-aot\]")]
)
def test_a_missing_compiler_names_its_extra(target, extra, monkeypatch):
  monkeypatch.setattr(compilers, "_found", lambda package: [])
  monkeypatch.setattr(compilers, "ptxas", lambda: None)
  fresh = functools.partial(scale, by=3)  # never asked before
  with pytest.raises(compile_ahead.CompilerMissing, match=rf"lacks .*pip install '{extra}'"):
    compile_ahead.memory(fresh, (shaped(8, 128),), target)
