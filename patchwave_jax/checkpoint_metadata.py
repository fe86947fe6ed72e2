"""The metadata of checkpoints: its checksum, and which configurations may resume from it."""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import numpy as np

from patchwave_jax.config import MODELS, Config
from patchwave_jax.config_dict import from_config_dict
from patchwave_jax.errors import UserError
from patchwave_jax.runtime.distributed import to_host

# Fields that older versions had, and the only value that can be restored.
RETIRED = (("train", "hop", 1), ("run", "shard_parameters", False))


@dataclasses.dataclass(frozen=True)
class Record:
    """The metadata of a checkpoint."""

    config: Config
    manifest_hash: str
    code_version: str
    best_nats: float | None  # lowest validation NLL so far
    flat_evals: int  # validations since then, past `decay_steps`
    validation_nats: float | None = None  # after this very step
    seconds: float = 0.0  # spent in training so far, over restarts
    arrays: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    # By the array's name: dtype, shape, SHA-256. Empty: an older version wrote it.


class DamagedError(UserError):
    """A checkpoint that is not as it was written."""


def parse(stored: Any) -> Record | None:
    """Parses stored metadata; None if another program wrote it.

    Raises:
      ValueError, TypeError or KeyError: if it is damaged.
    """
    if not isinstance(stored, dict) or not stored:
        raise ValueError("it is empty")
    if "config" not in stored and "sha256" not in stored:
        return None
    fields = dict(stored)
    claimed = fields.pop("sha256", None)
    if claimed is None and "arrays" in fields:
        raise ValueError("its SHA-256 is missing")
    if claimed is not None and claimed != record_hash(fields):
        raise ValueError("it does not match its SHA-256")
    return Record(**{**fields, "config": from_config_dict(_completed(fields["config"]))})


def _completed(stored: dict[str, Any]) -> dict[str, Any]:
    """An older version's configuration with defaults for new fields, without retired ones."""
    stored = {name: dict(x) if isinstance(x, dict) else x for name, x in stored.items()}
    for section, field, usual in RETIRED:
        if (value := stored.get(section, {}).pop(field, usual)) != usual:
            raise ValueError(f"{section}.{field} {value!r} is of an older version")
    kind = stored.get("model", {}).get("kind", Config().model.kind)
    sections = dataclasses.asdict(dataclasses.replace(Config(), model=MODELS[kind]()))
    return {
        name: {**default, **stored.get(name, {})}
        if isinstance(default, dict)
        else stored.get(name, default)
        for name, default in sections.items()
    } | {name: value for name, value in stored.items() if name not in sections}


def record_hash(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def layout(trees: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every array by its name."""
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    name = jax.tree_util.keystr
    return {
        name(path, simple=True, separator="/"): (str(x.dtype), list(x.shape)) for path, x in leaves
    }


def described(trees: dict[str, Any]) -> dict[str, list[Any]]:
    """Dtype, shape and SHA-256 of every array by its name."""
    hashes = (
        hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()
        for x in to_host(jax.tree.leaves(trees))
    )
    named = layout(trees).items()
    return {name: [*known, found] for (name, known), found in zip(named, hashes, strict=True)}


def check_continues(config: Config, manifest_hash: str, record: Record) -> None:
    """Refuses to resume with another network, other codes or other data than the checkpoint's.

    Other fields, such as the learning rate, may change: see `changes`.

    Raises:
      UserError: naming the first field that differs and both values.
    """
    stored = record.config
    pairs = [("objective", config.objective, stored.objective)]
    pairs += [("data.quantiser", config.data.quantiser, stored.data.quantiser)]
    old, new = dataclasses.asdict(stored.model), dataclasses.asdict(config.model)
    for name in {"kind": None} | new:
        pairs += [(f"model.{name}", new.get(name), old.get(name))]
    pairs += [("data.dataset", config.data.dataset, stored.data.dataset)]
    for name, new, old in pairs:
        if new != old:
            raise UserError(
                f"config.{name} is {new!r}, but the checkpoint was trained with {old!r}; "
                "use another --workdir or the checkpoint's value"
            )
    if manifest_hash != record.manifest_hash:
        raise UserError(
            f"the dataset {config.data.dataset} has the manifest {manifest_hash[:12]}, but the "
            f"checkpoint was trained on {record.manifest_hash[:12]}: other files, whose NLL does "
            "not compare; give its --config.data.data_dir, or use another --workdir"
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
