"""create

    step      do                                         undo
    record    add the VM's record (reserves the name)    take it away
    files     its folder: heads, UEFI variables, seed    remove the folder
    tell      the event

The request has the whole record of the VM to be, resolved beforehand, so each step can be done again. Clones are made
by the same verb: they stand on a snapshot's layers instead of an image's.
"""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from atoll.errors import AlreadyExists, InvalidInput, StorageFailed, from_os_error
from atoll.host import disks, files
from atoll.model import names, supervision
from atoll.model.image import Image
from atoll.model.launch import Firmware
from atoll.model.requests import CreateRequest
from atoll.model.spec import SeedSpec, VmSpec
from atoll.model.vm import Vm
from atoll.operations import heads, networks, resolve, resolve_nics
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.guest_settle import leave_word
from atoll.operations.services import Report, Services
from atoll.qemu.plan import layer_chain

IMAGES_LOCK = "images"
"""Held while layers and what needs them are recorded, and while unneeded ones are removed."""


class NewVm(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole record of the VM to be, and what it takes over from a snapshot."""

    vm: Vm
    nvram: str | None = None
    """SHA-256 of the blob with its UEFI variables; the firmware's empty ones when None."""
    copy: bool = False
    """Its disks have another machine's identity: it is to get one of its own."""
    copies: dict[str, str] = field(default_factory=dict)
    """Disks that begin as whole copies of a layer's content, with nothing below them: the layer by the disk's name."""


async def create(request: CreateRequest, *, services: Services, report: Report | None = None) -> Vm:
    """A stopped VM. Raises `InvalidInput`, `NotFound` (image), `AlreadyExists` (name or port), `StorageFailed`."""
    new = await _resolved(request, services)
    vm = new.vm
    try:
        await perform(CREATE, new, services=services, subject=vm.id, subject_name=vm.name, report=report)
    except AlreadyExists:
        if request.name is not None or all(other.name != vm.name for other in services.records.vms()):
            raise
        # Another process took the name that was made up; it is recorded now, so another one is made up.
        return await create(request, services=services, report=report)
    return services.vm(vm.id)


async def _resolved(request: CreateRequest, services: Services) -> NewVm:
    if request.name is not None:
        names.check_vm_name(request.name)
    supervision.check(restart=request.restart, boot_order=request.boot_order, throwaway=request.remove_when_stopped)
    everything = services.records.images() if request.image or request.cdrom or request.disks else []
    image = find_image(request.image, everything) if request.image is not None else None
    cdroms = [find_image(reference, everything) for reference in request.cdrom]
    if image is None and not (request.disks or request.cdrom or request.disk_size or request.firmware):
        raise InvalidInput(
            "a VM needs something to start from", next_step="Name an image, or use --disk-size and --cdrom."
        )
    caps = await services.capabilities(resolve.guest_arch(request, image))
    seed = await _seed(request, image)
    spec = resolve.resolve(request, image=image, cdroms=cdroms, caps=caps, host_cpus=os.cpu_count() or 1, seed=seed)
    if request.nics:
        spec = resolve_nics.with_nics(spec, request, services.records.networks())
        networks.check_groups(services, (name for nic in spec.nics for name in nic.groups))
    if request.shares:
        from atoll.operations.shares import with_shares

        spec = with_shares(spec, request)
    spec = resolve.with_disk_images(
        spec, request, {d.image: find_image(d.image, everything) for d in request.disks if d.image}
    )
    vm = Vm(
        id=names.new_id(),
        name=request.name or resolve.made_up_name({vm.name for vm in services.records.vms()}),
        image=image.name if image else "",
        created_at=time.time(),
        spec=spec,
        labels=resolve.check_labels(request.labels),
        remove_when_stopped=request.remove_when_stopped,
        restart=request.restart,
        autostart=request.autostart,
        boot_order=request.boot_order,
        memory_min=resolve.check_floor(spec.memory, request.memory_min),
        on_memory_pressure=request.on_memory_pressure,
    )
    nvram = image.nvram if image is not None and spec.boot.firmware == "uefi" else None
    return NewVm(vm=vm, nvram=nvram, copy=image is not None and image.copy)


def find_image(reference: str, images: Sequence[Image]) -> Image:
    """By any of its names (`:latest` may be left away), its id, or a unique prefix. Raises `NotFound`."""
    for image in images:
        if {reference, f"{reference}:latest"} & {image.name, *image.tags}:
            return image
    return names.find(reference, images, "image")


async def _seed(request: CreateRequest, image: Image | None) -> SeedSpec:
    from atoll.images.seed import hash_password

    wanted = SeedSpec(
        user=request.user,
        password_hash=await hash_password(request.password) if request.password is not None else None,
        ssh_keys=request.ssh_keys,
        user_data=request.user_data,
    )
    kind = image.guest.seed if image else "none"
    if not wanted.empty and kind == "none":
        raise InvalidInput(
            f"the image {image.name if image else ''} takes no user, key or user data".replace("  ", " "),
            "it has no first-boot service that reads them",
            "Use an image with cloud-init, or log in through `atoll shell`.",
        )
    if not wanted.empty and kind == "cmdline":
        raise InvalidInput(
            f"the image {image.name if image else ''} takes no user, key or user data", next_step="Use `atoll shell`."
        )
    return wanted


async def firmware_for(spec: VmSpec) -> Firmware | None:
    """The UEFI firmware of this host for the VM; None when it boots otherwise. Raises `Unsupported`."""
    if spec.boot.firmware != "uefi":
        return None
    from atoll.qemu import firmware

    descriptors = firmware.read_descriptors(firmware.folders())
    return firmware.choose(descriptors, arch=spec.arch, machine_type=spec.machine_type)


# Steps


async def _record(context: Context[NewVm]) -> None:
    request = context.request
    with_layers = [*(disk.layer for disk in request.vm.spec.disks if disk.layer), *request.copies.values()]
    async with context.services.lease(IMAGES_LOCK, what="the images"):
        for layer in with_layers:
            if context.services.records.layer(layer) is None:
                raise StorageFailed(
                    "the image is gone", "another command removed it", "`atoll image ls` lists what there is."
                )
        if context.services.records.vm(context.subject) is None:
            async with networks.addressed(context.services, request.vm) as vm:
                context.services.records.add_vm(vm)


async def _unrecord(context: Context[NewVm]) -> None:
    # On a full disk it can be seen that there is nothing to remove, and not be written.
    if context.services.records.vm(context.subject) is not None:
        context.services.records.remove_vm(context.subject)


async def make_files(context: Context[NewVm]) -> None:
    """The VM's folder with all that is in it."""
    layout, request, spec = context.services.layout, context.request, context.request.vm.spec
    paths = layout.vm(context.subject)
    files.make_folder(paths.logs)
    await heads.make(layout, context.subject, [disk for disk in spec.disks if disk.name not in request.copies])
    for disk in spec.disks:
        if disk.name in request.copies:
            chain = layer_chain(
                request.copies[disk.name], {each.id: each for each in context.services.records.layers()}
            )
            layers = [layout.layer(layer) for layer in chain]
            await disks.copy_content(layers, paths.head(disk), size=disk.size, report=context.report)
    firmware = await firmware_for(spec)
    if request.nvram is not None:
        files.write_atomically(paths.nvram, layout.blob(request.nvram).read_bytes())
    elif firmware is not None:
        copy_variables(firmware, paths.nvram)
    if spec.wants_seed:
        await _write_seed(request.vm, paths.seed)
    if request.copy and spec.guest.agent:
        leave_word(paths, name=request.vm.name)
    files.sync_folder(paths.home)


def copy_variables(firmware: Firmware, nvram: Path) -> None:
    """A VM's own copy of the firmware's empty variables."""
    try:
        files.write_atomically(nvram, Path(firmware.variables).read_bytes())
    except OSError as error:
        raise from_os_error(error, f"read {firmware.variables}") from error


async def _write_seed(vm: Vm, path: Path) -> None:
    from atoll.images.seed import write_seed

    agent_missing = not vm.spec.guest.agent
    write_seed(path, seed=vm.spec.seed, hostname=vm.name, instance_id=vm.id, install_agent=agent_missing)


async def remove_files(context: Context[Any]) -> None:
    """Undo `make_files`, for as much of it as was done."""
    paths = context.services.layout.vm(context.subject)
    for folder in (paths.home, paths.run):
        shutil.rmtree(folder, ignore_errors=False) if folder.exists() else None


async def _tell(context: Context[NewVm]) -> None:
    vm = context.request.vm
    await networks.tell_names(context.services, networks.shared_by(vm.spec))
    context.services.records.add_event("vm.created", vm_id=vm.id, name=vm.name, data={"image": vm.image})


CREATE = Verb(
    name="create",
    request=NewVm,
    steps=(
        Step("record", _record, _unrecord),
        Step("files", make_files, remove_files),
        Step("tell", _tell),
    ),
)
