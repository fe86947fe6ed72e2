"""Running a function over chunks of an axis, one after the other, to save memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32


def map_over_chunks(function: Callable[[Any], Array], tree: Any, *, axis: int, size: int) -> Array:
    """`function` of all of `tree`, computed from chunks of `size` along an axis.

    Raises:
      ValueError: if `size` does not divide the axis.
    """
    count = _count(tree, axis, size)
    if count == 1:
        return function(tree)
    out = lax.map(lambda i: function(_take(tree, axis, size, i)), jnp.arange(count))
    out = jnp.moveaxis(out, 0, axis)
    return out.reshape(*out.shape[:axis], -1, *out.shape[axis + 2 :])


def mean_over_chunks(
    function: Callable[[Any, Any, Array], Float32[Array, "*shape"]],
    tree: Any,
    fixed: Any = (),
    *,
    axis: int,
    size: int,
) -> tuple[Float32[Array, ""], Float32[Array, "*shape"]]:
    """The mean of `function(chunk, fixed_chunk, index)` over chunks of `size` along an axis.

    The chunks are of `tree` and of `fixed`, which needs no gradient. The first result is the mean
    over everything. Its gradient with respect to `tree` and to what `function` closes over is
    computed along with it, chunk by chunk: the intermediate results of only one chunk are in memory
    (and in the caches of a CPU), and none is computed twice. The second result is the mean over
    chunks alone, without a gradient.

    Raises:
      ValueError: if `size` does not divide the axis.
    """
    count = _count(tree, axis, size)
    leaves, structure = jax.tree.flatten(tree)
    inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

    def joined(floats: list[Array], others: Any, index: Array) -> Array:
        integers, fixed = others
        streams = {True: iter(floats), False: iter(integers)}
        chunk = jax.tree.unflatten(structure, [next(streams[i]) for i in inexact])
        return function(chunk, fixed, index)

    floats = [x for x, i in zip(leaves, inexact, strict=True) if i]
    others = [x for x, i in zip(leaves, inexact, strict=True) if not i], fixed
    first = _take((floats, others), axis, size, 0)
    pure, closed_over = jax.closure_convert(joined, *first, jnp.int32(0))
    shape = jax.eval_shape(pure, *first, jnp.int32(0), *closed_over)

    @jax.custom_vjp
    def mean(floats: list[Array], closed_over: list[Array], others: Any) -> tuple[Array, Array]:
        def add(total: Array, i: Array) -> tuple[Array, None]:
            return total + pure(*_take((floats, others), axis, size, i), i, *closed_over), None

        values = lax.scan(add, jnp.zeros_like(shape), jnp.arange(count))[0] / count
        return values.mean(), values

    def forward(floats: list[Array], closed_over: list[Array], others: Any):
        def of_chunk(i: Array, piece: list[Array], closed: list[Array]) -> tuple[Array, Array]:
            values = pure(piece, _take(others, axis, size, i), i, *closed)
            return values.mean(), values

        total, gradients = _sum_and_gradients(
            of_chunk, floats, closed_over, jnp.zeros_like(shape), axis=axis, size=size, count=count
        )
        values = total / count
        return (values.mean(), values), gradients

    def backward(gradients: tuple[list[Array], list[Array]], out: tuple[Array, Array]):
        scaled = jax.tree.map(lambda x: x * (out[0] / count).astype(x.dtype), gradients)
        return *scaled, jax.tree.map(lambda _: None, others)

    mean.defvjp(forward, backward)
    return mean(floats, closed_over, others)


def _sum_and_gradients(
    of_chunk: Callable[..., tuple[Array, Array]],
    floats: list[Array],
    closed_over: list[Array],
    zero: Array,
    *,
    axis: int,
    size: int,
    count: int,
) -> tuple[Array, tuple[list[Array], list[Array]]]:
    """The sum of the second results of `of_chunk`, and the gradients of the sum of the first.

    The gradients are with respect to all of `floats` and to `closed_over`, summed in float32.
    """

    def add(carry: Any, i: Array) -> tuple[Any, None]:
        total, of_floats, of_closed = carry
        piece = _take(floats, axis, size, i)
        (d_piece, d_closed), values = jax.grad(of_chunk, (1, 2), has_aux=True)(
            i, piece, closed_over
        )
        of_floats = [
            lax.dynamic_update_slice_in_dim(whole, d, i * size, axis)
            for whole, d in zip(of_floats, d_piece, strict=True)
        ]
        return (total + values, of_floats, jax.tree.map(jnp.add, of_closed, d_closed)), None

    sums = [jnp.zeros(x.shape, jnp.float32) for x in closed_over]
    carry = (zero, jax.tree.map(jnp.zeros_like, floats), sums)
    total, of_floats, of_closed = lax.scan(add, carry, jnp.arange(count))[0]
    of_closed = [d.astype(x.dtype) for d, x in zip(of_closed, closed_over, strict=True)]
    return total, (of_floats, of_closed)


def recomputed(function: Callable[[Array, Any], Any], pieces: list[tuple[Array, Any]]) -> list[Any]:
    """`[function(*piece) for piece in pieces]`; the first part of each piece are codes.

    Pieces are computed one after the other, and only what `function` closes over is kept for the
    backward pass. `jax.checkpoint` does not achieve this: XLA's CPU backend drops its barriers,
    merges the recomputation with the original, and runs all pieces in parallel. So each
    computation is made to depend on a result of the one before it.
    """
    pure, closed_over = jax.closure_convert(function, *pieces[0])

    def after(before: Array, codes: Array) -> Array:
        # Adds zero, unless `before` is NaN and the result is lost anyway; no compiler knows.
        return codes + jnp.isnan(before).astype(codes.dtype)

    @jax.custom_vjp
    def run(closed_over: list[Array]) -> list[Any]:
        outs, before = [], jnp.float32(0)
        for codes, rest in pieces:
            outs.append(pure(after(before, codes), rest, *closed_over))
            before = _any(outs[-1])
        return outs

    def backward(closed_over: list[Array], gradients: list[Any]) -> tuple[list[Array]]:
        total, before = jax.tree.map(jnp.zeros_like, closed_over), _any(gradients)
        for (codes, rest), gradient in zip(pieces, gradients, strict=True):
            same = after(before, codes)
            _, pull = jax.vjp(lambda x, codes=same, rest=rest: pure(codes, rest, *x), closed_over)
            total = jax.tree.map(jnp.add, total, pull(gradient)[0])
            before = _any(total)
        return (total,)

    run.defvjp(lambda closed_over: (run(closed_over), closed_over), backward)
    return run(closed_over)


def _any(tree: Any) -> Array:
    """A scalar that depends on all leaves."""
    return jnp.stack([x.ravel()[0].astype(jnp.float32) for x in jax.tree.leaves(tree)]).sum()


def _count(tree: Any, axis: int, size: int) -> int:
    total = jax.tree.leaves(tree)[0].shape[axis]
    if total % size:
        raise ValueError(f"chunks of {size} don't divide an axis of {total}")
    return total // size


def _take(tree: Any, axis: int, size: int, index: Array | int) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, index * size, size, axis), tree)
