"""The training step: state, loss, and the jitted update on a mesh."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float32, UInt8

from patchwave_jax.config import Config
from patchwave_jax.errors import UserError
from patchwave_jax.models.baseline import Baseline
from patchwave_jax.models.patchwave.model import PatchWave
from patchwave_jax.runtime.distributed import place_rows
from patchwave_jax.runtime.memory import choose_chunks, largest_divisor
from patchwave_jax.runtime.mesh import (
    by_longest_axis,
    by_rows,
    context_shards,
    one_device,
    replicated,
)
from patchwave_jax.training.optimizer import make_optimizer

State = dict[str, Any]  # params, opt_state, step; carry, of a baseline that has one
LN2 = math.log(2)


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


@dataclasses.dataclass(frozen=True)
class Step:
    """What a run compiles. `update` donates its state, and takes this process' rows of a batch.

    Its metrics are `nll_nats`, `gradient_norm`, and as `row_nats` the NLL of each micro-batch's
    rows: row i of the batch is row i // count of micro-batch i % count. It calls `accumulate` for
    each micro-batch and then `apply`; the planner lowers those two for machines that aren't there.
    """

    config: Config
    mesh: Mesh
    graphdef: Any
    abstract_state: State  # shapes, dtypes and shardings
    init: Callable[[], State]
    update: Callable[[State, UInt8[np.ndarray, "B T"]], tuple[State, dict[str, Any]]]
    whole: Callable[[Any], Any]  # parameters on every device, where `update` keeps them split
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
            f"config.train.batch_size {train.batch_size} is not a multiple of {shares} devices: "
            f"try --config.train.batch_size={-(-train.batch_size // shares) * shares}"
        )
    rows_each = train.batch_size // shares
    rows_each = largest_divisor(rows_each, train.micro_batch_size or rows_each)
    rows, count = rows_each * shares, train.batch_size // (rows_each * shares)
    graphdef, _ = graphdef_and_params(config)
    optimizer = make_optimizer(config)
    chunks = choose_chunks(config, rows_each, one_device(mesh), shards)
    phase_chunk, chunk_patches = chunks

    def init() -> State:
        model = make_model(config, nnx.Rngs(config.seed))
        params = nnx.state(model)
        state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}
        carry = model.start(train.batch_size) if isinstance(model, Baseline) else ()
        return {**state, "carry": carry} if jax.tree.leaves(carry) else state

    def loss(
        params: Any, carry: Any, codes: UInt8[Array, "b T"], step: Array, key: Array
    ) -> tuple[Float32[Array, ""], tuple[Float32[Array, " b"], Any]]:
        model = nnx.merge(graphdef, params)
        if isinstance(model, Baseline):
            return model.nats(codes, carry, step % config.segments == 0, key)
        if config.objective == "last":
            nats = -model.next_sample_log_prob(codes, key)
            return nats.mean(), (nats, carry)
        nats, row_nats = model.dense_nats(
            codes,
            hop=train.hop,
            phase_chunk=phase_chunk,
            chunk_patches=chunk_patches,
            key=key,
            shards=shards,
        )
        return nats, (row_nats, carry)

    def own_gradient(
        params: Any, carry: Any, codes: UInt8[Array, "b T"], step: Array, key: Array
    ) -> Any:
        key = jax.random.fold_in(key, lax.axis_index(mesh.axis_names))
        (nats, (own, carry)), gradient = jax.value_and_grad(loss, has_aux=True)(
            params, carry, codes, step, key
        )
        # Of all rows, so that one reduction is enough: others' are 0 here.
        first = lax.axis_index("data") * rows_each
        all_rows = lax.dynamic_update_slice(jnp.zeros(rows), shares * own, (first,))
        nats, all_rows, gradient = lax.pmean((nats, all_rows, gradient), mesh.axis_names)
        return (nats, (all_rows, carry)), gradient

    # Left to itself, XLA gathers what the predictors read and adds up gradients inside loops. But
    # it draws the same dropout on any number of devices.
    gradient: Any = jax.value_and_grad(loss, has_aux=True)
    mapped = shards is not None or (mesh.size > 1 and not has_dropout(config))
    if mapped:
        everything, rows_of = PartitionSpec(), PartitionSpec("data")
        gradient = jax.shard_map(
            own_gradient,
            mesh=mesh,
            in_specs=(everything, rows_of, rows_of, everything, everything),
            out_specs=((everything, (everything, rows_of)), everything),
            check_vma=False,
        )

    def accumulate(total: Any, params: Any, carry: Any, codes: Any, step: Array, index: int) -> Any:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        params = lax.with_sharding_constraint(params, everywhere)
        split = jax.tree.map(lambda x: x.reshape(rows, count, *x.shape[1:]), carry)
        own = jax.tree.map(lambda x: x[:, index], split)
        (nats, (row_nats, own)), piece = gradient(
            params, own, codes, step, jax.random.fold_in(key, index)
        )
        split = jax.tree.map(lambda x, new: x.at[:, index].set(new), split, own)
        carry = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), split)
        return jax.tree.map(jnp.add, total, (nats, piece)), row_nats, carry

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
    layouts = jax.tree.map(
        lambda x: by_longest_axis(mesh, x.shape) if config.run.shard_parameters else everywhere,
        shapes,
    )
    if "carry" in shapes:
        layouts["carry"] = jax.tree.map(lambda _: by_rows(mesh), shapes["carry"])
    abstract_state = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, layouts
    )
    summed = (everywhere, layouts["params"])
    zeros = jax.jit(
        lambda: jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), (jnp.float32(0), abstract_state["params"])
        ),
        out_shardings=summed,
    )
    carried = layouts.get("carry", ())
    shardings = (summed, layouts["params"], carried, by_rows(mesh), everywhere, None)
    donated = () if config.run.debug_nans else (0,)  # JAX repeats a call to find the NaN in it
    accumulate = jax.jit(
        accumulate,
        in_shardings=shardings,
        out_shardings=(summed, everywhere if mapped else by_rows(mesh), carried),
        donate_argnums=donated,
    )
    apply = jax.jit(apply, out_shardings=(layouts, everywhere), donate_argnums=donated)

    def update(state: State, codes: UInt8[np.ndarray, "B T"]) -> tuple[State, dict[str, Any]]:
        # A loop of the host's, for the reason given in `PatchWave.encode_segment`. Row i of the
        # batch is in micro-batch i % count, so that each device keeps the rows it has.
        total, parts, carry = zeros(), [], state.get("carry", ())
        for index in range(count):
            micro = place_rows(mesh, codes.reshape(-1, count, codes.shape[1])[:, index], rows)
            total, row_nats, carry = accumulate(
                total, state["params"], carry, micro, state["step"], index
            )
            parts.append(row_nats)
        state, metrics = apply(state, total, carry)
        return state, {**metrics, "row_nats": parts}

    return Step(
        config=config,
        mesh=mesh,
        graphdef=graphdef,
        abstract_state=abstract_state,
        init=jax.jit(init, out_shardings=layouts),
        update=update,
        whole=jax.jit(lambda params: params, out_shardings=everywhere),
        accumulate=accumulate,
        apply=apply,
        micro_batch=(rows, count),
        chunks=chunks,
    )


def has_dropout(config: Config) -> bool:
    return any(value for name, value in vars(config.model).items() if name.endswith("dropout"))


def keep_compilations() -> None:
    """Has JAX keep compiled programs in `~/.cache/patchwave_jax/compiled`, to start faster again.

    `JAX_COMPILATION_CACHE_DIR` names another place, `JAX_ENABLE_COMPILATION_CACHE=0` is none.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore
        folder = Path.home() / ".cache/patchwave_jax/compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def count_parameters(params: Any) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
