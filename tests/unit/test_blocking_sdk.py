"""The blocking SDK: the same names and parameters as the asynchronous one, and calls that end cleanly."""

import asyncio
import inspect
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import atoll
from atoll.errors import NotFound, WrongState
from atoll.model.requests import CreateRequest
from atoll.model.vm import ExecRequest, ExecResult
from atoll.platform import api, blocking

PAIRS = [
    (api.AsyncHost, blocking.Host),
    (api.AsyncVm, blocking.Vm),
    (api.AsyncImages, blocking.Images),
    (api.AsyncOperations, blocking.Operations),
    (api.AsyncPools, blocking.Pools),
    (api.AsyncBackups, blocking.Backups),
    (api.AsyncNetworks, blocking.Networks),
    (api.AsyncGroups, blocking.Groups),
    (api.Terminal, blocking.BlockingTerminal),
]


def public_names(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def parameters(method: Any) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(method).parameters.values()
    return [(each.name, each.kind, each.default) for each in found]


@pytest.mark.parametrize(("awaited", "plain"), PAIRS)
def test_both_have_the_same_names_and_parameters(awaited: type, plain: type) -> None:
    assert public_names(awaited) == public_names(plain)
    for name in public_names(awaited):
        theirs, ours = getattr(awaited, name), getattr(plain, name)
        if isinstance(theirs, property):
            assert isinstance(ours, property)
        else:
            assert parameters(ours) == parameters(theirs), name
            assert not inspect.iscoroutinefunction(inspect.unwrap(ours)) or ours.__wrapped__ is theirs


class Guest:
    """The part of a VM that these tests need, on the loop's side."""

    id, name = "0" * 32, "web"

    def __init__(self) -> None:
        self.told: list[str] = []
        self.threads: set[int] = set()

    async def rename(self, name: str) -> None:
        self.threads.add(threading.get_ident())
        if name == "taken":
            raise NotFound("no such name")
        self.told.append(name)

    async def stop(self, *, force: bool = False, timeout: float = 60.0) -> None:
        self.told.append("stopping")
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.2)  # an undo takes its time, and awaits
            self.told.append("undone")

    async def exec(self, command: ExecRequest, *, stdin: Any, on_stdout: Any, on_stderr: Any) -> ExecResult:
        read = b"".join([piece async for piece in stdin])
        return ExecResult(exit_code=0, stdout=read)

    async def logs(
        self, *, follow: bool = False, tail: int | None = None, source: str = "serial"
    ) -> AsyncIterator[bytes]:
        try:
            for number in range(1000):
                yield b"%d" % number
        finally:
            self.told.append("no longer followed")


class Computer:
    """A host with one guest."""

    def __init__(self) -> None:
        self.guest, self.open = Guest(), False

    async def __aenter__(self) -> "Computer":
        self.open = True
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.open = False

    async def get(self, reference: str) -> Guest:
        return self.guest

    async def create(self, image: str | CreateRequest, *, report: Any = None, **options: object) -> Guest:
        self.guest.told.append(f"{image} {options}")
        return self.guest


@pytest.fixture
def computer() -> Computer:
    return Computer()


@pytest.fixture
def host(computer: Computer) -> Iterator[blocking.Host]:
    with blocking.Host(computer) as opened:  # type: ignore[arg-type]
        yield opened


def test_calls_run_on_a_loop_of_their_own_and_give_results_and_errors_back(
    host: blocking.Host, computer: Computer
) -> None:
    web = host.create("tiny", name="web", cpus=2)
    web.rename("v1")
    with pytest.raises(NotFound, match="no such name"):
        web.rename("taken")
    assert web.name == "web"
    assert computer.guest.told == ["tiny {'name': 'web', 'cpus': 2}", "v1"]
    assert threading.get_ident() not in computer.guest.threads


def test_the_host_is_closed_at_the_end_and_says_so_afterwards(computer: Computer) -> None:
    with blocking.Host(computer) as host:  # type: ignore[arg-type]
        web = host.get("web")
        assert computer.open
    assert not computer.open
    with pytest.raises(WrongState, match="not open"):
        web.rename("v2")


def test_an_iteration_that_is_broken_off_ends_on_the_other_side(host: blocking.Host, computer: Computer) -> None:
    lines = host.get("web").logs()
    for line in lines:
        if line == b"3":
            break
    lines.close()  # type: ignore[attr-defined]
    assert computer.guest.told == ["no longer followed"]
    assert len(list(host.get("web").logs())) == 1000


def test_stdin_may_be_an_open_file_or_any_iterable(host: blocking.Host, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(b"x" * 300_000)
    with big.open("rb") as file:
        assert host.get("web").exec(["cat"], stdin=file).stdout == big.read_bytes()
    assert host.get("web").exec(["cat"], stdin=iter([b"a", b"", b"b"])).stdout == b"ab"


def test_ctrl_c_waits_until_the_call_is_undone(host: blocking.Host, computer: Computer) -> None:
    main = threading.main_thread().ident
    assert main is not None

    def interrupt_twice() -> None:
        while "stopping" not in computer.guest.told:
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.1)
        signal.pthread_kill(main, signal.SIGINT)

    interrupter = threading.Thread(target=interrupt_twice)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        host.get("web").stop()
    interrupter.join()
    assert computer.guest.told == ["stopping", "undone"]
    host.get("web").rename("still-usable")


def test_many_threads_share_one_host(host: blocking.Host, computer: Computer) -> None:
    threads = [threading.Thread(target=host.get("web").rename, args=(f"v{number}",)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(computer.guest.told) == sorted(f"v{number}" for number in range(20))


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = (
        "import sys, atoll; print([m for m in ('asyncio', 'httpx', 'anyio', 'rich', 'msgspec') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_public_name_of_the_package_is_there() -> None:
    for name in atoll.__all__:
        assert getattr(atoll, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        atoll.nonsense  # noqa: B018
