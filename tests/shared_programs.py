"""Tests of one process share their jitted programs: tracing one takes seconds, even if the compiled
program is in JAX's cache.

A training step, an evaluator or a sampler made a second time, for a configuration that differs only
in what no program depends on (where data is, how long to train, what to save), gets the jitted
functions of the first. `tests/crash` and `tests/pod` run the commands in processes of their own.
"""

import dataclasses
import functools

from jax.sharding import Mesh

from patchwave_jax import train
from patchwave_jax.config import Config, DataConfig, RunConfig
from patchwave_jax.evaluation import evaluator
from patchwave_jax.evaluation.evaluator import Evaluator
from patchwave_jax.generation.sampler import Sampler
from patchwave_jax.training import step
from patchwave_jax.training.step import Step


def _same_programs(config: Config) -> Config:
    """What programs depend on, and defaults for the rest."""
    run = config.run
    return dataclasses.replace(
        config,
        data=DataConfig(quantiser=config.data.quantiser),
        train=dataclasses.replace(config.train, num_steps=1, patience_evals=0, max_minutes=0.0),
        run=RunConfig(
            phase_chunk=run.phase_chunk,
            encode_chunk_patches=run.encode_chunk_patches,
            context_devices=run.context_devices,
            debug_nans=run.debug_nans,
        ),
    )


_step = functools.cache(step.make_step)
_init_evaluator = Evaluator.__init__
_compile_sampler = Sampler._compile
_samplers: dict[tuple, dict] = {}


@functools.cache
def _evaluator(config: Config, mesh: Mesh, batch_samples: int) -> dict:
    del batch_samples
    made = object.__new__(Evaluator)
    _init_evaluator(made, config, mesh)
    return vars(made)


def make_step(config: Config, mesh: Mesh) -> Step:
    return dataclasses.replace(_step(_same_programs(config), mesh), config=config)


def init_evaluator(self: Evaluator, config: Config, mesh: Mesh) -> None:
    vars(self).update(_evaluator(_same_programs(config), mesh, evaluator.BATCH_SAMPLES))
    self.config = config


def compile_sampler(self: Sampler, mesh: Mesh) -> None:
    key = _same_programs(self.config), mesh, self._rows, self.sampling, self.stride_patches
    if key not in _samplers:
        before = set(vars(self))
        _compile_sampler(self, mesh)
        _samplers[key] = {name: x for name, x in vars(self).items() if name not in before}
    vars(self).update(_samplers[key])


def share(monkeypatch) -> None:
    monkeypatch.setattr(train, "make_step", make_step)
    monkeypatch.setattr(Evaluator, "__init__", init_evaluator)
    monkeypatch.setattr(Sampler, "_compile", compile_sampler)
