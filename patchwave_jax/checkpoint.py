"""Checkpoints of a run, by orbax: saved in the background; the newest and the best are kept.

`WORKDIR/checkpoints/STEP` holds two trees, `params` and `optimizer`, and as metadata the
configuration, the data manifest's hash, the code version, the state of the stopping rule, and the
SHA-256 of every array and of the metadata itself. `STEP` counts completed steps. A save becomes
visible by one rename, so a killed save leaves nothing. Restored arrays are compared with their
SHA-256. Training moves a damaged step to `WORKDIR/damaged` and resumes from the newest undamaged
one.
"""

import contextlib
import dataclasses
import json
import logging as standard_logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from absl import logging
from etils import epath
from flax import nnx
from orbax.checkpoint import v1 as ocp

import patchwave_jax
from patchwave_jax.checkpoint_metadata import (
    DamagedError,
    Record,
    described,
    layout,
    parse,
    record_hash,
)
from patchwave_jax.config import Config
from patchwave_jax.errors import UserError
from patchwave_jax.runtime.distributed import all_agree, is_first, wait_for_all
from patchwave_jax.runtime.storage import is_url, names_url
from patchwave_jax.runtime.workdir import as_path

METRIC = "validation_nll_nats"
_policies = ocp.training.preservation_policies


