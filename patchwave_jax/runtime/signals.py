"""SIGTERM and Ctrl-C, heard where a loop can stop and save."""

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def stop_requested(shared: bool = False) -> Iterator[Callable[[], bool]]:
    """Within it, a first SIGTERM or Ctrl-C only makes the yielded function say True.

    If it is `shared`, JAX hears SIGTERM, for `distributed.stop_agreed`; Ctrl-C becomes one.
    """
    received: list[int] = []
    signals = (signal.SIGINT,) if shared else (signal.SIGTERM, signal.SIGINT)

    def note(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        if shared:
            signal.raise_signal(signal.SIGTERM)

    before = [signal.signal(number, note) for number in signals]
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
