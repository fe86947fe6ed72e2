"""The classical baselines of a run, fitted once and kept in its working directory.

`WORKDIR/classical_baselines.json` holds what was fitted to the train split, and the NLL on every
set of targets that was asked for. It is replaced for other data or another quantiser.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patchwave_jax.data import quantisers
from patchwave_jax.data.index import Split
from patchwave_jax.data.windows import clips
from patchwave_jax.errors import UserError
from patchwave_jax.evaluation import classical
from patchwave_jax.evaluation.classical import NAMES, ClassicalBaselines
from patchwave_jax.evaluation.measure import Targets, measure_classical
from patchwave_jax.evaluation.nll import LN2
from patchwave_jax.runtime.distributed import is_first
from patchwave_jax.runtime.storage import write_atomically

FILENAME = "classical_baselines.json"
FIT_CLIP_SAMPLES = 262_144
FIT_CLIPS = 64  # 16.8M samples at most, from all over the train split


def fit(train_split: Split, quantiser: str) -> ClassicalBaselines:
    """Classical baselines fitted to evenly spread stretches of `train_split`."""
    code = quantisers.get(quantiser)
    chosen = list(clips(train_split, FIT_CLIP_SAMPLES, drop_last=False))
    step = -(-len(chosen) // FIT_CLIPS)
    stretches = train_split.excerpts((c.recording, c.start, c.length) for c in chosen[::step])
    return classical.fit(map(code.encode, stretches), code)


def fitted(
    workdir: str | os.PathLike[str], train_split: Split, quantiser: str
) -> ClassicalBaselines:
    """The baselines kept in `workdir`, fitted first if there are none for this data."""
    return ClassicalBaselines.from_dict(_open(workdir, train_split, quantiser)["fitted"])


def classical_on(
    targets: Targets,
    train_split: Split,
    workdir: str | os.PathLike[str],
    names: Sequence[str] = NAMES,
) -> dict[str, float]:
    """NLL of the classical baselines on `targets`, in nats, by name; kept in `workdir`."""
    kept = _open(workdir, train_split, targets.config.data.quantiser)
    values = kept["nats"].setdefault(_key(targets), {})
    if missing := [name for name in names if name not in values]:
        nll = measure_classical(
            ClassicalBaselines.from_dict(kept["fitted"]), targets, names=missing
        )
        values |= {name: nll.total(name).nll_nats for name in missing}
        _write(workdir, kept)
    return {name: values[name] for name in names}


def verdict(nats: float, classical_nats: Mapping[str, float], split: str = "validation") -> str:
    """One sentence that compares an NLL of `split` with the baselines on the same targets."""
    ordered = sorted(classical_nats.items(), key=lambda item: -item[1])
    beaten = [name for name, value in ordered if nats < value]
    better = [f"{name} {value / LN2:.4f}" for name, value in ordered if nats >= value]
    own = f"{split} {nats / LN2:.4f} bits"
    if not better:
        return f"{own} is below all classical baselines, the best of which is {_best(ordered)}"
    if not beaten:
        return (
            f"{own} is above all classical baselines ({', '.join(better)}): "
            "so far the model is worse than a histogram of the samples"
        )
    return (
        f"{own} is still above {', '.join(better)}, which need no network; "
        f"it is below {', '.join(beaten)}"
    )


def _best(ordered: Sequence[tuple[str, float]]) -> str:
    name, value = ordered[-1]
    return f"{name}, {value / LN2:.4f}"


def _key(targets: Targets) -> str:
    """The name of a set of targets: the same for the same windows of the same split."""
    size = targets.config.window_unit
    count = sum(window.end - window.first for window in targets.windows)
    first = targets.windows[0]
    clip = "whole recordings" if targets.clip_samples is None else f"clips {targets.clip_samples}"
    last = ", last dropped" if targets.drop_last else ""
    return (
        f"{targets.split.name}, {clip}{last}, stride {targets.stride_patches} x {size} of "
        f"{targets.config.context_samples}, {count} targets from {first.clip}:{first.first}"
    )


def _open(workdir: str | os.PathLike[str], train_split: Split, quantiser: str) -> dict[str, Any]:
    path = Path(workdir) / FILENAME
    if path.exists():
        try:
            kept = json.loads(path.read_text())
            same = kept["manifest_hash"] == train_split.manifest_hash
            if same and kept["fitted"]["quantiser"] == quantiser:
                return kept
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is damaged ({error!r}); remove it: it will be computed again"
            ) from error
    kept = {
        "manifest_hash": train_split.manifest_hash,
        "nats": {},
        "fitted": fit(train_split, quantiser).to_dict(),
    }
    _write(workdir, kept)
    return kept


def _write(workdir: str | os.PathLike[str], kept: dict[str, Any]) -> None:
    if not is_first():
        return
    write_atomically(Path(workdir) / FILENAME, json.dumps(kept) + "\n")
