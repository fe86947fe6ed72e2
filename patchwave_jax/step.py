"""The training step: state, optimizer, loss, and the jitted update on a mesh.

The mesh has one axis, `data`: a batch's rows are split over it and the parameters replicated.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, UInt8

from patchwave_jax.baseline import Baseline
from patchwave_jax.config import Config
from patchwave_jax.errors import UserError
from patchwave_jax.model import PatchWave
from patchwave_jax.sashimi import S4_LEARNING_RATE, SaShiMiConfig, s4_parameters

State = dict[str, Any]  # params, opt_state, step; carry, of a baseline that has one
CPU_CHUNK_BYTES = 100e6
LN2 = math.log(2)


def make_mesh() -> Mesh:
    """All devices along `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("data"))


def make_model(config: Config, rngs: nnx.Rngs) -> Any:
    """A `PatchWave` or a `Baseline`."""
    if config.is_baseline:
        return Baseline(config, rngs=rngs)
    return PatchWave(
        config.patch_model,
        causal=config.objective == "dense",
        quantiser=config.data.quantiser,
        rngs=rngs,
    )


def graphdef_and_params(config: Config) -> tuple[Any, Any]:
    """The model's static structure and its parameters' shapes, without computing anything."""
    model = nnx.eval_shape(lambda: make_model(config, nnx.Rngs(config.seed)))
    graphdef, params = nnx.split(model)
    return graphdef, params


def make_schedule(config: Config) -> optax.Schedule:
    """The learning rate after so many steps."""
    train = config.train
    if train.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0 if train.warmup_steps else train.learning_rate,
            train.learning_rate,
            train.warmup_steps,
            max(train.decay_steps, train.warmup_steps + 1),
            train.final_learning_rate,
        )
    drop = optax.piecewise_constant_schedule(
        train.learning_rate, {train.decay_steps: train.final_learning_rate / train.learning_rate}
    )
    if not train.warmup_steps:
        return drop
    return lambda step: drop(step) * jnp.minimum(1.0, (step + 1) / train.warmup_steps)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam, with decoupled weight decay of matrices and clipping where the recipe has them.

    S4's own parameters have their own learning rate, in step with all others', and no decay.
    """
    train, own = config.train, []

    def decayed(params: Any) -> Any:
        return jax.tree.map(lambda x, s4: x.ndim > 1 and not s4, params, s4_parameters(params))

    if isinstance(config.model, SaShiMiConfig):
        slower = optax.scale(S4_LEARNING_RATE / train.learning_rate)
        own = [optax.masked(slower, s4_parameters)]
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm) if train.clip_norm else optax.identity(),
        optax.adamw(
            make_schedule(config),
            b2=train.beta2,
            weight_decay=train.weight_decay,
            mask=decayed,
        ),
        *own,
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """What a run compiles. `update` donates the state it is given.

    Its metrics are `nll_nats`, `gradient_norm`, and as `micro_batch_nats` the NLL of each
    micro-batch: row i of the batch is in micro-batch i % count.
    """

    config: Config
    mesh: Mesh
    graphdef: Any
    abstract_state: State  # shapes, dtypes and shardings
    init: Callable[[], State]
    update: Callable[[State, UInt8[np.ndarray, "B T"]], tuple[State, dict[str, Any]]]


def make_step(config: Config, mesh: Mesh) -> Step:
    """The training step of `config` on `mesh`.

    Raises:
      UserError: if the batch can't be split evenly over the devices.
    """
    train = config.train
    if train.batch_size % mesh.size:
        raise UserError(
            f"config.train.batch_size {train.batch_size} is not a multiple of {mesh.size} devices"
        )
    rows_each = train.batch_size // mesh.size
    rows_each = _largest_divisor(rows_each, train.micro_batch_size or rows_each)
    rows, count = rows_each * mesh.size, train.batch_size // (rows_each * mesh.size)
    graphdef, _ = graphdef_and_params(config)
    optimizer = make_optimizer(config)
    phase_chunk, chunk_patches = choose_chunks(config, rows_each, mesh.devices.flat[0])

    def init() -> State:
        model = make_model(config, nnx.Rngs(config.seed))
        params = nnx.state(model)
        state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}
        carry = model.start(train.batch_size) if isinstance(model, Baseline) else ()
        return {**state, "carry": carry} if jax.tree.leaves(carry) else state

    def loss(
        params: Any, carry: Any, codes: UInt8[Array, "b T"], step: Array, key: Array
    ) -> tuple[Float32[Array, ""], Any]:
        model = nnx.merge(graphdef, params)
        if isinstance(model, Baseline):
            return model.nats(codes, carry, step % config.segments == 0, key)
        if config.objective == "last":
            return -model.next_sample_log_prob(codes, key).mean(), carry
        nats = model.dense_nats(
            codes, hop=train.hop, phase_chunk=phase_chunk, chunk_patches=chunk_patches, key=key
        )
        return nats, carry

    def accumulate(total: Any, params: Any, carry: Any, codes: Any, step: Array, index: int) -> Any:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        split = jax.tree.map(lambda x: x.reshape(rows, count, *x.shape[1:]), carry)
        mine = jax.tree.map(lambda x: x[:, index], split)
        (nats, mine), gradient = jax.value_and_grad(loss, has_aux=True)(
            params, mine, codes, step, jax.random.fold_in(key, index)
        )
        split = jax.tree.map(lambda x, new: x.at[:, index].set(new), split, mine)
        carry = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), split)
        return jax.tree.map(jnp.add, total, (nats, gradient)), nats, carry

    def apply(state: State, total: Any, carry: Any) -> tuple[State, dict[str, Array]]:
        nats, gradient = jax.tree.map(lambda x: x / count, total)
        updates, opt_state = optimizer.update(gradient, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {"nll_nats": nats, "gradient_norm": optax.tree.norm(gradient)}
        # A step that is not finite leaves parameters and moments as they were; what counts steps,
        # and so the learning rate, goes on. `Watch` tells of it.
        finite = jnp.isfinite(nats) & jnp.isfinite(metrics["gradient_norm"])
        new = {"params": params, "opt_state": opt_state}
        new |= {"carry": carry} if "carry" in state else {}
        old = {name: state[name] for name in new}
        kept = jax.tree.map(
            lambda a, b: jnp.where(finite, a, b) if jnp.issubdtype(a.dtype, jnp.floating) else a,
            new,
            old,
        )
        return {**kept, "step": state["step"] + 1}, metrics

    everywhere = replicated(mesh)
    shapes = jax.eval_shape(init)
    layouts = jax.tree.map(lambda _: everywhere, shapes)
    if "carry" in shapes:
        layouts["carry"] = jax.tree.map(lambda _: by_rows(mesh), shapes["carry"])
    abstract_state = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, layouts
    )
    zeros = jax.jit(
        lambda: jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), (jnp.float32(0), abstract_state["params"])
        ),
        out_shardings=everywhere,
    )
    carried = layouts.get("carry", ())
    shardings = (everywhere, everywhere, carried, by_rows(mesh), everywhere, None)
    donated = () if config.run.debug_nans else (0,)  # JAX repeats a call to find the NaN in it
    accumulate = jax.jit(
        accumulate,
        in_shardings=shardings,
        out_shardings=(everywhere, everywhere, carried),
        donate_argnums=donated,
    )
    apply = jax.jit(apply, out_shardings=(layouts, everywhere), donate_argnums=donated)

    def update(state: State, codes: UInt8[np.ndarray, "B T"]) -> tuple[State, dict[str, Any]]:
        # A loop of the host's, for the reason given in `PatchWave.encode_segment`. Row i of the
        # batch is in micro-batch i % count, so that each device keeps the rows it has.
        total, parts, carry = zeros(), [], state.get("carry", ())
        for index in range(count):
            micro = codes.reshape(rows, count, -1)[:, index]
            total, nats, carry = accumulate(
                total, state["params"], carry, micro, state["step"], index
            )
            parts.append(nats)
        state, metrics = apply(state, total, carry)
        return state, {**metrics, "micro_batch_nats": parts}

    return Step(
        config=config,
        mesh=mesh,
        graphdef=graphdef,
        abstract_state=abstract_state,
        init=jax.jit(init, out_shardings=layouts),
        update=update,
    )


def choose_chunks(config: Config, rows: int, device: Any) -> tuple[int, int]:
    """`(phase_chunk, chunk_patches)` of the dense form for `rows` segments on one device.

    What the configuration leaves at 0 is chosen for the device's memory, of which a third is for
    the encoder's activations (half of the machine's counts where the device does not tell). The
    Transformer's, kept for one chunk of phases, take up to a 24th of it, but on a CPU not much
    more than its caches hold.
    """
    if config.is_baseline:
        return 1, config.patches
    model, run = config.patch_model, config.run
    memory = (device.memory_stats() or {}).get("bytes_limit", _machine_bytes() / 2)
    most = CPU_CHUNK_BYTES if device.platform == "cpu" else memory / 24
    patches, phases = config.patches, model.patch_samples // config.train.hop
    bytes_each = jnp.dtype(model.compute_dtype).itemsize
    scores = patches if config.objective == "dense" else 2 * patches  # and weights; half if causal
    layer = model.num_heads * (2 * model.width + scores) + 8 * model.width + model.mlp_width
    token = model.num_layers * layer + 2 * model.readout_width + 512
    phase = rows * patches * token * bytes_each
    patch = rows * model.patch_samples * 3 * sum(model.filters) * bytes_each
    return (
        run.phase_chunk or _largest_divisor(phases, most / phase),
        run.encode_chunk_patches or _largest_divisor(patches, memory / 3 / patch),
    )


def _machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _largest_divisor(total: int, most: float) -> int:
    return max(d for d in range(1, total + 1) if total % d == 0 and d <= max(1, most))


def keep_compilations() -> None:
    """Has JAX keep compiled programs in `~/.cache/patchwave_jax/compiled`, to start faster again.

    `JAX_COMPILATION_CACHE_DIR` names another place, `JAX_ENABLE_COMPILATION_CACHE=0` is none.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore
        folder = Path.home() / ".cache/patchwave_jax/compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def count_parameters(params: Any) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
