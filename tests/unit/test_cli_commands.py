"""The command line as a whole, on real records; no guest runs here."""

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner, Result
from msgspec.structs import replace
from tests.helpers.records import WEB

from atoll.cli.listing import _description
from atoll.cli.main import ALIASES, SECTIONS, cli
from atoll.errors import Busy
from atoll.host import facts
from atoll.model.isolation import Barrier, Isolation
from atoll.model.names import new_id
from atoll.model.operation import Operation, Owner
from atoll.model.pressure import Figures
from atoll.model.snapshot import Memory, Snapshot
from atoll.model.spec import NicSpec, PortSpec, VmSpec
from atoll.model.state import Phase
from atoll.model.vm import Vm, VmInfo
from atoll.operations.services import Services
from atoll.operations.wake import wake

Run = Callable[..., Result]


@pytest.fixture
def run(home: Path) -> Run:
    """Runs a command line in a home of its own."""

    def invoke(*words: str, stdin: str | bytes | None = None, env: dict[str, str] | None = None) -> Result:
        return CliRunner().invoke(cli, list(words), input=stdin, env=env)

    return invoke


@pytest.fixture
def services(home: Path) -> Iterator[Services]:
    opened = Services()
    yield opened
    opened.close()


def add_vm(services: Services, name: str, *, port: int | None = None, **fields: object) -> Vm:
    ports = () if port is None else (PortSpec(host_port=port, guest_port=80),)
    nic = NicSpec(name="net0", mac="52:54:00:00:00:01", ports=ports)
    vm = Vm(id=new_id(), name=name, image="tiny:latest", created_at=time.time(), spec=VmSpec(nics=(nic,)), **fields)  # type: ignore[arg-type]
    services.records.add_vm(vm)
    return vm


def add_snapshot(services: Services, vm: Vm, name: str) -> Snapshot:
    node = Snapshot(
        id=new_id(), name=name, vm_id=vm.id, vm_name=vm.name, image=vm.image, created_at=time.time(), spec=vm.spec
    )
    services.records.put_snapshot(node)
    return node


def every_command() -> list[tuple[str, click.Command]]:
    """All commands with the words that call them."""
    found: list[tuple[str, click.Command]] = []

    def visit(words: str, command: click.Command, ctx: click.Context) -> None:
        found.append((words, command))
        if isinstance(command, click.Group):
            for name in command.list_commands(ctx):
                inner = command.get_command(ctx, name)
                assert inner is not None
                visit(f"{words} {name}", inner, ctx)

    ctx = click.Context(cli)
    for name in cli.list_commands(ctx):
        command = cli.get_command(ctx, name)
        assert command is not None
        visit(name, command, ctx)
    return found


COMMANDS = every_command()


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[words for words, _ in COMMANDS])
def test_every_command_has_help_with_an_example_of_itself(words: str, command: click.Command) -> None:
    result = CliRunner().invoke(cli, [*words.split(), "--help"])
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"atoll {words}" in result.stdout
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert parameter.help, f"{words} {parameter.name} has no help"


