"""Large files to and from an agent: they go on after a lost connection, are checked, and cost no memory."""

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from tests.helpers import image_files
from tests.helpers.agents import Served, agent
from tests.helpers.cutting_proxy import Proxy, proxy
from tests.helpers.images import adopt_cached

from atoll.errors import ImageRefused, InvalidInput, NetworkFailed, NotFound, StorageFailed, WrongState
from atoll.layout import Layout
from atoll.model.operation import Progress
from atoll.model.requests import ImportRequest
from atoll.model.transfer import Upload, UploadRequest
from atoll.operations import transfers
from atoll.platform import remote_transfers
from atoll.platform.remote import RemoteHost
from atoll.platform.wire import Place, Wire

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]
MIB = 1 << 20


@pytest.fixture
async def served(layout: Layout) -> AsyncIterator[Served]:
    await adopt_cached("tiny", layout)
    async with agent(layout) as running:
        yield running


@pytest.fixture
async def between(served: Served) -> AsyncIterator[Proxy]:
    async with proxy(served.layout.agent_socket) as made:
        yield made


@pytest.fixture
async def host(between: Proxy) -> AsyncIterator[RemoteHost]:
    """The agent, as from another computer."""
    async with RemoteHost(Place(url=between.url)) as reached:
        yield reached


@pytest.fixture
async def wire(served: Served) -> AsyncIterator[Wire]:
    made = Wire(Place(url="http://atoll", socket=str(served.layout.agent_socket)))
    yield made
    await made.close()


