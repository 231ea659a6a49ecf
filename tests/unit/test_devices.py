"""The inventory, on this machine and on made-up trees of proc and sys; NVML by a small model of pynvml."""

# ruff: noqa: N801, N802, N815, N818  # the model of pynvml bears its names

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from llmosd.kernel.placement import Gpu
from llmosd.kernel.units import CpuSet
from llmosd.node import devices
from llmosd.node.gpu import GpuDevice, Gpus, Slice, read_gpus, read_memory_by_pid, take_gpus

MIB = 1 << 20


# -- CPUs, NUMA nodes, RAM ----------------------------------------------------------------------------------------


def test_the_inventory_counts_the_cpus_and_the_memory_of_this_machine() -> None:
    inventory = devices.take_inventory()
    assert inventory.cpu_set == CpuSet(os.sched_getaffinity(0))
    assert inventory.threads == len(inventory.cpus) >= inventory.cores >= inventory.packages >= 1
    total_kib = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
    assert inventory.machine_memory_bytes == total_kib * 1024
    assert 0 < inventory.memory_bytes <= inventory.machine_memory_bytes


def test_every_cpu_belongs_to_the_numa_node_that_lists_it() -> None:
    inventory = devices.take_inventory()
    for node in inventory.numa_nodes:
        assert {cpu.number for cpu in inventory.cpus if cpu.numa_node == node.number} == set(node.cpus)


def test_a_process_with_a_narrow_affinity_counts_only_the_cpus_it_may_use() -> None:
    last = max(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{last}}})\n"
        "from llmosd.node.devices import take_inventory\n"
        "inventory = take_inventory(); print(inventory.cpu_set, inventory.capacity(0).millicpus)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.split() == [str(last), "1000"]


def test_a_machine_whose_kernel_shows_no_numa_nodes_gets_a_note(tmp_path: Path) -> None:
    inventory = devices.take_inventory(tmp_path)
    assert inventory.numa_nodes == ()
    assert any("NUMA" in note for note in inventory.notes)


