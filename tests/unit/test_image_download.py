"""Downloads from a real server that behaves, and from one that doesn't."""

import asyncio
import gzip
import hashlib
import random
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.helpers.root import small_file_system
from tests.helpers.web import Site, serving

from atoll.errors import DownloadFailed, ImageRefused, InvalidInput, StorageFailed
from atoll.images.addresses import public
from atoll.images.checksums import Checksum
from atoll.images.download import Patience, downloaded
from atoll.model.operation import Progress

CONTENT = random.Random(7).randbytes(3 << 20)
RIGHT = Checksum("sha256", hashlib.sha256(CONTENT).hexdigest())
WRONG = Checksum("sha256", "0" * 64)
HASTY = Patience(connect=2, stall=0.4, attempts=4, progress=1000, first_pause=0.01, longest_pause=0.05)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site(files={"/disk.img": CONTENT})) as found:
        yield found


@asynccontextmanager
async def fetched(
    site: Site, into: Path, checksum: Checksum | None = RIGHT, *, path: str = "/disk.img", limit: int = 1 << 40
) -> AsyncIterator[Path]:
    async with downloaded(
        site.url + path, into=into, checksum=checksum, report=lambda _: None, limit=limit, patience=HASTY
    ) as file:
        yield file


async def content_of(site: Site, into: Path, checksum: Checksum | None = RIGHT, *, path: str = "/disk.img") -> bytes:
    async with fetched(site, into, checksum, path=path) as file:
        return file.read_bytes()


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.part"))


async def interrupted(site: Site, into: Path, after: int) -> None:
    """Download until the server stalls after so many bytes, then be cancelled."""
    site.stalls_after = [after]
    task = asyncio.create_task(content_of(site, into))
    async with asyncio.timeout(5):
        while not (parts(into) and parts(into)[0].stat().st_size >= after):
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_file_comes_whole_with_progress_and_is_gone_after_use(site: Site, tmp_path: Path) -> None:
    seen: list[Progress] = []
    async with downloaded(
        f"{site.url}/disk.img", into=tmp_path, checksum=RIGHT, report=seen.append, patience=HASTY
    ) as file:
        assert file.read_bytes() == CONTENT
    assert not parts(tmp_path)
    steps = [event for event in seen if event.step == "download"]
    assert [event.done for event in steps] == sorted(event.done for event in steps)
    assert (steps[-1].done, steps[-1].total, steps[-1].unit) == (len(CONTENT), len(CONTENT), "bytes")


async def test_a_dying_server_is_asked_again_for_what_is_missing(site: Site, tmp_path: Path) -> None:
    site.dies_after = [1_000_000, 1_000_000]
    assert await content_of(site, tmp_path) == CONTENT
    assert [asked[1] for asked in site.asked] == ["", "bytes=1000000-", "bytes=2000000-"]
    assert {asked[2] for asked in site.asked[1:]} == {site.etag}
    assert site.sent == len(CONTENT)


async def test_a_server_without_ranges_starts_over(site: Site, tmp_path: Path) -> None:
    site.ranges = False
    site.dies_after = [1_000_000]
    assert await content_of(site, tmp_path) == CONTENT
    assert site.sent == len(CONTENT) + 1_000_000


async def test_a_stalled_server_is_left_and_asked_again(site: Site, tmp_path: Path) -> None:
    site.stalls_after = [500_000]
    assert await content_of(site, tmp_path) == CONTENT
    assert site.asked[1][1] == "bytes=500000-"


async def test_a_cancelled_download_goes_on_in_the_next_call(site: Site, tmp_path: Path) -> None:
    await interrupted(site, tmp_path, after=1_500_000)
    assert await content_of(site, tmp_path) == CONTENT
    assert site.asked[-1][1] == "bytes=1500000-"


async def test_a_file_that_changed_meanwhile_is_fetched_anew(site: Site, tmp_path: Path) -> None:
    await interrupted(site, tmp_path, after=1_500_000)
    new = CONTENT[::-1]
    site.files["/disk.img"], site.etag = new, '"two"'
    assert await content_of(site, tmp_path, Checksum("sha256", hashlib.sha256(new).hexdigest())) == new