def sparse_iso(path: Path, size: int) -> Path:
    """A CD of so many bytes, most of them in no block of the disk."""
    path.write_bytes(image_files.iso(blocks=size // 2048)[: 40 << 10])
    with path.open("r+b") as file:
        file.truncate(size)
    return path


def peak(pid: int | str) -> int:
    """The most memory that a process has had since `forget_peak`."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def forget_peak(pid: int | str) -> int:
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak(pid)


def left(layout: Layout) -> list[str]:
    return [path.name for path in layout.temporary.iterdir()]


@pytest.mark.parametrize("size", [96 * MIB, pytest.param(2048 * MIB, marks=pytest.mark.slow)])
async def test_a_large_machine_goes_in_and_out_over_connections_that_break(
    host: RemoteHost, between: Proxy, served: Served, tmp_path: Path, size: int
) -> None:
    disc = sparse_iso(tmp_path / "Big Disc.iso", size)
    await host.images.ls()
    before = {each: forget_peak(each) for each in (served.pid, "self")}
    between.cuts = [10 * MIB, size // 3, 0]

    image = await host.images.import_file(ImportRequest(path=str(disc)))
    assert (image.name, image.source, image.disks[0].size) == ("big-disc:latest", disc.name, size)
    assert between.cuts == []
    vm = await host.create("big-disc", name="big", memory="64MiB")
    between.cuts = [size // 2]
    steps: list[Progress] = []
    await vm.export(tmp_path / "big.atoll", report=steps.append)
    assert between.cuts == []
    assert steps[-1].step == "download"
    assert steps[-1].done == steps[-1].total == (tmp_path / "big.atoll").stat().st_size > size

    await vm.rm()
    between.cuts = [size // 2]
    again = await host.import_bundle(tmp_path / "big.atoll", "again")
    assert between.cuts == []
    assert [each.size for each in await again.disks()] == [size]
    for each, was in before.items():
        assert peak(each) - was < 40 * MIB
    assert left(served.layout) == []
    await again.rm()


async def test_altered_bytes_are_refused(
    host: RemoteHost, between: Proxy, served: Served, wire: Wire, tmp_path: Path
) -> None:
    vm = await host.create("tiny", name="web", memory="64MiB")
    await vm.export(tmp_path / "bundle")
    middle = (tmp_path / "bundle").read_bytes()[4 * MIB :][:16]
    between.alter = (middle, middle[::-1])
    with pytest.raises(ImageRefused):
        await host.import_bundle(tmp_path / "bundle", "forged")
    assert [each.vm.name for each in await host.ls()] == ["web"]

    content = b"x" * 1000
    announced = await begin(wire, UploadRequest(size=1000, sha256=hashlib.sha256(content).hexdigest()))
    await send(wire, announced.id, 0, b"y" + content[1:])
    with pytest.raises(ImageRefused, match="isn't the one that was announced"):
        await wire.change("POST", "/v1/import", query={"upload": announced.id}, kind=None)
    await vm.rm()


async def begin(wire: Wire, request: UploadRequest) -> Upload:
    async with wire.request("POST", "/v1/uploads", content=msgspec.json.encode(request)) as response:
        return msgspec.json.decode(await response.aread(), type=Upload)


async def send(wire: Wire, upload: str, offset: int, content: bytes) -> None:
    headers = {"Upload-Offset": str(offset), "Content-Type": "application/octet-stream"}
    async with wire.request("PATCH", f"/v1/uploads/{upload}", content=content, headers=headers):
        pass


async def test_an_upload_says_how_far_it_is_and_takes_no_more(wire: Wire, served: Served) -> None:
    upload = await begin(wire, UploadRequest(size=10))
    path = f"/v1/uploads/{upload.id}"
    await send(wire, upload.id, 0, b"four")
    assert await remote_transfers._reached(wire, path) == 4
    async with wire.request("HEAD", path) as response:
        told = dict(response.headers)
    assert (told[b"upload-offset"], told[b"upload-length"]) == (b"4", b"10")
    with pytest.raises(WrongState, match="doesn't go on at 0"):
        await send(wire, upload.id, 0, b"four")
    with pytest.raises(WrongState, match="isn't whole"):
        await wire.change("POST", "/v1/import", query={"upload": upload.id}, kind=None)
    with pytest.raises(InvalidInput, match="larger than was said"):
        await send(wire, upload.id, 4, b"seven  ")
    assert await remote_transfers._reached(wire, path) == 4
    with pytest.raises(NotFound):
        await send(wire, "0" * 32, 0, b"")
    for name in ("../../atoll.db", "..%2f..%2fatoll.db"):
        with pytest.raises(NotFound):
            await send(wire, name, 0, b"")
    with pytest.raises(StorageFailed, match="doesn't fit on the disk"):
        await begin(wire, UploadRequest(size=1 << 50))


async def test_an_upload_that_is_gone_is_told_at_once(
    host: RemoteHost, between: Proxy, served: Served, tmp_path: Path
) -> None:
    disc = sparse_iso(tmp_path / "disc.iso", 64 * MIB)
    between.cuts = [8 * MIB]

    def forget(progress: Progress) -> None:
        for path in served.layout.temporary.glob("upload-*"):
            shutil.rmtree(path)

    async with asyncio.timeout(30):
        with pytest.raises(NotFound, match="there is no upload"):
            await host.images.import_file(ImportRequest(path=str(disc)), report=forget)


async def test_an_upload_outlives_the_agent(layout: Layout, wire: Wire, served: Served) -> None:
    upload = await begin(wire, UploadRequest(size=10))
    await send(wire, upload.id, 0, b"four")
    await served.end()
    async with agent(layout):
        await send(wire, upload.id, 4, b"or ten")
        assert await remote_transfers._reached(wire, f"/v1/uploads/{upload.id}") == 10


async def test_what_nobody_goes_on_with_is_removed(
    layout: Layout, wire: Wire, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = await begin(wire, UploadRequest(size=10))
    host = RemoteHost(wire.place)
    async with host:
        assert await host.prune() == []
        assert left(layout) == [f"upload-{upload.id}"]
    transfers.sweep(layout)
    assert left(layout) == [f"upload-{upload.id}"]
    monkeypatch.setattr(transfers, "_KINDS", {"upload": -1.0})
    transfers.sweep(layout)
    assert left(layout) == []


async def test_a_host_that_stays_away_is_told(
    host: RemoteHost, between: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_transfers, "PATIENCE", 1.0)
    disc = sparse_iso(tmp_path / "disc.iso", 4 * MIB)
    await host.images.ls()
    between.cuts = [1 << 20, *([0] * 1000)]
    async with asyncio.timeout(30):
        with pytest.raises(NetworkFailed, match="the connection to the agent"):
            await host.images.import_file(ImportRequest(path=str(disc)))


async def test_what_a_range_asks_for_is_sent(host: RemoteHost, wire: Wire) -> None:
    vm = await host.create("tiny", name="web", memory="64MiB")
    written = await remote_transfers.write_bundle(wire, remote_transfers.BundleRequest(source="web"), report=None)
    path = f"/v1/exports/{written.id}"

    async def fetched(part: str | None) -> tuple[int, dict[bytes, bytes], bytes]:
        headers = {"Range": part} if part else {}
        async with wire.request("GET", path, headers=headers, endless=True) as response:
            return response.status, dict(response.headers), await response.aread()

    status, headers, whole = await fetched(None)
    assert (status, len(whole), headers[b"etag"]) == (200, written.size, f'"{written.id}"'.encode())
    status, headers, some = await fetched("bytes=100-199")
    assert (status, some) == (206, whole[100:200])
    assert headers[b"content-range"] == f"bytes 100-199/{written.size}".encode()
    assert (await fetched(f"bytes={written.size - 5}-"))[2] == whole[-5:]
    assert (await fetched("bytes=0-1,5-6"))[2] == whole
    with pytest.raises(InvalidInput):
        await fetched(f"bytes={written.size}-")
    await vm.rm()
