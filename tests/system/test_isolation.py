"""Isolated workers: what each property forbids, that a sibling without it can do that, and that all else works on.

Where the kernel gives this process no namespaces, each test asserts the refusal instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from engine_models import ENGINES, SHORT, command, gemma, openai
from machine import Machine, machine, wait_for

from llmos.errors import LlmosError
from llmosd.isolation import UNDOING

ROOT = os.geteuid() == 0
USER = "nobody"
#: Asked of somebody else than the code under test.
NAMESPACES = (
    subprocess.run(["unshare", *([] if ROOT else ["--map-root-user"]), "--mount", "--net", "true"], check=False)
).returncode == 0
EVERYTHING = """
private_tmp = true
read_only_paths = ["/"]
no_new_privileges = true
private_network = true
device_policy = "closed"
""" + (f'user = "{USER}"' if ROOT else "")


def shell(name: str, isolation: str = "", rest: str = SHORT) -> str:
    """A model that answers with what a shell makes of the prompt, inside the worker."""
    function = f'driver = "python"\nfunction = "{ENGINES}/shell.py:answer"'
    return f'model = "{name}"\n[engine]\n{function}\n{isolated(isolation)}\n{rest}'


def isolated(isolation: str) -> str:
    return f"[isolation]\n{isolation}\n"


@pytest.fixture(scope="module")
def shared() -> Iterator[Machine]:
    with machine() as made:
        made.model(shell("free"))
        made.start()
        yield made


def ask(machine: Machine, model: str, script: str) -> str:
    """What a script says inside the model's worker. It comes through the bus."""
    return machine.client.run(model, script, max_tokens=1_000_000, timeout=30).text.strip()


def possible(machine: Machine, text: str, *, here: bool = NAMESPACES) -> bool:
    """Apply a model file. False: it was refused, with a reason, and rightly."""
    try:
        machine.client.apply(text)
    except LlmosError as error:
        assert not here, error
        assert str(error).startswith("isolation: ") and re.search("CAP_|user namespaces", str(error)), error
        return False
    assert here
    return True


def test_a_private_tmp_shows_nothing_of_the_machines_and_the_machine_nothing_of_it(shared: Machine) -> None:
    if not possible(shared, shell("tmp", "private_tmp = true")):
        return
    for directory in ("/tmp", "/var/tmp"):
        outside = Path(directory, f"{shared.root.name}-outside")
        inside = outside.with_name(f"{shared.root.name}-inside")
        outside.write_text("seen")
        try:
            assert ask(shared, "free", f"cat {outside}") == "seen"
            assert "No such file" in ask(shared, "tmp", f"cat {outside}")
            assert ask(shared, "tmp", f"echo mine > {inside}; cat {inside}; stat -c %a {directory}") == "mine\n1777"
            assert not inside.exists()
            assert "Read-only" in ask(shared, "tmp", f"touch {shared.runtime}/x")  # shown, for the bus is in there
            ask(shared, "free", f"echo theirs > {inside}")
            assert inside.read_text() == "theirs\n"
        finally:
            outside.unlink()
            inside.unlink(missing_ok=True)


def test_a_private_tmp_does_not_hide_what_a_worker_is_made_of_and_a_program_in_it_is_refused(shared: Machine) -> None:
    function = shared.root / "own.py"  # below /tmp
    shutil.copy(ENGINES / "shell.py", function)
    model = shell("own", "private_tmp = true").replace(f"{ENGINES}/shell.py", str(function))
    if not possible(shared, model):
        return
    seen = set(ask(shared, "own", f"ls {shared.root}").split()) - {"__pycache__"}
    assert seen == {"etc", "lib", "log", "own.py", "run"} < {path.name for path in shared.root.iterdir()}
    program = shared.root / "program"
    program.write_text("#!/bin/sh\nsleep 1000\n")
    program.chmod(0o755)
    with pytest.raises(LlmosError, match=f"private_tmp: the worker could not see its own program, {program}"):
        shared.client.apply(command([str(program)], name="hidden", rest=isolated("private_tmp = true")))


