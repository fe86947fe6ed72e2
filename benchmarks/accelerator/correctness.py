"""Whether an accelerator computes what the CPU does: the parts `correctness` and `parity`.

Differences are the largest of absolute log-probabilities, in nats, unless a name says otherwise.
"""

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.accelerator.common import (
    HIGHEST,
    Case,
    Found,
    configuration,
    random_codes,
    shortened,
)
from patchwave_jax import recipes
from patchwave_jax.config import Config
from patchwave_jax.evaluation.evaluator import Evaluator
from patchwave_jax.generation import check
from patchwave_jax.models.patchwave.config import PatchWaveConfig
from patchwave_jax.runtime.mesh import make_mesh
from patchwave_jax.training.step import make_step


def plain(patches: int, patch_samples: int) -> Config:
    """Ours at full width, without adaptive predictors, which compute in float32 only."""
    model = PatchWaveConfig(
        patch_samples=patch_samples,
        input="embedding",
        skip_connections=True,
        head="logistic_mixture",
        **recipes.NO_DROPOUT,
    )
    return Config(objective="dense", context_samples=patches * patch_samples, model=model)


def both_forms(config: Config, params: Any, codes: np.ndarray, places: list[int]) -> Any:
    """Log-probabilities of the dense form's samples at `places`, and of the patch form there."""
    context, size = config.context_samples, config.window_unit
    graphdef, _ = config.abstract_model()

    def dense(params: Any, codes: Any) -> Any:
        return nnx.merge(graphdef, params).log_probs(codes, context)

    def patch(params: Any, windows: Any) -> Any:
        return nnx.merge(graphdef, params).next_sample_log_prob(windows)

    windows = np.concatenate([codes[:, t - context : t + 1] for t in places])
    log_probs = jax.jit(dense)(params, codes)
    chosen = np.asarray(log_probs)[0, [t - size for t in places]]
    return chosen, np.asarray(jax.jit(patch)(params, windows))


def forms(small: bool) -> Found:
    """Both forms on this device and, in float64, on the CPU."""
    config = plain(*((4, 500) if small else (8, 2000)))
    context, size = config.context_samples, config.window_unit
    codes = random_codes(1, context + size)
    places = [context + i for i in (0, 1, 77, size - 1)]  # those with the whole context
    params = jax.jit(lambda: nnx.state(config.build_model(nnx.Rngs(0))))()
    found: Found = {}
    cpu = jax.devices("cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        double = dataclasses.replace(config.model, compute_dtype="float64")
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(params))
        exact, _ = both_forms(dataclasses.replace(config, model=double), wide, codes, places)
    for name, precision in (("", None), ("_highest", HIGHEST)):
        with jax.default_matmul_precision(precision or "default"):
            dense, patch = both_forms(config, params, codes, places)
        found[f"forms{name}"] = float(np.abs(dense - patch).max())
        found[f"float64{name}"] = float(np.abs(dense - exact).max())
    return found


def loss_and_gradient(
    config: Config, chip: Any, precision: str | None, codes: Any, params: Any = None
) -> Any:
    """A batch's on one device, as the training step computes them, with the parameters used."""
    step = make_step(config, make_mesh(1, [chip]))
    state = step.init()
    params = state["params"] if params is None else jax.device_put(params, chip)
    arguments = params, state.get("carry", ()), jax.device_put(codes, chip), state["step"], 0
    with jax.default_matmul_precision(precision or "default"):
        (nats, gradient), _, _ = step.accumulate(step.zeros(), *arguments)
    return jax.device_get((nats, gradient, params))


def against_cpu(config: Config) -> Found:
    """One step's loss and gradients here and on the CPU."""
    codes = random_codes(config.train.batch_size, config.window_samples // config.segments)
    nats, gradient, params = loss_and_gradient(config, jax.devices("cpu")[0], HIGHEST, codes)
    found: Found = {}
    for name, precision in (("", None), ("_highest", HIGHEST)):
        own_nats, own, _ = loss_and_gradient(config, jax.devices()[0], precision, codes, params)
        error = sum(
            np.square(a - b).sum()
            for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(gradient), strict=True)
        )
        size = sum(np.square(x).sum() for x in jax.tree.leaves(gradient))
        found[f"loss{name}"] = float(abs(own_nats - nats))
        found[f"gradient{name}_relative"] = float(np.sqrt(error / size))
    return found


def consistency(config: Config) -> Found:
    """Cached generation against uncached evaluation."""
    evaluator = Evaluator(config, make_mesh(1, jax.devices()[:1]))
    params = nnx.state(config.build_model(nnx.Rngs(0)))
    found: Found = {}
    for name, precision in (("", None), ("_highest", HIGHEST)):
        with jax.default_matmul_precision(precision or "default"):
            result = check.check(evaluator, params, random_codes(20_000))
        found[f"cached{name}"], found[f"passed{name}"] = result.largest, result.passed
    return found


def repeated(config: Config) -> Found:
    """Whether four steps give the same bits as two steps, a copy to the host, and two more."""
    step = make_step(config, make_mesh(1, jax.devices()[:1]))
    batches = [random_codes(config.train.batch_size, config.window_samples, seed=i) for i in (0, 1)]

    def run(restart: bool) -> Any:
        state = step.init()
        for i in range(4):
            state, _ = step.update(state, batches[i % 2])
            if restart and i == 1:
                state = jax.device_put(jax.device_get(state))
        return jax.device_get(state["params"])

    straight, resumed = run(False), run(True)
    pairs = list(zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True))
    return {
        "equal_bits": all(np.array_equal(a, b) for a, b in pairs),
        "largest_difference": float(max(np.abs(a - b).max() for a, b in pairs)),
    }


def without_dropout(config: Config) -> Config:
    names = [x.name for x in dataclasses.fields(config.model) if x.name.endswith("dropout")]
    values: Any = dict.fromkeys(names, 0.0)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **values))


def correctness(small: bool) -> Iterator[Case]:
    """Forms against each other and float64, steps against the CPU's, caches, resumption."""
    laptop = shortened(configuration("laptop"), 2_000 if small else 8_000)
    yield "step laptop", functools.partial(against_cpu, laptop)
    yield "generation laptop", functools.partial(consistency, laptop)
    yield "resumption laptop", functools.partial(repeated, laptop)
    yield "forms", functools.partial(forms, small)
    if small:
        return
    for name, context in (("ctx128k", 16_000), ("ctx128k:dense", 8_000)):
        config = without_dropout(shortened(configuration(name), context))
        yield f"step {name}", functools.partial(against_cpu, config)
    yield (
        "generation ctx128k",
        functools.partial(consistency, shortened(configuration("ctx128k"), 8_000)),
    )
    for name in ("wavenet", "samplernn", "sashimi", "megabyte"):
        config = without_dropout(shortened(configuration(name), 4_096))
        yield f"step {name}", functools.partial(against_cpu, config)


def parity(small: bool) -> Iterator[Case]:
    """The tests of the baselines against their references, on this device."""

    def run(file: str, only: str) -> Found:
        environment = {
            **os.environ, "JAX_DEFAULT_MATMUL_PRECISION": HIGHEST,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }  # fmt: skip
        command = [sys.executable, "-m", "pytest", "-n0", "-W", "default", file, "-k", only]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        lines = [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
        ended = (done.stdout + done.stderr).strip().splitlines()[-1]
        return {"ended": ended[:200], "failed": "; ".join(lines)[:400]}

    for file in ("sashimi", "wavenet_samplernn", "megabyte") if not small else ("megabyte",):
        only = "published or public_code or as_published"
        yield file, functools.partial(run, f"tests/models/test_{file}.py", only)
