"""How fast an accelerator is: all parts but those of `correctness`. Times are medians."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from benchmarks.accelerator.common import (
    HIGHEST,
    Case,
    Found,
    configuration,
    random_codes,
    seconds_of,
    shortened,
)
from patchwave_jax import recipes
from patchwave_jax.config import Config
from patchwave_jax.models.patchwave import encoder
from patchwave_jax.models.patchwave.config import PatchWaveConfig
from patchwave_jax.models.predictors import least_squares
from patchwave_jax.planning import aot_compile, hardware
from patchwave_jax.runtime.mesh import make_mesh
from patchwave_jax.training.step import make_step


def device(small: bool) -> Iterator[Case]:
    """Its name, memory and rates."""
    chip = jax.devices()[0]

    def about() -> Found:
        stats = chip.memory_stats() or {}
        return {
            "kind": chip.device_kind,
            "jax": jax.__version__,
            "backend": chip.client.platform_version.splitlines()[0],
            "usable_gib": stats.get("bytes_limit", 0) / 2**30,
        }

    def copy() -> Found:
        x = jax.random.normal(jax.random.key(0), (2**22 if small else 2**28,))
        seconds = seconds_of(jax.jit(lambda x: x + 1), x)
        return {"gb_per_second": 2 * x.nbytes / seconds / 1e9}

    def product(dtype: Any, precision: Any) -> Found:
        size = 512 if small else 8192
        x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
        seconds = seconds_of(jax.jit(lambda x: jnp.matmul(x, x, precision=precision)), x)
        return {"tflops_per_second": 2 * size**3 / seconds / 1e12}

    def launch() -> Found:
        def many(x: jax.Array) -> jax.Array:
            return lax.fori_loop(0, 1000, lambda i, x: x * 0.999 + i, x)

        return {"microseconds_per_turn": 1e6 * seconds_of(jax.jit(many), jnp.ones(64)) / 1000}

    yield "about", about
    yield "copy", copy
    for name, dtype, precision in (
        ("product float32", jnp.float32, HIGHEST),
        ("product float32, default precision", jnp.float32, None),
        ("product bfloat16", jnp.bfloat16, None),
    ):
        yield name, functools.partial(product, dtype, precision)
    yield "an empty loop", launch


def library(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    return encoder.library(x, kernel, (1,), rhs_dilation=(dilation,))


def by_products(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    """One matrix product for each tap, of shifted samples."""
    outputs = x.shape[1] - (kernel.shape[0] - 1) * dilation
    shifted = [x[:, k * dilation :][:, :outputs] for k in range(kernel.shape[0])]
    return functools.reduce(
        jnp.add, (piece @ tap for piece, tap in zip(shifted, kernel, strict=True))
    )


def by_one_product(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    """One matrix product of all taps, side by side."""
    outputs = x.shape[1] - (kernel.shape[0] - 1) * dilation
    shifted = [x[:, k * dilation :][:, :outputs] for k in range(kernel.shape[0])]
    return jnp.concatenate(shifted, -1) @ kernel.reshape(-1, kernel.shape[2])


FORMS = {
    "library": library,
    "phases": encoder.by_phases,
    "products": by_products,
    "one product": by_one_product,
}


def convolutions(small: bool) -> Iterator[Case]:
    """Seven taps, 128 channels to 128 filters, on 128,000 samples; forward with backward."""
    samples, channels = (2_000, 16) if small else (128_000, 128)

    def measure(form: Any, dilation: int, dtype: Any) -> Found:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (1, samples, channels)).astype(dtype)
        kernel = jax.random.normal(keys[1], (7, channels, channels)).astype(dtype) / 30
        outputs = samples - 6 * dilation
        g = jax.random.normal(keys[2], (1, outputs, channels)).astype(dtype)

        def both(x: Any, kernel: Any, g: Any) -> Any:
            y, pull = jax.vjp(lambda x, kernel: form(x, kernel, dilation), x, kernel)
            return y, pull(g)

        begin = time.perf_counter()
        made = jax.jit(both)(x, kernel, g)
        compile_seconds = time.perf_counter() - begin
        exact = jax.jit(lambda x, k: by_products(x, k, dilation))(
            x.astype(jnp.float32), kernel.astype(jnp.float32)
        )
        seconds = seconds_of(jax.jit(both), x, kernel, g, at_least=0.05)
        forward = seconds_of(jax.jit(lambda x, k: form(x, k, dilation)), x, kernel, at_least=0.05)
        flops = 2 * 7 * channels**2 * outputs
        error = jnp.abs(made[0].astype(jnp.float32) - exact).max() / jnp.abs(exact).max()
        return {
            "ms": 1e3 * seconds,
            "forward_ms": 1e3 * forward,
            "tflops_per_second": 3 * flops / seconds / 1e12,
            "relative_error": float(error),
            "compile_seconds": compile_seconds,
        }

    for dtype in (jnp.float32, jnp.bfloat16) if not small else (jnp.bfloat16,):
        for dilation in (1, 2, 12, 72, 6, 36) if not small else (12,):
            for name, form in FORMS.items():
                yield (
                    f"{name}, dilation {dilation}, {jnp.dtype(dtype).name}",
                    functools.partial(measure, form, dilation, dtype),
                )


def predictors(small: bool) -> Iterator[Case]:
    """The adaptive predictors and the denoiser alone, forward."""
    samples = 4_000 if small else 128_000
    full = PatchWaveConfig(head="logistic_mixture", **recipes.ADAPTIVE)
    alone: list[tuple[str, Any]] = [("all", full)]
    no_denoiser: Any = {"denoiser_taps": 0, "denoiser_window": 0}
    for taps, window in zip(full.adaptive_taps, full.adaptive_windows, strict=True):
        one: Any = {"adaptive_taps": (taps,), "adaptive_windows": (window,), **no_denoiser}
        alone.append((f"{taps} taps", dataclasses.replace(full, **one)))
    one = {"adaptive_taps": (24,), "adaptive_windows": (1024,)}
    alone.insert(1, ("24 taps, denoiser", dataclasses.replace(full, **one)))

    def measure(config: PatchWaveConfig, rows: int, at_once: int) -> Found:
        bank = config.predictor_bank("mulaw")
        codes = random_codes(rows, samples + bank.lookback)
        with mock.patch.object(least_squares, "GPU_TAPS_AT_ONCE", at_once):

            def run(codes: Any) -> Any:
                prediction, features = bank.predict(codes, bank.lookback)
                return prediction.mean.sum() + features.sum()

            begin = time.perf_counter()
            compiled = jax.jit(run)
            jax.block_until_ready(compiled(codes))
            first = time.perf_counter() - begin
            seconds = seconds_of(compiled, jnp.asarray(codes), at_least=0)
        return {
            "seconds": seconds,
            "targets_per_second": rows * samples / seconds,
            "first_seconds": first,
        }

    own = least_squares.GPU_TAPS_AT_ONCE
    for name, config in alone:
        yield name, functools.partial(measure, config, 1, own)
        if name == "all":
            yield f"{name}, few blocks at once", functools.partial(measure, config, 1, 2**18)
            if not small:
                yield f"{name}, 8 rows", functools.partial(measure, config, 8, own)


def steps(small: bool) -> Iterator[Case]:
    """Whole training steps of every configuration, on random codes."""
    names = [
        "gpu10", "ctx128k", "laptop, 32 rows", "ctx128k:dense", "gpu10, bfloat16", "sashimi",
        "ctx1m:dense", "wavenet", "samplernn", "ctx1m",
        "megabyte", "ctx512k:dense", "ctx512k", "laptop",
    ] if not small else ["laptop"]  # fmt: skip
    for name in names:
        yield name, functools.partial(one_step, varied(name, small))


def varied(name: str, small: bool) -> Config:
    file, _, variation = name.partition(", ")
    config = configuration(file)
    train, model = config.train, config.model
    if variation == "32 rows":
        train = dataclasses.replace(train, batch_size=32, micro_batch_size=0)
    elif variation == "bfloat16":
        model = dataclasses.replace(model, compute_dtype="bfloat16")
    config = dataclasses.replace(config, train=train, model=model)
    return shortened(config, 4_000) if small else config


def one_step(config: Config) -> Found:
    chip = jax.devices()[0]
    step = make_step(config, make_mesh(1, [chip]))
    begin = time.perf_counter()
    programs = aot_compile.compile_programs(step)
    compile_seconds = time.perf_counter() - begin
    state = step.init()
    codes = random_codes(config.train.batch_size, config.window_samples // config.segments)
    box = [state]

    def again() -> Any:
        box[0], metrics = step.update(box[0], codes)
        return metrics

    seconds = seconds_of(again)
    dtype = config.model.compute_dtype
    found: Found = {
        "ms": 1e3 * seconds,
        "targets_per_second": config.targets_per_step / seconds,
        "compile_seconds": compile_seconds,
        "phase_chunk": step.execution.phase_chunk,
        "planned_gib": sum(aot_compile.memory_by_kind(step, programs).values()) / 2**30,
    }
    stats = chip.memory_stats() or {}
    found["peak_gib_so_far"] = stats.get("peak_bytes_in_use", 0) / 2**30
    known = next((c for c in hardware.CHIPS.values() if c.kind == chip.device_kind), None)
    useful = config.model.useful_flops(config.context_samples, config.causal)
    if useful and known:
        found["share_of_peak"] = useful * config.train.batch_size / seconds / known.flops[dtype]
    if known:
        bound = aot_compile.roofline(known, programs, dtype)["step"]
        found |= {"bound_ms": 1e3 * bound, "over_bound": seconds / bound}
    return found


def generation(small: bool) -> Iterator[Case]:
    """Samples per second at the end of a full context, as `benchmarks/generate.py` has them."""
    from benchmarks import generate

    contexts = (4_000,) if small else (128_000, 1_000_000)

    def measure(name: str, context: int, num: int) -> Found:
        config = Config(objective="dense", context_samples=context)
        if name == "laptop":
            config = configuration("laptop")
        params = jax.jit(lambda: nnx.state(config.build_model(nnx.Rngs(0))))()
        stats = jax.devices()[0].memory_stats() or {"bytes_limit": 4 * 2**30}
        with mock.patch.object(generate, "memory_bytes", return_value=stats["bytes_limit"]):
            found = generate.cached(config, params, num, 0.5, False)
        if "samples_per_second" in found:
            rate: Any = found["samples_per_second"]
            found["per_stream"] = rate / num
            found["microseconds_per_step"] = 1e6 * num / rate
        return dict(found)

    for context in contexts:
        for num in (1, 64) if not small else (1, 2):
            yield f"paper, {context}, {num} streams", functools.partial(measure, "", context, num)
    if small:
        return
    yield (
        "paper, 128000, 1 streams, command buffers",
        functools.partial(in_process, "generation", "paper, 128000, 1 streams", COMMAND_BUFFERS),
    )
    for num in (1, 16, 256):
        yield f"laptop, {num} streams", functools.partial(measure, "laptop", 0, num)
    for context, num in ((128_000, 16), (128_000, 256), (1_000_000, 16)):
        yield f"paper, {context}, {num} streams", functools.partial(measure, "", context, num)


COMMAND_BUFFERS = (
    "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,WHILE,"
    "DYNAMIC_SLICE_FUSION --xla_gpu_graph_min_graph_size=1"
)


def in_process(part: str, case: str, flags: str) -> Found:
    """A case with flags for XLA, which are read when it starts."""
    environment = {**os.environ, "XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", "benchmarks.accelerator.part", part, "/dev/stdout"]
    done = subprocess.run(
        [*command, f"--only={case}"], capture_output=True, text=True, env=environment, timeout=60
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(done.stderr.strip().splitlines()[-1][:200])
    return {**json.loads(lines[-1]), "case": f"{case}, command buffers"}


def pipeline(small: bool) -> Iterator[Case]:
    """Training windows per second, of noise."""
    import tempfile

    from benchmarks import windows

    def measure(samples: int) -> Found:
        with tempfile.TemporaryDirectory() as scratch:
            split = windows.synthetic_split(Path(scratch))
            rate = windows.windows_per_second(split, samples, 0.5 if small else 3.0)
        return {"windows_per_second": rate, "targets_per_second": rate * samples}

    for samples in (4_000,) if small else (130_000, 1_002_000):
        yield f"windows of {samples}", functools.partial(measure, samples)
