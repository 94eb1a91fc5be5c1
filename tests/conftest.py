"""What all tests share: a home of their own, real images built once, and a look behind that nothing is left."""

import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from atoll.layout import Layout
from atoll.model import chain
from atoll.operations import merge
from tests.helpers import leftovers
from tests.helpers.images import adopt_cached
from tests.helpers.machines import Factory
from tests.helpers.root import small_file_system

RESULTS = Path(__file__).parent.parent / "test-results"

# How long an example takes says how busy the computer is.
settings.register_profile("atoll", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("atoll")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Let fixtures see whether the test failed, so that they keep its logs."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    setattr(item, f"report_{report.when}", report)


def failed(request: pytest.FixtureRequest) -> bool:
    report = getattr(request.node, "report_call", None)
    return report is None or report.failed


@pytest.fixture
def home(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh ATOLL_HOME. After a failure the logs of its VMs are kept in test-results/; every QEMU of it is ended."""
    folder = Path(tempfile.mkdtemp(prefix="atoll-test-"))
    folder.chmod(0o755)
    monkeypatch.setenv("ATOLL_HOME", str(folder))
    try:
        yield folder
    finally:
        left = leftovers.end_processes_of(folder)
        if failed(request):
            leftovers.keep_logs(folder, RESULTS / request.node.nodeid.replace("/", "_").replace("::", "."))
        shutil.rmtree(Layout(data=folder / "data", cache=folder, run=folder).templates, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        if not failed(request) and not request.node.get_closest_marker("leaves_processes"):
            assert not left, f"the test left processes behind: {left}"


@pytest.fixture
def small_home(home: Path) -> Iterator[Path]:
    """The home on a file system of its own, which can be filled, and made read-only."""
    with small_file_system(home, size="600m"):
        yield home


@pytest.fixture
def layout(home: Path) -> Layout:
    return Layout(data=home / "data", cache=home / "cache", run=home / "run")


@pytest.fixture
async def factory(layout: Layout) -> AsyncIterator[Factory]:
    """Makes VMs that are removed after the test: `vm = await factory.run("tiny")`."""
    async with Factory(layout) as machines:
        yield machines


@pytest.fixture
def with_image(layout: Layout) -> Callable[[str], Awaitable[str]]:
    """Puts a built image into the test's home: `name = await with_image("tiny")`."""

    async def put(recipe: str) -> str:
        return await adopt_cached(recipe, layout)

    return put


@pytest.fixture
def short_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test says itself when layers are merged, and there are soon too many of them."""
    monkeypatch.setattr(merge, "begin", lambda services, vm_id: None)
    monkeypatch.setattr(merge, "LONGEST", 2)
    monkeypatch.setattr(chain, "LONGEST", 2)
    monkeypatch.setattr(chain, "AFTER", 1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "leaves_processes: the test ends QEMU by other means than Atoll's")
    os.environ.pop("ATOLL_HOME", None)
    # A shell that starts tests in its background has them, and all that they start, ignore Ctrl-C.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
