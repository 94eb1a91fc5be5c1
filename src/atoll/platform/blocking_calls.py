"""The façade without `await`: each call runs on an event loop in a thread of its own, and the caller waits for it.

Calls run as plain asyncio tasks, not in the portal's cancel scope: a scope cancels again at every `await` until it is
left, and would so disturb the undo of an operation. Ctrl-C cancels the call, waits until it is undone, and is raised.
"""

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from atoll.errors import Cancelled, WrongState

P = ParamSpec("P")
R = TypeVar("R")
Inner = TypeVar("Inner")


class Calls:
    """The loop's thread, while the host is open."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        portal: BlockingPortal = self._stack.enter_context(start_blocking_portal("asyncio"))
        self._loop = portal.call(asyncio.get_running_loop)

    def close(self) -> None:
        self._loop = None
        self._stack.close()

    def wait_for(self, make: Callable[[], Coroutine[Any, Any, R]]) -> R:
        """The coroutine's result. When the waiting is interrupted, it is cancelled, and has ended before we return."""
        loop = self._loop
        if loop is None:
            raise WrongState("the host is not open", next_step="Use it in `with atoll.connect() as host:`.")
        ended = threading.Event()
        tasks: list[asyncio.Task[R]] = []

        def begin() -> None:
            tasks.append(loop.create_task(make()))
            tasks[0].add_done_callback(lambda task: ended.set())

        loop.call_soon_threadsafe(begin)
        interruption: BaseException | None = None
        while not ended.is_set():
            try:
                ended.wait()
            except BaseException as error:
                # Only the first one cancels: a second would cancel the undo. Each step of an undo is bounded in time.
                if interruption is None:
                    loop.call_soon_threadsafe(lambda: tasks[0].cancel())
                interruption = error
        if interruption is not None:
            raise interruption
        try:
            return tasks[0].result()
        except asyncio.CancelledError:
            raise Cancelled("the call was cancelled", "its host was closed by another thread") from None

    def each(self, make: Callable[[], AsyncIterator[R]]) -> Iterator[R]:
        """The items as they come. Leaving the loop, or `close()`, ends the iteration on the other side too."""

        async def start() -> AsyncIterator[R]:
            return make()

        async def following() -> tuple[R, ...]:
            async for item in items:
                return (item,)
            return ()

        async def end() -> None:
            await items.aclose()  # type: ignore[attr-defined]  # they are generators

        items = self.wait_for(start)
        try:
            while found := self.wait_for(following):
                yield found[0]
        finally:
            if self._loop is not None:
                self.wait_for(end)


class Handle(Generic[Inner]):
    """Something of the asynchronous façade, with the calls that bring it here."""

    def __init__(self, inner: Inner, calls: Calls) -> None:
        self._inner = inner
        self._calls = calls

    def __repr__(self) -> str:
        return repr(self._inner)


def blocking(
    method: Callable[Concatenate[Inner, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Handle[Inner], P], R]:
    """The same method without `await`."""

    @functools.wraps(method)
    def call(self: Handle[Inner], /, *args: P.args, **kwargs: P.kwargs) -> R:
        bound: Callable[P, Coroutine[Any, Any, R]] = getattr(self._inner, method.__name__)
        return self._calls.wait_for(lambda: bound(*args, **kwargs))

    return call


def plain_iterator(
    method: Callable[Concatenate[Inner, P], AsyncIterator[R]],
) -> Callable[Concatenate[Handle[Inner], P], Iterator[R]]:
    """The same method with a plain iterator."""

    @functools.wraps(method)
    def call(self: Handle[Inner], /, *args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
        bound: Callable[P, AsyncIterator[R]] = getattr(self._inner, method.__name__)
        return self._calls.each(lambda: bound(*args, **kwargs))

    return call
