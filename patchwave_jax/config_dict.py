"""The configuration as a tree that flags override, and back, checked.

A file in `configs/` returns an `ml_collections.ConfigDict` made by `to_config_dict`, so that
`--config.train.batch_size=8` works on the command line; `from_config_dict` turns it back into
dataclasses and names any field that is unknown, missing, of a wrong type or out of range.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping

import ml_collections

from patchwave_jax.config import MODELS, OBJECTIVES, Config, PatchWaveConfig
from patchwave_jax.data import quantisers
from patchwave_jax.errors import UserError


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """`config` as the mutable tree that command-line flags override."""
    return ml_collections.ConfigDict(dataclasses.asdict(config))


def from_config_dict(tree: Mapping[str, typing.Any]) -> Config:
    """The typed configuration. Raises `UserError` naming the field that is wrong."""
    if isinstance(tree, ml_collections.ConfigDict):
        tree = tree.to_dict()
    config = _build(Config, tree, "config")
    _check(config)
    return config


def _build(kind: type, tree: Mapping[str, typing.Any], where: str):
    hints = typing.get_type_hints(kind)
    for name in tree:
        if name not in hints:
            raise UserError(f"{where}.{name} is no field; there are {', '.join(sorted(hints))}")
    values = {}
    for name, hint in hints.items():
        if name not in tree:
            raise UserError(f"{where}.{name} is missing")
        values[name] = _typed(hint, tree[name], f"{where}.{name}")
    return kind(**values)


def _typed(hint: typing.Any, value: typing.Any, where: str):
    if isinstance(hint, types.UnionType):
        kind = value.get("kind")
        if kind is not None and kind not in tuple(MODELS):
            raise UserError(f"{where}.kind must be one of {', '.join(MODELS)}, got {kind!r}")
        hint = PatchWaveConfig if kind is None else MODELS[kind]
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


def _check(config: Config) -> None:
    def one_of(where: str, value: str, names: tuple[str, ...]) -> None:
        require(value in names, where, f"must be one of {', '.join(names)}, got {value!r}")

    def require(ok: bool, where: str, what: str) -> None:
        if not ok:
            raise UserError(f"config.{where} {what}")

    model, data, train, run = config.model, config.data, config.train, config.run
    one_of("objective", config.objective, OBJECTIVES)
    one_of("model.compute_dtype", model.compute_dtype, ("float32", "bfloat16"))
    one_of("data.quantiser", data.quantiser, quantisers.NAMES)
    one_of("train.schedule", train.schedule, ("drop", "cosine"))

    zero_allowed = {
        "seed", "num_layers", "distinct_positions", "micro_batch_size", "warmup_steps",
        "patience_evals", "eval_targets", "phase_chunk", "encode_chunk_patches",
        "sample_every_steps", "denoiser_taps", "denoiser_window",
    }  # fmt: skip
    for section, part in (("model.", model), ("data.", data), ("train.", train), ("run.", run)):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, bool) or not isinstance(item, (int, float)):
                    continue
                least = 0 if isinstance(item, float) or field.name in zero_allowed else 1
                name = section + field.name
                require(item >= least, name, f"must be at least {least}, got {item}")
                if isinstance(item, int) and field.name != "distinct_positions":
                    require(item < 2**31, name, f"must be below 2**31, got {item}")
                if name.endswith("_dropout"):
                    require(item < 1, name, f"must be below 1, got {item}")
    # What a device counts in 32 bits, what a division needs, and what is still music.
    require(
        config.context_samples < 2**31,
        "context_samples",
        f"must be below 2**31, got {config.context_samples}",
    )
    rate = train.learning_rate
    require(rate > 0, "train.learning_rate", f"must be above 0, got {rate}")
    require(train.beta2 < 1, "train.beta2", f"must be below 1, got {train.beta2}")
    for name, value, most in (
        ("gain_db", data.gain_db, 60),
        ("pitch_semitones", data.pitch_semitones, 24),
    ):
        require(value <= most, f"data.{name}", f"must be at most {most}, got {value}")
    require(0 <= config.seed < 2**31, "seed", f"must be in [0, 2**31), got {config.seed}")

    if isinstance(model, PatchWaveConfig):
        _check_patch_model(config, model, require)
    else:
        one_of("objective", config.objective, ("dense",))
        require(train.hop == 1, "train.hop", f"must be 1 for a baseline, got {train.hop}")
        require(
            config.context_samples > 0 and config.context_samples % 2 == 0,
            "context_samples",
            f"must be even and above 0 for a baseline, got {config.context_samples}",
        )
        model.check(config.context_samples)


def _check_patch_model(
    config: Config, model: PatchWaveConfig, require: Callable[[bool, str, str], None]
) -> None:
    train, run = config.train, config.run
    for name, value, names in (
        ("input", model.input, ("waveform", "embedding")),
        ("head", model.head, ("softmax", "logistic_mixture")),
    ):
        require(
            value in names, f"model.{name}", f"must be one of {', '.join(names)}, got {value!r}"
        )
    require(model.width % 2 == 0, "model.width", f"must be even, got {model.width}")
    require(
        0 < len(model.strides) == len(model.filters),
        "model.strides",
        f"must have one entry for each of the {len(model.filters)} model.filters",
    )
    require(
        model.final_frames >= 1,
        "model.patch_samples",
        f"{model.patch_samples} is too short for model.strides {model.strides}",
    )
    require(
        model.predictor_taps <= model.patch_samples,
        "model.predictor_taps",
        f"{model.predictor_taps} is more than model.patch_samples, {model.patch_samples}",
    )
    size = model.patch_samples
    _check_adaptive(config, model, require)
    require(
        config.context_samples > 0 and config.context_samples % size == 0,
        "context_samples",
        f"{config.context_samples} is not a whole number of patches of {size} samples; "
        f"the nearest is {max(1, round(config.context_samples / size)) * size}",
    )
    require(size % train.hop == 0, "train.hop", f"{train.hop} does not divide the patch of {size}")
    require(
        config.objective == "dense" or train.hop == 1,
        "train.hop",
        "needs config.objective='dense'; 'last' has one target a window",
    )
    if run.phase_chunk:
        phases = size // train.hop
        require(
            phases % run.phase_chunk == 0,
            "run.phase_chunk",
            f"{run.phase_chunk} does not divide the {phases} phases",
        )
    if run.encode_chunk_patches:
        require(
            config.patches % run.encode_chunk_patches == 0,
            "run.encode_chunk_patches",
            f"{run.encode_chunk_patches} does not divide the {config.patches} patches",
        )


def _check_adaptive(
    config: Config, model: PatchWaveConfig, require: Callable[[bool, str, str], None]
) -> None:
    taps, windows, block = model.adaptive_taps, model.adaptive_windows, model.adaptive_block_samples
    require(
        len(taps) == len(windows),
        "model.adaptive_windows",
        f"must have one entry for each of the {len(taps)} model.adaptive_taps",
    )
    if not taps:
        return
    fits = [("model.adaptive_windows", *pair) for pair in zip(taps, windows, strict=True)]
    if model.denoiser_taps:
        require(model.denoiser_taps > 1, "model.denoiser_taps", "must be 0, or at least 2")
        fits.append(("model.denoiser_window", model.denoiser_taps, model.denoiser_window))
    for name, count, window in fits:
        least = max(2 * count, 33)  # the taper falls over 32
        require(
            least <= window,
            name,
            f"{window} samples are too few to fit {count} taps to; give at least {least}",
        )
    require(
        model.head == "logistic_mixture" and config.objective == "dense",
        "model.adaptive_taps",
        "needs config.model.head='logistic_mixture' and config.objective='dense'",
    )
    require(
        model.patch_samples % block == 0,
        "model.adaptive_block_samples",
        f"{block} does not divide the patch of {model.patch_samples}",
    )
