"""The training step: state, optimizer, loss, and the jitted update on a mesh.

The mesh has the axis `data`, over which a batch's rows are split, and may have `context`, whose
devices share each row (see `patchwave_jax.context`). The parameters are replicated.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, UInt8

from patchwave_jax.chips import usable_bytes
from patchwave_jax.config import Config
from patchwave_jax.context import AXIS, Shards
from patchwave_jax.distributed import least, place_rows
from patchwave_jax.errors import UserError
from patchwave_jax.model import PatchWave

State = dict[str, Any]  # params, opt_state, step
CPU_CHUNK_BYTES = 100e6
LN2 = math.log(2)


def make_mesh(context_devices: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """All devices (or `devices`), `context_devices` of them for each row.

    Raises:
      UserError: if that does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if count % context_devices:
        raise UserError(
            f"config.run.context_devices {context_devices} does not divide the {count} devices"
        )
    sizes = (count // context_devices, context_devices)
    return jax.make_mesh(sizes, ("data", AXIS), axis_types=(AxisType.Auto,) * 2, devices=devices)


def context_shards(config: Config, mesh: Mesh) -> Shards | None:
    """How the devices along `context` share a row; None where one has it for itself.

    Raises:
      UserError: if they can't share it evenly.
    """
    count = mesh.shape.get(AXIS, 1)
    if count == 1:
        return None
    phases = config.model.patch_samples // config.train.hop
    if config.objective != "dense":
        raise UserError(
            f"config.run.context_devices is {count}, but config.objective is "
            f"{config.objective!r}: only the windows of 'dense' are shared; set it to 1"
        )
    for what, total in (
        (f"{config.patches} patches", config.patches),
        (f"{phases} phases", phases),
    ):
        if total % count:
            raise UserError(
                f"config.run.context_devices {count} does not divide the {what} of a row"
            )
    return Shards(count)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("data"))


def make_model(config: Config, rngs: nnx.Rngs) -> PatchWave:
    return PatchWave(
        config.model,
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
    """Adam, with decoupled weight decay of matrices and clipping where the recipe has them."""
    train = config.train
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm) if train.clip_norm else optax.identity(),
        optax.adamw(
            make_schedule(config),
            b2=train.beta2,
            weight_decay=train.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """What a run compiles. `update` donates its state, and takes this process' rows of a batch.

    Its metrics are `nll_nats`, `gradient_norm`, and as `micro_batch_nats` the NLL of each
    micro-batch: row i of the batch is in micro-batch i % count. It calls `accumulate` for each
    micro-batch and then `apply`; the planner lowers those two for machines that aren't there.
    """

    config: Config
    mesh: Mesh
    graphdef: Any
    abstract_state: State  # shapes, dtypes and shardings
    init: Callable[[], State]
    update: Callable[[State, UInt8[np.ndarray, "B T"]], tuple[State, dict[str, Any]]]
    accumulate: Any  # jitted
    apply: Any  # jitted
    micro_batch: tuple[int, int]  # rows over all devices, and how many of them are a batch
    chunks: tuple[int, int]  # `choose_chunks`


def make_step(config: Config, mesh: Mesh) -> Step:
    """The training step of `config` on `mesh`.

    Raises:
      UserError: if the batch or its rows can't be split evenly over the devices.
    """
    train, shares, shards = config.train, mesh.shape["data"], context_shards(config, mesh)
    if train.batch_size % shares:
        raise UserError(
            f"config.train.batch_size {train.batch_size} is not a multiple of {shares} devices"
        )
    rows_each = train.batch_size // shares
    rows_each = _largest_divisor(rows_each, train.micro_batch_size or rows_each)
    rows, count = rows_each * shares, train.batch_size // (rows_each * shares)
    graphdef, _ = graphdef_and_params(config)
    optimizer = make_optimizer(config)
    chunks = choose_chunks(config, rows_each, one_device(mesh), shards)
    phase_chunk, chunk_patches = chunks

    def init() -> State:
        params = nnx.state(make_model(config, nnx.Rngs(config.seed)))
        return {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}

    def loss(params: Any, codes: UInt8[Array, "b T"], key: Array) -> Float32[Array, ""]:
        model = nnx.merge(graphdef, params)
        if config.objective == "last":
            return -model.next_sample_log_prob(codes, key).mean()
        return model.dense_nats(
            codes,
            hop=train.hop,
            phase_chunk=phase_chunk,
            chunk_patches=chunk_patches,
            key=key,
            shards=shards,
        )

    def own_gradient(params: Any, codes: UInt8[Array, "b T"], key: Array) -> Any:
        key = jax.random.fold_in(key, lax.axis_index(mesh.axis_names))
        return lax.pmean(jax.value_and_grad(loss)(params, codes, key), mesh.axis_names)

    # Left to itself, XLA gathers what the predictors read and adds up gradients inside loops. But
    # it draws the same dropout on any number of devices.
    model = config.model
    gradient: Any = jax.value_and_grad(loss)
    dropout = model.conv_dropout or model.mlp_dropout or model.head_dropout or model.token_dropout
    if shards or (mesh.size > 1 and not dropout):
        everything, rows_of = PartitionSpec(), PartitionSpec("data")
        gradient = jax.shard_map(
            own_gradient,
            mesh=mesh,
            in_specs=(everything, rows_of, everything),
            out_specs=everything,
            check_vma=False,
        )

    def accumulate(total: Any, params: Any, codes: Any, step: Array, index: int) -> Any:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        piece = gradient(params, codes, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, piece), piece[0]

    def apply(state: State, total: Any) -> tuple[State, dict[str, Array]]:
        nats, gradient = jax.tree.map(lambda x: x / count, total)
        updates, opt_state = optimizer.update(gradient, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {"nll_nats": nats, "gradient_norm": optax.tree.norm(gradient)}
        # A step that is not finite leaves parameters and moments as they were; what counts steps,
        # and so the learning rate, goes on. `Watch` tells of it.
        finite = jnp.isfinite(nats) & jnp.isfinite(metrics["gradient_norm"])
        new = {"params": params, "opt_state": opt_state}
        old = {name: state[name] for name in new}
        kept = jax.tree.map(
            lambda a, b: jnp.where(finite, a, b) if jnp.issubdtype(a.dtype, jnp.floating) else a,
            new,
            old,
        )
        return {**kept, "step": state["step"] + 1}, metrics

    everywhere = replicated(mesh)
    abstract_state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), jax.eval_shape(init)
    )
    zeros = jax.jit(
        lambda: jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), (jnp.float32(0), abstract_state["params"])
        ),
        out_shardings=everywhere,
    )
    shardings = (everywhere, everywhere, by_rows(mesh), everywhere, None)
    donated = () if config.run.debug_nans else (0,)  # JAX repeats a call to find the NaN in it
    accumulate = jax.jit(
        accumulate,
        in_shardings=shardings,
        out_shardings=everywhere,
        donate_argnums=donated,
    )
    apply = jax.jit(apply, out_shardings=everywhere, donate_argnums=donated)

    def update(state: State, codes: UInt8[np.ndarray, "B T"]) -> tuple[State, dict[str, Any]]:
        # A loop of the host's, for the reason given in `PatchWave.encode_segment`. Row i of the
        # batch is in micro-batch i % count, so that each device keeps the rows it has.
        total, parts = zeros(), []
        for index in range(count):
            micro = place_rows(mesh, codes.reshape(-1, count, codes.shape[1])[:, index], rows)
            total, nats = accumulate(total, state["params"], micro, state["step"], index)
            parts.append(nats)
        state, metrics = apply(state, total)
        return state, {**metrics, "micro_batch_nats": parts}

    return Step(
        config=config,
        mesh=mesh,
        graphdef=graphdef,
        abstract_state=abstract_state,
        init=jax.jit(init, out_shardings=everywhere),
        update=update,
        accumulate=accumulate,
        apply=apply,
        micro_batch=(rows, count),
        chunks=chunks,
    )