def test_a_read_only_path_cannot_be_written_nor_what_is_below_it(shared: Machine, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    if not possible(shared, shell("reads", f'read_only_paths = ["{tmp_path}"]')):
        return
    for path in (tmp_path / "file", tmp_path / "below" / "file"):
        assert "Read-only file system" in ask(shared, "reads", f"echo x > {path}")
        assert ask(shared, "free", f"echo x > {path}; cat {path}") == "x"
        assert "Read-only file system" in ask(shared, "reads", f"rm {path}")
        assert ask(shared, "reads", f"cat {path}") == "x"
    undo = f"mount -o remount,rw {tmp_path} || umount {tmp_path} || nsenter -t 1 -m true"
    assert ask(shared, "reads", f"({undo}) >/dev/null 2>&1 && echo undone") == ""


def test_the_whole_machine_can_be_read_only_but_for_the_workers_own(shared: Machine) -> None:
    if not possible(shared, shell("still", 'read_only_paths = ["/"]')):
        return
    mounts = [line.split() for line in ask(shared, "still", "cat /proc/self/mountinfo").splitlines()]
    writable = {words[4] for words in mounts if "rw" in words[5].split(",")}
    own = ("/proc", "/dev", str(shared.runtime / "scratch" / "still@1"), str(shared.root / "log"))
    assert {path for path in writable if not path.startswith(own)} == set()
    assert ask(shared, "still", f"echo x > {own[2]}/x && echo y > /dev/null && cat {own[2]}/x") == "x"


def test_with_no_new_privileges_a_setuid_program_gains_nothing(shared: Machine) -> None:
    """Somebody else's program, with the bit that makes it run as its owner."""
    program = shared.root / "id"
    shutil.copy(str(shutil.which("id")), program)
    if ROOT:
        os.chown(program, 65534, 65534)
    program.chmod(0o6755)
    shared.client.apply(shell("humble", "no_new_privileges = true"))
    assert ask(shared, "humble", "grep NoNewPrivs /proc/self/status").split() == ["NoNewPrivs:", "1"]
    assert ask(shared, "humble", f"{program} -u") == str(os.geteuid())
    assert ask(shared, "free", "grep NoNewPrivs /proc/self/status").split() == ["NoNewPrivs:", "0"]
    assert ask(shared, "free", f"{program} -u") == str(65534 if ROOT else os.geteuid())


CONNECT = '{python} -c \'import socket; socket.create_connection(("127.0.0.1", {port}), 5); print("connected")\' 2>&1'


def test_in_a_private_network_there_is_only_a_loopback_of_its_own(shared: Machine) -> None:
    if not possible(shared, shell("alone", "private_network = true")):
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = CONNECT.format(python=sys.executable, port=server.getsockname()[1])
        assert ask(shared, "free", connect) == "connected"
        assert ask(shared, "alone", connect).endswith("Connection refused")
    devices = [line.split(":")[0].strip() for line in ask(shared, "alone", "cat /proc/net/dev").splitlines()[2:]]
    # The kernel may put fallback tunnels into each network; none of them leads anywhere.
    assert "lo" in devices and not set(devices) & set(psutil.net_if_stats()) - {"lo", *FALLBACK}
    # An engine on a TCP port is reached by its host, which is in there too.
    shared.client.apply(openai("served", rest=SHORT + isolated("private_network = true")))
    assert shared.client.run("served", "hello", max_tokens=3).completion_tokens == 3
    engine = shared.worker("served@1").engine_pid
    assert Path(f"/proc/{engine}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    attached = 'model = "far"\n[engine]\ndriver = "attached"\nurl = "http://127.0.0.1:1"\n'
    with pytest.raises(LlmosError, match="private_network: an attached engine"):
        shared.client.apply(attached + isolated("private_network = true"))


FALLBACK = ("tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0")


def test_a_closed_device_policy_leaves_the_harmless_devices(shared: Machine) -> None:
    if not possible(shared, shell("closed", 'device_policy = "closed"')):
        return
    nodes = set(ask(shared, "closed", "ls /dev").split())
    assert nodes <= {"null", "zero", "full", "random", "urandom", "tty", "pts", "ptmx", "shm", "fd", "stdin", "stdout",
                     "stderr"}  # fmt: skip
    assert {"null", "zero", "urandom", "pts"} <= nodes < {path.name for path in Path("/dev").iterdir()} | {"ptmx"}
    assert ask(
        shared, "closed", "echo x > /dev/null && head -c 4 /dev/zero | wc -c; echo x > /dev/shm/x && echo y"
    ) == ("4\ny")
    terminal = f"{sys.executable} -c 'import os; print(os.ttyname(os.openpty()[1]))'"
    assert ask(shared, "closed", terminal) == "/dev/pts/0"
    assert "not permitted" in ask(shared, "closed", f"mknod {shared.root}/node c 1 3 2>&1")
    if ROOT:  # a node that somebody left lying about is none either
        os.mknod(shared.root / "left", 0o666 | 0o020000, os.makedev(1, 5))
        assert ask(shared, "free", f"head -c 4 {shared.root}/left | wc -c") == "4"
        assert "Permission denied" in ask(shared, "closed", f"head -c 4 {shared.root}/left 2>&1")


def test_a_worker_runs_as_its_user_and_gets_at_the_bus_and_at_nothing_else_of_the_daemons(shared: Machine) -> None:
    if not possible(shared, shell("other", f'user = "{USER}"'), here=ROOT and NAMESPACES):
        return
    entry = pwd.getpwnam(USER)
    groups = " ".join(map(str, os.getgrouplist(USER, entry.pw_gid)))
    assert ask(shared, "other", "id -u; id -g; id -G; echo $HOME") == (
        f"{entry.pw_uid}\n{entry.pw_gid}\n{groups}\n{entry.pw_dir}"
    )
    assert ask(shared, "free", "id -u") == "0"
    run = shared.runtime
    for path in (run, run / "workers", run / "scratch", run / "scratch" / "free@1", shared.root / "log"):
        assert re.search("Permission denied|No such file", ask(shared, "other", f"ls {path} 2>&1"))
    assert "Permission denied" in ask(shared, "other", f"cat {run}/ticket-key 2>&1")
    reach = "import socket,sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    for name, outcome in (("control", "PermissionError"), ("front", "PermissionError"), ("back", "")):
        said = ask(shared, "other", f"{sys.executable} -c '{reach}' {run}/{name}.sock 2>&1 | tail -n 1")
        assert said.partition(":")[0] == outcome
    record = json.loads((run / "workers" / "other@1.json").read_text())
    assert record["pid"] == shared.worker("other@1").pid


def test_a_user_that_is_not_there_and_a_path_that_is_not_there_are_refused(shared: Machine) -> None:
    with pytest.raises(LlmosError, match="there is no user 'nosuchuser' on this machine"):
        shared.client.apply(shell("wrong", 'user = "nosuchuser"'))
    with pytest.raises(LlmosError, match="read_only_paths: /no/such does not exist"):
        shared.client.apply(shell("wrong", 'read_only_paths = ["/no/such"]'))
    shared.model(shell("wrong", 'user = "nosuchuser"'))
    refused = shared.client.reload().refused
    assert any(str(shared.models / "wrong.toml") in line and "nosuchuser" in line for line in refused)
    (shared.models / "wrong.toml").unlink()


def test_what_cannot_be_set_up_any_more_fails_the_worker_at_once_with_the_reason(a_machine: Machine) -> None:
    path = a_machine.root / "goes"
    path.mkdir()
    a_machine.start()
    text = command(["sleep", "1000"], name="plain", rest=SHORT + isolated(f'read_only_paths = ["{path}"]'))
    if not possible(a_machine, text):
        return
    path.rmdir()
    a_machine.client.start("plain")
    worker = a_machine.wait_worker("plain@1", "failed")
    assert worker.why.startswith("namespaces: cannot take up") and str(path) in worker.why
    assert worker.restarts == 0


def test_an_isolated_worker_outlives_its_daemon_with_what_is_in_its_tmp(a_machine: Machine) -> None:
    a_machine.start()
    if not possible(a_machine, shell("sealed", EVERYTHING)):
        return
    ask(a_machine, "sealed", "echo kept > /tmp/mine; echo too > /var/tmp/mine")
    before = a_machine.worker("sealed@1").pid
    for _ in range(2):
        a_machine.kill()
        a_machine.start()
        a_machine.wait_worker("sealed@1", "ready")
        assert ask(a_machine, "sealed", "cat /tmp/mine /var/tmp/mine") == "kept\ntoo"
        assert a_machine.worker("sealed@1").pid == before
    # It is the new daemon's in every way.
    client = a_machine.client
    client.kill("sealed@1", "STOP")
    a_machine.wait_worker("sealed@1", "frozen")
    client.kill("sealed@1", "CONT")
    a_machine.wait_worker("sealed@1", "ready")
    os.kill(before, signal.SIGKILL)
    again = a_machine.wait_worker("sealed@1", "ready", not_pid=before)
    assert again.last_exit == "killed by signal 9"  # though the daemon was not its parent
    assert "No such file" in ask(a_machine, "sealed", "cat /tmp/mine")
    client.kill("sealed@1", "KILL")
    a_machine.wait_worker("sealed@1", "ready", not_pid=again.pid)
    client.stop("sealed")
    a_machine.wait_worker("sealed@1", "stopped")
    a_machine.check_processes()


def test_the_log_of_an_isolated_worker_is_shown_and_stays_in_bounds(a_machine: Machine) -> None:
    a_machine.configure('[logs]\nmax_size = "64K"\n')
    a_machine.start()
    script = (
        "i=0; while :; do i=$((i+1)); echo line $i of many that are printed; [ $((i % 500)) = 0 ] && sleep 0.05; done"
    )
    engine = ["sh", "-c", f"({script}) & exec {sys.executable} {ENGINES}/openai_like.py --port {{port}}"]
    text = f'model = "chatty"\n[engine]\ndriver = "openai"\ncommand = {json.dumps(engine)}\n{SHORT}'
    if not possible(a_machine, text + isolated(EVERYTHING)):
        return
    assert a_machine.client.run("chatty", "hello", max_tokens=2).completion_tokens == 2
    log = a_machine.root / "log" / "chatty@1.log"
    wait_for("older part", log.with_name(log.name + ".1").exists)
    assert log.stat().st_size + log.with_name(log.name + ".1").stat().st_size < 4 * (64 << 10)
    assert "of many that are printed" in a_machine.llmos("logs", "chatty").stdout
    assert log.stat().st_uid == os.geteuid()


def test_the_last_words_of_another_users_worker_lead_to_nothing_that_is_not_its_own(a_machine: Machine) -> None:
    secret = a_machine.root / "secret"
    secret.write_text("the daemon's own secret")
    a_machine.start()
    if not possible(a_machine, shell("liar", f'user = "{USER}"'), here=ROOT and NAMESPACES):
        return
    scratch = a_machine.runtime / "scratch" / "liar@1"
    with contextlib.suppress(LlmosError):
        ask(a_machine, "liar", f"ln -s {secret} {scratch}/engine-exit; kill -9 $PPID")
    worker = wait_for("end of it", lambda: (w := a_machine.worker("liar@1")).last_exit and w)
    assert "secret" not in worker.why and worker.last_exit == "killed by signal 9"


def test_an_ordinary_users_daemon_isolates_in_a_user_namespace(a_machine: Machine) -> None:
    """All but `user`. Where these tests are root's, the daemon is made an ordinary user's."""
    probe = ["unshare", "--map-root-user", "--mount", "--net", "true"]
    if ROOT:
        as_nobody = ("--reuid=65534", "--regid=65534", "--clear-groups")
        # Nobody may write anything; but root's Python and this checkout may be where only root can look.
        may_read = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
        a_machine.prefix = (str(shutil.which("setpriv")), *as_nobody, *may_read)
        for path in (a_machine.root, *a_machine.root.rglob("*")):
            os.chown(path, 65534, 65534)
    here = subprocess.run([*a_machine.prefix, *probe], check=False).returncode == 0
    a_machine.start()
    with pytest.raises(LlmosError, match=r"user: llmosd has no CAP_CHOWN.*run it as root"):
        a_machine.client.apply(shell("other", f'user = "{USER}"'))
    script = (
        "touch /tmp/x /usr/x; ls /tmp /dev; cat /proc/net/dev; grep -e CapBnd -e CapEff /proc/self/status; sleep 1000"
    )
    text = command(["sh", "-c", script], name="plain", rest=SHORT + isolated(EVERYTHING.partition("user =")[0]))
    if not possible(a_machine, text, here=here):
        return
    worker = a_machine.client.wait(a_machine.client.start("plain").workers)[0]
    log = a_machine.root / "log" / "plain@1.log"
    said = wait_for("last line", lambda: (text := log.read_text()).count("Cap") == 2 and text)
    assert "'/usr/x': Read-only file system" in said
    assert "x\n" in said and "zero\n" in said and "vda" not in said and "eth0" not in said
    capabilities = [int(value, 16) for value in re.findall(r"Cap\w+:\s+(\w+)", said)]
    assert not any(have >> number & 1 for have in capabilities for number in UNDOING)
    # The daemon has it in hand as any other.
    a_machine.kill()
    a_machine.start()
    client = a_machine.client
    assert a_machine.worker("plain@1").pid == worker.pid
    client.kill("plain@1", "STOP")
    wait_for("stopped process", lambda: psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED)
    client.kill("plain@1", "CONT")
    client.stop("plain")
    a_machine.wait_worker("plain@1", "stopped")
    a_machine.check_processes()


def test_the_doctor_says_whether_workers_can_be_isolated(shared: Machine) -> None:
    (check,) = [check for check in shared.client.doctor() if check.name == "isolation"]
    assert check.result == ("ok" if ROOT and NAMESPACES else "limited")


@pytest.mark.model
def test_gemma_completes_with_all_of_it_at_once(a_machine: Machine, gemma_weights: Path) -> None:
    gemma_weights.chmod(0o644)
    a_machine.start()
    if not possible(a_machine, gemma(gemma_weights) + isolated(EVERYTHING)):
        return
    answer = a_machine.client.run("gemma", "The capital of France is", max_tokens=12, temperature=0, timeout=100)
    assert answer.completion_tokens == 12 and "France" in answer.text
    engine = psutil.Process(a_machine.worker("gemma@1").engine_pid)
    assert engine.username() == (USER if ROOT else psutil.Process().username())
