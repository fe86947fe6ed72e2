"""What the cases of all parts share."""

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from patchwave_jax.config import Config
from patchwave_jax.config_dict import from_config_dict

Case = tuple[str, Callable[[], dict[str, Any]]]
Found = dict[str, Any]
HIGHEST = "highest"


def seconds_of(function: Callable[..., Any], *args: Any, at_least: float = 0.2) -> float:
    """Median time of a call after the first; at least three calls, and `at_least` seconds."""
    jax.block_until_ready(function(*args))
    times: list[float] = []
    while len(times) < 3 or (sum(times) < at_least and len(times) < 50):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def random_codes(*shape: int, seed: int = 0) -> np.ndarray:
    """Codes of a decaying chord with noise: something that predictors predict."""
    rng, time_axis = np.random.default_rng(seed), np.arange(shape[-1])
    notes = sum(np.sin(time_axis * f) for f in (0.05, 0.081, 0.131))
    wave = 12 * notes * np.exp(-(time_axis % 16_000) / 8_000) + rng.normal(0, 1, shape)
    return np.clip(np.rint(128 + wave), 0, 255).astype(np.uint8)


def configuration(name: str) -> Config:
    """`ctx128k:dense`: of configs/ctx128k.py, with its argument."""
    file, _, arg = name.partition(":")
    path = Path(__file__).parents[2] / "configs" / f"{file}.py"
    spec = importlib.util.spec_from_file_location(f"config_{file}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config(arg))


def shortened(config: Config, context: int, rows: int = 2) -> Config:
    train = dataclasses.replace(config.train, batch_size=rows, micro_batch_size=0)
    return dataclasses.replace(config, context_samples=context, train=train)