def test_the_help_lists_every_command_in_its_section(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    for section, names in SECTIONS.items():
        assert f"{section}:" in result.stdout
        for name in names:
            assert f"\n  {name} " in result.stdout
    assert "atoll run tiny --name web" in result.stdout


def test_other_tools_names_work_without_being_listed(run: Run) -> None:
    for alias, name in ALIASES.items():
        assert run(alias, "--help").exit_code == 0
        assert f"\n  {alias} " not in run("--help").stdout or alias == name


def test_unknown_commands_and_options_get_a_suggestion(run: Run) -> None:
    result = run("strat", "web")
    assert result.exit_code == 2
    assert (
        result.stderr == "Error: there is no command 'strat'. Did you mean 'start' or 'restart'? See `atoll --help`.\n"
    )
    result = run("ls", "--fromat", "json")
    assert result.exit_code == 2
    assert "--format" in result.stderr
    assert "atoll ls --help" in result.stderr
    assert result.stderr.count("\n") == 1


def test_unknown_vms_get_a_suggestion_and_exit_code_3(run: Run, services: Services) -> None:
    add_vm(services, "webserver")
    result = run("show", "webservr")
    assert result.exit_code == 3
    assert result.stderr == "Error: there is no VM 'webservr'. Did you mean webserver?\n"


def test_ls_prints_a_table_json_yaml_or_names(run: Run, services: Services) -> None:
    web, db = add_vm(services, "web", port=8080, labels={"tier": "front"}), add_vm(services, "db")
    lines = run("ls").stdout.splitlines()
    assert lines[0].split() == ["NAME", "STATE", "IMAGE", "CPUS", "MEMORY", "PORTS", "CREATED"]
    assert lines[1].split()[:6] == ["web", "stopped", "tiny:latest", "1", "512MiB", "8080->80"]
    listed = json.loads(run("ls", "--format", "json").stdout)
    assert [each["vm"]["id"] for each in listed] == [web.id, db.id]
    assert listed[0]["phase"] == "stopped"
    assert yaml.safe_load(run("ls", "--format", "yaml").stdout) == listed
    assert json.loads(run("ls", env={"ATOLL_FORMAT": "json"}).stdout) == listed
    assert run("ls", "-q").stdout == "web\ndb\n"
    assert run("ps", "-q", "--label", "tier=front").stdout == "web\n"
    assert run("ls", "-q", "--state", "running").stdout == ""


def test_show_tells_one_vm(run: Run, services: Services) -> None:
    web = add_vm(services, "web", labels={"note": "bell\x07"})
    assert "State:" in run("show", "web").stdout
    assert "bell\\x07" in run("show", "web").stdout
    assert json.loads(run("show", web.id[:6], "--format", "json").stdout)["vm"]["name"] == "web"


def test_show_tells_what_is_confined_less_than_it_should_be() -> None:
    why = "the network of net0 has no file system of its own: unshare: Operation not permitted"
    isolation = Isolation(level="standard", barriers=(Barrier(name="network helper", holds=False, why=why),))
    assert WEB.run is not None
    told = VmInfo(vm=replace(WEB, run=replace(WEB.run, isolation=isolation)), phase=Phase.RUNNING)
    assert dict(_description(told, networks={}))["Isolation"] == f"standard\nnetwork helper: no: {why}"


def test_errors_are_an_object_where_json_is_wanted(run: Run) -> None:
    result = run("show", "nothing", "--format", "json")
    assert result.exit_code == 3
    assert json.loads(result.stderr) == {
        "code": "not-found",
        "what": "there is no VM 'nothing'",
        "why": "",
        "next_step": "`atoll ls` lists what there is.",
    }
    assert result.stdout == ""
    assert json.loads(run("ls", "--format", "json", "--nonsense").stderr)["code"] == "invalid-input"


def test_one_of_several_vms_that_fails_does_not_keep_the_others_from_it(run: Run, services: Services) -> None:
    add_vm(services, "one")
    add_vm(services, "three")
    result = run("rm", "one", "two", "three", "one")
    assert result.exit_code == 3
    assert result.stderr.count("Error:") == 1
    assert "'two'" in result.stderr
    assert run("ls", "-q").stdout == ""


def test_rm_lists_in_json_what_it_removed(run: Run, services: Services) -> None:
    web = add_vm(services, "web")
    assert json.loads(run("rm", "web", "--format", "json").stdout) == [{"id": web.id, "name": "web", "snapshots": 0}]


def test_rm_tells_how_many_snapshots_went_with_each(run: Run, services: Services) -> None:
    web, db = add_vm(services, "web"), add_vm(services, "db")
    add_vm(services, "bare")
    for vm, name in ((web, "one"), (web, "two"), (db, "one")):
        add_snapshot(services, vm, name)
    result = run("rm", "web", "bare")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "Note: 2 snapshots of 'web' went with it.\n"
    assert [node.vm_name for node in services.records.snapshots()] == ["db"]
    result = run("rm", "db", "--format", "json")
    assert json.loads(result.stdout) == [{"id": db.id, "name": "db", "snapshots": 1}]
    assert result.stderr == ""
    assert "snapshots" in run("rm", "--help").stdout


def test_show_tells_the_snapshot_a_vm_stands_on_and_whether_it_is_suspended(run: Run, services: Services) -> None:
    web = add_vm(services, "web")
    assert re.search(r"^Snapshot: +none$", run("show", "web").stdout, re.M)
    assert re.search(r"^Suspended: +no$", run("show", "web").stdout, re.M)
    assert json.loads(run("show", "web", "--format", "json").stdout)["stands_on"] is None
    node = add_snapshot(services, web, "clean")
    services.records.put_vm(replace(web, name="front", snapshot=node.id))
    memory = Memory(id=new_id(), file_size=3 << 20, accelerator="tcg")
    add_vm(services, "copy", snapshot=node.id, suspended=memory)
    add_vm(services, "lost", snapshot=new_id())
    assert re.search(r"^Snapshot: +clean$", run("show", "front").stdout, re.M)
    assert json.loads(run("show", "front", "--format", "json").stdout)["stands_on"] == "clean"
    assert re.search(r"^Snapshot: +front@clean$", run("show", "copy").stdout, re.M)
    assert re.search(r"^Suspended: +yes, 3MiB of memory; `atoll resume copy`", run("show", "copy").stdout, re.M)
    assert re.search(r"^Snapshot: +one that is forgotten$", run("show", "lost").stdout, re.M)


def test_one_that_sleeps_for_want_of_memory_isnt_woken_while_there_is_none(services: Services) -> None:
    memory = Memory(id=new_id(), file_size=3 << 20, accelerator="tcg")
    web = add_vm(services, "web", suspended=memory, suspended_because="memory")
    services.pressure = Figures(reserve=facts.memory().total)
    with pytest.raises(Busy, match=r"web sleeps, and can't be woken: the computer's memory is short: it takes 99MiB"):
        asyncio.run(wake(web, services=services, by="command"))


def test_rename_and_labels_change_the_record(run: Run, services: Services) -> None:
    add_vm(services, "web")
    assert run("rename", "web", "front").exit_code == 0
    assert run("set", "front", "--label", "a=1", "--label", "b=2").exit_code == 0
    assert run("set", "front", "--unlabel", "a").exit_code == 0
    assert services.records.vms()[0].labels == {"b": "2"}
    assert run("set", "front").exit_code == 2


def test_atolls_own_failures_in_exec_are_125(run: Run, services: Services) -> None:
    add_vm(services, "web")
    assert run("exec", "nothing", "--", "true").exit_code == 125
    assert run("exec", "web", "--", "true").exit_code == 125
    assert run("run", "no-such-image", "--", "true").exit_code == 125
    assert run("run", "no-such-image").exit_code == 3
    result = run("exec", "web")
    assert result.exit_code == 125
    assert "no command" in result.stderr


def test_a_file_in_the_place_of_an_image_is_told_what_to_do(run: Run, tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(b"")
    result = run("run", str(disk))
    assert result.exit_code == 2
    assert f"atoll image import {disk}" in result.stderr


def test_options_that_exclude_each_other_are_refused(run: Run) -> None:
    for words in (
        ("run", "tiny", "-d", "--", "ls"),
        ("run", "tiny", "-i", "--password-stdin", "--", "ls"),
        ("create", "tiny", "--password-stdin", "--user-data", "-"),
        ("wait", "web", "--for", "ready", "--text", "x"),
        ("cp", "a", "b"),
        ("cp", "web:/a", "db:/b"),
        ("disk", "add", "web"),
        ("top", "--interval", "0s"),
    ):
        result = run(*words, stdin="x\n")
        assert result.exit_code in (2, 125), words
        assert result.stderr.startswith("Error: "), words


def test_what_recovery_did_is_noted(run: Run, services: Services) -> None:
    vm = add_vm(services, "web")
    gone = Owner(pid=2**22 - 1, start_time=1, boot_id="another boot")
    services.records.put_operation(
        Operation(
            id=new_id(),
            verb="rename",
            subject=vm.id,
            subject_name="web",
            request={"vm_id": vm.id, "old": "web", "new": "front"},
            state="running",
            owner=gone,
            created_at=time.time(),
        )
    )
    result = run("ls", "-q")
    assert result.stdout == "web\n"
    assert result.stderr.startswith("Note: 'rename web' had been interrupted; ")
    assert result.stderr.count("\n") == 1
    assert run("ls", "-q").stderr == ""


def test_events_and_operations_are_printed(run: Run, services: Services) -> None:
    add_vm(services, "web")
    run("rm", "web")
    events = [json.loads(line) for line in run("events", "--format", "json").stdout.splitlines()]
    assert events
    assert {"id", "at", "kind"} <= events[0].keys()
    assert events[0]["kind"] in run("events").stdout
    operations = json.loads(run("operation", "ls", "--format", "json").stdout)
    assert [each["state"] for each in operations] == ["done"]
    assert "Steps:" in run("operation", "show", operations[0]["id"][:8]).stdout
    assert run("operation", "show", "ffff").exit_code == 3


def test_version_and_completion_need_no_records(run: Run, home: Path) -> None:
    assert run("version").stdout.startswith("atoll ")
    assert json.loads(run("version", "--format", "json").stdout)["atoll"]
    for shell in ("bash", "zsh", "fish"):
        assert "_ATOLL_COMPLETE" in run("completion", shell).stdout
    assert not any(home.iterdir())


# As a process of its own


ATOLL = [sys.executable, "-c", "from atoll.cli.main import main; main()"]


def atoll(*words: str, **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*ATOLL, *words], capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload, no-any-return]


def completed(line: str) -> list[str]:
    """What the shell is offered for the last word."""
    env = {**os.environ, "_ATOLL_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    return [each.partition(",")[2] for each in atoll(env=env).stdout.split()]


def test_the_shell_completes_commands_and_names_of_vms(services: Services) -> None:
    add_vm(services, "web-one")
    add_vm(services, "db")
    assert completed("atoll scr") == ["screenshot"]
    assert completed("atoll show w") == ["web-one"]
    assert completed("atoll stop web-one d") == ["db"]


def test_the_shell_completes_names_of_snapshots(services: Services) -> None:
    for vm in (add_vm(services, "web"), add_vm(services, "db")):
        for name in (f"{vm.name}-clean", f"{vm.name}-before"):
            add_snapshot(services, vm, name)

    assert completed("atoll restore web ") == ["web-clean", "web-before"]
    assert completed("atoll restore db db-c") == ["db-clean"]
    assert completed("atoll forget web web-clean web-b") == ["web-before"]
    assert completed("atoll restore nothing ") == []
    for command in ("clone", "fork", "diff", "diff web", "pool create", "pool rm"):
        assert completed(f"atoll {command} d") == ["db"]
        assert completed(f"atoll {command} db@") == ["db@db-clean", "db@db-before"]
        assert completed(f"atoll {command} db@db-b") == ["db@db-before"]
        assert completed(f"atoll {command} nothing@") == []


def test_bash_completes_a_snapshot_after_the_at_sign(services: Services, tmp_path: Path) -> None:
    add_snapshot(services, add_vm(services, "web"), "before")
    program = tmp_path / "atoll"
    program.write_text("#!/bin/sh\nexec " + shlex.join(ATOLL) + ' "$@"\n')
    program.chmod(0o755)

    def offered(*words: str) -> list[str]:
        """What bash offers in place of the last of these words, as it splits them."""
        script = (
            f'eval "$({program} completion bash)"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1));'
            '_atoll_completion "$0"; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", script, str(program), *words], capture_output=True, text=True, timeout=60)
        assert done.stderr == ""
        return done.stdout.split()

    # Bash takes the sign as a part of what it replaces.
    assert offered("atoll", "clone", "web", "@", "be") == ["@before"]
    assert offered("atoll", "clone", "web", "@") == ["@before"]
    assert offered("atoll", "diff", "web", "@", "before", "web", "@", "b") == ["@before"]
    # As it is without '@' in COMP_WORDBREAKS.
    assert offered("atoll", "clone", "web@be") == ["web@before"]
    assert offered("atoll", "restore", "web", "") == ["before"]
    assert offered("atoll", "clone", "w") == ["web"]


def test_a_reader_that_goes_away_is_no_failure(services: Services) -> None:
    for number in range(300):
        add_vm(services, f"vm-{number}")
    process = subprocess.Popen([*ATOLL, "ls"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_full_disk_behind_the_output_is_told(services: Services) -> None:
    add_vm(services, "web")
    with Path("/dev/full").open("w") as full:
        result = subprocess.run([*ATOLL, "ls"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 1
    assert "No space left" in result.stderr
    assert "Traceback" not in result.stderr


def test_ls_imports_neither_asyncio_nor_rich_nor_http(services: Services) -> None:
    add_vm(services, "web")
    script = (
        "import sys; from atoll.cli.main import cli; cli.main(['ls'], standalone_mode=False);"
        "print([m for m in ('asyncio', 'rich', 'httpx', 'anyio', 'yaml', 'qemu') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "[]"


def test_faults_of_ours_ask_for_a_report_and_show_where_only_on_demand(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("atoll.platform.local.list_now", fail)
    result = run("ls")
    assert result.exit_code == 1
    assert "KeyError" in result.stderr and "report it" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in run("ls", env={"ATOLL_DEBUG": "1"}).stderr


def test_what_the_agent_does_for_a_vm_is_shown_and_checked(run: Run, services: Services) -> None:
    add_vm(services, "web")
    done = run(
        "set", "web", "--restart", "on-failure", "--autostart", "--boot-order", "7", "--suspend-when-idle", "90m"
    )
    assert done.exit_code == 0
    assert [line.split() for line in done.output.splitlines()[1:]] == [
        ["restart", "on-failure", "now"],
        ["autostart", "true", "now"],
        ["boot-order", "7", "now"],
        ["suspend-when-idle", "1h30m", "now"],
    ]
    shown = run("show", "web").output
    assert "suspended after 1h30m" in shown
    assert "Restart:" in shown and "on-failure" in shown and "it is started" in shown
    assert run("set", "web", "--no-autostart").exit_code == 0
    refused = run("set", "web", "--boot-order", "5000")
    assert refused.exit_code == 2 and "is no boot order" in refused.stderr
    assert services.vm(services.find_vm("web").id).boot_order == 7
    assert run("create", "--rm", "--restart", "always", "--disk-size", "1MiB").exit_code == 2
    assert run("create", "--rm", "--suspend-when-idle", "1h", "--disk-size", "1MiB").exit_code == 2
    assert run("set", "web", "--suspend-when-idle", "soon").exit_code == 2
    assert run("set", "web", "--suspend-when-idle", "never").exit_code == 0
    assert services.vm(services.find_vm("web").id).suspend_when_idle is None


def test_stopping_all_names_none(run: Run, services: Services) -> None:
    add_vm(services, "web")
    assert run("stop").exit_code == 2
    assert run("stop", "web", "--all").exit_code == 2
    assert run("stop", "web", "--suspend").exit_code == 2
    assert json.loads(run("stop", "--all", "--format", "json").output) == []
    done = run("shutdown", "--timeout", "5s")
    assert (done.exit_code, done.output) == (0, "")
