"""`net exec`: programs of this computer inside a network reach its VMs by name, and are elsewhere in nothing else."""

import asyncio
import sys
from pathlib import Path

import pytest
from tests.helpers.command import atoll
from tests.helpers.machines import Factory

from atoll.errors import InvalidInput
from atoll.model.requests import NicRequest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(120)]

FETCH = "import urllib.request as u; print(u.urlopen('http://web.lab.atoll/', timeout=10).read())"


async def test_a_program_reaches_vms_by_their_names(factory: Factory) -> None:
    await factory.host.networks.create("lab")
    resolver = Path("/etc/resolv.conf").read_bytes()
    web = await factory.run("tiny", name="web", memory="96MiB", nics=(NicRequest(network="lab"),))
    wanted = web.record.spec.nics[0].address
    await web.sh(f"for i in $(seq 100); do ip addr | grep -q {wanted}/ && exit 0; sleep 0.1; done; exit 1")
    await web.sh("mkdir -p /www; echo hello >/www/index.html; httpd -h /www")

    networks = factory.host.networks
    fetched = await networks.exec("lab", [sys.executable, "-c", FETCH])
    assert fetched.stdout == b"b'hello\\n'\n", fetched.stderr
    said = await networks.exec("lab", ["sh", "-c", "cat; cat /etc/resolv.conf; echo bad >&2; exit 7"], stdin=b"given\n")
    assert (said.exit_code, said.stderr) == (7, b"bad\n")
    assert said.text == "given\nsearch lab.atoll\nnameserver 10.213.0.1"
    assert Path("/etc/resolv.conf").read_bytes() == resolver, "elsewhere nothing has changed"
    interfaces = (await networks.exec("lab", ["cat", "/proc/net/dev"])).text
    assert "br0:" in interfaces and "eth0:" not in interfaces

    # A VM still reaches nothing of what listens there.
    server = await asyncio.create_subprocess_exec(
        *await networks.command_line("lab", [sys.executable, "-m", "http.server", "8000"])
    )
    try:
        await asyncio.sleep(1)
        assert (await web.exec(["wget", "-T", "2", "-qO-", "http://10.213.0.1:8000/"])).exit_code != 0
    finally:
        server.kill()
        await server.wait()

    typed = await asyncio.to_thread(atoll, "net", "exec", "lab", "sh", "-c", "cat; exit 3", stdin=b"streams")
    assert (typed.code, typed.out) == (3, "streams")
    assert (await asyncio.to_thread(atoll, "net", "exec", "lab", "--", "no-such-program")).code == 127
    missing = await asyncio.to_thread(atoll, "net", "exec", "nolab", "--", "true")
    assert missing.code == 125 and "no network 'nolab'" in missing.err
    with pytest.raises(InvalidInput, match="no command"):
        await networks.exec("lab", [])


async def test_a_network_without_vms_comes_up_for_it(factory: Factory) -> None:
    await factory.host.networks.create("empty")
    assert "10.213.0.1/24" in (await factory.host.networks.exec("empty", ["ip", "addr"])).text
    assert (await factory.host.networks.show("empty")).up
