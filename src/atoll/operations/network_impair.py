"""Cables that work badly. Recorded nowhere but with the network that is up: it is good again when that goes down."""

from atoll.errors import InvalidInput, NotFound, Unsupported, WrongState
from atoll.model.network import Impairment, Relayed
from atoll.model.requests import ImpairRequest
from atoll.model.vm import Vm
from atoll.operations.networks import card_of, locked, members_of, network_of
from atoll.operations.services import Services

LONGEST_DELAY = 60


async def impair(vm: Vm, request: ImpairRequest, *, services: Services) -> None:
    """Let a VM's cable work badly until the network goes down. Raises `NotFound`, `InvalidInput`, `WrongState`."""
    from atoll.host import network as world

    nic = card_of(services, vm, network=request.network, shared=True)
    _check(request)
    assert nic.network
    if network_of(services, nic.network).mode == "bridge":
        raise Unsupported(
            "cables on this computer's own bridge can't be impaired",
            "what is behind it isn't Atoll's",
            "Use a network of Atoll's.",
        )
    paths = services.layout.network(nic.network)
    async with locked(services, [nic.network]):
        members = members_of(services, network_of(services, nic.network))
        macs = {each.vm: each.mac for each in members.attached}
        for other in (*request.cut_from, *([request.towards] if request.towards else [])):
            if other not in macs or other == vm.name:
                raise NotFound(f"'{other}' isn't another VM on that network", next_step=f"There are {', '.join(macs)}.")
        if not world.is_up(paths):
            raise WrongState("the network is down", "no VM on it has started", "Start one.")
        before = next((each for each in world.impairments(paths) if each.mac == nic.mac), Impairment(mac=nic.mac))
        await world.impair(members, paths, _changed(before, request, macs))


def _check(request: ImpairRequest) -> None:
    shares = (request.loss, request.duplicate, request.reorder)
    if not all(0 <= share <= 100 for share in shares) or request.rate < 0:
        raise InvalidInput("no cable can do that", "it does 0 to 100 % of something", "Write it like --loss 5%.")
    if not 0 <= request.jitter <= request.delay <= LONGEST_DELAY:
        raise InvalidInput(
            "no cable can do that",
            f"a delay is at most {LONGEST_DELAY} s, and its jitter no longer than the delay",
            "Write it like --delay 50ms --jitter 10ms.",
        )
    if request.towards and (request.rate or request.cut_from):
        raise InvalidInput(
            "towards one VM there is neither a rate nor a partition",
            next_step=f"Use --partition {request.towards} for that; or leave --towards away.",
        )


def _changed(before: Impairment, request: ImpairRequest, macs: dict[str, str]) -> Impairment:
    peer = macs[request.towards] if request.towards else None
    wanted = Relayed(
        peer=peer,
        delay=request.delay,
        jitter=request.jitter,
        duplicate=request.duplicate,
        reorder=request.reorder,
        loss=request.loss if peer else 0,
    )
    others = tuple(each for each in before.relayed if each.peer != peer)
    if peer is None and request == ImpairRequest(network=request.network):
        others = ()
    relayed = others if wanted == Relayed(peer=peer) else (*others, wanted)
    if peer is not None:
        return Impairment(mac=before.mac, loss=before.loss, rate=before.rate, cut_from=before.cut_from, relayed=relayed)
    cut_from = tuple(macs[other] for other in request.cut_from)
    return Impairment(mac=before.mac, loss=request.loss, rate=request.rate, cut_from=cut_from, relayed=relayed)