async def test_a_weak_tag_is_not_trusted_for_resuming(site: Site, tmp_path: Path) -> None:
    site.etag, site.modified = 'W/"weak"', "Mon, 01 Jan 2024 00:00:00 GMT"
    site.dies_after = [1_000_000]
    assert await content_of(site, tmp_path, None) == CONTENT
    assert site.asked[1][2] == site.modified


async def test_without_any_tag_only_a_checksum_allows_resuming(site: Site, tmp_path: Path) -> None:
    site.etag = ""
    site.dies_after = [1_000_000]
    assert await content_of(site, tmp_path, None) == CONTENT
    site.dies_after = [1_000_000]
    assert await content_of(site, tmp_path, RIGHT) == CONTENT
    assert [asked[1] for asked in site.asked] == ["", "", "", "bytes=1000000-"]


async def test_a_file_that_was_already_whole_is_not_sent_again(site: Site, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        async with fetched(site, tmp_path):
            raise RuntimeError("the disk was full, say")
    before = site.sent
    assert await content_of(site, tmp_path, RIGHT) == CONTENT
    with pytest.raises(RuntimeError):
        async with fetched(site, tmp_path, None):
            raise RuntimeError
    between = site.sent
    assert await content_of(site, tmp_path, None) == CONTENT
    assert (before, site.sent) == (len(CONTENT), between)
    assert site.asked[-1][1] == f"bytes={len(CONTENT)}-"


async def test_a_refused_image_is_not_kept(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ImageRefused):
        async with fetched(site, tmp_path):
            raise ImageRefused("it is a bomb")
    assert not parts(tmp_path)


async def test_a_wrong_checksum_is_told_and_nothing_is_kept(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadFailed, match=f"wrong checksum: {RIGHT} came instead of {WRONG}"):
        await content_of(site, tmp_path, WRONG)
    assert not parts(tmp_path)


async def test_a_damaged_part_is_found_by_the_checksum(site: Site, tmp_path: Path) -> None:
    await interrupted(site, tmp_path, after=1_500_000)
    with parts(tmp_path)[0].open("r+b") as file:
        file.write(b"damage")
    with pytest.raises(DownloadFailed, match="wrong checksum"):
        await content_of(site, tmp_path)
    assert await content_of(site, tmp_path) == CONTENT


async def test_a_server_that_never_delivers_is_given_up_with_the_part_kept(site: Site, tmp_path: Path) -> None:
    site.dies_after = [1_000_000, *([0] * 50)]
    with pytest.raises(DownloadFailed, match=r"976\.6KiB are kept"):
        await content_of(site, tmp_path)
    assert len(site.asked) == 1 + HASTY.attempts - 1
    assert parts(tmp_path)[0].stat().st_size == 1_000_000


async def test_a_server_that_restarts_and_dies_at_the_same_place_is_given_up(site: Site, tmp_path: Path) -> None:
    site.ranges = False
    site.dies_after = [1_000_000] * 50
    with pytest.raises(DownloadFailed):
        await content_of(site, tmp_path)
    assert len(site.asked) < 10


async def test_passing_errors_of_the_server_are_retried(site: Site, tmp_path: Path) -> None:
    site.statuses = [503, 429]
    assert await content_of(site, tmp_path) == CONTENT


@pytest.mark.parametrize("status", [401, 403, 410])
async def test_final_errors_of_the_server_are_told_at_once(site: Site, tmp_path: Path, status: int) -> None:
    site.statuses = [status]
    with pytest.raises(DownloadFailed, match=f"the server says {status}"):
        await content_of(site, tmp_path)
    assert len(site.asked) == 1


async def test_a_missing_file_is_told_with_its_address(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadFailed, match=r"/nothing: the server says 404 Not Found\. Check the address"):
        await content_of(site, tmp_path, path="/nothing")


async def test_nobody_there_is_a_failed_download(tmp_path: Path) -> None:
    with serving(Site()) as gone:
        pass
    with pytest.raises(DownloadFailed, match="4 times"):
        await content_of(gone, tmp_path)


async def test_redirects_are_followed_but_not_for_ever(site: Site, tmp_path: Path) -> None:
    site.redirects = {"/latest": "/disk.img", "/round": "/round", "/file": "file:///etc/passwd"}
    assert await content_of(site, tmp_path, path="/latest") == CONTENT
    for path in ("/round", "/file"):
        with pytest.raises(DownloadFailed):
            await content_of(site, tmp_path, path=path)


async def test_the_proxy_of_the_environment_is_used(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", site.url)
    address = "http://publisher.invalid/disk.img"
    site.files[address] = CONTENT  # a proxy is asked for the whole address
    async with downloaded(address, into=tmp_path, checksum=RIGHT, report=lambda _: None, patience=HASTY) as file:
        assert file.read_bytes() == CONTENT


async def test_a_file_of_unknown_length_needs_a_proper_end_or_a_checksum(site: Site, tmp_path: Path) -> None:
    site.lengths = False
    with pytest.raises(DownloadFailed, match="where the file ends"):
        await content_of(site, tmp_path, None)
    assert await content_of(site, tmp_path, RIGHT) == CONTENT
    site.chunked = True
    assert await content_of(site, tmp_path, None) == CONTENT
    site.dies_after = [1]
    assert await content_of(site, tmp_path, None) == CONTENT


async def test_compressed_files_are_kept_as_they_are(site: Site, tmp_path: Path) -> None:
    site.files["/disk.gz"] = packed = gzip.compress(CONTENT)
    assert await content_of(site, tmp_path, None, path="/disk.gz") == packed


async def test_more_than_the_limit_is_refused(site: Site, tmp_path: Path) -> None:
    for site.chunked in (False, True):
        with pytest.raises(DownloadFailed, match="more than 1MiB"):
            async with fetched(site, tmp_path, limit=1 << 20):
                pass


async def test_an_empty_file_is_one_clear_error(site: Site, tmp_path: Path) -> None:
    site.files["/disk.img"] = b""
    with pytest.raises(DownloadFailed, match="it is empty"):
        await content_of(site, tmp_path)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://example.org/x", "/etc/passwd", "http://", "http://x:99999/", "http://[", ""]
)
async def test_only_http_addresses_are_taken(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no http:// or https:// address"):
        async with downloaded(url, into=tmp_path, checksum=None, report=lambda _: None):
            pass


def test_secrets_in_an_address_are_not_shown() -> None:
    assert public("https://me:secret@example.org:8443/a/b.img?token=x#y") == "https://example.org:8443/a/b.img"


async def test_two_processes_at_once_both_get_the_whole_file(site: Site, tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import asyncio, hashlib, sys
        from pathlib import Path
        from atoll.images.download import downloaded
        async def main():
            async with downloaded(sys.argv[1], into=Path(sys.argv[2]), checksum=None, report=lambda _: None) as file:
                print(hashlib.sha256(file.read_bytes()).hexdigest())
        asyncio.run(main())
    """)
    argv = [sys.executable, "-c", code, f"{site.url}/disk.img", str(tmp_path)]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in both] == [RIGHT.digest] * 2
    assert not parts(tmp_path)


async def test_a_full_disk_is_told_before_and_while_it_fills(site: Site, small_disk: Path) -> None:
    site.files["/big"] = bytes(80 << 20)
    with pytest.raises(StorageFailed, match="No space left on device"):
        await content_of(site, small_disk, None, path="/big")
    assert site.sent < 80 << 20  # it was told before all was sent
    site.chunked = True
    with pytest.raises(StorageFailed, match="No space left on device"):
        await content_of(site, small_disk, None, path="/big")
    assert parts(small_disk)[0].stat().st_size > 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 70 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    with small_file_system(folder, size="70m"):
        yield folder
