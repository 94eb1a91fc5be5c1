"""What those who watch an agent see: figures for Prometheus, its health, its log."""

import asyncio
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families
from tests.helpers.agents import agent
from tests.helpers.api_client import api
from tests.helpers.images import adopt_cached

from atoll.agent import metrics
from atoll.layout import Layout

pytestmark = pytest.mark.vm
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
MIB = 1 << 20


def samples(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(found: Samples, name: str, **labels: str) -> Iterator[float]:
    wanted = set(labels.items())
    return (value for (told, has), value in found.items() if told == name and wanted <= has)


async def scraped(client: httpx.AsyncClient) -> Samples:
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return samples(answer.text)


async def test_prometheus_is_told_of_vms_the_host_and_the_agent(layout: Layout) -> None:
    await adopt_cached("tiny", layout)
    async with agent(layout), api(layout) as client:
        await client.post("/v1/networks", json={"name": "lab"})
        for name in ("web", "off"):
            made = {"image": "tiny", "name": name, "memory": "128MiB", "nics": [{"network": "lab"}]}
            assert (await client.post("/v1/vms", json=made)).status_code == 200
        assert (await client.post("/v1/vms/web/start", json={"wait": True})).status_code == 200
        assert (await client.get("/v1/vms/none")).status_code == 404
        talk = {"command": {"argv": ["ping", "-c1", "-W1", "-I", "eth0", "224.0.0.1"]}}
        assert (await client.post("/v1/vms/web/exec", json=talk)).status_code == 200

        found = await scraped(client)
        assert list(of(found, "atoll_vm_phase", vm="web", phase="running")) == [1]
        assert list(of(found, "atoll_vm_phase", vm="off", phase="stopped")) == [1]
        assert list(of(found, "atoll_vm_memory_given_bytes")) == [128 * MIB]
        (resident,) = of(found, "atoll_vm_memory_resident_bytes", vm="web")
        (shared,) = of(found, "atoll_vm_memory_shared_bytes", vm="web")
        (private,) = of(found, "atoll_vm_memory_private_bytes", vm="web")
        assert 10 * MIB < private <= resident * 1.1
        assert shared > 0
        assert next(of(found, "atoll_vm_network_bytes_total", vm="web", direction="sent")) > 0
        assert len(list(of(found, "atoll_vm_disk_bytes_total", vm="web"))) == 2
        assert list(of(found, "atoll_host_vms", phase="running")) == [1]
        assert list(of(found, "atoll_host_memory_promised_bytes")) == [128 * MIB]
        assert list(of(found, "atoll_operation_seconds_count", call="vm.start", outcome="done")) == [1]
        assert list(of(found, "atoll_request_seconds_count", call="vm_info", status="404")) == [1]
        assert next(of(found, "atoll_agent_memory_resident_bytes")) > 30 * MIB

        (before,) = of(found, "atoll_vm_cpu_seconds_total", vm="web")
        await client.post("/v1/vms/web/exec", json={"command": {"argv": ["sh", "-c", "seq 200000 | tail -1"]}})
        (after,) = of(await scraped(client), "atoll_vm_cpu_seconds_total", vm="web")
        assert after > before
        for name in ("web", "off"):
            await client.delete(f"/v1/vms/{name}", params={"force": True})
        assert not list(of(await scraped(client), "atoll_vm_phase"))
        await client.delete("/v1/networks/lab")


async def test_hundreds_of_vms_are_read_quickly() -> None:
    begun = time.process_time()
    for _ in range(500):
        metrics.read(1)
    assert time.process_time() - begun < 1


async def test_an_agent_with_a_full_disk_is_alive_and_not_ready(small_home: Path, layout: Layout) -> None:
    async with agent(layout), api(layout) as client:
        assert (await client.get("/readyz")).json() == {"status": "ready"}
        filler = small_home / "filler"
        with filler.open("wb") as file, pytest.raises(OSError):
            while True:
                file.write(bytes(MIB))
                file.flush()
        refused = await client.get("/readyz")
        assert (refused.status_code, refused.headers["content-type"]) == (503, "application/problem+json")
        assert "Free some space" in refused.json()["next_step"]
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        filler.unlink()
        assert (await client.get("/readyz")).status_code == 200


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Span]]:
    """An OpenTelemetry collector: the spans that it was sent."""
    received: list[Span] = []

    class Receive(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            sent = gzip.decompress(sent) if self.headers.get("Content-Encoding") == "gzip" else sent
            for resource in ExportTraceServiceRequest.FromString(sent).resource_spans:
                received.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receive)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield received
    server.shutdown()
    serving.join()
    server.server_close()


async def test_operations_are_traced_below_their_tasks(layout: Layout, collector: list[Span]) -> None:
    async with agent(layout), api(layout) as client:
        await client.post("/v1/groups", json={"name": "web"})
        await client.delete("/v1/groups/none")
    tasks = {span.name: span for span in collector if not span.parent_span_id}
    assert set(tasks) == {"groups.create", "groups.rm"}
    (operation,) = (span for span in collector if span.parent_span_id)
    assert operation.parent_span_id == tasks["groups.create"].span_id
    assert {each.key: each.value.string_value for each in operation.attributes}["atoll.state"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize("listens", [False, True], ids=["nobody listens", "nobody answers"])
async def test_a_collector_that_is_gone_holds_nothing_up(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], listens: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        if not listens:
            silent.close()
        async with agent(layout) as served, api(layout) as client:
            async with asyncio.timeout(30):
                for each in range(50):
                    assert (await client.post("/v1/groups", json={"name": f"g{each}"})).status_code == 200
            # Spans are sent after some seconds, and again: it serves meanwhile, and ends though they are left.
            said = ""
            async with asyncio.timeout(60):
                while not listens and "exporting spans" not in said:
                    assert (await client.delete("/v1/groups/none")).status_code == 404
                    await asyncio.sleep(0.1)
                    said += capfd.readouterr().err
            async with asyncio.timeout(45):
                assert await served.end() == 0


async def test_its_log_tells_each_task(layout: Layout, capfd: pytest.CaptureFixture[str]) -> None:
    async with agent(layout, "--log-format", "json"), api(layout) as client:
        made = await client.post("/v1/groups", json={"name": "web"})
        await client.post("/v1/vms/none/start")
        said = ""
        async with asyncio.timeout(10):
            while "vm.start" not in said:
                await asyncio.sleep(0.1)
                said += capfd.readouterr().err
    entries = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    told = {each["call"]: each for each in entries if "call" in each and "operation" not in each}
    assert [each["call"] for each in entries if "operation" in each] == ["groups.create"]
    assert told["groups.create"]["task"] == made.headers["atoll-task"]
    assert (told["groups.create"]["message"], told["groups.create"]["principal"]) == ("done", "local")
    assert "there is no VM 'none'" in told["vm.start"]["message"]
    assert all({"time", "level", "message"} <= set(each) for each in entries)
