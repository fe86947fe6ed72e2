"""A run's working directory: a folder, or an address in a bucket such as `gs://bucket/runs/pw`.

Checkpoints are written and read where they are, by orbax. The other files of a run in a bucket are
appended to and renamed, which a bucket can't: they live in a temporary folder, are fetched from
the bucket when a command starts, and go there when `publish` says so.
"""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import fsspec
from absl import logging
from etils import epath

from patchwave_jax.data.remote import is_address, names_address
from patchwave_jax.errors import UserError
from patchwave_jax.runtime.distributed import is_first
from patchwave_jax.runtime.lock import FILENAME as LOCK

LEFT = ("checkpoints", "damaged", "profile", "tensorboard")  # there when the others are fetched


class Workdir:
    """The files of a run but its checkpoints, in `folder`. A context manager: `publish` ends it."""

    def __init__(self, place: str | os.PathLike[str]):
        self._address = os.fspath(place) if is_address(place) else ""
        self._system, self._published = None, {}
        self.folder = Path(place)

    def __enter__(self) -> "Workdir":
        """Fetches what is in the bucket, where `place` is an address.

        Raises:
          UserError: if it can't be read, or is of a kind that checkpoints can't be at.
        """
        if self._address:
            as_path(self._address)
            with contextlib.ExitStack() as stack, names_address(self._address):
                scratch = tempfile.TemporaryDirectory(prefix="patchwave_jax-")
                self.folder = Path(stack.enter_context(scratch))
                self._system, self._root = fsspec.core.url_to_fs(self._address)
                self._fetch(self._system)
                self._scratch = stack.pop_all()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if not self._address:
            return
        with self._scratch:
            try:
                self.publish()
            except UserError as error:
                if kind is None:  # else what went wrong before is what to tell
                    raise
                logging.error("%s", error)

    def publish(self) -> None:
        """Copies what is new in `folder` to the bucket, if there is one.

        Raises:
          UserError: if it can't be written there.
        """
        if self._system is None or not is_first():
            return
        for file in sorted(p for p in self.folder.rglob("*") if p.is_file() and p.name != LOCK):
            if self._published.get(file) != (now := _stamp(file)):
                name = file.relative_to(self.folder).as_posix()
                with names_address(f"{self._address}/{name}", writing=True):
                    self._system.put_file(str(file), f"{self._root}/{name}")
                self._published[file] = now

    def _fetch(self, system: Any) -> None:
        for name in system.find(self._root):
            relative = os.path.relpath(name, self._root)
            if relative.split("/")[0] not in LEFT and not name.endswith("/"):  # an empty folder
                file = self.folder / relative
                file.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(name, str(file))
                self._published[file] = _stamp(file)


def as_path(place: str | os.PathLike[str]) -> epath.Path:
    """A working directory as a path, of a folder or of a bucket.

    Raises:
      UserError: if it is at an address of another kind.
    """
    if not is_address(place):
        return epath.Path(place).resolve()
    if not os.fspath(place).startswith("gs://"):
        raise UserError(f"--workdir={os.fspath(place)} is neither a folder nor at gs://")
    return epath.Path(place)


def clips_of(place: str | os.PathLike[str]) -> str:
    """Where to have clips of a run: a folder, since they grow as they are made."""
    return "generated" if is_address(place) else f"{os.fspath(place)}/generated"


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_mtime_ns, found.st_size
