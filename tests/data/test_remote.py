"""Datasets in a bucket, by fsspec's file system in memory."""

import fsspec
import numpy as np
import pytest
from small_run import make_data

from patchwave_jax.data import manifest
from patchwave_jax.data.build import build
from patchwave_jax.data.index import open_split
from patchwave_jax.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """This host's copies."""
    monkeypatch.setenv("PATCHWAVE_DATA_DIR", str(tmp_path / "cache"))
    manifest.local_copy.cache_clear()
    return tmp_path / "cache/remote"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data"))


def test_a_split_is_copied_once(data, cache):
    system = fsspec.filesystem("memory")
    system.put(str(data / "audio_folder"), "/bucket/audio_folder", recursive=True)
    local = open_split(data, "audio_folder", "train")
    for _ in range(2):
        split = open_split("memory://bucket", "audio_folder", "train")
        assert split.manifest_hash == local.manifest_hash
        count = local.recordings[0].num_samples
        np.testing.assert_array_equal(split.read(0, 0, count), local.read(0, 0, count))
        # Leaves only the manifest, which is all that a second process of this host needs.
        for path in system.find("/bucket"):
            if not path.endswith("manifest.json"):
                system.rm(path)
        manifest.local_copy.cache_clear()
    assert len(list(cache.iterdir())) == 1


def test_an_incomplete_copy_is_removed(data, cache, monkeypatch):
    system = fsspec.filesystem("memory")
    system.put(str(data / "audio_folder"), "/cut/audio_folder", recursive=True)
    get, got = type(system).get_file, []

    def fail(self, name, *args, **kwargs):
        got.append(name)
        if len(got) == 2:
            raise PermissionError("403 Forbidden")
        return get(self, name, *args, **kwargs)

    monkeypatch.setattr(type(system), "get_file", fail)
    with pytest.raises(UserError, match=r"memory://cut/.* can't be read: 403 Forbidden"):
        open_split("memory://cut", "audio_folder", "train")
    assert list(cache.iterdir()) == []


def test_missing_datasets_and_packages_are_named(without_gcsfs, tmp_path):
    with pytest.raises(UserError, match=r"memory://nothing/audio_folder/1\.0\.0 holds no dataset"):
        open_split("memory://nothing", "audio_folder", "train")
    with pytest.raises(UserError, match=r"no-such-kind://x/.* can't be read: Protocol not known"):
        open_split("no-such-kind://x", "audio_folder", "train")
    with pytest.raises(UserError, match=r"gs://bucket/.* pip install 'patchwave-jax\[gcs\]'"):
        open_split("gs://bucket", "audio_folder", "train")
    with pytest.raises(UserError, match="gs://bucket is not a folder; build in a folder"):
        build("audio_folder", tmp_path, "gs://bucket")
