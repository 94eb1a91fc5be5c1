"""image create: an image on the layers of a snapshot, or of the present of a VM, which is cut first.

Nothing is copied but UEFI variables; what is left is one transaction, so there is nothing to undo.
"""

import hashlib
import time

from msgspec.structs import replace

from atoll.errors import StorageFailed, from_os_error
from atoll.host import files
from atoll.model.image import Image, ImageDisk
from atoll.model.names import SHORT_ID, check_image_name, new_id
from atoll.model.snapshot import Snapshot
from atoll.model.spec import VmSpec
from atoll.model.vm import Vm
from atoll.operations.clone import present
from atoll.operations.create import IMAGES_LOCK
from atoll.operations.services import Report, Services


async def create_image(source: Vm | Snapshot, name: str, *, services: Services, report: Report | None = None) -> Image:
    """Name a node. Raises `InvalidInput` (name), `WrongState`, `StorageFailed`.

    A name that another image has moves to this one.
    """
    name = check_image_name(name)
    if isinstance(source, Vm):
        spec, nvram = await present(source, services, report), _variables(services, source)
        image = _image(name, spec, made_of=source.name)
    else:
        nvram = None
        image = _image(name, source.spec, made_of=f"{source.vm_name}@{source.name}", node=source)
    async with services.lease(IMAGES_LOCK, what="the images"):
        _check_still_there(services, image)
        if nvram is not None:
            image = _with_variables(services, image, nvram)
        services.records.add_image(image, [])
    services.records.add_event("image.added", name=image.name, data={"image": image.id, "source": image.source})
    return image


def _image(name: str, spec: VmSpec, *, made_of: str, node: Snapshot | None = None) -> Image:
    disks = tuple(
        ImageDisk(name=disk.name, size=disk.size, layer=disk.layer, blob=disk.blob, bus=disk.bus, media=disk.media)
        for disk in spec.disks
    )
    content = " ".join(disk.layer or disk.blob or "" for disk in disks)
    return Image(
        id=new_id(),
        name=name,
        arch=spec.arch,
        created_at=time.time(),
        source=made_of,
        sha256=hashlib.sha256(content.encode()).hexdigest(),
        disks=disks,
        firmware=spec.boot.firmware,
        firmwares=(spec.boot.firmware,),
        kernel=spec.boot.kernel,
        initrd=spec.boot.initrd,
        cmdline=spec.boot.cmdline,
        nvram=node.nvram if node is not None else None,
        copy=True,
        machine=spec.machine,
        memory=spec.memory,
        display=spec.display != "none",
        guest=spec.guest,
        description=(node.message if node is not None else "") or f"made of {made_of}",
    )


def _variables(services: Services, vm: Vm) -> bytes | None:
    path = services.layout.vm(vm.id).nvram
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise from_os_error(error, f"read {path}") from error


def _check_still_there(services: Services, image: Image) -> None:
    layout = services.layout
    gone = [layer for layer in image.layer_ids if services.records.layer(layer) is None]
    gone += [blob for blob in image.blob_ids if not layout.blob(blob).exists()]
    if gone:
        raise StorageFailed(
            f"{image.source}: a part of it is gone ({gone[0][:SHORT_ID]})", "another command removed it", "Try again."
        )


def _with_variables(services: Services, image: Image, content: bytes) -> Image:
    """The image with the UEFI variables as a blob. The caller holds the images' lock."""
    sha256 = hashlib.sha256(content).hexdigest()
    blob = services.layout.blob(sha256)
    if not blob.exists():
        files.make_folder(blob.parent)
        files.write_atomically(blob, content, mode=0o444)
    return replace(image, nvram=sha256)
