"""Changes for one who insists on what a thing is. The look and the change are under one lock, so that of two who
change the same version one wins, and the other is told."""

import contextlib
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar

from atoll.errors import Changed


class _Expectation:
    def __init__(self, subject: str, versions: Collection[str], now: Callable[[], str]) -> None:
        self._subject = subject
        self._versions = versions
        self._now = now
        self._held = False

    def look(self) -> None:
        if self._now() not in self._versions:
            raise Changed(
                "it was changed meanwhile",
                "its version is another one than the one that the change is for",
                "Read it again, and decide anew.",
            )

    def locked(self, subject: str) -> None:
        # Only the first time: what the verb itself changes under its lock is no reason to stop it.
        if subject == self._subject and not self._held:
            self.look()
            self._held = True


_expected: ContextVar[_Expectation | None] = ContextVar("expected", default=None)


@contextlib.contextmanager
def expecting(subject: str, versions: Collection[str], now: Callable[[], str]) -> Iterator[None]:
    """What is done within is done only if the subject has one of the versions. Raises `Changed`.

    A verb that takes no lock changes no record; for that one the look is now.
    """
    expectation = _Expectation(subject, versions, now)
    expectation.look()
    token = _expected.set(expectation)
    try:
        yield
    finally:
        _expected.reset(token)


def locked(subject: str) -> None:
    """The subject's lock is held now. Raises `Changed`."""
    if (expectation := _expected.get()) is not None:
        expectation.locked(subject)
