"""What strangers send through the API to be used: disks, archives and bundles that lie, and more than the disk has."""

import hashlib
import io
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tests.helpers import image_files as files
from tests.helpers.agents import agent
from tests.helpers.api_client import api
from tests.helpers.images import adopt_cached

from atoll.host import facts
from atoll.layout import Layout
from atoll.operations import bundle_format

pytestmark = pytest.mark.vm
MIB = 1 << 20
BYTES = {"Content-Type": "application/octet-stream"}


async def begun(client: httpx.AsyncClient, size: int, **more: Any) -> str:
    made = await client.post("/v1/uploads", json={"size": size, **more})
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


async def sent(client: httpx.AsyncClient, upload: str, content: bytes, offset: int = 0) -> httpx.Response:
    return await client.patch(f"/v1/uploads/{upload}", content=content, headers=BYTES | {"Upload-Offset": str(offset)})


async def uploaded(client: httpx.AsyncClient, content: bytes) -> str:
    upload = await begun(client, len(content))
    assert (await sent(client, upload, content)).status_code == 204
    return upload


@pytest.fixture
async def client(layout: Layout) -> AsyncIterator[httpx.AsyncClient]:
    async with agent(layout), api(layout) as made:
        yield made


DISKS = {
    "a backing file": files.qcow2(backing=b"/etc/shadow"),
    "a backing file as JSON": files.qcow2(backing=b'json:{"driver":"file","filename":"/etc/shadow"}'),
    "a data file elsewhere": files.qcow2(extensions=files.qcow2_extension(0x44415441, b"/etc/shadow")),
    "8 EiB": files.qcow2(size=1 << 63, l1_entries=1 << 22, cluster_bits=21),
    "a table of 4 GiB": files.qcow2(l1_entries=1 << 29),
    "endless refcounts": files.qcow2(refcount_clusters=1 << 30),
    "endless snapshots": files.qcow2(snapshots=1 << 31),
    "an extent elsewhere": files.vmdk(descriptor=files.VMDK_DESCRIPTOR.replace("disk.vmdk", "../../etc/shadow")),
    "a parent": files.vhdx(flags=2),
    "an endless block map": files.vdi(size=1 << 50, blocks=1 << 30),
    "nothing": b"",
}


async def test_disks_that_lie_are_refused_and_tell_nothing_of_this_computer(
    client: httpx.AsyncClient, layout: Layout
) -> None:
    for label, content in DISKS.items():
        upload = await uploaded(client, content)
        refused = await client.post("/v1/images/import", json={"upload": upload, "name": "evil"})
        assert (400 <= refused.status_code < 500, refused.json()["code"]) == (True, "image-refused"), (
            label,
            refused.text,
        )
        assert str(layout.data) not in refused.text, label
        await client.delete(f"/v1/uploads/{upload}")
        assert not list(layout.temporary.iterdir()), label
    assert (await client.get("/v1/images")).json() == []
    # Nor is one upload a way to another one's file, or to the agent's own.
    upload = await uploaded(client, files.bzimage())
    for other in ("0" * 32, "../../atoll.db", "/etc/passwd"):
        refused = await client.post("/v1/images/import", json={"upload": upload, "name": "evil", "initrd": other})
        assert refused.status_code in (400, 404), refused.text


def archives() -> dict[str, bytes]:
    """As `tar` would unpack them: out of their folder, or through links."""

    def member(name: str, content: bytes = b"x", **changes: Any) -> tuple[tarfile.TarInfo, bytes]:
        info = tarfile.TarInfo(name)
        info.size = len(content) if "type" not in changes else 0
        for key, value in changes.items():
            setattr(info, key, value)
        return info, content

    def archive(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode=mode) as tar:  # type: ignore[call-overload]
            for info, content in members:
                tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
        return out.getvalue()

    manifest = (tarfile.TarInfo(bundle_format.MANIFEST), b"{}")
    manifest[0].size = 2
    made = {
        "..": archive(member("../../../../tmp/atoll-evil")),
        "an absolute name": archive(member("/tmp/atoll-evil")),
        "a link as the manifest": archive(member(bundle_format.MANIFEST, type=tarfile.SYMTYPE, linkname="/etc/shadow")),
        "a hard link": archive(manifest, member("atoll-bundle-1/memory", type=tarfile.LNKTYPE, linkname="/etc/shadow")),
        "a device": archive(manifest, member("atoll-bundle-1/memory", type=tarfile.CHRTYPE)),
        "gzip": archive(manifest, mode="w:gz"),
        "xz": archive(member("x", bytes(64 * MIB)), mode="w:xz"),
    }
    lie = bundle_format.header(bundle_format.MANIFEST, 1 << 40)
    made["a manifest of a terabyte"] = lie + bytes(MIB)
    nested = b'{"layers":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    made["a manifest without a bottom"] = bundle_format.plain_member(
        bundle_format.MANIFEST, nested
    ) + bundle_format.sums(nested)
    return made


