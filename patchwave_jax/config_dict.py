"""The configuration as a tree that command-line flags override, and back, checked.

A file in `configs/` returns an `ml_collections.ConfigDict` made by `to_config_dict`, so that
`--config.train.batch_size=8` works on the command line; `from_config_dict` turns it back into
dataclasses and names any field that is unknown, missing, of a wrong type or out of range.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping

import ml_collections

from patchwave_jax.config import MODELS, Config
from patchwave_jax.errors import UserError
from patchwave_jax.models.base import ModelConfig


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """`config` as the mutable tree that command-line flags override."""
    return ml_collections.ConfigDict(dataclasses.asdict(config))


def from_config_dict(tree: Mapping[str, typing.Any]) -> Config:
    """The typed configuration. Raises `UserError` naming the field that is wrong."""
    if isinstance(tree, ml_collections.ConfigDict):
        tree = tree.to_dict()
    config = _build(Config, tree, "config")
    config.check()
    return config


def _build(kind: type, tree: Mapping[str, typing.Any], where: str):
    all_hints = typing.get_type_hints(kind)
    hints = {field.name: all_hints[field.name] for field in dataclasses.fields(kind)}
    for name in tree:
        if name not in hints:
            raise UserError(
                f"{where}.{name} is not a field; the fields are {', '.join(sorted(hints))}"
            )
    values = {}
    for name, hint in hints.items():
        if name not in tree:
            raise UserError(f"{where}.{name} is missing")
        values[name] = _typed(hint, tree[name], f"{where}.{name}")
    return kind(**values)


def _typed(hint: typing.Any, value: typing.Any, where: str):
    if hint is ModelConfig:
        kind = value.get("kind")
        if kind not in tuple(MODELS):
            raise UserError(f"{where}.kind must be one of {', '.join(MODELS)}, got {kind!r}")
        hint = MODELS[kind]
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if isinstance(hint, types.GenericAlias):
        if not isinstance(value, (tuple, list)):
            raise UserError(f"{where} must be a tuple such as '(2, 3)', got {value!r}")
        return tuple(_typed(hint.__args__[0], item, where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where} must be of type {hint.__name__}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"{where} must be finite, got {value!r}")
    return value
