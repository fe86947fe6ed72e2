"""Speed and memory of training steps: `python -m benchmarks.train_step`. Prints one JSON object.

Each configuration runs in a fresh process, whose peak memory is its own. The machine's reference
is a product of two 2048 x 2048 matrices at float32, timed right before and after every run; a
share is the useful FLOPs of a run over what the reference would have done in the same time, and
the median of the runs is printed. Useful FLOPs are counted from the configuration: the
attention's products folded, half of the scores (causal), nothing that is computed twice, and
three times the forward pass for a training step.
"""

import argparse
import dataclasses
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from patchwave_jax import recipes
from patchwave_jax.config import Config
from patchwave_jax.models.chunking import mean_over_chunks
from patchwave_jax.models.patchwave import cost
from patchwave_jax.models.patchwave.model import PatchWave
from patchwave_jax.runtime.distributed import keep_compilations
from patchwave_jax.runtime.memory import choose_execution
from patchwave_jax.runtime.mesh import make_mesh
from patchwave_jax.training.step import make_step

REFERENCE_SIZE = 2048
CHUNKS = 6  # of phases, for the Transformer and the head alone
CONFIGS = ["parts:128000", "paper:128000", "ours:128000"]


def configuration(name: str, context: int) -> Config:
    """One row a step of `ours`, the dense recipe, or of the paper's network.

    That is trained densely as `paper`, and as `dropout` with its dropout; `last` is its recipe
    without dropout.
    """
    if name == "ours":
        config = recipes.dense(context)
    else:
        config = recipes.paper(context)
        objective = "last" if name == "last" else "dense"
        model = (
            config.model
            if name == "dropout"
            else dataclasses.replace(config.model, **recipes.NO_DROPOUT)
        )
        config = dataclasses.replace(config, objective=objective, model=model)
    train = dataclasses.replace(config.train, batch_size=1, micro_batch_size=1)
    return dataclasses.replace(config, train=train)


def measured(run: Callable[[], Any], runs: int) -> tuple[float, float]:
    """Seconds and the reference's FLOP/s of the run whose product of both is the median."""
    square = jnp.ones((REFERENCE_SIZE, REFERENCE_SIZE))
    product = jax.jit(jnp.matmul)

    def reference() -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            product(square, square).block_until_ready()
            times.append(time.perf_counter() - start)
        return 2 * REFERENCE_SIZE**3 / statistics.median(times)

    reference()
    seconds, rates = [], [reference()]
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
        rates.append(reference())
    around = [(a + b) / 2 for a, b in itertools.pairwise(rates)]
    middle = sorted(range(runs), key=lambda i: seconds[i] * around[i])[runs // 2]
    return seconds[middle], around[middle]


def useful_flops(config: Config) -> dict[str, float]:
    """Of one row, by part."""
    return cost.useful_flops(config.model, config.context_samples, config.causal)


def report(seconds: float, rate: float, flops: float, targets: int) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 3),
        "microseconds_per_target": round(1e6 * seconds / targets, 1),
        "useful_gflops_per_second": round(flops / seconds / 1e9, 1),
        "matmul_gflops_per_second": round(rate / 1e9, 1),
        "share_of_matmul": round(flops / seconds / rate, 3),
    }


def step(config: Config, runs: int) -> dict[str, Any]:
    """One whole optimizer step of one row, as `train` runs it."""
    step = make_step(config, make_mesh())
    state = step.init()
    codes = np.random.default_rng(0).integers(0, 256, (1, config.window_samples), np.uint8)
    start = time.perf_counter()
    box = [jax.block_until_ready(step.update(state, codes))[0]]
    first = time.perf_counter() - start

    def again() -> Any:
        box[0], metrics = step.update(box[0], codes)
        return metrics

    if runs:
        seconds, rate = measured(again, runs)
    else:  # the first run is all there is time for
        _, rate = measured(lambda: None, 1)
        seconds = first
    flops = sum(useful_flops(config).values())
    found = report(seconds, rate, flops, config.targets_per_step)
    if config.objective == "last":
        for key in ("useful_gflops_per_second", "share_of_matmul"):
            del found[key]
    return {
        **found,
        "first_step_seconds": round(first, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


def parts(config: Config, runs: int) -> dict[str, Any]:
    """Encoder, Transformer and softmax head alone, forward and backward, on a part of a row."""
    model: Any = config.build_model(nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    size, patches, width = config.window_unit, config.window_units, model.config.width
    chunk = choose_execution(config, 1, jax.devices()[0]).phase_chunk or 1
    rng = np.random.default_rng(0)
    few, count = max(1, patches // 8), CHUNKS * chunk * patches
    codes = rng.integers(0, 256, (1, (few + 1) * size), np.uint8)
    tokens = rng.normal(size=(1, patches, CHUNKS * chunk, width)).astype(np.float32)
    targets = rng.integers(0, 256, tokens.shape[:3], np.uint8)

    def encoder(params: Any) -> jax.Array:
        model: PatchWave = nnx.merge(graphdef, params)
        return model.encoder.every_offset(jnp.asarray(codes)[:, :-1], few * size)[0].sum()

    def transformer(params: Any, tokens: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        folded = model.folded()

        def states(tokens: jax.Array, *_: Any) -> jax.Array:
            sequences = jnp.swapaxes(tokens, 1, 2).reshape(-1, patches, width)
            return model.transform(sequences, None, folded)[0].mean()

        return mean_over_chunks(states, tokens, axis=2, size=chunk)[0]

    def head(params: Any, tokens: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)

        def log_prob(piece: Any, *_: Any) -> jax.Array:
            hidden = model.hidden(piece[0], None, ())
            return model.head.log_prob(hidden, piece[1]).mean()

        return mean_over_chunks(log_prob, (tokens, targets), axis=2, size=chunk)[0]

    found = {}
    for name, gradient, args, targets_of in (
        ("encoder", jax.grad(encoder), (params,), few * size),
        ("transformer", jax.grad(transformer, (0, 1)), (params, tokens), count),
        ("head", jax.grad(head, (0, 1)), (params, tokens), count),
    ):
        compiled = jax.jit(gradient)
        jax.block_until_ready(compiled(*args))
        seconds, rate = measured(lambda f=compiled, a=args: f(*a), runs)
        flops = useful_flops(config)[name] * targets_of / config.targets_per_step
        found[name] = report(seconds, rate, flops, targets_of)
    return found


def main() -> None:
    """Parses the flags, runs every configuration in a process of its own, prints the result."""
    parser = argparse.ArgumentParser("python -m benchmarks.train_step", description=__doc__)
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--runs", type=int, default=3, help="0: time the first step, compiled once")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        name, context = args.only.split(":")
        keep_compilations()
        run = parts if name == "parts" else step
        print(json.dumps(run(configuration(name, int(context)), args.runs)))
        return
    result: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "runs": args.runs,
    }
    for name in args.configs:
        command = [sys.executable, "-m", "benchmarks.train_step", f"--runs={args.runs}"]
        done = subprocess.run([*command, f"--only={name}"], check=True, stdout=subprocess.PIPE)
        result[name] = json.loads(done.stdout)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
