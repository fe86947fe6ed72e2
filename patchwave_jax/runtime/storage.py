"""Atomic writes of files, locks of directories, and URLs of buckets."""

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from patchwave_jax.errors import UserError

LOCK_NAME = ".lock"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames what is written there to `path`.

    If anything fails, the temporary file is removed and the previous one stays. The temporary name
    contains the process ID, so processes that write the same file don't disturb each other. A
    directory can be written too; it is discarded if another process has made `path` meanwhile.

    Raises:
      OSError: naming `path`, which `errors.names_file` and every command turn into a `UserError`.
    """
    if path.exists() and not path.is_file():  # a pipe or /dev/null can't be replaced
        yield path
        return
    path = Path(os.path.realpath(path))  # replaces what a link points to, not the link
    temporary = path.with_name(f"{path.name[:40]}.{os.getpid()}.tmp")
    try:
        yield temporary
        if not path.is_dir():
            temporary.replace(path)
    except OSError as error:
        if error.errno and str(error.filename) in ("None", str(temporary)):
            error.filename = str(path)
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file by `replacing`: readers see the old content or the new, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


class Lock:
    """Holds `directory` until `release`, as a context manager, or until the process dies."""

    def __init__(self, directory: str | os.PathLike[str], flag: str, wait: bool = False):
        """Locks `directory`, which the user chose by `flag`, and creates it if necessary.

        With `wait`, waits for another process that holds it.

        Raises:
          UserError: if another process holds it, or nothing can be written there.
        """
        self._file = -1
        path = Path(directory) / LOCK_NAME
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"can't write in {directory}: {error.strerror}; make it writable, make room, or "
                f"choose another {flag}"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.read(self._file, 200).decode(errors="replace").strip()
            self.release()
            raise UserError(
                f"{directory} is in use by another process ({holder}); wait until it ends, or "
                f"choose another {flag}"
            ) from None
        except OSError as error:
            logging.warning(
                "%s can't be locked (%s): use it from one process at a time", path, error.strerror
            )
        with contextlib.suppress(OSError):  # the disk may be full, and this is only information
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Unlocks the directory."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a URL, such as `gs://bucket/data`, and not a path of this host."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def names_url(url: str, writing: bool = False) -> Iterator[None]:
    """Turns any exception of a file system into a `UserError` with URL, cause and remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each file system has its own exceptions
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, FileNotFoundError):
            cause = f"nothing is there ({cause})"
        can, may, role = ("written", "write", "User") if writing else ("read", "read", "Viewer")
        remedy = f"check the URL, and that this account may {may} there"
        if url.startswith(("gs://", "gcs://")):
            remedy += f" (storage.object{role}; gcloud auth application-default login)"
        if isinstance(error, ImportError):
            remedy = "pip install 'patchwave-jax[gcs]' for gs://, or the package named here"
        raise UserError(f"{url} can't be {can}: {cause}; {remedy}") from error
