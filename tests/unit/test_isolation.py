"""What a model file may say of isolation, what becomes of it for the launcher, and access control lists."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from llmosd import isolation as isolating
from llmosd.declared import DeclarationError
from llmosd.gateway.config import GatewayConfig
from llmosd.isolation import UNDOING, Isolator
from llmosd.kernel.ledger import Grant
from llmosd.kernel.spec import Isolation, LlamaCpp, ModelSpec, Simulated
from llmosd.launch import child
from llmosd.launch.gate import Namespaces, Order, User
from llmosd.modelfile import parse
from llmosd.node import access
from llmosd.node.confine.process import ProcessConfinement
from llmosd.node.devices import take_inventory
from llmosd.node.doctor import diagnose, look
from llmosd.settings import Directories

STRANGER = User(54321, 54321, (54322,))


@pytest.fixture
def directories(tmp_path: Path) -> Directories:
    made = Directories(tmp_path / "etc", tmp_path / "run", tmp_path / "lib", tmp_path / "log")
    made.make()
    (made.runtime / "scratch" / "m@1").mkdir(parents=True)
    return made


def namespaces(directories: Directories, isolation: Isolation, engine: LlamaCpp | None = None) -> Namespaces:
    spec = ModelSpec(model="m", engine=engine or Simulated(), isolation=isolation)
    scratch = directories.runtime / "scratch" / "m@1"
    order = Isolator(directories).isolate(Order(argv=("true",), env={"TMPDIR": "/x"}), spec, Grant(), scratch)
    assert order.drop_capabilities == UNDOING
    assert order.namespaces is not None
    return order.namespaces


def model(isolation: str, engine: str = 'driver = "simulated"') -> str:
    return f'model = "m"\n[engine]\n{engine}\n[isolation]\n{isolation}\n'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (model('read_only_paths = ["usr"]'), r"isolation.read_only_paths\[0\]: expected an absolute path"),
        (model('device_policy = "strict"'), "isolation.device_policy: expected one of auto, closed"),
        (model("private_temp = true"), "unknown key 'isolation.private_temp'; did you mean 'private_tmp'"),
        (
            model("private_network = true", 'driver = "attached"\nurl = "http://127.0.0.1:1"'),
            "isolation.private_network: an attached engine is somewhere else",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_key(text: str, problem: str) -> None:
    with pytest.raises(DeclarationError, match=problem):
        parse(text, "m.toml")


def test_a_model_that_asks_for_nothing_is_launched_as_before(directories: Directories) -> None:
    order = Order(argv=("true",), env={"A": "b"})
    spec = parse('model = "m"\n[engine]\ndriver = "simulated"\n', "m.toml")
    assert Isolator(directories).isolate(order, spec, Grant(), directories.runtime) is order


def test_the_launcher_loads_nothing_for_orders_that_isolate_nothing() -> None:
    script = f"import sys; sys.path.insert(0, {str(Path(child.__file__).parent)!r}); import child; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    assert not {"isolate", "ctypes", "socket", "pathlib"} & set(done.stdout.split())


def test_a_private_tmp_shows_the_weights_in_it_with_all_their_parts_and_not_itself(
    directories: Directories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolating, "_PRIVATE_TMP", (str(tmp_path),))
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path[1:]])
    parts = [tmp_path / f"big-0000{number}-of-00002.gguf" for number in (1, 2)]
    for path in (*parts, tmp_path / "other.gguf"):
        path.touch()
    found = namespaces(directories, Isolation(private_tmp=True), LlamaCpp(weights=str(parts[0])))
    assert found.private == ((str(tmp_path), 0o1777),)
    assert {str(path) for path in parts} <= set(found.readable)
    assert {str(tmp_path), "/", str(tmp_path / "other.gguf")}.isdisjoint(found.readable)
    assert {str(directories.runtime / "scratch" / "m@1"), str(directories.logs)} <= set(found.writable)


def test_a_closed_device_policy_leaves_the_gpus_that_were_granted(
    directories: Directories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolating, "_NVIDIA_GPUS", tmp_path / "gpus")
    for minor in (0, 1):
        card = tmp_path / "gpus" / f"0000:0{minor}:00.0"
        card.mkdir(parents=True)
        (card / "information").write_text(f"Model: \t NVIDIA X\nGPU UUID: \t GPU-{minor}\nDevice Minor: \t {minor}\n")
    spec = ModelSpec(model="m", engine=Simulated(), isolation=Isolation(device_policy="closed"))

    def devices(*gpus: str) -> tuple[str, ...]:
        grant = msgspec.structs.replace(Grant(), gpus=dict.fromkeys(gpus, 1))
        order = Isolator(directories).isolate(Order(argv=("true",), env={}), spec, grant, directories.runtime)
        assert order.namespaces is not None and order.namespaces.devices is not None
        assert "/dev" not in order.namespaces.writable
        return tuple(name for name in order.namespaces.devices if "nvidia" in name)

    assert devices() == ()
    assert devices("GPU-1") == ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia1")
    with pytest.raises(ValueError, match="which device MIG-5 is cannot be found"):
        devices("MIG-5")


def test_the_gateway_is_never_isolated() -> None:
    assert not set(Isolation.__struct_fields__) & set(GatewayConfig.__struct_fields__)
    with pytest.raises(DeclarationError, match="kept for llmosd's own service"):
        parse(model("private_network = true").replace('"m"', '"gateway"'), "gateway.toml")


# -- access -----------------------------------------------------------------------------------------------------


def allows(path: Path) -> bool:
    try:
        access.allow(path, STRANGER.uid, access.SEARCH)
    except OSError as error:
        assert error.errno == errno.EOPNOTSUPP, error  # then a model file with `user` is refused in those words
        return False
    return True


def test_a_user_is_let_in_and_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "runtime"
    path.mkdir(mode=0o700)
    assert not access.may(path, STRANGER, access.SEARCH)
    if not allows(path):
        return
    assert access.may(path, STRANGER, access.SEARCH) and not access.may(path, STRANGER, access.READ)
    other = msgspec.structs.replace(STRANGER, uid=STRANGER.uid + 1)
    assert not access.may(path, other, access.SEARCH)
    before = os.getxattr(path, "system.posix_acl_access")
    access.allow(path, STRANGER.uid, access.SEARCH)
    assert os.getxattr(path, "system.posix_acl_access") == before


def test_letting_one_user_in_gives_no_group_back_what_a_chmod_took(tmp_path: Path) -> None:
    path = tmp_path / "runtime"
    path.mkdir(mode=0o750)
    path.chmod(0o750)
    if not allows(path):
        return
    path.chmod(0o700)
    member = User(54399, path.stat().st_gid)
    assert not access.may(path, member, access.SEARCH) and not access.may(path, STRANGER, access.SEARCH)
    access.allow(path, STRANGER.uid, access.SEARCH)
    assert access.may(path, STRANGER, access.SEARCH) and not access.may(path, member, access.SEARCH)


def test_the_first_directory_that_is_closed_to_a_user_is_found(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    deep = tmp_path / "closed" / "open"
    deep.mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    closed = access.closed_parent(deep / "file", STRANGER)
    assert closed is not None and (tmp_path / "closed").is_relative_to(closed)
    assert access.closed_parent(Path("/etc/hostname"), STRANGER) is None
    assert access.closed_parent(deep / "file", User(0, 0)) is None


# -- the doctor -------------------------------------------------------------------------------------------------


def test_the_doctor_names_what_is_refused_and_why(tmp_path: Path) -> None:
    facts = look(take_inventory(), ProcessConfinement(), tmp_path, isolation={"user": "needs CAP_SETUID"})
    (check,) = [check for check in diagnose(facts) if check.name == "isolation"]
    assert (check.result, check.message) == ("limited", "user is refused: needs CAP_SETUID")
    everything = dict.fromkeys(Isolation.__struct_fields__, "no")
    checks = diagnose(msgspec.structs.replace(facts, isolation=everything))
    assert [check.result for check in checks if check.name == "isolation"] == ["missing"]