async def test_archives_that_lie_are_refused_in_both_ways_in(client: httpx.AsyncClient, layout: Layout) -> None:
    for label, content in archives().items():
        upload = await uploaded(client, content)
        for refused in (
            await client.post("/v1/import", params={"upload": upload, "name": "evil"}),
            await client.post("/v1/import", params={"name": "evil"}, content=content, headers=BYTES),
        ):
            assert 400 <= refused.status_code < 500, (label, refused.text)
            assert refused.json()["code"] == "image-refused", (label, refused.text)
            assert len(refused.text) < 2000, label
        await client.delete(f"/v1/uploads/{upload}")
        assert not list(layout.temporary.iterdir()), label
    assert (await client.get("/v1/vms")).json() == []
    assert not Path("/tmp/atoll-evil").exists()


async def test_a_layer_of_a_bundle_that_names_a_file_of_the_host_is_refused(layout: Layout) -> None:
    """All checksums are right, since whoever lies makes them."""
    await adopt_cached("tiny", layout)
    async with agent(layout), api(layout) as client:
        made = await client.post("/v1/vms", json={"name": "v", "memory": "64MiB", "disks": [{"size": "1MiB"}]})
        assert made.status_code == 200, made.text
        written = (await client.post("/v1/exports", json={"source": "v"})).json()
        whole = (await client.get(f"/v1/exports/{written['id']}")).content
        await client.delete(f"/v1/exports/{written['id']}")
        size = int(whole[124:135], 8)
        manifest = msgspec.json.decode(whole[512 : 512 + size])
        evil = files.qcow2(backing=b"/etc/shadow", size=MIB)
        layer = manifest["layers"][0]["layer"] | {"id": "e" * 32, "sha256": hashlib.sha256(evil).hexdigest()}
        layer |= {"virtual_size": MIB, "parent": None}
        disk = manifest["snapshot"]["spec"]["disks"][0] | {"layer": layer["id"], "size": MIB}
        manifest["snapshot"]["spec"]["disks"] = [disk]
        manifest |= {"layers": [{"layer": layer, "size": len(evil)}], "memory": None, "blobs": []}
        content = msgspec.json.encode(manifest)
        lying = bundle_format.plain_member(bundle_format.MANIFEST, content) + bundle_format.sums(content)
        lying += bundle_format.plain_member(f"{bundle_format.ROOT}layers/{layer['id']}.qcow2", evil)
        lying += bundle_format.end()
        upload = await uploaded(client, lying)
        refused = await client.post("/v1/import", params={"upload": upload, "name": "evil"})
        assert refused.json()["code"] == "image-refused", refused.text
        assert "backing file" in refused.text
        await client.delete(f"/v1/uploads/{upload}")
        assert not list(layout.temporary.iterdir())
        assert [each["vm"]["name"] for each in (await client.get("/v1/vms")).json()] == ["v"]
        await client.delete("/v1/vms/v", params={"force": True})


async def test_uploads_leave_room_on_the_disk(small_home: Path, layout: Layout) -> None:
    async with agent(layout), api(layout) as client:
        reserve = facts.disk_reserve(small_home)
        assert reserve > 8 * MIB
        refused = await client.post("/v1/uploads", json={"size": facts.free_disk(small_home) - reserve // 2})
        assert (refused.status_code, refused.json()["code"]) == (507, "storage-failed")
        assert "kept for what runs here" in refused.text

        # Each of them would have room; all of them together haven't.
        half = facts.free_disk(small_home) * 2 // 3
        uploads = [await begun(client, half) for _ in range(3)]
        noise, statuses = os.urandom(8 * MIB), []
        for upload in uploads:
            for offset in range(0, half, len(noise)):
                answer = await sent(client, upload, noise[: half - offset], offset)
                statuses.append(answer.status_code)
                if answer.status_code != 204:
                    break
            # Where it would go beyond the reserve it is told, and others still write.
            assert facts.free_disk(small_home) >= reserve
        assert set(statuses) == {204, 507}
        assert (await client.post("/v1/groups", json={"name": "still"})).status_code == 200
        # Nobody goes on with the first two, so they make room where there is little: as many as it takes.
        for upload in uploads[:2]:
            for path in (layout.transfer("upload", upload).folder, *layout.transfer("upload", upload).folder.iterdir()):
                os.utime(path, (1.0, path.stat().st_mtime - 1200))
        again = await begun(client, 32 * MIB)
        assert (await sent(client, again, noise)).status_code == 204
        left = {path.name.removeprefix("upload-") for path in layout.temporary.iterdir()}
        assert {uploads[2], again} < left and len(left) == 3


async def test_a_body_that_is_longer_than_the_upload_is_refused_on_the_way(
    client: httpx.AsyncClient, layout: Layout
) -> None:
    upload = await begun(client, 3 * MIB)
    came = 0

    async def more() -> AsyncIterator[bytes]:
        nonlocal came
        while came < 1 << 30:
            came += MIB
            yield b"x" * MIB

    try:
        refused = await client.patch(f"/v1/uploads/{upload}", content=more(), headers=BYTES | {"Upload-Offset": "0"})
        assert (refused.status_code, refused.json()["code"]) == (400, "invalid-input")
    except httpx.WriteError:
        pass
    assert came < 1 << 30
    assert layout.transfer("upload", upload).content.stat().st_size <= 3 * MIB
    # What was right of it is kept; the rest can be sent.
    offset = int((await client.head(f"/v1/uploads/{upload}")).headers["upload-offset"])
    assert (await sent(client, upload, b"x" * (3 * MIB - offset), offset)).status_code == 204
