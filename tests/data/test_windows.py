"""Windows, their order, and clips: a batch is a function of (seed, step, row) only."""

import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from patchwave_jax.data import build as build_lib
from patchwave_jax.data import index, quantisers, windows
from patchwave_jax.data.permutation import permute
from patchwave_jax.errors import UserError

Windows = windows.Windows
LENGTHS = {"a.wav": 5000, "b.wav": 2500, "c.wav": 140_000, "d.wav": 2001}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """An audio_folder with four train recordings, and their PCM by name."""
    root = tmp_path_factory.mktemp("windows")
    rng, pcm = np.random.default_rng(0), {}
    (root / "source/train").mkdir(parents=True)
    (root / "source/test").mkdir()
    for name, size in LENGTHS.items():
        pcm[name] = np.cumsum(rng.integers(-99, 100, size)).clip(-30_000, 30_000).astype(np.int16)
        sf.write(root / "source/train" / name, pcm[name], 16_000)
    sf.write(root / "source/test/e.wav", pcm["a.wav"][::-1], 16_000)
    build_lib.build("audio_folder", root / "source", root / "data")
    return root / "data", pcm


@pytest.fixture
def split(built) -> index.Split:
    return index.open_split(built[0], "audio_folder", "train")


def make(split: index.Split, **changes) -> Windows:
    arguments = {"window_samples": 1000, "batch_size": 8, "quantiser": "mulaw", "seed": 7}
    return Windows(split, **{**arguments, **changes})


# --- the permutation


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000, 65_537])
def test_a_permutation_is_a_bijection(size):
    for key in range(5):
        image = permute(np.arange(size), size, key)
        np.testing.assert_array_equal(np.sort(image), np.arange(size))


def test_every_permutation_of_few_points_occurs():
    images = [tuple(permute(np.arange(4), 4, key)) for key in range(24 * 100)]
    counts = np.unique(images, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 100) ** 2 / 100).sum() < 60  # chi-square of 23 degrees: p = 4e-5


@pytest.mark.parametrize("size", [10**6 + 3, 2**40, 3 * 2**38 + 1])
def test_neighbours_are_mapped_far_apart_and_uniformly(size):
    n = 100_000
    for begin in (0, size - n):
        x = permute(np.arange(begin, begin + n), size, 1, 2) / size
        histogram = np.histogram(x, 100, (0, 1))[0]
        assert ((histogram - n / 100) ** 2 / (n / 100)).sum() < 170  # 99 degrees: p = 1e-5
        for lag in (1, 2, 7, 1024):
            assert abs(np.corrcoef(x[:-lag], x[lag:])[0, 1]) < 0.015  # 4.7 sigma
        steps = np.diff(x) % 1  # a linear map would have them all equal
        assert ((np.histogram(steps, 100, (0, 1))[0] - n / 100) ** 2 / (n / 100)).sum() < 170


def test_keys_give_unrelated_permutations():
    size, at = 2**40, np.arange(50_000)
    keys = ((0, 1), (1, 0), (0, 2), (0,), (0, 0), (2**32,), (0, 2**32 + 1))
    images = [permute(at, size, *key) / size for key in keys]
    for i, x in enumerate(images):
        for y in images[:i]:
            assert abs(np.corrcoef(x, y)[0, 1]) < 0.025
            assert (x == y).mean() < 1e-3


def test_a_permutation_is_pointwise_and_the_same_in_every_release():
    image = permute(np.arange(1000), 1000, 3)
    for i in (0, 1, 500, 999):
        assert permute(np.array([i]), 1000, 3)[0] == image[i]
    # A seed must give the same order of training in every release.
    np.testing.assert_array_equal(image[:5], [557, 547, 189, 359, 616])


@pytest.mark.parametrize(("at", "size"), [([-1], 5), ([5], 5), ([0], 0), ([0], 2**63)])
def test_points_outside_are_refused(at, size):
    with pytest.raises(ValueError, match="outside"):
        permute(np.array(at), size, 0)


# --- windows


def test_a_batch_has_the_audio_at_its_positions(built, split):
    _, pcm = built
    source = make(split, window_samples=2001)
    batch = source[5]
    assert (batch["codes"].dtype, batch["codes"].shape) == (np.uint8, (8, 2001))
    assert batch["recording"].dtype == np.int32
    assert batch["start"].dtype == np.int64
    for row in range(8):
        recording, start = int(batch["recording"][row]), int(batch["start"][row])
        assert source.locate(5, row) == (recording, start)
        window = pcm[split.recordings[recording].name.split("/")[1]][start : start + 2001]
        assert window.size == 2001  # it is within its recording
        np.testing.assert_array_equal(batch["codes"][row], quantisers.get("mulaw").encode(window))


