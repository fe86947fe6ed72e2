"""The one exception for mistakes a user can mend, and how a command reports it."""

import functools
import sys
from collections.abc import Callable

EXIT_CODE = 2


class UserError(Exception):
    """Bad input: the message names the file, field or flag and says what to do about it."""


def exits_cleanly(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command's `main`: a `UserError` becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args: object) -> None:
        try:
            main(*args)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(EXIT_CODE)

    return wrapped
