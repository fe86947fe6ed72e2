"""A directory for one process at a time, by a lock that a dead process doesn't hold."""

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from absl import logging

from patchwave_jax.errors import UserError

FILENAME = ".lock"


class Lock:
    """Holds `directory` until it is released, as a context manager or when it is forgotten."""

    def __init__(self, directory: str | os.PathLike[str], flag: str):
        """Locks `directory`, which the user chose by `flag`, and makes it if need be.

        Raises:
          UserError: if another process holds it, or nothing can be written there.
        """
        self._file = -1
        path = Path(directory) / FILENAME
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"can't write in {directory}: {error.strerror}; make it writable, make room, or "
                f"choose another {flag}"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._file, 200).decode(errors="replace").strip()
            self.release()
            raise UserError(
                f"{directory} is in use by another process ({holder}); wait for its end, or "
                f"choose another {flag}"
            ) from None
        except OSError as error:
            logging.warning("%s can't be locked (%s): use it once at a time", path, error.strerror)
        with contextlib.suppress(OSError):  # on a full disk: only to tell who it is
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Lets others have it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()