def test_an_epoch_visits_every_position_once_and_in_its_own_order(split):
    source = make(split, window_samples=1990, batch_size=701)
    expected = {
        (r, start)
        for r, recording in enumerate(split.recordings)
        for start in range(recording.num_samples - 1990 + 1)
    }
    assert source.num_positions == len(expected)
    draws = [source._locate(step, range(701)) for step in range(2 * len(expected) // 701 + 1)]
    places = [(int(r), int(s)) for rs, ss in draws for r, s in zip(rs, ss, strict=True)]
    first, second = places[: len(expected)], places[len(expected) : 2 * len(expected)]
    assert len(set(first)) == len(first)
    assert set(first) == set(second) == expected
    assert np.mean([a == b for a, b in zip(first, second, strict=True)]) < 1e-3


@pytest.mark.parametrize("processes", [2, 8])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(split, processes):
    changes = {"gain_db": 6.0, "pitch_semitones": 1.0}
    all_rows = make(split, **changes)
    share = 8 // processes
    parts = [
        make(split, rows=range(p * share, (p + 1) * share), **changes) for p in range(processes)
    ]
    for step in (0, 1, 1000):
        batches = [part[step] for part in parts]
        for key, expected in all_rows[step].items():
            np.testing.assert_array_equal(np.concatenate([b[key] for b in batches]), expected)


def test_batches_resume_from_the_step_alone(split):
    straight = list(windows.batches(make(split), 0, 12))
    resumed = list(windows.batches(make(split), 5, 7))
    assert (len(straight), len(resumed)) == (12, 7)
    for a, b, step in zip(straight[5:], resumed, range(5, 12), strict=True):
        for key, value in make(split)[step].items():
            np.testing.assert_array_equal(a[key], value)
            np.testing.assert_array_equal(b[key], value)


def test_batches_resume_from_a_large_step(split):
    (batch,) = windows.batches(make(split), 10**9, 1)
    np.testing.assert_array_equal(batch["start"], make(split)[10**9]["start"])


def test_the_seed_decides_the_order(split):
    a, b, c = (make(split, seed=seed)[0]["start"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_distinct_positions_are_fixed_and_uniform(split):
    source = make(split, window_samples=2001, distinct_positions=1000, batch_size=100)
    epochs = [
        [source.locate(epoch * 10 + step, row) for step in range(10) for row in range(100)]
        for epoch in range(2)
    ]
    assert len(set(epochs[0])) == 1000
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]
    # Of the 137,999 + 2,999 + 500 + 1 positions nearly all are in "c".
    starts = np.array([start for recording, start in epochs[0] if recording == 2])
    assert starts.size > 950
    histogram = np.histogram(starts, 10, (0, 138_000))[0]
    assert ((histogram - starts.size / 10) ** 2 / (starts.size / 10)).sum() < 34  # p = 1e-4
    other = make(split, window_samples=2001, distinct_positions=1000, batch_size=100, seed=8)
    others = {other.locate(step, row) for step in range(10) for row in range(100)}
    assert len(others & set(epochs[0])) < 50


def test_distinct_positions_do_not_depend_on_the_batch_size(split):
    def positions(batch_size: int) -> list[tuple[int, int]]:
        source = make(split, distinct_positions=60, batch_size=batch_size)
        return [source.locate(i // batch_size, i % batch_size) for i in range(120)]

    assert positions(4) == positions(6)


def test_too_many_distinct_positions_are_a_warning(split, caplog):
    with caplog.at_level(logging.WARNING, "absl"):
        source = make(split, window_samples=2000, distinct_positions=10**7)
    assert source.epoch_positions == source.num_positions == 138_001 + 3001 + 501 + 2
    assert "distinct_positions=10000000" in caplog.text
    assert "141505 positions" in caplog.text


def test_recordings_shorter_than_a_window_are_unused(split, caplog):
    with caplog.at_level(logging.INFO, "absl"):
        source = make(split, window_samples=3000)
    assert "2 of 4 recordings" in caplog.text
    used = {source.locate(step, row)[0] for step in range(200) for row in range(8)}
    assert used == {0, 2}


def test_a_window_longer_than_every_recording_is_an_error(split):
    with pytest.raises(UserError) as caught:
        make(split, window_samples=140_001)
    for part in ("audio_folder train", "140001", "140000", "context_samples"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 0},
        {"window_samples": 0},
        {"seed": -1},
        {"distinct_positions": 0},
        {"gain_db": -1.0},
        {"pitch_semitones": -1.0},
        {"rows": range(8, 16)},
        {"quantiser": "alaw"},
    ],
)
def test_bad_arguments_are_errors_that_name_them(split, change):
    with pytest.raises(UserError, match=next(iter(change))):
        make(split, **change)


def test_damage_found_while_prefetching_reaches_the_caller(split, monkeypatch):
    def damaged(*_):
        raise UserError("shard x is damaged")

    monkeypatch.setattr(index.Split, "read", damaged)
    with pytest.raises(UserError, match="shard x is damaged"):
        next(windows.batches(make(split), 0))


def test_sashimi_scales_each_window_by_itself(built, split):
    batch = make(split, quantiser="sashimi")[0]
    assert (batch["codes"].min(1) == 0).all()
    assert (batch["codes"].max(1) == 255).all()


def test_every_second_row_begins_with_silence(split):
    plain, silent = make(split, batch_size=3), make(split, batch_size=3, silent_samples=400)
    for step in (0, 1):
        codes, changed = plain[step]["codes"], silent[step]["codes"]
        begins = (np.arange(3) + 3 * step) % 2 == 1
        assert (changed[begins, :400] == quantisers.SILENCE).all()
        np.testing.assert_array_equal(changed[begins, 400:], codes[begins, 400:])
        np.testing.assert_array_equal(changed[~begins], codes[~begins])


# --- augmentation


def test_gain_is_uniform_in_db_within_its_bounds(split):
    plain, louder = make(split, quantiser="linear"), make(split, quantiser="linear", gain_db=6.0)
    gains = []
    for step in range(100):
        for row in range(8):
            place = plain.locate(step, row)
            x, _ = plain._augmented(step, row, *place)
            y, start = louder._augmented(step, row, *place)
            assert start == place[1]
            at = np.argmax(np.abs(x.astype(int)))
            if 1000 < abs(x[at]) < 16_000:
                gains.append(20 * np.log10(y[at] / x[at]))
    gains = np.array(gains)
    assert len(gains) > 300
    assert np.abs(gains).max() < 6.01
    histogram = np.histogram(gains, 4, (-6, 6))[0]
    assert ((histogram - len(gains) / 4) ** 2 / (len(gains) / 4)).sum() < 22  # p = 1e-4


def test_pitch_shift_moves_a_tone_by_its_semitones(tmp_path):
    t = np.arange(160_000) / 16_000
    (tmp_path / "source/train").mkdir(parents=True)
    sf.write(tmp_path / "source/train/a.wav", 0.5 * np.sin(2 * np.pi * 500 * t), 16_000)
    build_lib.build("audio_folder", tmp_path / "source", tmp_path / "data")
    split = index.open_split(tmp_path / "data", "audio_folder", "train")
    source = make(split, window_samples=16_000, pitch_semitones=12.0)
    octaves = []
    for step in range(20):
        batch = source[step]
        for codes in batch["codes"]:
            spectrum = np.abs(np.fft.rfft(quantisers.get("mulaw").decode(codes)))
            octaves.append(np.log2(np.argmax(spectrum) / 500))  # bins of 1 Hz
        assert (batch["start"] >= 0).all()
    octaves = np.array(octaves)
    assert np.abs(octaves).max() <= 1.005
    histogram = np.histogram(octaves, 4, (-1.01, 1.01))[0]
    assert ((histogram - 40) ** 2 / 40).sum() < 22


def test_pitch_shift_in_a_recording_as_long_as_the_window(split):
    source = make(split, window_samples=140_000, pitch_semitones=12.0, batch_size=2)
    for step in range(5):
        batch = source[step]
        assert batch["codes"].shape == (2, 140_000)
        assert (batch["start"] >= 0).all()


def test_augmentation_is_off_at_zero_and_fixed_by_the_seed(split):
    changes = {"gain_db": 3.0, "pitch_semitones": 2.0}
    plain, a, b = make(split), make(split, **changes), make(split, **changes)
    np.testing.assert_array_equal(a[3]["codes"], b[3]["codes"])
    assert (a[3]["codes"] != plain[3]["codes"]).any(1).all()
    assert a.locate(3, 1) == plain.locate(3, 1)


# --- clips


@pytest.fixture(scope="module")
def cut(tmp_path_factory) -> index.Split:
    """One recording of three files: 5000, 2500 and 4000 samples."""
    root = tmp_path_factory.mktemp("clips")
    for folder, sizes in {"train": [5000, 2500, 4000], "val": [2000], "test": [2000]}.items():
        (root / "source" / folder).mkdir(parents=True)
        for i, size in enumerate(sizes):
            noise = np.random.default_rng(i).integers(-99, 99, size).astype(np.int16)
            sf.write(root / f"source/{folder}/{i}.wav", noise, 16_000)
    build_lib.build("youtube_mix", root / "source", root / "data")
    return index.open_split(root / "data", "youtube_mix", "train")


A, B, C = (f"train/{i}.wav" for i in range(3))


@pytest.mark.parametrize(
    ("clip_samples", "drop_last", "per_file", "expected"),
    [
        (4000, True, False, [(A, 0, 4000), (A, 4000, 4000)]),
        (4000, False, False, [(A, 0, 4000), (A, 4000, 4000), (C, 8000, 3500)]),
        (2500, True, True, [(A, 0, 2500), (A, 2500, 2500), (B, 5000, 2500), (C, 7500, 2500)]),
        (3000, False, True, [(A, 0, 3000), (A, 3000, 2000), (B, 5000, 2500), (C, 7500, 3000),
                             (C, 10_500, 1000)]),
        (None, True, False, [(A, 0, 11_500)]),
        (None, True, True, [(A, 0, 5000), (B, 5000, 2500), (C, 7500, 4000)]),
        (20_000, True, False, []),
    ],
)  # fmt: skip
def test_clips_by_hand(cut, clip_samples, drop_last, per_file, expected):
    found = list(windows.clips(cut, clip_samples, drop_last, per_file))
    assert found == [(0, *clip) for clip in expected]


def test_clips_need_a_positive_length(split):
    with pytest.raises(UserError, match="clip_samples is 0"):
        list(windows.clips(split, 0, drop_last=True))
