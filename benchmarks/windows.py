"""Training windows per second: `python benchmarks/windows.py`. Prints one JSON object.

    {"windows_per_second": {"128000": 1000.0, "1000000": 200.0}, ...}

Where a dataset has no recording of a million samples, a synthetic one is built for that length.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile as sf

from patchwave_jax.data import build, index, manifest, windows
from patchwave_jax.errors import exits_cleanly

BATCH_SIZE = 8
LENGTHS = (128_000, 1_000_000)


def windows_per_second(split: index.Split, window_samples: int, seconds: float) -> float:
    """Windows read, quantised and handed over per second, once the first batch is there."""
    source = windows.Windows(
        split, window_samples=window_samples, batch_size=BATCH_SIZE, quantiser="mulaw", seed=0
    )
    stream = windows.batches(source, 0)
    next(stream)
    begin, steps = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        next(stream)
        steps += 1
    return steps * BATCH_SIZE / (time.perf_counter() - begin)


def synthetic_split(directory: Path) -> index.Split:
    """The train split of an audio_folder of several recordings of four minutes of noise."""
    (directory / "source").mkdir()
    for i in range(5):
        noise = np.random.default_rng(i).normal(0, 3000, 240 * 16_000)
        sf.write(directory / f"source/{i}.flac", noise.astype(np.int16), 16_000)
    build.build("audio_folder", directory / "source", directory / "data")
    return index.open_split(directory / "data", "audio_folder", "train")


@exits_cleanly
def main() -> None:
    """Parses the flags and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dataset", default="piano_demo", choices=manifest.DATASETS)
    parser.add_argument("--data_dir", default=manifest.default_data_dir(), metavar="DIR")
    parser.add_argument("--seconds", default=5.0, type=float, help="per length (default: 5)")
    flags = parser.parse_args()
    build.ensure_built(flags.dataset, flags.data_dir)
    split = index.open_split(flags.data_dir, flags.dataset, "train")
    longest = max(recording.num_samples for recording in split.recordings)
    rates, datasets = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for length in LENGTHS:
            if length > longest:
                split = synthetic_split(Path(scratch))
            rates[str(length)] = round(windows_per_second(split, length, flags.seconds), 1)
            datasets[str(length)] = split.dataset if length <= longest else "synthetic"
    print(json.dumps({"windows_per_second": rates, "dataset": datasets, "batch_size": BATCH_SIZE}))


if __name__ == "__main__":
    main()
