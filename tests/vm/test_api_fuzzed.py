"""schemathesis sends the agent what its OpenAPI document allows, and what it doesn't: no 5xx, no answer that isn't
in the document, nothing that hangs."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.helpers import unix_requests
from tests.helpers.agents import agent
from tests.helpers.images import adopt_cached

from atoll.layout import Layout

pytestmark = pytest.mark.vm
URL = "http://atoll"
LONGEST = 60.0
"""Seconds for a call, on a busy computer. Each waits 2 s for its task, and then has 202."""
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
# Not `positive_data_acceptance`: whether an image, a processor or a rule is one that exists is no question of a schema.

ENDLESS = {"audit_follow", "events_follow", "tasks_follow", "vm_logs", "vm_capture"}
"""Of these only the beginning is looked at."""
Change = Callable[[Case, Path], None]


@schemathesis.serializer("application/x-tar")
def _as_it_is(context: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _in_body(**values: Any) -> Change:
    def change(case: Case, home: Path) -> None:
        if isinstance(case.body, dict):
            for name, value in values.items():
                limited = value(home) if callable(value) else value
                # What isn't valid stays that.
                if isinstance(case.body.get(name), type(limited)):
                    case.body[name] = limited

    return change


def _in_query(**values: Any) -> Change:
    def change(case: Case, home: Path) -> None:
        for name, value in values.items():
            case.query[name] = value(home) if callable(value) else value

    return change


def _backups(home: Path) -> str:
    return str(home / "backups")


LIMITED: dict[str, Change] = {
    # Its command is a program of this computer, run as who runs the tests.
    "networks_exec": _in_body(command=["true"]),
    # These write into, or remove from, whatever folder they are given.
    "vm_backup": _in_body(to=_backups),
    "backups_prune": _in_body(folder=_backups),
    "backups_verify": _in_body(folder=_backups),
    "backups_restore": _in_body(folder=_backups),
    "backups_ls": _in_query(folder=_backups),
    "backups_unreadable": _in_query(folder=_backups),
    "backups_show": _in_query(folder=_backups),
    # A build takes minutes, and a download asks servers elsewhere; what isn't there is refused before that.
    "images_build": _in_body(recipe="no-such-recipe"),
    "images_pull": _in_body(source="no-such-image"),
    # The image of a VM that isn't built here would be.
    "host_create": _in_body(image="tiny"),
    # A thousand copies are more than this machine has room for; 0 and -1 are tried in a test of their own.
    "host_fork": _in_body(count=1),
    "vm_fork": _in_body(count=1),
    "pools_fill": _in_body(ready=1),
}


@contextlib.contextmanager
def serving(layout: Layout) -> Iterator[requests.Session]:
    with start_blocking_portal() as portal:
        portal.call(adopt_cached, "tiny", layout)
        with portal.wrap_async_context_manager(agent(layout)), unix_requests.session(layout.agent_socket) as session:
            yield session


def prepare(session: requests.Session, wanted: set[str]) -> None:
    """The things that calls are about, made again when a call has removed or renamed them."""
    there = {each["vm"]["name"] for each in session.get(f"{URL}/v1/vms", timeout=60).json()}
    if "vm" in wanted and "web" not in there:
        made = session.post(f"{URL}/v1/vms", json={"image": "tiny", "name": "web", "memory": "128MiB"}, timeout=60)
        assert made.status_code == 200, made.text
        session.post(f"{URL}/v1/vms/web/snapshots", json={"name": "clean"}, timeout=60)


KNOWN = {"vm": "web", "snapshot": "clean", "name": "root", "network": "lab", "reference": "lab"}
"""What stands for a part of a path every other time, so that a call comes further than to 404."""


def limit(case: Case, home: Path, *, known: bool) -> None:
    case.headers = dict(case.headers or {}) | {"Prefer": "wait=2"}
    case.headers.pop("If-Match", None) if known else None
    if change := LIMITED.get(case.operation.definition.raw["operationId"]):
        change(case, home)
    if known:
        for name in case.path_parameters or {}:
            case.path_parameters[name] = KNOWN.get(name, case.path_parameters[name])


def send(case: Case, session: requests.Session) -> None:
    begun = time.monotonic()
    if case.operation.definition.raw["operationId"] in ENDLESS:
        answer = session.request(case.method, **_asked(case), stream=True, timeout=LONGEST)
        answer.close()
        assert answer.status_code < 500, answer.status_code
        assert str(answer.status_code) in case.operation.definition.raw["responses"]
    else:
        response = case.call(base_url=URL, session=session, timeout=LONGEST)
        body = case.meta.components.get(ParameterLocation.BODY) if case.meta is not None else None
        more = [negative_data_rejection] if body is not None and body.mode is GenerationMode.NEGATIVE else []
        case.validate_response(response, checks=CHECKS + more)
    assert time.monotonic() - begun < LONGEST


def _asked(case: Case) -> dict[str, Any]:
    asked = case.as_transport_kwargs(base_url=URL)
    return {name: asked[name] for name in ("url", "params", "headers") if name in asked}


@pytest.mark.parametrize("examples", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_every_call_answers_as_the_document_says(layout: Layout, home: Path, examples: int) -> None:
    (home / "backups").mkdir()
    broken: list[str] = []
    with serving(layout) as session:
        document = session.get(f"{URL}/v1/schema/openapi.json", timeout=30).json()
        for each in schemathesis.openapi.from_dict(document).get_all_operations():
            operation = each.ok()
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                try:
                    fuzz(operation, mode, session, home, examples)
                except Unsatisfiable:
                    pass  # Any text is right in its path, and there is nothing else.
                except BaseException as error:
                    broken.append(f"{operation.label} ({mode.value}): {_told(error)}")
        for vm in session.get(f"{URL}/v1/vms", timeout=60).json():
            session.delete(f"{URL}/v1/vms/{vm['vm']['id']}?force=true", timeout=120)
    assert not broken, "\n\n".join(broken)


def fuzz(operation: Any, mode: GenerationMode, session: requests.Session, home: Path, examples: int) -> None:
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query or operation.path_parameters):
        return
    count = 0

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    def one(case: Case) -> None:
        nonlocal count
        count += 1
        limit(case, home, known=count % 2 == 0)
        prepare(session, {each.name for each in operation.path_parameters})
        send(case, session)

    one()


def _told(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        raise error
    parts = getattr(error, "exceptions", None)
    return "; ".join(_told(part) for part in parts) if parts else f"{type(error).__name__}: {error}"[:3000]


def test_what_was_found_once_stays_mended(layout: Layout) -> None:
    with serving(layout) as session:
        made = {"name": "web", "memory": "64MiB", "disks": [{"size": "1MiB"}]}
        assert session.post(f"{URL}/v1/vms", json=made, timeout=60).status_code == 200
        web = f"{URL}/v1/vms/web"

        beyond = session.get(f"{URL}/v1/events/past", params={"after": 1 << 63}, timeout=60)
        assert (beyond.status_code, beyond.json()["code"]) == (400, "invalid-input")
        absent = session.post(f"{URL}/v1/images/import", json={"upload": "0" * 32}, timeout=60)
        assert (absent.status_code, absent.json()["code"]) == (404, "not-found")
        too_many = session.post(f"{web}/wait", json={"text": "a{99999999999}"}, timeout=60)
        assert (too_many.status_code, too_many.json()["code"]) == (400, "invalid-input")
        session.post(f"{web}/start", timeout=60)
        later = session.post(f"{web}/wait", json={"text": "never"}, headers={"Prefer": "wait=1"}, timeout=60)
        assert (later.status_code, later.json()["call"]) == (202, "vm.wait")
        session.delete(web, params={"force": "true"}, timeout=60)
