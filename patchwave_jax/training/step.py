"""The training step: state, loss, gradient and update, jitted on a mesh.

A batch is cut into micro-batches. For each, `accumulate` adds the gradient of its loss to a sum;
then `apply` updates the parameters once.

Dimensions: `B` rows of the batch, `b` rows of a micro-batch, `T` samples of a row.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
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
from patchwave_jax.models.base import Execution
from patchwave_jax.models.patchwave.cost import largest_divisor
from patchwave_jax.runtime.distributed import place_rows
from patchwave_jax.runtime.memory import choose_execution
from patchwave_jax.runtime.mesh import by_rows, context_shards, one_device, replicated
from patchwave_jax.training.optimizer import make_optimizer

State = dict[str, Any]  # params, opt_state, step; carry, of a model that has one


@dataclasses.dataclass(frozen=True)
class MicroBatches:
    """How a batch is computed. Row i is row i // count of micro-batch i % count."""

    rows: int  # of a micro-batch, over all devices
    count: int  # micro-batches of a batch
    rows_each: int  # of a micro-batch, on one device

    @classmethod
    def of(cls, config: Config, mesh: Mesh) -> "MicroBatches":
        """The largest micro-batches that `train.micro_batch_size` allows.

        Raises:
          UserError: if the batch can't be split evenly over the devices.
        """
        batch, shares = config.train.batch_size, mesh.shape["data"]
        if batch % shares:
            raise UserError(
                f"config.train.batch_size {batch} is not a multiple of {shares} devices: "
                f"try --config.train.batch_size={-(-batch // shares) * shares}"
            )
        each = largest_divisor(batch // shares, config.train.micro_batch_size or batch)
        return cls(each * shares, batch // (each * shares), each)


@dataclasses.dataclass(frozen=True)
class Step:
    """What a run compiles. The planner lowers `accumulate` and `apply` for absent machines."""

    config: Config
    mesh: Mesh
    graphdef: Any
    abstract_state: State  # shapes, dtypes and shardings
    micro: MicroBatches
    execution: Execution
    init: Callable[[], State]
    zeros: Callable[[], Any]  # the sum that `accumulate` begins with
    accumulate: Any  # (sum, params, carry, codes, step, index) -> (sum, row_nats, carry); jitted
    apply: Any  # (state, sum, carry, spent=None) -> (state, metrics); jitted

    def update(
        self, state: State, codes: UInt8[np.ndarray, "B T"], spent: float | None = None
    ) -> tuple[State, dict[str, Any]]:
        """The state after one step on this process' rows of a batch; `state` is donated.

        `spent` is the share of `train.max_minutes` that is used; None without a limit.
        Metrics are `nll_nats`, `gradient_norm`, and as `row_nats` the NLL of each micro-batch's
        rows.
        """
        # A loop on the host, for the reason given in `PatchWave._encode_segment`.
        total, row_nats, carry = self.zeros(), [], state.get("carry", ())
        for index in range(self.micro.count):
            rows = codes.reshape(-1, self.micro.count, codes.shape[1])[:, index]
            rows = place_rows(self.mesh, rows, self.micro.rows)
            total, own, carry = self.accumulate(
                total, state["params"], carry, rows, state["step"], index
            )
            row_nats.append(own)
        state, metrics = self.apply(state, total, carry, spent)
        return state, {**metrics, "row_nats": row_nats}


def make_step(config: Config, mesh: Mesh) -> Step:
    """The training step of `config` on `mesh`.

    Raises:
      UserError: if the batch or its rows can't be split evenly over the devices.
    """
    shards, micro = context_shards(config, mesh), MicroBatches.of(config, mesh)
    execution = choose_execution(config, micro.rows_each, one_device(mesh), shards)
    graphdef, _ = config.abstract_model(execution)
    init = partial(init_state, config)
    layouts = state_layouts(init, mesh)
    abstract_state = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        jax.eval_shape(init),
        layouts,
    )
    everywhere, carried = replicated(mesh), layouts.get("carry", ())
    summed = (everywhere, layouts["params"])
    donated = () if config.run.debug_nans else (0,)  # JAX repeats a call to find the NaN in it
    gradient, rows_at = loss_and_gradient(config, graphdef, mesh, micro, shards is not None)
    return Step(
        config=config,
        mesh=mesh,
        graphdef=graphdef,
        abstract_state=abstract_state,
        micro=micro,
        execution=execution,
        init=jax.jit(init, out_shardings=layouts),
        zeros=jax.jit(partial(zero_sum, abstract_state["params"]), out_shardings=summed),
        accumulate=jax.jit(
            partial(accumulate, gradient, micro, config.seed),
            in_shardings=(summed, layouts["params"], carried, by_rows(mesh), everywhere, None),
            out_shardings=(summed, rows_at, carried),
            donate_argnums=donated,
        ),
        apply=jax.jit(
            partial(apply, config, micro.count),
            out_shardings=(layouts, everywhere),
            donate_argnums=donated,
        ),
    )


def init_state(config: Config) -> State:
    """The state before the first step."""
    model = config.build_model(nnx.Rngs(config.seed))
    params = nnx.state(model)
    opt_state = make_optimizer(config).init(params)
    state = {"params": params, "opt_state": opt_state, "step": jnp.int32(0)}
    carry = model.init_carry(config.train.batch_size)
    return {**state, "carry": carry} if jax.tree.leaves(carry) else state


def state_layouts(init: Callable[[], State], mesh: Mesh) -> Any:
    """Where each array of the state lies: everywhere, but what rows carry with the rows."""
    shapes = jax.eval_shape(init)
    layouts = jax.tree.map(lambda _: replicated(mesh), shapes)
    if "carry" in shapes:
        layouts["carry"] = jax.tree.map(lambda _: by_rows(mesh), shapes["carry"])
    return layouts


def zero_sum(params: Any) -> Any:
    """Zeros for the sum of losses and of gradients."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (jnp.float32(0), params))


def loss_and_gradient(
    config: Config, graphdef: Any, mesh: Mesh, micro: MicroBatches, shared_rows: bool
) -> tuple[Any, Any]:
    """`value_and_grad` of the loss of a micro-batch on `mesh`, and where its rows' losses lie."""

    def loss(
        params: Any, carry: Any, codes: UInt8[Array, "b T"], step: Array, key: Array
    ) -> tuple[Float32[Array, ""], tuple[Float32[Array, " b"], Any]]:
        model = nnx.merge(graphdef, params)
        return model.loss(codes, carry, step % config.segments == 0, key)

    gradient: Any = jax.value_and_grad(loss, has_aux=True)
    # Left to itself, XLA gathers what the predictors read and adds up gradients inside loops. But
    # it draws the same dropout on any number of devices.
    if not shared_rows and (mesh.size == 1 or config.model.has_dropout):
        return gradient, by_rows(mesh)
    everywhere, rows_of = PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(
        partial(reduced_gradient, gradient, mesh, micro),
        mesh=mesh,
        in_specs=(everywhere, rows_of, rows_of, everywhere, everywhere),
        out_specs=((everywhere, (everywhere, rows_of)), everywhere),
        check_vma=False,
    )
    return mapped, replicated(mesh)


def reduced_gradient(
    gradient: Any, mesh: Mesh, micro: MicroBatches,
    params: Any, carry: Any, codes: UInt8[Array, "b T"], step: Array, key: Array,
) -> Any:  # fmt: skip
    """The gradient of a device's own rows, then one reduction over all devices."""
    key = jax.random.fold_in(key, lax.axis_index(mesh.axis_names))
    (nats, (own, carry)), own_gradient = gradient(params, carry, codes, step, key)
    # In an array of all rows, so that one reduction is enough: others' are 0 here.
    first = lax.axis_index("data") * micro.rows_each
    row_nats = lax.dynamic_update_slice(jnp.zeros(micro.rows), mesh.shape["data"] * own, (first,))
    nats, row_nats, summed = lax.pmean((nats, row_nats, own_gradient), mesh.axis_names)
    return (nats, (row_nats, carry)), summed


def accumulate(
    gradient: Any, micro: MicroBatches, seed: int,
    total: Any, params: Any, carry: Any, codes: Any, step: Array | int, index: Array | int,
) -> Any:  # fmt: skip
    """Adds the loss and gradient of micro-batch `index`, and replaces its rows of the carry."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    split = jax.tree.map(lambda x: x.reshape(micro.rows, micro.count, *x.shape[1:]), carry)
    own = jax.tree.map(lambda x: x[:, index], split)
    (nats, (row_nats, own)), piece = gradient(
        params, own, codes, step, jax.random.fold_in(key, index)
    )
    split = jax.tree.map(lambda x, new: x.at[:, index].set(new), split, own)
    carry = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), split)
    return jax.tree.map(jnp.add, total, (nats, piece)), row_nats, carry


def apply(
    config: Config, count: int, state: State, total: Any, carry: Any,
    spent: Array | float | None = None,
) -> tuple[State, dict[str, Array]]:  # fmt: skip
    """The state after the update by the mean of `count` losses and gradients.

    A step that is not finite leaves parameters and moments as they were; what counts steps, and so
    the learning rate, goes on. `NonFiniteGuard` tells of it.
    """
    nats, gradient = jax.tree.map(lambda x: x / count, total)
    optimizer = make_optimizer(config, spent)
    updates, opt_state = optimizer.update(gradient, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    metrics = {"nll_nats": nats, "gradient_norm": optax.tree.norm(gradient)}
    finite = jnp.isfinite(nats) & jnp.isfinite(metrics["gradient_norm"])
    new = {"params": params, "opt_state": opt_state}
    new |= {"carry": carry} if "carry" in state else {}
    kept = jax.tree.map(
        lambda a, b: jnp.where(finite, a, b) if jnp.issubdtype(a.dtype, jnp.floating) else a,
        new,
        {name: state[name] for name in new},
    )
    return {**kept, "step": state["step"] + 1}, metrics
