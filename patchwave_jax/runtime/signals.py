"""Lets a loop stop and save on SIGTERM or Ctrl-C."""

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def stop_requested(shared: bool = False) -> Iterator[Callable[[], bool]]:
    """Yields a function that returns True after a first SIGTERM or Ctrl-C; a second one kills.

    With `shared`, JAX handles SIGTERM (see `distributed.stop_agreed`), and Ctrl-C raises SIGTERM.
    """
    received: list[int] = []
    signals = (signal.SIGINT,) if shared else (signal.SIGTERM, signal.SIGINT)

    def handle(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        if shared:
            signal.raise_signal(signal.SIGTERM)

    previous = [signal.signal(number, handle) for number in signals]
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)