class Checkpoints:
    """The checkpoints of one working directory. A context manager that waits for saves on exit."""

    def __init__(self, workdir: str | os.PathLike[str], keep: int | None = None):
        """Opens `workdir` for training, keeping the `keep` newest steps, or (None) for reading."""
        self._in_bucket = is_url(workdir)
        self.directory = as_path(workdir) / "checkpoints"
        with self._names_bucket():
            if keep is None and not _is_there(self.directory):
                raise UserError(
                    f"{workdir} holds no checkpoints; train there first "
                    f"(python -m patchwave_jax.train --config=... --workdir={workdir})"
                )
            for step, error in _broken_json(self.directory) if keep is None or is_first() else ():
                damaged = self._damaged(step, error)
                if keep is None:
                    raise damaged
                self._set_aside(step, damaged)
        wait_for_all("checkpoints")
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

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            with self._says_what_failed():
                self._checkpointer.close()
        except UserError:
            if kind is None:  # else the first error is the one to report
                raise

    def wait(self) -> None:
        """Waits until all saves are on disk."""
        with self._says_what_failed():
            self._checkpointer.wait()

    @property
    def latest(self) -> int | None:
        """The newest step."""
        return self._checkpointer.latest.step if self._checkpointer.latest else None

    @property
    def best(self) -> int | None:
        """The step with the lowest validation NLL; None if no step was validated."""
        scored: dict[int, Any] = {c.step: c.metrics for c in self._checkpointer.checkpoints}
        nats = {step: metrics[METRIC] for step, metrics in scored.items() if metrics}
        return min(nats, key=nats.__getitem__, default=None)

    def choose(self, step: int | None) -> int:
        """`step` if it exists; for None the best step, or the newest if none was validated."""
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
        seconds: float = 0.0,
    ) -> None:
        """Saves `state` as `step` in the background; a step that exists is left as it is.

        Raises:
          UserError: if this or the previous save can't be written.
        """
        if step in [c.step for c in self._checkpointer.checkpoints]:
            return
        trees = _as_trees(state)
        record = {
            "config": dataclasses.asdict(config),
            "manifest_hash": manifest_hash,
            "code_version": patchwave_jax.__version__,
            "best_nats": best_nats,
            "flat_evals": flat_evals,
            "validation_nats": validation_nats,
            "seconds": seconds,
            "arrays": described(trees),
        }
        with self._says_what_failed():
            self._checkpointer.save_checkpointables_async(
                step,
                trees,
                metrics=None if validation_nats is None else {METRIC: validation_nats},
                custom_metadata={**record, "sha256": record_hash(record)},
            )

    def record(self, step: int) -> Record:
        """The metadata of the checkpoint of `step`.

        Raises:
          DamagedError: if it is not as it was written.
          UserError: if something else wrote it.
        """
        try:
            with self._names_bucket():
                stored: Any = self._checkpointer.checkpointables_metadata(step).custom_metadata
            record = parse(stored)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise self._unreadable(step, error, "its metadata: ") from error
        if record is None:
            raise UserError(
                f"{self.directory / str(step)} was not written by patchwave_jax; "
                "use another --workdir"
            )
        metrics: Any = {c.step: c.metrics for c in self._checkpointer.checkpoints}[step]
        if not record.arrays:
            logging.warning("%s/%s has no checksums: an older version's", self.directory, step)
        elif (metrics or {}).get(METRIC) != record.validation_nats:
            raise self._damaged(step, f"its metrics are {metrics}, not {record.validation_nats}")
        return record

    def restore(self, step: int, abstract_state: dict[str, Any]) -> dict[str, Any]:
        """The training state; `abstract_state` gives shapes, dtypes and shardings.

        Raises:
          DamagedError: naming what is not as it was written.
          UserError: naming the first array that is missing or has another shape or dtype.
        """
        return _as_state(self._load(step, _as_trees(abstract_state)))

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Only the parameters; raises as `restore`."""
        return self._load(step, {"params": abstract_params})["params"]

    def resume(
        self, abstract_state: dict[str, Any], check: Callable[[Record], None]
    ) -> tuple[dict[str, Any], Record] | None:
        """State and metadata of the newest undamaged step; None before the first checkpoint.

        Damaged steps are moved to `WORKDIR/damaged`. `check` raises `UserError` for metadata that
        does not belong to this run.

        Raises:
          UserError: from `check`, or if all steps are damaged.
        """
        while (step := self.latest) is not None:
            damage, found = self._damaged(step, "another process can't read it"), None
            try:
                record = self.record(step)
                check(record)
                found = self.restore(step, abstract_state), record
            except DamagedError as error:
                damage = error
            if all_agree(found is not None):
                return found
            if is_first():
                self._set_aside(step, damage)
            wait_for_all("set aside")
            self._checkpointer.reload()
        if self._aside.is_dir() and any(self._aside.iterdir()):
            raise UserError(
                f"{self.directory} has no undamaged checkpoint, only those in {self._aside}; "
                "repair them, or start again in another --workdir"
            )
        return None

    @property
    def _aside(self) -> epath.Path:
        return self.directory.with_name("damaged")

    def _set_aside(self, step: int, damage: DamagedError) -> None:
        if self._in_bucket:
            raise damage
        logging.error("%s", damage)
        try:
            self._aside.mkdir(exist_ok=True)
            taken = sum(p.name.split("-")[0] == str(step) for p in self._aside.iterdir())
            name = f"{step}-{taken}" if taken else str(step)
            (self.directory / str(step)).rename(self._aside / name)
        except OSError as error:
            raise UserError(
                f"{self.directory / str(step)} is damaged and can't be moved to {self._aside}: "
                f"{error.strerror}"
            ) from error

    def _damaged(self, step: int, why: str) -> DamagedError:
        others = [str(s) for s in _steps(self.directory) if s != step]
        place = self.directory / str(step)
        then = f"Training moves it to {self._aside} and continues without it"
        if self._in_bucket:
            then = f"gcloud storage mv {place} {self._aside}/, and training continues without it"
        return DamagedError(
            f"{place} is damaged: {why}. {then}; other steps: {', '.join(others) or 'none'}"
        )

    def _unreadable(self, step: int, error: Exception, what: str = "") -> UserError:
        """`error` as damage, unless its cause is this machine or the connection to a bucket."""
        machine = (
            self._in_bucket
            or isinstance(error, (MemoryError, PermissionError))
            or "RESOURCE_EX" in str(error)
        )
        if machine or "PERMISSION_DENIED" in str(error):
            return UserError(f"{self.directory / str(step)} can't be read: {_first_line(error)}")
        return self._damaged(step, what + _first_line(error))

    def _load(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        expected = self.record(step).arrays  # empty if an older version wrote it
        in_network = any(name.startswith("params/network/") for name in expected)
        if in_network:
            abstract = _of_states(abstract, lambda state: nnx.State({"network": state}))
        for name, (dtype, shape) in layout(abstract).items() if expected else ():
            there = expected[name][:2] if name in expected else ["absent", ""]
            if there != [dtype, shape]:
                raise UserError(
                    f"{name} is {dtype}{shape} here, but {there[0]}{there[1]} in "
                    f"{self.directory / str(step)}; use another --workdir or its configuration"
                )
        try:
            trees = self._checkpointer.load_checkpointables(step, abstract)
        except Exception as error:
            # orbax abandons its reads of the other arrays, which asyncio would report.
            standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
            raise self._unreadable(step, error) from error
        for name, found in described(trees).items() if expected else ():
            if found != expected[name]:
                raise self._damaged(step, f"{name} does not match its SHA-256")
        return _of_states(trees, lambda state: state["network"]) if in_network else trees

    def _names_bucket(self) -> AbstractContextManager[None]:
        return names_url(str(self.directory)) if self._in_bucket else nullcontext()

    @contextlib.contextmanager
    def _says_what_failed(self) -> Iterator[None]:
        """Turns what orbax raises while it writes, or in the background, into a `UserError`."""
        try:
            yield
        except Exception as error:
            whole = _steps(self.directory)
            kept = f"step {whole[-1]} is the last good one" if whole else "there is none yet"
            raise UserError(
                f"a checkpoint can't be written to {self.directory}: {_first_line(error)}. {kept}; "
                "free some space or repair the disk; the same command then continues"
            ) from error


def _is_there(directory: epath.Path) -> bool:
    try:
        next(iter(directory.iterdir()), None)  # `is_dir` is false for a bucket without a connection
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _steps(directory: epath.Path) -> list[int]:
    return sorted(int(p.name) for p in directory.glob("*") if p.name.isdecimal())


def _broken_json(directory: epath.Path) -> Iterator[tuple[int, str]]:
    """Steps whose JSON files orbax could not read, and why."""
    for step in _steps(directory):
        for name in ("_CHECKPOINT_METADATA", "metrics/metrics"):
            try:
                json.loads((directory / str(step) / name).read_bytes())
            except FileNotFoundError:
                continue  # reported when the step is read
            except (OSError, ValueError) as error:
                yield step, f"{name}: {error}"
                break


def _first_line(error: Exception) -> str:
    if "incompatible handler" in str(error):  # the message goes on with pages of shapes
        return "its list of arrays is missing or can't be read"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _as_trees(state: dict[str, Any]) -> dict[str, Any]:
    rest = {name: tree for name, tree in state.items() if name != "params"}
    return {"params": state["params"], "optimizer": rest}


def _of_states(trees: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """`change` of every tree of parameters or moments: old baselines had one more level."""
    return jax.tree.map(
        lambda x: change(x) if isinstance(x, nnx.State) else x,
        trees,
        is_leaf=lambda x: isinstance(x, nnx.State),
    )


def _as_state(trees: dict[str, Any]) -> dict[str, Any]:
    return {"params": trees["params"], **trees["optimizer"]}


def abstract(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Shapes and dtypes of `tree`, all with one sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
