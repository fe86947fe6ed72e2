"""The one exception for mistakes a user can mend, and how a command reports it."""

import contextlib
import errno
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

EXIT_CODE = 2


class UserError(Exception):
    """Bad input: the message names the file, field or flag and says what to do about it."""


def require(ok: bool, field: str, what: str) -> None:
    """Raises `UserError` about a field of the configuration unless `ok`."""
    if not ok:
        raise UserError(f"config.{field} {what}")


def shown(name: object) -> str:
    """A path or other text of the user's on one line: what does not print is escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in str(name)
    )


_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit on a file's size",
    errno.EROFS: "make it writable, or choose another place",
    errno.EACCES: "make it accessible, or choose another place",
    errno.EPERM: "make it accessible, or choose another place",
    errno.EIO: "mend the disk, or choose another place",
}


@contextlib.contextmanager
def names_file(directory: object = "", then: str = "") -> Iterator[None]:
    """Within it an `OSError` becomes a `UserError`: the file (or `directory`), cause and remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the path")
        raise UserError(
            f"{shown(error.filename or directory)}: {error.strerror or error}; {remedy}{then}"
        ) from error


def check_output(path: Path | None, overwrite: bool) -> None:
    """Raises `UserError` if a file that is to be written exists, or its folder does not."""
    if path is None:
        return
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; give --overwrite to replace it, or another name")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder; make it first")


def exits_cleanly(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command's `main`: bad input becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args: object) -> None:
        try:
            with names_file("error"):
                main(*args)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(EXIT_CODE)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            told = (str(error) or "no memory is left").splitlines()[0]
            print(
                f"error: {told}; compute less at once (config.train.micro_batch_size, "
                "config.run.phase_chunk) or shorten config.context_samples",
                file=sys.stderr,
            )
            sys.exit(EXIT_CODE)

    return wrapped
