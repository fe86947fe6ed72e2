"""NLLs by context, position and file, with intervals that respect correlation.

One pass over a split fills a `NllAccumulator`: per source file, per context that was available and
per position in the clip. Neighbouring samples are nowhere near independent, so every sum is kept
per *unit*, a stretch long enough to stand for itself, and intervals resample units, not samples.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64
from scipy import stats

from patchwave_jax.data.audio import SAMPLE_RATE
from patchwave_jax.data.index import Recording
from patchwave_jax.data.windows import Clip

LN2 = math.log(2)
MODEL = "model"  # the name of the model's row
LEVEL = 0.95  # of all intervals
RESAMPLES = 2_000
FEWEST_UNITS = 5  # of an interval: fewer say little about the spread
ENOUGH_RECORDINGS = 10  # to resample recordings; with fewer, blocks are resampled
BLOCK_SECONDS = 10.0  # at most
ENOUGH_BLOCKS = 20  # blocks are shorter than that only to have as many
SHORTEST_BLOCK_SECONDS = 1.0
BINS_PER_OCTAVE = 2  # of context
MOST_POSITION_BINS = 120


@dataclasses.dataclass(frozen=True)
class Row:
    """The NLL of some targets. There is no interval where there are few units."""

    targets: int
    nll_nats: float
    nll_bits: float
    bits_low: float | None
    bits_high: float | None


@dataclasses.dataclass(frozen=True)
class Point(Row):
    """A row of a curve: targets whose context or position is in [`low`, `high`), in samples."""

    low: int
    high: int
    mean: float


@dataclasses.dataclass(frozen=True)
class FileRow(Row):
    """A row of the table per source file."""

    file: str
    recording: str


class NllAccumulator:
    """Sums over the targets of one split, for the model and classical baselines, each by a name."""

    def __init__(self, recordings: Sequence[Recording], chosen: Sequence[Clip], longest: int):
        """For `chosen` clips of `recordings`, whose contexts have at most `longest` samples."""
        self._recordings, self._clips = recordings, chosen
        samples = np.array([recording.num_samples for recording in recordings], np.int64)
        if len(recordings) >= ENOUGH_RECORDINGS:
            self._block, self._unit = int(samples.max()), "recordings"
        else:
            seconds = samples.sum() / ENOUGH_BLOCKS / SAMPLE_RATE
            seconds = min(max(seconds, SHORTEST_BLOCK_SECONDS), BLOCK_SECONDS)
            self._block, self._unit = round(seconds * SAMPLE_RATE), f"blocks of {seconds:.1f} s"
        units = -(-samples // self._block)
        self._first_unit = np.concatenate([[0], np.cumsum(units)])
        self._file_ends = [
            np.array(list(itertools.accumulate(file.num_samples for file in recording.files)))
            for recording in recordings
        ]
        self._first_file = np.cumsum([0, *(len(ends) for ends in self._file_ends)])
        self.context_edges = _log_edges(longest)
        longest_clip = max((clip.length for clip in chosen), default=1)
        self.position_step = max(SAMPLE_RATE, -(-longest_clip // MOST_POSITION_BINS))
        self._bins = {
            "context": len(self.context_edges) - 1,
            "position": -(-longest_clip // self.position_step),
            "file": int(self._first_file[-1]),
        }
        self._sums: dict[tuple[str, str], Float64[np.ndarray, "U bins"]] = {}
        self._counts: dict[tuple[str, str], Float64[np.ndarray, "U bins"]] = {}
        self._context_sums: dict[str, Float64[np.ndarray, " bins"]] = {}
        self.context_min, self.context_max = 2**62, 0

    def add(
        self,
        clip: int,
        first: int,
        contexts: Int64[np.ndarray, " n"],
        log_probs: np.ndarray,
        name: str = MODEL,
    ) -> None:
        """Adds the log-probabilities, in nats, of `n` targets from `first` of a clip."""
        chosen = self._clips[clip]
        position = first + np.arange(len(log_probs))
        place = chosen.start + position
        units = self._first_unit[chosen.recording] + place // self._block
        files = np.searchsorted(self._file_ends[chosen.recording], place, side="right")
        bins = {
            "context": np.searchsorted(self.context_edges, contexts, side="right") - 1,
            "position": position // self.position_step,
            "file": self._first_file[chosen.recording] + files,
        }
        if name not in self._context_sums:
            self._context_sums[name] = np.zeros(self._bins["context"])
            for axis, count in self._bins.items():
                self._sums[name, axis] = np.zeros((self._first_unit[-1], count))
                self._counts[name, axis] = np.zeros((self._first_unit[-1], count))
        for axis, index in bins.items():
            _accumulate(self._sums[name, axis], units, index, log_probs)
            _accumulate(self._counts[name, axis], units, index, np.ones(len(index)))
        context_sums = np.bincount(bins["context"], contexts, self._bins["context"])
        self._context_sums[name] += context_sums
        self.context_min = min(self.context_min, int(contexts.min()))
        self.context_max = max(self.context_max, int(contexts.max()))

    @property
    def names(self) -> tuple[str, ...]:
        """Names whose log-probabilities were added, in the order in which they came first."""
        return tuple(self._context_sums)

    @property
    def context_mean(self) -> float:
        """Mean context of the first name's targets."""
        name = self.names[0]
        return float(self._context_sums[name].sum() / self._counts[name, "file"].sum())

    @property
    def interval_over(self) -> str:
        """The units that were resampled, and their number."""
        occupied = int((self._counts[self.names[0], "file"].sum(1) > 0).sum())
        return f"{occupied} {self._unit}"

    def total(self, name: str = MODEL) -> Row:
        """Over all targets."""
        tables = self._sums[name, "file"], self._counts[name, "file"]
        return Row(**_rows(*(table.sum(1, keepdims=True) for table in tables))[0])

    def by_context(self, name: str = MODEL, coarse: bool = False) -> list[Point]:
        """NLL against the available context; bins without targets are left out.

        `coarse` is for a table: two bins below 1,024 samples, then one per octave.
        """
        lows = self.context_edges[:-1]
        starts = np.arange(len(lows))
        if coarse:
            octaves = (lows >= 1_024) & (lows & (lows - 1) == 0)
            starts = np.flatnonzero(np.isin(lows, (0, 32, lows[-1])) | octaves)
        ends = self.context_edges[[*starts[1:], -1]]
        tables = self._sums[name, "context"], self._counts[name, "context"]
        rows = _rows(*(np.add.reduceat(table, starts, axis=1) for table in tables))
        context_sums = np.add.reduceat(self._context_sums[name], starts)
        return [
            Point(**row, low=int(low), high=int(high), mean=float(total / row["targets"]))
            for row, low, high, total in zip(rows, lows[starts], ends, context_sums, strict=True)
            if row["targets"]
        ]

    def by_position(self, name: str = MODEL) -> list[Point]:
        """NLL against the position in the clip; bins without targets are left out."""
        rows = _rows(self._sums[name, "position"], self._counts[name, "position"])
        step = self.position_step
        return [
            Point(**row, low=i * step, high=(i + 1) * step, mean=(i + 0.5) * step)
            for i, row in enumerate(rows)
            if row["targets"]
        ]

    def by_file(self, name: str = MODEL) -> list[FileRow]:
        """NLL of each source file that has targets."""
        rows = _rows(self._sums[name, "file"], self._counts[name, "file"])
        names = [(file.name, r.name) for r in self._recordings for file in r.files]
        return [
            FileRow(**row, file=file, recording=recording)
            for row, (file, recording) in zip(rows, names, strict=True)
            if row["targets"]
        ]


