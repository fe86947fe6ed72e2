"""Cost of a training target in the dense form against the patch form, in one run, as JSON.

    python -m benchmarks.forms

Both are the paper's network at float32 without dropout: the forward and backward pass of one
window in the patch form (one target), and of one segment in the dense form (`context` targets).
"""

import argparse
import dataclasses
import functools
import json
import platform
import statistics
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from patchwave_jax import recipes
from patchwave_jax.config import Config
from patchwave_jax.runtime.memory import choose_execution


def seconds(function: Any, *args: Any, runs: int) -> float:
    """Median time of a call, compilation excluded."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.forms", description=__doc__)
    parser.add_argument("--context_samples", type=int, default=128_000)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()

    paper = recipes.paper(args.context_samples)
    last = dataclasses.replace(paper, model=dataclasses.replace(paper.model, **recipes.NO_DROPOUT))
    dense = dataclasses.replace(last, objective="dense")
    rng, result = np.random.default_rng(0), {}
    for config in (last, dense):
        codes = rng.integers(0, 256, (1, config.window_samples), dtype=np.uint8)
        result[config.objective] = seconds(gradient(config), codes, runs=args.runs)
    result = {
        "context_samples": args.context_samples,
        "patch_form_seconds_per_target": result["last"],
        "dense_form_seconds_per_target": result["dense"] / dense.context_samples,
        "ratio": result["last"] / (result["dense"] / dense.context_samples),
        "runs": args.runs,
        "machine": f"{platform.machine()}, {jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    print(json.dumps(result, indent=2))


def gradient(config: Config) -> Any:
    """The jitted gradient of one row's loss."""
    execution = choose_execution(config, 1, jax.devices()[0])
    graphdef, params = nnx.split(config.build_model(nnx.Rngs(0), execution))

    def loss(params: Any, codes: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params).loss(codes, (), True, None)[0]

    return functools.partial(jax.jit(jax.grad(loss)), params)


if __name__ == "__main__":
    main()
