"""A run's working directory: a folder, or a URL of a bucket such as `gs://bucket/runs/pw`.

Orbax writes and reads checkpoints in place. A bucket can't append to or rename the other files of a
run: they live in a temporary folder, downloaded when a command starts and uploaded by `publish`.
"""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import fsspec
from absl import logging
from etils import epath

from patchwave_jax.errors import UserError
from patchwave_jax.runtime.distributed import is_first
from patchwave_jax.runtime.storage import LOCK_NAME, is_url, names_url

_NOT_DOWNLOADED = ("checkpoints", "damaged", "profile", "tensorboard")


class Workdir:
    """The files of a run except its checkpoints, in `folder`. A context manager that publishes."""

    def __init__(self, path: str | os.PathLike[str]):
        self._url = os.fspath(path) if is_url(path) else ""
        self._system, self._published = None, {}
        self.folder = Path(path)

    def __enter__(self) -> "Workdir":
        """Downloads the files, if `path` is a URL.

        Raises:
          UserError: if it can't be read, or checkpoints don't support this kind of URL.
        """
        if self._url:
            as_path(self._url)
            with contextlib.ExitStack() as stack, names_url(self._url):
                scratch = tempfile.TemporaryDirectory(prefix="patchwave_jax-")
                self.folder = Path(stack.enter_context(scratch))
                self._system, self._root = fsspec.core.url_to_fs(self._url)
                self._download(self._system)
                self._scratch = stack.pop_all()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if not self._url:
            return
        with self._scratch:
            try:
                self.publish()
            except UserError as error:
                if kind is None:  # otherwise report the earlier error
                    raise
                logging.error("%s", error)

    def publish(self) -> None:
        """Uploads the files that changed since the last call, if `path` is a URL.

        Raises:
          UserError: if the bucket can't be written.
        """
        if self._system is None or not is_first():
            return
        files = (path for path in self.folder.rglob("*") if path.is_file())
        for file in sorted(path for path in files if path.name != LOCK_NAME):
            if self._published.get(file) != (stamp := _stamp(file)):
                name = file.relative_to(self.folder).as_posix()
                with names_url(f"{self._url}/{name}", writing=True):
                    self._system.put_file(str(file), f"{self._root}/{name}")
                self._published[file] = stamp

    def _download(self, system: Any) -> None:
        for name in system.find(self._root):
            relative = os.path.relpath(name, self._root)
            is_folder = name.endswith("/")
            if relative.split("/")[0] not in _NOT_DOWNLOADED and not is_folder:
                file = self.folder / relative
                file.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(name, str(file))
                self._published[file] = _stamp(file)


def as_path(path: str | os.PathLike[str]) -> epath.Path:
    """A working directory as a path, local or in a bucket.

    Raises:
      UserError: if it is a URL that is not gs://.
    """
    if not is_url(path):
        return epath.Path(path).resolve()
    if not os.fspath(path).startswith("gs://"):
        raise UserError(f"--workdir={os.fspath(path)} is neither a folder nor a gs:// URL")
    return epath.Path(path)


def clips_of(path: str | os.PathLike[str]) -> str:
    """Where to generate clips of a run: a local folder, because they are appended to."""
    return "generated" if is_url(path) else f"{os.fspath(path)}/generated"


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size
