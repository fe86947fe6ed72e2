"""Samples generated per second: `python benchmarks/generate.py`. Prints one JSON object.

The model is the paper's in size (`ModelConfig()`, causal), with random weights and caches filled
with numbers: what it computes does not depend on them. Every rate is the median over chunks at
the end of a full context, where a sample costs most. What the window's slide costs, every half
a context, is measured with `--slides`. The naive way is the patch form, run anew for every sample.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

from patchwave_jax.config import Config
from patchwave_jax.errors import exits_cleanly
from patchwave_jax.sampler import CHUNK_SAMPLES, Sampler
from patchwave_jax.step import make_model

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
        sampler.pretend(config.context_samples - CHUNK_SAMPLES)
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
        codes = np.random.default_rng(0).integers(0, 256, (num, sampler.reach), np.uint8)
        slide = 0.0
        for _ in range(2):  # the first compiles
            start = time.perf_counter()
            sampler.prime(codes, config.context_samples)
            sampler.run(1)
            slide = time.perf_counter() - start
        samples = sampler.stride_patches * config.model.patch_samples
        found["slide_seconds"] = round(slide, 2)
        seconds_each = num / statistics.median(rates[1:]) + slide / samples
        found["samples_per_second_with_slides"] = round(num / seconds_each)
    return found


def naive(config: Config, params, samples: int) -> dict[str, object]:
    """Rate of one stream in the patch form."""
    graphdef = nnx.split(nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0))))[0]
    forward = jax.jit(lambda params, x: nnx.merge(graphdef, params).next_sample_logits(x))
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
        params = nnx.state(make_model(config, nnx.Rngs(0)))
        found: dict[str, object] = {
            str(num): cached(config, params, num, flags.seconds, flags.slides)
            for num in flags.streams
        }
        if flags.naive_samples:
            found["naive"] = naive(config, params, flags.naive_samples)
        result[str(context)] = found
    result["load_after"] = os.getloadavg()[0]
    print(json.dumps(result, indent=1))
    if flags.json:
        flags.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
