"""Atomic writes, and waiting for a lock."""

import contextlib
import errno
import os
from concurrent import futures
from pathlib import Path

import pytest

from patchwave_jax.errors import UserError, names_file
from patchwave_jax.runtime.storage import Lock, replacing, write_atomically


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "old €")
    with contextlib.suppress(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half of the new")
        assert path.read_text(encoding="utf-8") == "old €"
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "old €"
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path):
    path = tmp_path / "none/a.json"
    with pytest.raises(UserError, match=f"^{path}: No such file or directory"), names_file("x"):
        write_atomically(path, "")
    with pytest.raises(UserError, match=f"^{path}: No space"), names_file("x"), replacing(path):
        raise OSError(errno.ENOSPC, "No space")  # as `write` raises it


def test_the_first_of_two_directories_stays(tmp_path):
    path = tmp_path / "copy"
    with replacing(path) as temporary:
        temporary.mkdir()
        path.mkdir()  # by another process, which was faster
        (path / "a").write_text("first")
    assert (path / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_links_and_pipes_are_written_through(tmp_path):
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", "text")
    assert (tmp_path / "target").read_text() == "text"
    assert (tmp_path / "link").is_symlink()
    read, write = os.pipe()
    write_atomically(Path(f"/dev/fd/{write}"), "through a pipe")
    os.close(write)
    with open(read) as pipe:
        assert pipe.read() == "through a pipe"


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    write_atomically(tmp_path / ("é" * 127), "")


def test_a_lock_can_wait_for_another(tmp_path):
    with Lock(tmp_path, "--data_dir") as held, futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(Lock, tmp_path, "--data_dir", wait=True)
        with pytest.raises(futures.TimeoutError):
            waiting.result(0.1)
        held.release()
        waiting.result(10).release()
