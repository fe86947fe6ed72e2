"""The exception for mistakes that a user can fix, and how a command reports it."""

import contextlib
import errno
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

EXIT_CODE = 2


class UserError(Exception):
    """Bad input: the message names the file, field or flag and says what to do."""


def require(ok: bool, field: str, what: str) -> None:
    """Raises `UserError` about a field of the configuration unless `ok`."""
    if not ok:
        raise UserError(f"config.{field} {what}")


def printable(name: object) -> str:
    """A path or other text from the user on one line, with non-printing characters escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in str(name)
    )


def listed(names: Sequence[str], limit: int = 20) -> str:
    """The first `limit` names, comma-separated and `printable`, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return printable(", ".join(names[:limit])) + more


_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the file size limit",
    errno.EROFS: "make it writable, or choose another location",
    errno.EACCES: "make it accessible, or choose another location",
    errno.EPERM: "make it accessible, or choose another location",
    errno.EIO: "repair the disk, or choose another location",
}


@contextlib.contextmanager
def names_file(path: object = "", then: str = "") -> Iterator[None]:
    """Turns an `OSError` into a `UserError` with the file (or `path`), cause and remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the path")
        raise UserError(
            f"{printable(error.filename or path)}: {error.strerror or error}; {remedy}{then}"
        ) from error


def check_output(path: Path | None, overwrite: bool) -> None:
    """Raises `UserError` if the output file exists already, or its folder does not."""
    if path is None:
        return
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; give --overwrite to replace it, or another name")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a folder; create it first")


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
            cause = (str(error) or "out of memory").splitlines()[0]
            print(
                f"error: {cause}; reduce config.train.micro_batch_size, config.run.phase_chunk or "
                "config.context_samples",
                file=sys.stderr,
            )
            sys.exit(EXIT_CODE)

    return wrapped
