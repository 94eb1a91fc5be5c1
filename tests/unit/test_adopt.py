"""Files from outside: checked, recorded together with what needs them, and gone without a trace when they aren't."""

import hashlib
from pathlib import Path

import pytest
from tests.helpers.image_files import qcow2, qcow2_extension

from atoll.errors import ImageRefused, NotFound
from atoll.layout import Layout
from atoll.model.image import Image, ImageDisk, Layer
from atoll.model.names import new_id
from atoll.operations.adopt import Outside, adopt, agree, check, discard
from atoll.operations.services import Services

MIB = 1 << 20
KERNEL = b"kernel"


@pytest.fixture
def services(layout: Layout) -> Services:
    layout.temporary.mkdir(parents=True)
    return Services(layout)


def layer_of(folder: Path, content: bytes, *, parent: str | None = None, size: int = MIB) -> tuple[Path, Layer]:
    layer = Layer(
        id=new_id(), virtual_size=size, file_size=0, sha256=hashlib.sha256(content).hexdigest(), parent=parent
    )
    path = folder / f"{layer.id}.qcow2"
    path.write_bytes(content)
    return path, layer


def some(folder: Path) -> Outside:
    """Two layers, the upper with a path of another computer's in its header, a kernel and memory."""
    folder.mkdir()
    below = layer_of(folder, qcow2())
    above = layer_of(folder, qcow2(backing=b"/elsewhere/x.qcow2"), parent=below[1].id)
    (folder / "kernel").write_bytes(KERNEL)
    (folder / "memory").write_bytes(b"ram")
    return Outside(
        layers=(below, above),
        blobs=((folder / "kernel", hashlib.sha256(KERNEL).hexdigest()),),
        memory=((folder / "memory", new_id()),),
    )


def image_of(outside: Outside) -> Image:
    disk = ImageDisk(name="root", size=MIB, layer=outside.layers[-1][1].id)
    return Image(
        id=new_id(), name="x:latest", arch="x86_64", created_at=0, source="", sha256="", disks=(disk,),
        kernel=outside.blobs[0][1],
    )  # fmt: skip


async def test_what_is_taken_is_recorded_with_what_needs_it_and_may_be_taken_again(services: Services) -> None:
    layout = services.layout
    outside = some(layout.temporary / "x-1")
    layers = [layer for _, layer in outside.layers]
    image = image_of(outside)
    await check(outside, lambda progress: None)
    assert await agree(services, layers, lambda progress: None) == {}
    for _ in range(2):
        await adopt(services, outside, lambda new: services.records.add_image(image, new))
    assert {layer.id for layer in services.records.layers()} == {layer.id for layer in layers}
    assert all(layout.layer(layer.id).stat().st_mode & 0o777 == 0o444 for layer in layers)
    assert layout.blob(image.kernel or "").read_bytes() == KERNEL
    assert layout.memory_file(outside.memory[0][1]).read_bytes() == b"ram"
    assert await agree(services, layers, lambda progress: None) == {layer.id: layer.id for layer in layers}

    await discard(services, outside)
    assert {path.stem for path in layout.layers.iterdir()} == {layer.id for layer in layers}, "the image needs them"
    assert list(layout.memory.iterdir()) == []
    services.records.remove_image(image.id)
    for _ in range(2):
        await discard(services, outside)
    assert services.records.layers() == [] == [*layout.layers.iterdir(), *layout.blobs.iterdir()]


async def test_what_is_not_what_is_said_of_it_is_refused(services: Services) -> None:
    folder = services.layout.temporary
    outside_data = qcow2(extensions=qcow2_extension(0x44415441, b"/etc/shadow"))
    wrong = [
        layer_of(folder, qcow2(backing=b"/etc/shadow")),
        layer_of(folder, outside_data, parent=new_id()),
        layer_of(folder, b"no disk" * 99),
        layer_of(folder, b""),
        layer_of(folder, qcow2(), size=2 * MIB),
    ]
    altered = layer_of(folder, qcow2())
    altered[0].write_bytes(qcow2() + b"\0")
    for layer in (*wrong, altered):
        with pytest.raises(ImageRefused):
            await check(Outside(layers=(layer,)), lambda progress: None)
    (folder / "blob").write_bytes(b"other")
    with pytest.raises(ImageRefused, match="checksum"):
        await check(Outside(blobs=((folder / "blob", hashlib.sha256(KERNEL).hexdigest()),)), lambda progress: None)


async def test_an_id_that_has_other_content_here_or_a_parent_that_is_gone_is_refused(services: Services) -> None:
    layout = services.layout
    outside = some(layout.temporary / "x-1")
    (_, below), (path, above) = outside.layers
    with pytest.raises(NotFound, match="is gone"):
        await adopt(services, Outside(layers=((path, above),)), services.records.put_layers)
    layout.layers.mkdir(exist_ok=True)
    layout.layer(below.id).write_bytes(qcow2(size=MIB // 2))
    # Nobody had read it yet, so its checksum isn't recorded.
    services.records.put_layers([Layer(id=below.id, virtual_size=MIB, file_size=0)])
    with pytest.raises(ImageRefused, match="other content"):
        await agree(services, [below], lambda progress: None)
    assert services.records.layer(below.id) == Layer(
        id=below.id, virtual_size=MIB, file_size=0, sha256=hashlib.sha256(qcow2(size=MIB // 2)).hexdigest()
    )
    with pytest.raises(ImageRefused, match="other content"):
        await adopt(services, outside, services.records.put_layers)


async def test_a_layer_that_was_merged_here_stands_for_the_one_that_it_has_the_content_of(services: Services) -> None:
    lower, upper, merged = new_id(), new_id(), new_id()
    services.records.put_layers([Layer(id=merged, virtual_size=MIB, file_size=0, merged=(lower, upper))])
    layers = [Layer(id=each, virtual_size=MIB, file_size=0, sha256="0" * 64) for each in (lower, upper)]
    assert await agree(services, layers, lambda progress: None) == {upper: merged}