def _machine(root: Path, cgroup: str, mountinfo: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mountinfo, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2_MOUNT = "41 31 0:31 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw\n"


def test_the_least_limit_of_a_cgroup_and_those_above_it_counts_in_v2(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/a/memory.max": "4096000\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/cpu.max": "max 100000\n",
        "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n",
    }
    root = _machine(tmp_path, "0::/a/b\n", V2_MOUNT, files)
    assert devices.memory_limit(root) == 4096000
    assert devices.cpu_quota_millicpus(root) == 1500
    assert devices.take_inventory(root).memory_bytes == 4096000


def test_a_hybrid_machine_bounds_memory_by_its_v1_hierarchy(tmp_path: Path) -> None:
    mountinfo = (
        "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "36 31 0:33 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
        "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    )
    files = {
        "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "123456789\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }
    root = _machine(tmp_path, "4:memory:/x\n1:cpu,cpuacct:/\n0::/\n", mountinfo, files)
    assert devices.memory_limit(root) == 123456789
    assert devices.cpu_quota_millicpus(root) is None


def test_a_container_that_sees_only_its_part_of_the_tree_finds_its_limit(tmp_path: Path) -> None:
    mountinfo = "35 31 0:32 /docker/cafe /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": "1048576\n"}
    root = _machine(tmp_path, "4:memory:/docker/cafe\n", mountinfo, files)
    assert devices.memory_limit(root) == 1048576


def test_a_cgroup_above_the_root_of_its_namespace_is_bounded_by_what_the_mount_shows(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": "77777\n", "sys/memory.max": "1\n"}
    root = _machine(tmp_path, "0::/../..\n", V2_MOUNT, files)
    assert devices.memory_limit(root) == 77777


def _inventory(**fields: object) -> devices.Inventory:
    cpus = tuple(devices.Cpu(number, 0, number // 2, 0) for number in range(4))
    plain = devices.Inventory(cpus, (), memory_bytes=1000, machine_memory_bytes=1000, swap_bytes=0)
    return msgspec.structs.replace(plain, **fields)


def test_the_capacity_leaves_the_reserve_and_keeps_to_the_cpu_quota() -> None:
    inventory = _inventory(quota_millicpus=2500)
    assert inventory.cores == 2
    capacity = inventory.capacity(300)
    assert (capacity.millicpus, capacity.memory_bytes) == (2500, 700)
    assert _inventory().capacity(5000).memory_bytes == 0


def test_a_gpu_in_slices_is_given_away_by_the_slice() -> None:
    whole = GpuDevice("GPU-a", "A", "", 80, 0)
    cut = GpuDevice("GPU-b", "B", "", 80, 0, True, (Slice("MIG-1", "1g", 10, 0), Slice("MIG-2", "3g", 40, 0)))
    capacity = _inventory(gpus=Gpus("1", (whole, cut))).capacity(0)
    assert capacity.gpus == (Gpu("GPU-a", 80), Gpu("MIG-1", 10), Gpu("MIG-2", 40))


# -- GPUs ---------------------------------------------------------------------------------------------------------


class FakeNvml:
    """pynvml as far as it is used: GPUs are namespaces, a handle is the namespace, a field that lacks raises."""

    NVML_DEVICE_MIG_ENABLE = 1
    nvmlMemory_v2 = 2

    class NVMLError(Exception): ...

    class NVMLError_NotSupported(NVMLError): ...

    class NVMLError_NotFound(NVMLError): ...

    def __init__(self, *gpus: SimpleNamespace, trouble: str = "") -> None:
        self.gpus = gpus
        self.trouble = trouble
        self.sessions = 0

    def nvmlInit(self) -> None:
        if self.trouble:
            raise self.NVMLError(self.trouble)
        self.sessions += 1

    def nvmlShutdown(self) -> None:
        self.sessions -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> SimpleNamespace:
        return self.gpus[index]

    def _get(self, handle: SimpleNamespace, field: str) -> object:
        if not hasattr(handle, field):
            raise self.NVMLError_NotSupported("Not Supported")
        value = getattr(handle, field)
        if isinstance(value, Exception):
            raise value
        return value

    def nvmlDeviceGetUUID(self, handle: SimpleNamespace) -> object:
        return self._get(handle, "uuid")

    def nvmlDeviceGetName(self, handle: SimpleNamespace) -> object:
        return self._get(handle, "name")

    def nvmlDeviceGetPciInfo(self, handle: SimpleNamespace) -> object:
        return SimpleNamespace(busId=b"0000:01:00.0")

    def nvmlDeviceGetMemoryInfo(self, handle: SimpleNamespace, version: int | None = None) -> object:
        return self._get(handle, "memory_v2" if version else "memory")

    def nvmlDeviceGetMigMode(self, handle: SimpleNamespace) -> object:
        return self._get(handle, "mig")

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: SimpleNamespace) -> int:
        return len(handle.slices)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: SimpleNamespace, index: int) -> object:
        if handle.slices[index] is None:
            raise self.NVMLError_NotFound("Not Found")
        return handle.slices[index]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: SimpleNamespace) -> object:
        return self._get(handle, "processes")


def _gpu(**fields: object) -> SimpleNamespace:
    memory = SimpleNamespace(total=100 * MIB, reserved=4 * MIB, free=90 * MIB, used=6 * MIB)
    return SimpleNamespace(**{"uuid": "GPU-a", "name": "Model A", "memory_v2": memory, **fields})


def test_a_machine_without_the_driver_has_no_gpu_and_a_note_that_says_so() -> None:
    assert read_gpus(FakeNvml(trouble="NVML Shared Library Not Found")) == Gpus(
        notes=("NVML: Shared Library Not Found",)
    )


def test_a_gpu_offers_its_memory_less_the_drivers_reserve() -> None:
    nvml = FakeNvml(_gpu())
    assert read_gpus(nvml) == Gpus("580.1", (GpuDevice("GPU-a", "Model A", "0000:01:00.0", 96 * MIB, 6 * MIB),), ())
    assert nvml.sessions == 0


def test_a_driver_without_the_second_memory_call_is_asked_by_the_first() -> None:
    gpu = _gpu(memory=SimpleNamespace(total=100, free=70, used=30))
    del gpu.memory_v2
    (device,) = read_gpus(FakeNvml(gpu)).devices
    assert (device.memory_bytes, device.memory_used_bytes) == (100, 30)


def test_a_gpu_that_shares_the_machines_ram_is_shown_with_a_note_and_no_memory() -> None:
    gpu = _gpu()
    del gpu.memory_v2
    gpus = read_gpus(FakeNvml(gpu))
    assert gpus.devices[0].memory_bytes == 0
    assert gpus.notes == ("NVML: GPU-a: memory: Not Supported",)


def test_mig_slices_are_found_across_the_gaps_in_their_numbers() -> None:
    part = SimpleNamespace(uuid="MIG-1", name="1g.10gb", memory=SimpleNamespace(total=10, used=1))
    (device,) = read_gpus(FakeNvml(_gpu(mig=(1, 1), slices=[None, part, None]))).devices
    assert device.mig_enabled
    assert device.slices == (Slice("MIG-1", "1g.10gb", 10, 1),)


def test_mig_that_is_only_pending_does_not_count() -> None:
    (device,) = read_gpus(FakeNvml(_gpu(mig=(0, 1), slices=[None]))).devices
    assert not device.mig_enabled


def test_a_gpu_that_fell_off_the_bus_leaves_a_note_and_the_others() -> None:
    lost = _gpu(uuid=FakeNvml.NVMLError("GPU is lost"))
    gpus = read_gpus(FakeNvml(lost, _gpu()))
    assert [device.uuid for device in gpus.devices] == ["GPU-a"]
    assert gpus.notes == ("NVML: GPU 0: UUID: GPU is lost",)


def test_gpu_memory_is_summed_by_process_over_all_gpus() -> None:
    def process(pid: int, used: int | None) -> SimpleNamespace:
        return SimpleNamespace(pid=pid, usedGpuMemory=used)

    nvml = FakeNvml(_gpu(processes=[process(7, 10), process(8, None)]), _gpu(processes=[process(7, 5)]), _gpu())
    assert read_memory_by_pid(nvml) == {7: 15, 8: 0}
    assert read_memory_by_pid(FakeNvml(trouble="Driver Not Loaded")) == {}


@pytest.mark.gpu
def test_the_gpus_of_this_machine_have_uuids_and_memory() -> None:
    gpus = take_gpus()
    if not gpus.devices:
        pytest.skip(f"no GPU here: {'; '.join(gpus.notes)}")
    assert all(device.uuid.startswith("GPU-") and device.memory_bytes > 0 for device in gpus.devices)