def _log_edges(longest: int) -> Int64[np.ndarray, " edges"]:
    """0, 1, 2, 3, 4, 6, 8, ... past `longest`; the last bin holds only the full context."""
    count = math.ceil(BINS_PER_OCTAVE * math.log2(max(longest, 2))) + 1
    powers = np.round(2.0 ** (np.arange(count) / BINS_PER_OCTAVE)).astype(np.int64)
    return np.unique(np.concatenate([[0], powers[powers < longest], [longest, longest + 1]]))


def _accumulate(table: np.ndarray, units: np.ndarray, bins: np.ndarray, values: np.ndarray) -> None:
    """table[units, bins] += values, where neighbours mostly share a cell."""
    keys = units * table.shape[1] + bins
    first = keys.min()
    sums = np.bincount(keys - first, values)
    table.reshape(-1)[first : first + len(sums)] += sums


def _rows(sums: Float64[np.ndarray, "U bins"], counts: Float64[np.ndarray, "U bins"]) -> list[dict]:
    low, high = bootstrap(-sums, counts)
    rows = []
    for i, targets in enumerate(counts.sum(0)):
        nats = float(-sums[:, i].sum() / max(targets, 1))
        known = math.isfinite(low[i])
        rows.append(
            {
                "targets": int(targets),
                "nll_nats": nats,
                "nll_bits": nats / LN2,
                "bits_low": float(low[i]) / LN2 if known else None,
                "bits_high": float(high[i]) / LN2 if known else None,
            }
        )
    return rows


def bootstrap(
    sums: Float64[np.ndarray, "U bins"],
    counts: Float64[np.ndarray, "U bins"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Float64[np.ndarray, " bins"], Float64[np.ndarray, " bins"]]:
    """95% interval of sum / count of each column, by resampling its units.

    Percentiles of resampled ratios, expanded for few units as in Hesterberg (2015, "What teachers
    should know about the bootstrap", section 3.3): a plain percentile interval of n units is as
    narrow as a normal one with variance / n. NaN where a column has too few units.
    """
    occupied = counts.sum(1) > 0
    sums, counts = sums[occupied], counts[occupied]
    units = (counts > 0).sum(0)
    low, high = np.full((2, sums.shape[1]), np.nan)
    if len(sums) < FEWEST_UNITS:
        return low, high
    draws = np.random.default_rng(seed).multinomial(
        len(sums), np.full(len(sums), 1 / len(sums)), size=resamples
    )
    drawn_sums, drawn_counts = draws @ sums, draws @ counts
    for i in np.flatnonzero(units >= FEWEST_UNITS):
        n, some = units[i], drawn_counts[:, i] > 0
        ratios = drawn_sums[some, i] / drawn_counts[some, i]
        tail = stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf((1 - LEVEL) / 2, n - 1))
        low[i], high[i] = np.quantile(ratios, [tail, 1 - tail])
    return low, high
