"""Checkpoints of a run: orbax, written in the background, the newest and the best kept.

`WORKDIR/checkpoints/STEP` holds two trees, `params` and `optimizer`, and as metadata the
configuration, the data manifest's hash, the code version and where the stopping rule stands.
`STEP` counts completed steps. A save becomes visible by one rename, so a killed one leaves none.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

import patchwave_jax
from patchwave_jax.config import Config, from_config_dict
from patchwave_jax.errors import UserError

METRIC = "validation_nll_nats"
_policies = ocp.training.preservation_policies


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself."""

    config: Config
    manifest_hash: str
    code_version: str
    best_nats: float | None  # lowest validation NLL so far
    flat_evals: int  # validations since then, past `decay_steps`


class Checkpoints:
    """The checkpoints of one working directory. A context manager: leaving it waits for saves."""

    def __init__(self, workdir: str | os.PathLike[str], keep: int | None = None):
        """Opens `workdir` for training, keeping `keep` newest steps; None: only to read."""
        self.directory = Path(workdir).resolve() / "checkpoints"
        if keep is None and not self.directory.is_dir():
            raise UserError(
                f"{workdir} holds no checkpoints; train there first "
                f"(python -m patchwave_jax.train --config=... --workdir={workdir})"
            )
        best = _policies.BestN(
            get_metric_fn=lambda metrics: metrics[METRIC],
            reverse=True,  # the lowest
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        kept: Any = _policies.AnyPreservationPolicy([_policies.LatestN(keep), best])
        always: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        self._checkpointer = ocp.training.Checkpointer(
            os.fspath(self.directory),  # pyright: ignore[reportArgumentType]
            save_decision_policy=always,
            preservation_policy=kept,
            cleanup_tmp_directories=keep is not None,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()

    def wait(self) -> None:
        """Returns when all saves are on disk."""
        self._checkpointer.wait()

    @property
    def latest(self) -> int | None:
        """The newest step."""
        return self._checkpointer.latest.step if self._checkpointer.latest else None

    @property
    def best(self) -> int | None:
        """The step with the lowest validation NLL, or None if none was validated."""
        scored: dict[int, Any] = {c.step: c.metrics for c in self._checkpointer.checkpoints}
        nats = {step: metrics[METRIC] for step, metrics in scored.items() if metrics}
        return min(nats, key=nats.__getitem__, default=None)

    def choose(self, step: int | None) -> int:
        """`step` if it exists; None is the best, or the newest where none was validated."""
        if step is None:
            step = self.latest if self.best is None else self.best
            if step is None:
                raise UserError(f"{self.directory} is empty; train there first")
        if step not in (steps := [c.step for c in self._checkpointer.checkpoints]):
            there = ", ".join(map(str, sorted(steps))) or "none"
            raise UserError(f"{self.directory} has no step {step}; it has {there}")
        return step

    def save(
        self,
        step: int,
        state: dict[str, Any],
        *,
        config: Config,
        manifest_hash: str,
        best_nats: float | None,
        flat_evals: int,
        validation_nats: float | None = None,
    ) -> None:
        """Writes `state` as `step` in the background; a step that exists is left as it is."""
        if step in [c.step for c in self._checkpointer.checkpoints]:
            return
        self._checkpointer.save_checkpointables_async(
            step,
            _as_trees(state),
            metrics=None if validation_nats is None else {METRIC: validation_nats},
            custom_metadata={
                "config": dataclasses.asdict(config),
                "manifest_hash": manifest_hash,
                "code_version": patchwave_jax.__version__,
                "best_nats": best_nats,
                "flat_evals": flat_evals,
            },
        )

    def record(self, step: int) -> Record:
        """What the checkpoint of `step` says of itself."""
        stored: Any = self._checkpointer.checkpointables_metadata(step).custom_metadata
        if not isinstance(stored, dict) or "config" not in stored:
            raise UserError(f"{self.directory / str(step)} was not written by patchwave_jax")
        return Record(**{**stored, "config": from_config_dict(stored["config"])})

    def restore(self, step: int, abstract_state: dict[str, Any]) -> dict[str, Any]:
        """The whole training state; `abstract_state` gives shapes, dtypes and shardings."""
        return _as_state(self._load(step, _as_trees(abstract_state)))

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Only the parameters."""
        return self._load(step, {"params": abstract_params})["params"]

    def _load(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._checkpointer.load_checkpointables(step, abstract)
        except Exception as error:
            raise UserError(
                f"{self.directory / str(step)} can't be read ({str(error).splitlines()[0]}); "
                "move that folder away to go on from an older step"
            ) from error


def _as_trees(state: dict[str, Any]) -> dict[str, Any]:
    rest = {"opt_state": state["opt_state"], "step": state["step"]}
    return {"params": state["params"], "optimizer": rest}


def _as_state(trees: dict[str, Any]) -> dict[str, Any]:
    return {"params": trees["params"], **trees["optimizer"]}


def check_same_model(config: Config, stored: Config) -> None:
    """Refuses a `config` whose network or codes are not those of the checkpoint.

    Raises:
      UserError: naming the first field that differs and both values.
    """
    pairs = [("objective", config.objective, stored.objective)]
    pairs += [("data.quantiser", config.data.quantiser, stored.data.quantiser)]
    for field in dataclasses.fields(config.model):
        name = field.name
        pairs += [(f"model.{name}", getattr(config.model, name), getattr(stored.model, name))]
    for name, new, old in pairs:
        if new != old:
            raise UserError(
                f"config.{name} is {new!r}, but the checkpoint was trained with {old!r}; "
                "use another --workdir or the checkpoint's value"
            )


def changes(config: Config, stored: Config) -> list[str]:
    """Fields that differ from the checkpoint's configuration, as `name: old -> new`."""

    def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
        items: dict[str, Any] = {}
        for name, value in tree.items():
            items |= flat(value, f"{name}.") if isinstance(value, dict) else {prefix + name: value}
        return items

    old, new = flat(dataclasses.asdict(stored)), flat(dataclasses.asdict(config))
    return [f"{name}: {old[name]} -> {new[name]}" for name in new if new[name] != old[name]]


def abstract(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Shapes and dtypes of `tree`, to be restored with one sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
