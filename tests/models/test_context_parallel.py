"""A row shared by several devices: the same numbers as on one, and no communication but what must.

Every comparison is with one device, which does not know of shards.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CLIP_LENGTHS, SMALL, random_model, smooth_codes
from flax import nnx
from jax.sharding import AxisType, Mesh

from patchwave_jax.config import Config, RunConfig, TrainConfig
from patchwave_jax.errors import UserError
from patchwave_jax.evaluation.evaluator import Evaluator
from patchwave_jax.evaluation.protocol import plan
from patchwave_jax.runtime import mesh as mesh_module
from patchwave_jax.runtime.mesh import make_mesh
from patchwave_jax.training.step import make_step

PLAIN = dataclasses.replace(
    SMALL, conv_dropout=0.0, mlp_dropout=0.0, head_dropout=0.0, token_dropout=0.0
)
OURS = dataclasses.replace(
    PLAIN,
    input="embedding",
    skip_connections=True,
    head="logistic_mixture",
    num_layers=1,
    adaptive_taps=(4,),
    adaptive_windows=(200,),  # reach beyond the first shard, and before the segment
    adaptive_block_samples=20,
    denoiser_taps=4,
    denoiser_window=50,
)
HALF = dataclasses.replace(
    OURS, compute_dtype="bfloat16", adaptive_taps=(), adaptive_windows=(), num_layers=1
)


def make_config(model=OURS, *, run=None, patches=8, **recipe) -> Config:
    train = TrainConfig(**{"batch_size": 2, "micro_batch_size": 0, "learning_rate": 1e-3} | recipe)
    return Config(
        "dense", patches * model.patch_samples, model=model, train=train, run=run or RunConfig()
    )


def mesh_of(data: int, context: int) -> Mesh:
    devices = np.array(jax.devices()[: data * context]).reshape(data, context)
    return Mesh(devices, ("data", "context"), axis_types=(AxisType.Auto,) * 2)


def gradient_of(config: Config, mesh: Mesh, codes) -> tuple:
    """The loss and the gradient of one micro-batch, and the program's lines that move data."""
    step = make_step(config, mesh)
    everywhere = mesh_module.replicated(mesh)
    params = jax.device_put(nnx.state(random_model(config.model, causal=True)), everywhere)
    total = jax.device_put((jnp.float32(0), jax.tree.map(jnp.zeros_like, params)), everywhere)
    compiled = step.accumulate.lower(total, params, (), codes, 0, 0).compile()
    kinds = (
        "all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute|collective-broadcast"
    )
    moving = re.findall(rf" ({kinds})(?:-start)?\(", compiled.as_text())
    (nats, gradient), row_nats, _ = step.accumulate(total, params, (), codes, 0, 0)
    assert row_nats.mean() == pytest.approx(float(nats), rel=1e-6)
    return float(nats), jax.device_get(gradient), sorted(moving)


@pytest.mark.parametrize(
    ("model", "chunks", "shape"),
    [
        (OURS, (5, 1), (2, 4)),
        (HALF, (0, 0), (1, 2)),
        (PLAIN, (0, 2), (1, 4)),
    ],
)
def test_loss_and_gradient_equal_those_of_one_device(model, chunks, shape):
    """By one exchange each way and one reduction."""
    run = RunConfig(phase_chunk=chunks[0], encode_chunk_patches=chunks[1])
    config = make_config(model, run=run)
    codes = smooth_codes(2, config.window_samples)
    nats, gradient, moving = gradient_of(config, mesh_of(1, 1), codes)
    assert moving == []
    scale = max(np.abs(x).max() for x in jax.tree.leaves(gradient))
    half = model.compute_dtype == "bfloat16"

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=(4e-2 if half else 3e-6) * scale)

    found, other, moving = gradient_of(config, mesh_of(*shape), codes)
    assert found == pytest.approx(nats, rel=1e-3 if half else 2e-6)
    jax.tree.map(close, other, gradient)
    assert moving == ["all-reduce", "all-to-all", "all-to-all"]


def test_evaluation_equals_that_of_one_device():
    config = make_config(patches=4, run=RunConfig(encode_chunk_patches=1))
    params = nnx.state(random_model(OURS, causal=True))
    clips = [smooth_codes(1, length, seed=i)[0] for i, length in enumerate(CLIP_LENGTHS)]
    windows = plan([clip.size for clip in clips], config, 1)
    one, eight = (
        {
            x.window: x.log_probs
            for x in Evaluator(config, mesh).score(params, clips.__getitem__, windows)
        }
        for mesh in (mesh_of(1, 1), mesh_of(2, 4))
    )
    assert one.keys() == eight.keys() == set(windows)
    for window, log_probs in one.items():
        np.testing.assert_allclose(eight[window], log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_samples": 360}, "context_devices 4 does not divide the 6 patches"),
        ({"objective": "last"}, "context_devices is 4, but only .* config.objective='dense'"),
        (
            {"run": RunConfig(phase_chunk=30)},
            "config.run.phase_chunk 30 does not divide the 15 of a device",
        ),
        (
            {"run": RunConfig(encode_chunk_patches=4)},
            "encode_chunk_patches 4 does not divide the 2 of a device",
        ),
        ({"train": TrainConfig(batch_size=3)}, "config.train.batch_size 3 is not a multiple of 2"),
    ],
)
def test_what_does_not_divide_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        make_step(dataclasses.replace(make_config(PLAIN), **changes), mesh_of(2, 4))


def test_a_mesh_that_the_devices_do_not_fill_is_named():
    assert dict(make_mesh(4).shape) == {"data": 2, "context": 4}
    with pytest.raises(UserError, match=r"config\.run\.context_devices 3 does not divide the 8"):
        make_mesh(3)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks of one of a TPU's devices."""

    id: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0
    process_index: int = 0


@pytest.mark.parametrize("context", [1, 2, 4, 8, 16])
def test_an_axis_of_chips_may_be_split(context):
    chips = [Chip(i, (i // 16, i % 16, 0)) for i in range(256)]
    mesh = make_mesh(context, chips)
    assert dict(mesh.shape) == {"data": 256 // context, "context": context}
    assert set(mesh.devices.flat) == set(chips)
