"""The planner: its counts against closed forms and XLA's, its plans against a run."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.sharding import SingleDeviceSharding
from small_run import make_config

from patchwave_jax import plan, recipes
from patchwave_jax.config import RunConfig, TrainConfig
from patchwave_jax.errors import UserError
from patchwave_jax.models.samplernn import SampleRNNConfig
from patchwave_jax.planning import aot_compile, hardware, hlo_cost
from patchwave_jax.planning.hardware import GIB
from patchwave_jax.runtime.mesh import make_mesh
from patchwave_jax.training.step import make_step

HAS_TPU = importlib.util.find_spec("libtpu") is not None
HAS_CUDA = importlib.util.find_spec("jax_cuda12_plugin") is not None
needs_tpu = pytest.mark.skipif(not HAS_TPU, reason="libtpu is not installed: pip install '.[tpu]'")
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="no CUDA plugin: pip install '.[cuda]'")


def compiled(function, *shapes, dtype=jnp.float32):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, dtype) for s in shapes)).compile()


def convolve(stride, dilation, padding):
    return lambda x, w: lax.conv_general_dilated(
        x, w, (stride,), [padding], rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "case", [(1, 1, (0, 0)), (3, 1, (0, 0)), (1, 6, (0, 0)), (2, 3, (5, 2)), (1, 4, (-3, 9))]
)
def test_convolutions_and_their_gradients_count_as_by_xla(case):
    forward, shapes = convolve(*case), ((2, 50, 8), (5, 8, 16))

    def backward(x, w):
        return jax.vjp(forward, x, w)[1](jnp.ones(jax.eval_shape(forward, x, w).shape))

    for function in (forward, backward):
        program = compiled(function, *shapes)
        costs = program.cost_analysis()
        assert hlo_cost.count(program.as_text()).flops == pytest.approx(costs["flops"], rel=0.01)


def test_a_loop_counts_as_often_as_it_runs():
    def looped(a, b):
        return lax.scan(lambda x, _: (jnp.tanh(x @ b), None), a, length=7)[0]

    def inner(a, b):
        return lax.fori_loop(3, 8, lambda _, x: looped(x, b), a)

    found = hlo_cost.count(compiled(inner, (30, 40), (40, 40)).as_text())
    assert found.flops == 5 * 7 * 2 * 30 * 40 * 40
    assert found.unknown_loops == 0


def test_a_loop_of_unknown_length_is_told():
    def until(a):
        return lax.while_loop(lambda x: x.sum() < 5, lambda x: x @ x, a)

    found = hlo_cost.count(compiled(until, (20, 20)).as_text())
    assert (found.unknown_loops, found.flops) == (1, 2 * 20**3)


def test_bytes_of_a_slice_in_a_loop_are_not_those_of_the_whole():
    def total(x):
        return lax.scan(lambda t, row: (t + jnp.tanh(row), None), jnp.zeros(1000), x)[0]

    found = hlo_cost.count(compiled(total, (500, 1000)).as_text())
    assert 4 * 500 * 1000 < found.bytes < 8 * 4 * 500 * 1000


def test_collectives_with_their_groups_bytes_and_times():
    mesh = make_mesh(4, jax.devices())

    def own(x):
        x = lax.all_to_all(x, "context", 1, 0, tiled=True)
        return lax.scan(lambda t, _: (lax.psum(t * 1.5, "data"), None), x, length=3)[0]

    rows = P("data")
    function = jax.shard_map(own, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    x = jax.ShapeDtypeStruct((16, 4, 5), jnp.float32)
    found = hlo_cost.count(jax.jit(function).lower(x).compile().as_text()).collectives
    told = {(c.kind, c.bytes_each, c.group): c.times for c in found}
    size = 4 * 16 * 4 * 5 // 2
    assert told == {("all-to-all", size, 4): 1, ("all-reduce", size, 2): 3}


# Plans of whole steps.

EXECUTE = """
import json, sys
import jax, numpy as np
sys.path[:0] = sys.argv[1:2]
from test_plan import config_of
from patchwave_jax.planning.aot_compile import held_bytes
from patchwave_jax.runtime.mesh import make_mesh
from patchwave_jax.training.step import make_step
config = config_of(sys.argv[2])
step = make_step(config, make_mesh(config.run.context_devices))
state = step.init()
params = held_bytes(state["params"])
codes = np.zeros((config.train.batch_size, config.window_samples), np.uint8)
state, metrics = step.update(state, codes)
assert np.isfinite(float(metrics["nll_nats"]))
rows = step.micro.rows_each
print(json.dumps({"params": params, "state": held_bytes(state), "codes": rows * codes.shape[1]}))
"""


NAMES = ("last", "context")


def config_of(name):
    """The objective `last`, or `dense` with rows shared by four devices."""
    config = make_config("unused", train=TrainConfig(batch_size=16, micro_batch_size=1))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1))
    if name == "last":
        model = dataclasses.replace(config.model, head="softmax", input="waveform")
        return dataclasses.replace(config, objective="last", model=model)
    config = dataclasses.replace(config, train=TrainConfig(batch_size=4, micro_batch_size=1))
    return dataclasses.replace(config, run=RunConfig(context_devices=4, phase_chunk=5))


@pytest.fixture(scope="module")
def plans():
    return {name: plan.plan(config_of(name), "cpu:8") for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_tells_of_the_program_that_runs(plans, name, tmp_path):
    """Eight simulated devices run the step in another process, which dumps what it compiled."""
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_dump_to={tmp_path} "
        "--xla_dump_hlo_module_re=jit_a[cp].*",
    }
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(Path(__file__).parent), name],
        env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    ran, found = json.loads(done.stdout), plans[name]
    for program in found.programs:
        dumps = list(tmp_path.glob(f"*jit_{program.name}.*after_optimizations.txt"))
        assert len(dumps) == 1
        executed = hlo_cost.count(dumps[0].read_text())
        assert executed.flops == program.counts.flops
        assert executed.collectives == program.counts.collectives
    accumulate, apply = found.programs
    assert accumulate.times == 2
    scalars = 4 + 4 + 4  # the sum of losses, the step, the micro-batch's number
    model = config_of(name).model  # whose attention's key bias cancels in the softmax: left out
    unused = 4 * model.num_layers * model.num_heads * model.head_size
    assert accumulate.arguments == 2 * ran["params"] - unused + ran["codes"] + scalars
    assert apply.arguments == ran["state"] + ran["params"] + 4
    assert found.memory_bytes["parameters"] == ran["params"]
    assert found.memory_bytes["optimizer"] == ran["state"] - ran["params"] - 4


@pytest.mark.parametrize("name", NAMES)
def test_devices_share_the_work(plans, name):
    """None computes what another one does, and all that they exchange is what design.md says."""
    alone = dataclasses.replace(config_of(name).run, context_devices=1)
    train = TrainConfig(batch_size=2, micro_batch_size=1)  # as many rows as a device has
    single = plan.plan(dataclasses.replace(config_of(name), run=alone, train=train), "cpu:1")
    shared = plans[name]
    # Of a shared row a device also encodes a halo, here of one patch for its one.
    least, most = (1, 1.02) if name == "last" else (1 / 4, 2 / 4)
    assert 0.99 * least < shared.flops / single.flops < most
    moved = {"all-to-all"} if name == "context" else set()
    assert {c["kind"] for c in shared.collectives} == {"all-reduce", *moved}


def test_rows_without_dropout_need_one_reduction():
    """With adaptive predictors and a loop over phases, as our recipe has them."""
    config = config_of("context")
    adaptive = {"adaptive_taps": (4,), "adaptive_windows": (80,), "adaptive_block_samples": 20}
    adaptive |= {"denoiser_taps": 4, "denoiser_window": 50}
    model = dataclasses.replace(config.model, **recipes.NO_DROPOUT, **adaptive)
    train = TrainConfig(batch_size=8, micro_batch_size=1)
    config = dataclasses.replace(config, model=model, train=train, run=RunConfig(phase_chunk=20))
    (reduction,) = plan.plan(config, "cpu:8").collectives
    assert (reduction["kind"], reduction["times"]) == ("all-reduce", 1)


def test_useful_flops_are_most_of_the_compiled(plans):
    for name in NAMES:
        assert 0.4 < plans[name].useful_flops / plans[name].flops < 1.1


def test_samplernn_is_planned_by_the_segments_that_its_steps_read():
    network = SampleRNNConfig(
        frame_sizes=(4, 2, 2), width=16, embedding_width=8, segment_samples=32
    )
    train = TrainConfig(batch_size=8)
    config = dataclasses.replace(config_of("last"), objective="dense", model=network, train=train)
    windows = [dataclasses.replace(config, context_samples=n) for n in (64, 256)]
    first, second = (plan.plan(config, "cpu:8") for config in windows)
    assert first.flops == second.flops > 0
    assert first.targets_per_step == second.targets_per_step == 8 * 32
    assert "phases" not in plan.table(first)  # which only ours has
    assert "phase_chunk" not in plan.remedy(windows[0])


# What doesn't fit.


@pytest.fixture
def tiny_chip(monkeypatch):
    """A chip that holds seven rows at once, on which nothing has to be compiled."""
    chip = dataclasses.replace(hardware.CHIPS["v5e"], memory_bytes=7.5e9)
    real = hardware.machine
    monkeypatch.setattr(hardware, "machine", lambda topology: (chip, real(topology)[1]))

    def programs(step):
        rows = step.micro.rows_each
        held = 2 * aot_compile.held_bytes(step.abstract_state["params"])
        temporaries = int(rows * 1e9)
        return [
            aot_compile.Program(
                "accumulate", 1, 0.0, held, 0, temporaries, 0, hlo_cost.Counts(1), None
            )
        ]

    monkeypatch.setattr(plan, "compile_programs", programs)


def test_fit_finds_the_largest_batch(tiny_chip):
    said = []
    config, found = plan.fit(config_of("last"), "cpu:8", "x", said.append)
    assert config.train.batch_size == found.batch_size == 7 * 8
    assert found.rows_at_once == 7
    assert [line.split()[0] for line in said] == ["1", "2", "4", "8", "6", "7"]
    assert sum(found.memory_bytes.values()) < 7.5e9


@pytest.mark.filterwarnings("ignore:the load_module")
def test_too_large_is_an_answer(tiny_chip, tmp_path, capsys):
    root = Path(__file__).parents[1]
    argv = [f"--config={root}/configs/demo.py", "--topology=cpu:1", f"--json={tmp_path}/plan"]
    argv += ["--config.train.batch_size=8", "--config.train.micro_batch_size=8"]
    plan.main(argv)
    told = capsys.readouterr().out
    assert "does not fit: needs 7.5 of 7.0 GiB: try --config.train.micro_batch_size=1" in told
    assert json.loads((tmp_path / "plan").read_text())["needs_bytes"] > 8e9


@pytest.mark.filterwarnings("ignore:the load_module")
def test_a_plan_as_json_and_as_a_table(tmp_path, capsys, monkeypatch, plans):
    root = Path(__file__).parents[1]
    monkeypatch.setattr(plan, "plan", lambda *_: plans["context"])
    plan.main([f"--config={root}/configs/demo.py", "--topology=cpu:8", f"--json={tmp_path}/p"])
    stored = json.loads((tmp_path / "p").read_text())
    assert stored["flops"] == plans["context"].flops
    assert f"{plans['context'].flops:.4g}" in capsys.readouterr().out
    for name, message in (("p", "exists; give --overwrite"), ("no/p", "is not a folder")):
        with pytest.raises(SystemExit):  # before anything is compiled
            plan.main(["--config=x", "--topology=cpu:8", f"--json={tmp_path}/{name}"])
        assert message in capsys.readouterr().err


# Machines.


@pytest.mark.parametrize(
    ("topology", "told"),
    [
        ("v9-4", "is unknown; give"),
        ("a100:12", "is unknown; give"),
        ("v5e-5", "there are v5e-1, v5e-4, v5e-8, v5e-16"),
        ("v5p-4", "there are v5p-8, v5p-16"),
        ("cpu:900", "fewer CPU devices"),
    ],
)
def test_unknown_machines(topology, told):
    with pytest.raises(UserError, match=told):
        hardware.machine(topology)


@pytest.mark.parametrize(("topology", "extra"), [("v5e-16", "tpu"), ("h100:8", "cuda")])
def test_a_missing_compiler_names_the_extra(topology, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install '.\[{extra}\]'"):
        hardware.machine(topology)


def test_roofline_of_a_program_by_hand():
    chip = hardware.CHIPS["v5e"]
    reduce = hlo_cost.Collective("all-reduce", 200, 4, 3)
    program = aot_compile.Program(
        "x", 2, 0, 0, 0, 0, 0, hlo_cost.Counts(197e12, 819e9 / 4, (reduce,)), None
    )
    found = aot_compile.roofline(chip, [program], "float32")
    network = 2 * 3 * 2 * 200 * 3 / 4 / 200e9
    expected = {"computation": 2.0, "memory": 0.5, "network": network, "step": 2.0}
    assert found == pytest.approx(expected)


@needs_tpu
@pytest.mark.parametrize(
    ("topology", "count"),
    [("v5e-16", 16), ("v5p-128", 64), ("v6e-256", 256), ("v4-8", 4), ("v5e:2x4", 8), ("v6e-1", 1)],
)
def test_tpus_that_are_not_there(topology, count):
    chip, devices = hardware.machine(topology)
    assert chip is not None
    assert len(devices) == count
    assert {d.device_kind for d in devices} == {chip.kind}
    assert hardware.usable_bytes(devices[0]) == chip.memory_bytes


@needs_tpu
@pytest.mark.parametrize("topology", ["v4-64", "v5e-16", "v5e-64", "v5p-128", "v6e-256"])
def test_every_slice_can_share_rows(topology):
    _, devices = hardware.machine(topology)
    for context in (1, 2, 4, 8, 16):
        mesh = make_mesh(context, devices)
        assert dict(mesh.shape) == {"data": len(devices) // context, "context": context}
        assert set(mesh.devices.flat) == set(devices)


@needs_tpu
def test_a_tpus_compiler_says_what_does_not_fit():
    _, (device,) = hardware.machine("v5e-1")
    x = jax.ShapeDtypeStruct((60_000, 60_000), jnp.float32, sharding=SingleDeviceSharding(device))
    with pytest.raises(aot_compile.DoesNotFitError) as caught:
        aot_compile.compile_one("x", 1, jax.jit(lambda x: jnp.sin(x @ x).T @ x), x)
    assert 15 * GIB < caught.value.has < 16 * GIB
    assert caught.value.needs > 2 * x.size * 4


@pytest.mark.parametrize(
    "topology",
    [pytest.param("v5e:2x4", marks=needs_tpu), pytest.param("a100:8", marks=needs_cuda)],
)
def test_a_step_elsewhere_counts_as_on_cpus(topology, plans):
    found = plan.plan(config_of("last"), topology)
    assert found.flops == pytest.approx(plans["last"].flops, rel=0.2)
    assert found.seconds is not None
    assert found.seconds["step"] > 0


def test_the_mesh_is_of_the_devices_asked_for():
    step = make_step(config_of("context"), make_mesh(4, jax.devices()[4:]))
    assert {d.id for d in np.ravel(step.mesh.devices)} == {d.id for d in jax.devices()[4:]}
