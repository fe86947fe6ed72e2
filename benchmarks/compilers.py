"""What choices that were made on CPUs cost on other chips, by those chips' compilers.

    python -m benchmarks.compilers --topology=a100:1

compiles one training step of `ctx128k:dense` with one row, without and with the adaptive
predictors, and of `ctx128k` with ten, each as it is and with one choice undone, as the planner
(`python -m patchwave_jax.plan`) does. Prints a Markdown table; memory, work and time are of a step.
"""

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax

from patchwave_jax import recipes
from patchwave_jax.config import Config
from patchwave_jax.errors import exits_cleanly
from patchwave_jax.models import chunking
from patchwave_jax.models.patchwave import model, transformer
from patchwave_jax.plan import plan


def gradient_afterwards(function: Callable, tree: Any, fixed: Any = (), *, axis: int, size: int):
    """`mean_over_chunks` by what JAX has: a loop over checkpointed chunks."""
    count = jax.tree.leaves(tree)[0].shape[axis] // size

    def add(total, i):
        piece, rest = chunking._take((tree, fixed), axis, size, i)
        return total + function(piece, rest, i), None

    first = chunking._take((tree, fixed), axis, size, 0)
    shape = jax.eval_shape(lambda: function(*first, jnp.int32(0)))
    start = jnp.zeros(shape.shape, shape.dtype)
    values = lax.scan(jax.checkpoint(add), start, jnp.arange(count))[0] / count
    return values.mean(), values


def plain_attention(self: transformer.Attention, x, causal: bool, folded=None, cache=None):
    """Queries, keys and values of each head, and all scores."""
    heads = (*x.shape[:2], self.config.num_heads, self.config.head_size)
    query, key, values = (f(x).reshape(heads) for f in (self.query, self.key, self.value))
    scores = jnp.einsum("mqhk,mshk->mhqs", query, key) / math.sqrt(self.config.head_size)
    mask = jnp.tril(jnp.ones((x.shape[1],) * 2, bool)) if causal else True
    weights = jax.nn.softmax(jnp.where(mask, scores.astype(jnp.float32), -jnp.inf))
    mixed = jnp.einsum("mhqs,mshk->mqhk", weights.astype(x.dtype), values)
    return self.output(mixed.reshape(*x.shape[:2], -1)), cache


def all_scores(folded: transformer.Folded, x):
    """`attend_to_older` in one block."""
    return transformer.attend(folded, x, x, jnp.tril(jnp.ones((x.shape[1],) * 2, bool)))


def checkpointed(function: Callable, pieces: list) -> list:
    """`chunking.recomputed` by what JAX has."""
    return [jax.checkpoint(function)(*piece) for piece in pieces]


patch = mock.patch.object
nothing = contextlib.nullcontext()


def cpus(*args: Any, default: Callable, cpu: Callable | None = None, **others: Callable) -> Any:
    """`lax.platform_dependent` on a CPU."""
    return (cpu or default)(*args)


as_on_a_cpu = patch(lax, "platform_dependent", cpus)
Variant = tuple[str, dict[str, int], contextlib.AbstractContextManager[Any]]  # fields of config.run
NETWORK: list[Variant] = [
    ("ours, without predictors", {}, nothing),
    ("20 phases at once, as on a CPU", {"phase_chunk": 20}, nothing),
    ("gradients after all values", {}, patch(model, "mean_over_chunks", gradient_afterwards)),
    ("all scores, the later masked", {}, patch(transformer, "attend_to_older", all_scores)),
    ("attention not folded", {}, patch(transformer.Attention, "__call__", plain_attention)),
    ("16 patches encoded at once", {"encode_chunk_patches": 16}, nothing),
    (
        "... with `jax.checkpoint`",
        {"encode_chunk_patches": 16},
        patch(model, "recomputed", checkpointed),
    ),
]
PREDICTORS: list[Variant] = [
    ("ours", {}, nothing),
    ("predictors and dilated convolutions as on a CPU", {}, as_on_a_cpu),
]
PATCHES: list[Variant] = [
    ("the paper's", {}, nothing),
    ("strides as on a CPU", {}, as_on_a_cpu),
]


def groups() -> list[tuple[Config, list[Variant]]]:
    """Each configuration with what is varied of it; the first variant is the reference."""

    def rows(config: Config, count: int) -> Config:
        return dataclasses.replace(
            config, train=dataclasses.replace(config.train, batch_size=count)
        )

    ours = rows(recipes.dense(128_000), 1)
    without: Any = {"adaptive_taps": (), "adaptive_windows": (), "denoiser_taps": 0}
    network = dataclasses.replace(ours.model, **without)
    return [
        (dataclasses.replace(ours, model=network), NETWORK),
        (ours, PREDICTORS),
        (rows(recipes.paper(128_000), 10), PATCHES),
    ]


@exits_cleanly
def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser("python -m benchmarks.compilers", description=__doc__)
    parser.add_argument("--topology", default="a100:1", help="as for the planner")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # no device here is wanted, only compilers
    print("| | GiB | TFLOP | GB moved | at best, ms | ratio |\n|---|--:|--:|--:|--:|--:|")
    for config, variants in groups():
        reference = None
        for name, fields, patched in variants:
            run = dataclasses.replace(config.run, **fields)
            with patched:
                found = plan(dataclasses.replace(config, run=run), args.topology)
            assert found.seconds
            reference = reference or found.seconds["step"]
            print(
                f"| {name} | {sum(found.memory_bytes.values()) / 2**30:.2f} "
                f"| {found.flops / 1e12:.3g} | {found.bytes / 1e9:.3g} "
                f"| {1e3 * found.seconds['step']:.3g} | {found.seconds['step'] / reference:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
