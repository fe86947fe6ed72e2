"""Samples generated per second: `python benchmarks/generate.py`. Prints one JSON object.

The model is the paper's in size (`PatchWaveConfig()`, causal; with `--dense` our recipe's), with
random weights and caches of arbitrary numbers: speed does not depend on them. Every rate is the
median over chunks at the end of a full context, where a sample costs most. The cost of the window's
slide, every half a context, is measured with `--slides`. The naive way is the patch form, repeated
for every sample. `bare` is a bound: a loop of only the products with the weights and the
cached tokens that a sample needs.
"""

import argparse
import json
import os
import re
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from patchwave_jax import recipes
from patchwave_jax.config import Config
from patchwave_jax.errors import exits_cleanly
from patchwave_jax.generation.sampler import CHUNK_SAMPLES, Sampler

MEMORY_SHARE = 0.8  # of the free memory that the streams' state may take


def memory_bytes() -> int:
    """What is free of the machine's memory."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def make_mesh(devices: int) -> Mesh:
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


def cached(config: Config, params, num: int, seconds: float, slides: bool) -> dict[str, object]:
    """Rates and memory of `num` streams at the end of a full context."""
    mesh = make_mesh(min(num, jax.device_count()))
    sampler = Sampler(config, params, mesh, num=num)
    each = sampler.state_bytes() // num
    if each * num > MEMORY_SHARE * memory_bytes():
        reason = f"{num} x {each / 1e6:.0f} MB of state do not fit in memory"
        return {"skipped": reason, "state_bytes_per_stream": each}
    rates: list[float] = []
    begin = time.perf_counter()
    while len(rates) < 4 or time.perf_counter() - begin < seconds:
        sampler.fill_dummy_state(config.context_samples - CHUNK_SAMPLES)
        start = time.perf_counter()
        sampler.run()
        rates.append(num * CHUNK_SAMPLES / (time.perf_counter() - start))
        if len(rates) == 1:  # compiled
            begin = time.perf_counter()
    found: dict[str, object] = {
        "samples_per_second": round(statistics.median(rates[1:])),
        "best_samples_per_second": round(max(rates[1:])),
        "state_bytes_per_stream": each,
        "devices": mesh.size,
    }
    if slides:
        codes = np.random.default_rng(0).integers(0, 256, (num, sampler.lookback), np.uint8)
        slide = 0.0
        for _ in range(2):  # the first compiles
            start = time.perf_counter()
            sampler.prime(codes, config.context_samples)
            sampler.run(1)
            slide = time.perf_counter() - start
        samples = sampler.stride_patches * config.window_unit
        found["slide_seconds"] = round(slide, 2)
        seconds_each = num / statistics.median(rates[1:]) + slide / samples
        found["samples_per_second_with_slides"] = round(num / seconds_each)
    return found


def bare(config: Config, params, num: int) -> dict[str, object]:
    """Rate of `num` streams if a sample cost only its products, and how many these are."""
    model: Any = config.model
    mesh = make_mesh(min(num, jax.device_count()))
    # Folded, the attention has matrices of the shapes of its queries' and its output's.
    kernels = [
        x.reshape(-1, x.shape[-1])
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if x.ndim > 1 and not re.search(r"'(key|value|embedding)'", jax.tree_util.keystr(path))
    ]
    rows, phases = num // mesh.size, min(model.patch_samples, 100)
    queries = jnp.ones((rows, model.num_heads, model.width))
    cache = np.ones((model.num_layers, phases, rows, config.window_units, model.width), np.float32)

    def loop(kernels, caches):
        inputs = [jnp.ones((rows, x.shape[0])) for x in kernels]

        def sample(i, x):  # each product waits for the one before, as in a model
            for given, kernel in zip(inputs, kernels, strict=True):
                x = x + 1e-30 * (given * x @ kernel).max()
            for cache in caches:
                keys = jax.lax.dynamic_index_in_dim(cache, i % phases, 0, False)
                scores = jnp.einsum("bke,bhe->bkh", keys, queries * x)
                mixed = jnp.einsum("bhk,bke->bhe", jnp.swapaxes(scores, 1, 2), keys)
                x = 1 + 1e-30 * mixed.max()
            return x

        return jax.lax.fori_loop(0, CHUNK_SAMPLES, sample, jnp.float32(1))[None]

    everywhere, split = PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(loop, mesh=mesh, in_specs=everywhere, out_specs=split, check_vma=False)
    caches = jax.device_put(list(cache), NamedSharding(mesh, everywhere))
    run, times = jax.jit(mapped), []
    for _ in range(6):
        start = time.perf_counter()
        run(kernels, caches).block_until_ready()
        times.append(time.perf_counter() - start)
    products = (
        sum(x.size for x in kernels) + 2 * queries[0].size * model.num_layers * config.window_units
    )
    return {
        "samples_per_second": round(num * CHUNK_SAMPLES / statistics.median(times[1:])),
        "multiply_adds_per_sample": products,
    }


def naive(config: Config, params, samples: int) -> dict[str, object]:
    """Rate of one stream in the patch form."""
    graphdef, _ = config.abstract_model()

    @jax.jit
    def forward(params: Any, window: jax.Array) -> jax.Array:
        model: Any = nnx.merge(graphdef, params)
        return model.next_sample_logits(window)

    window = np.random.default_rng(0).integers(0, 256, (1, config.context_samples), np.uint8)
    forward(params, window).block_until_ready()
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        window[:, :-1] = window[:, 1:]
        window[:, -1] = np.asarray(forward(params, window)).argmax()
        times.append(time.perf_counter() - start)
    return {"samples_per_second": round(1 / statistics.median(times), 3)}


@exits_cleanly
def main() -> None:
    """Parses the flags and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128_000, 1_000_000])
    parser.add_argument("--seconds", type=float, default=10.0, help="per measurement (default: 10)")
    parser.add_argument("--naive_samples", type=int, default=3, help="0: not the naive way")
    parser.add_argument("--dense", action="store_true", help="our recipe's model")
    parser.add_argument(
        "--bare", type=int, nargs="*", default=[], help="bounds for so many streams"
    )
    parser.add_argument("--slides", action="store_true", help="also time the window's slide")
    parser.add_argument("--devices", type=int, help="CPU devices; default: one per core")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    flags = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", flags.devices or os.cpu_count())
    result: dict[str, object] = {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "load_before": os.getloadavg()[0],
    }
    for context in flags.contexts:
        config = Config(objective="dense", context_samples=context)
        if flags.dense:
            config = recipes.dense(context)
        params = nnx.state(config.build_model(nnx.Rngs(0)))
        found: dict[str, object] = {
            str(num): cached(config, params, num, flags.seconds, flags.slides)
            for num in flags.streams
        }
        if flags.bare:
            found["bare"] = {str(num): bare(config, params, num) for num in flags.bare}
        if flags.naive_samples:
            found["naive"] = naive(config, params, flags.naive_samples)
        result[str(context)] = found
    result["load_after"] = os.getloadavg()[0]
    print(json.dumps(result, indent=1))
    if flags.json:
        flags.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
