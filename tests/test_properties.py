"""Properties of quantisers, windows, splits and sliding windows, tested on many inputs."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from patchwave_jax.config import Config
from patchwave_jax.data import quantisers
from patchwave_jax.data.audio_folder.audio_folder_dataset_builder import Builder as AudioFolder
from patchwave_jax.data.index import Recording, SourceFile
from patchwave_jax.data.permutation import permute
from patchwave_jax.data.windows import Windows, clips
from patchwave_jax.data.youtube_mix.youtube_mix_dataset_builder import Builder as YoutubeMix
from patchwave_jax.evaluation import protocol

# The same examples every time, so that failures are reproducible.
settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("suite")

PCM = arrays.arrays(np.int16, st.integers(1, 300))
LENGTHS = st.lists(st.integers(1, 3_000), min_size=1, max_size=6)


@given(PCM)
def test_sashimi_does_not_depend_on_the_level_of_a_clip(pcm):
    half = (pcm // 2 * 2).astype(np.int16)
    codes = quantisers.get("sashimi").encode(half)
    other = quantisers.get("sashimi").encode((half // 2).astype(np.int16))
    assert (np.abs(codes.astype(int) - other) <= 1).all()
    assert codes.dtype == np.uint8


@given(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.data())
def test_a_permutation_stays_inside_and_keeps_points_apart(size, key, data):
    points = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    sent = permute(np.array(points, np.int64), size, key)
    assert len(set(sent.tolist())) == len(points)
    assert sent.min() >= 0
    assert sent.max() < size


class FakeSplit:
    """A split of recordings whose samples encode their positions."""

    name, dataset, skip_damaged = "train", "fake", False

    def __init__(self, lengths: list[int]):
        self.recordings = tuple(
            Recording(str(i), (SourceFile(f"{i}.wav", n),)) for i, n in enumerate(lengths)
        )

    def read(self, recording: int, start: int, count: int) -> np.ndarray:
        assert 0 <= start <= start + count <= self.recordings[recording].num_samples
        return (np.arange(start, start + count) + 7 * recording).astype(np.int16)


@given(LENGTHS, st.integers(1, 400), st.integers(1, 6), st.integers(0, 2**31 - 1), st.data())
def test_an_epoch_has_every_window_once_whoever_reads_it(lengths, size, batch, seed, data):
    lengths[0] = max(lengths[0], size)
    split = FakeSplit([min(n, size + 40) for n in lengths])  # few positions
    options = {"window_samples": size, "batch_size": batch, "quantiser": "mulaw", "seed": seed}
    windows = Windows(split, **options)
    total = sum(max(0, r.num_samples - size + 1) for r in split.recordings)
    assert windows.num_positions == total
    steps = -(-total // batch)
    places = [windows.locate(step, row) for step in range(steps) for row in range(batch)][:total]
    assert len(set(places)) == total
    step = data.draw(st.integers(0, 10**9))
    cut = data.draw(st.integers(0, batch))
    expected = windows[step]
    parts = [Windows(split, **options, rows=r)[step] for r in (range(cut), range(cut, batch))]
    for name in expected:
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), expected[name])


@given(LENGTHS, st.one_of(st.none(), st.integers(1, 500)), st.booleans())
def test_clips_cover_what_they_should_and_nothing_twice(lengths, clip_samples, drop_last):
    split = FakeSplit(lengths)
    covered = [np.zeros(n, int) for n in lengths]
    for clip in clips(split, clip_samples, drop_last):
        covered[clip.recording][clip.start : clip.start + clip.length] += 1
    for length, count in zip(lengths, covered, strict=True):
        end = length // clip_samples * clip_samples if drop_last and clip_samples else length
        np.testing.assert_array_equal(count, np.arange(length) < end)


@given(
    LENGTHS,
    st.integers(1, 8),
    st.data(),
    st.sampled_from(["dense", "last"]),
)
def test_sliding_windows_count_every_sample_once_with_the_context_they_promise(
    lengths, patches, data, objective
):
    size = SMALL.patch_samples
    stride = data.draw(st.integers(1, patches))
    config = dataclasses.replace(
        Config(), model=SMALL, context_samples=patches * size, objective=objective
    )
    covered = [np.zeros(n, int) for n in lengths]
    for window in protocol.plan(lengths, config, stride):
        assert 0 <= window.first < window.end <= lengths[window.clip]
        covered[window.clip][window.first : window.end] += 1
        if window.first:  # it has moved: its targets have the promised context
            assert window.units == patches
            assert window.end - window.first <= stride * size
            assert window.last_n == stride
        else:
            assert window.end <= patches * size
    for count in covered:
        np.testing.assert_array_equal(count, 1)


NAMES = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0."), min_size=1, max_size=12),
    min_size=3,
    max_size=30,
    unique_by=lambda name: name.casefold(),
)


@given(NAMES)
def test_a_folder_is_split_by_its_names_alone(tmp_path_factory, names):
    splits = []
    for order in (names, names[::-1]):
        folder = tmp_path_factory.mktemp("folder")
        for name in order:
            (folder / f"{name}.wav").touch()
        planned = AudioFolder.plan(folder)
        splits.append([(file.name, file.split) for file in planned])
    assert splits[0] == splits[1]
    assert {name for name, _ in splits[0]} == {f"{name}.wav" for name in names}
    assert {split for _, split in splits[0]} == {"train", "validation", "test"}


@pytest.mark.parametrize("width", [1, 3])
@given(st.integers(3, 120))
def test_youtube_mix_is_split_as_published_whatever_the_order(tmp_path_factory, width, count):
    folder: Path = tmp_path_factory.mktemp("tube")
    for i in np.random.default_rng(count).permutation(count):
        (folder / f"out{i:0{width}}.wav").touch()
    planned = YoutubeMix.plan(folder)
    assert [int(file.path.stem[3:]) for file in planned] == list(range(count))
    sizes = [sum(f.split == s for f in planned) for s in ("train", "validation", "test")]
    assert sum(sizes) == count
    assert min(sizes) >= 1
    if int(0.88 * count) < int(0.94 * count):
        assert sizes[:2] == [int(0.88 * count), int(0.94 * count) - int(0.88 * count)]