def choose_chunks(
    config: Config, rows: int, device: Any, shards: Shards | None = None
) -> tuple[int, int]:
    """`(phase_chunk, chunk_patches)` of the dense form for `rows` segments, or shares, on a device.

    What the configuration leaves at 0 is chosen for the device's memory, of which a third is for
    the encoder's activations (half of the machine's counts where the device does not tell). The
    Transformer's, kept for one chunk of phases, take up to a 24th of it, but on a CPU not much
    more than its caches hold.

    Raises:
      UserError: if what the configuration gives does not divide a device's share.
    """
    model, run = config.model, config.run
    memory = usable_bytes(device) or _machine_bytes() / 2
    memory = least(memory)  # all processes have to run the same program
    most = CPU_CHUNK_BYTES if device.platform == "cpu" else memory / 24
    patches, phases = config.patches, model.patch_samples // config.train.hop
    bytes_each = jnp.dtype(model.compute_dtype).itemsize
    scores = patches if config.objective == "dense" else 2 * patches  # and weights; half if causal
    layer = model.num_heads * (2 * model.width + scores) + 8 * model.width + model.mlp_width
    token = model.num_layers * layer + 2 * model.readout_width + 512
    phase = rows * patches * token * bytes_each
    patch = rows * model.patch_samples * 3 * sum(model.filters) * bytes_each
    if shards:
        patches, phases = patches // shards.count, phases // shards.count
    for name, chunk, total in (
        ("phase_chunk", run.phase_chunk, phases),
        ("encode_chunk_patches", run.encode_chunk_patches, patches),
    ):
        if chunk and total % chunk:
            raise UserError(f"config.run.{name} {chunk} does not divide a device's {total}")
    return (
        run.phase_chunk or _largest_divisor(phases, most / phase),
        run.encode_chunk_patches or _largest_divisor(patches, memory / 3 / patch),
    )


def one_device(mesh: Mesh) -> Any:
    """One whose memory can be asked for: of this process, where it has any."""
    devices, own = list(mesh.devices.flat), jax.process_index()
    return next((device for device in devices if device.process_index == own), devices[0])


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
