"""rename

step      do                                                             undo
rename    the record; the guest learns its host name at the next start   the old name
tell      the event                                                      (point of no return)
"""

from msgspec import Struct
from msgspec.structs import replace

from atoll.model.names import check_vm_name
from atoll.model.vm import Vm
from atoll.operations import networks
from atoll.operations.engine import Context, Step, Verb, perform
from atoll.operations.services import Services


class RenameRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    vm_id: str
    old: str
    new: str


async def rename(vm: Vm, name: str, *, services: Services) -> None:
    """Give a VM another name, also while it runs. Raises `InvalidInput`, `AlreadyExists`."""
    request = RenameRequest(vm_id=vm.id, old=vm.name, new=check_vm_name(name))
    await perform(RENAME, request, services=services, subject=vm.id, subject_name=vm.name)


async def _rename(context: Context[RenameRequest]) -> None:
    request = context.request
    context.services.records.put_vm(replace(context.vm, name=request.new))


async def _rename_back(context: Context[RenameRequest]) -> None:
    vm = context.services.records.vm(context.subject)
    if vm is not None and vm.name == context.request.new:
        context.services.records.put_vm(replace(vm, name=context.request.old))


async def _tell(context: Context[RenameRequest]) -> None:
    request, vm = context.request, context.services.records.vm(context.subject)
    if vm is not None:
        await networks.tell_names(context.services, networks.shared_by(vm.spec, vm.pending))
    context.services.records.add_event("vm.renamed", vm_id=request.vm_id, name=request.new, data={"old": request.old})


RENAME = Verb(
    name="rename",
    request=RenameRequest,
    steps=(Step("rename", _rename, _rename_back), Step("tell", _tell, final=True)),
)
