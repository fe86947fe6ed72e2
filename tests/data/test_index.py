"""Random access: every range against numpy, and damaged datasets."""

import pickle
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from patchwave_jax.data import build as build_lib
from patchwave_jax.data import index, manifest
from patchwave_jax.errors import UserError

LENGTHS = (150_000, 60_001, 131_072, 2_000)  # together beyond two records of 2**17


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A youtube_mix whose train split is four files, and the PCM of that recording."""
    root = tmp_path_factory.mktemp("index")
    rng = np.random.default_rng(0)
    pcm = [rng.integers(-9000, 9000, n).astype(np.int16) for n in LENGTHS]
    for folder, names in {"train": range(4), "val": [4], "test": [5]}.items():
        (root / "source" / folder).mkdir(parents=True)
        for i in names:
            sf.write(root / f"source/{folder}/out{i}.wav", pcm[i % 4], 16_000)
    build_lib.build("youtube_mix", root / "source", root / "data")
    return root / "data", np.concatenate(pcm)


def test_recordings_and_files_are_as_built(built):
    data, pcm = built
    split = index.open_split(data, "youtube_mix", "train")
    assert (split.name, split.dataset) == ("train", "youtube_mix")
    assert len(split.recordings) == 1
    recording = split.recordings[0]
    assert [(f.name, f.num_samples) for f in recording.files] == [
        (f"train/out{i}.wav", n) for i, n in enumerate(LENGTHS)
    ]
    assert recording.num_samples == pcm.size


def test_every_read_is_the_slice_of_the_concatenation(built):
    data, pcm = built
    split = index.open_split(data, "youtube_mix", "train")
    rng = np.random.default_rng(1)
    starts = rng.integers(0, pcm.size, 100)
    edges = [0, 2**17 - 1, 2**17, 2**18, *np.cumsum(LENGTHS)[:-1], pcm.size]
    for start in [*starts, *edges]:
        for count in (0, 1, 2, 70_000, 2**17, int(pcm.size - start)):
            if start + count <= pcm.size:
                read = split.read(0, int(start), count)
                assert read.dtype == np.int16
                np.testing.assert_array_equal(read, pcm[start : start + count])


def test_only_the_records_needed_are_read(built, monkeypatch):
    data, _ = built
    split = index.open_split(data, "youtube_mix", "train")
    seen = []
    read_record = split._read_record
    monkeypatch.setattr(
        split, "_read_record", lambda *place: (seen.append(place), read_record(*place))[1]
    )
    split.read(0, 2**17 - 1, 2)
    split.read(0, 2**17, 2**17)
    assert seen == [(0, 0), (0, 1), (0, 1)]


@pytest.mark.parametrize(("start", "count"), [(-1, 5), (0, 343_074), (343_073, 1), (5, -1)])
def test_samples_outside_are_an_index_error(built, start, count):
    split = index.open_split(built[0], "youtube_mix", "train")
    with pytest.raises(IndexError, match="343073"):
        split.read(0, start, count)


def test_a_split_can_be_pickled_and_read_by_threads(built):
    data, pcm = built
    split = index.open_split(data, "youtube_mix", "train")
    split.read(0, 0, 1)
    copy = pickle.loads(pickle.dumps(split))
    starts = np.random.default_rng(2).integers(0, pcm.size - 5000, 200)
    with futures.ThreadPoolExecutor(8) as pool:
        reads = list(pool.map(lambda start: copy.read(0, int(start), 5000), starts))
    for start, read in zip(starts, reads, strict=True):
        np.testing.assert_array_equal(read, pcm[start : start + 5000])


def test_the_manifest_hash_is_that_of_its_bytes(built):
    split = index.open_split(built[0], "youtube_mix", "test")
    path = built[0] / "youtube_mix/1.0.0/manifest.json"
    assert split.manifest_hash == build_lib.audio.sha256(path)


def test_a_dataset_that_is_not_built_is_an_error_with_the_command(tmp_path):
    with pytest.raises(UserError) as caught:
        index.open_split(tmp_path, "piano_demo", "train")
    command = f"python -m patchwave_jax.data.build --dataset=piano_demo --data_dir={tmp_path}"
    assert command in str(caught.value)


def test_an_unknown_split_or_dataset_is_an_error_with_the_list(built):
    with pytest.raises(UserError, match="no split 'val'; it has train, validation, test"):
        index.open_split(built[0], "youtube_mix", "val")
    with pytest.raises(UserError, match="'yt' is unknown; use one of piano_demo, youtube_mix"):
        index.open_split(built[0], "yt", "train")


@pytest.fixture
def copy(built, tmp_path) -> Path:
    """The folder of a copy of the dataset, to damage."""
    source = built[0] / "youtube_mix/1.0.0"
    target = tmp_path / "youtube_mix/1.0.0"
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


SHARD = "youtube_mix-train.array_record-00000-of-00001"


def read_train(directory: Path) -> None:
    split = index.open_split(directory.parents[1], "youtube_mix", "train")
    split.read(0, 0, split.recordings[0].num_samples)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: bytes(len(content)),
    ],
)
def test_a_damaged_shard_is_an_error_that_names_it(copy, damage):
    read_train(copy)
    (copy / SHARD).write_bytes(damage((copy / SHARD).read_bytes()))
    with pytest.raises(UserError, match=f"{SHARD} is damaged"):
        read_train(copy)


def test_a_missing_shard_is_an_error_that_names_it(copy):
    (copy / SHARD).unlink()
    with pytest.raises(UserError, match=SHARD):
        read_train(copy)


def test_shards_of_another_build_are_an_error(copy):
    text = (copy / manifest.FILENAME).read_text()
    (copy / manifest.FILENAME).write_text(text.replace("343073", "343072"))
    split = index.open_split(copy.parents[1], "youtube_mix", "train")
    with pytest.raises(UserError, match=f"{SHARD} does not match the manifest"):
        split.read(0, 2**18, 5)


@pytest.mark.parametrize("content", ["", "{}", '{"files": 3}', "[1]"])
def test_a_damaged_manifest_is_an_error_that_names_it(copy, content):
    (copy / manifest.FILENAME).write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged.*--overwrite"):
        read_train(copy)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_missing_tfds_metadata_is_an_error(copy, name):
    (copy / name).unlink()
    with pytest.raises(UserError, match="--overwrite"):
        read_train(copy)
