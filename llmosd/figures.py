"""Figures for people: what the kernel has given away beside what the node has measured. Pure, for `LocalMachine`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmosd.control.machine import DeviceRow, Gauge, Used
from llmosd.kernel.units import CpuSet
from llmosd.kernel.views import LedgerView, WorkerView
from llmosd.node.counters import Counters
from llmosd.node.devices import Inventory
from llmosd.node.watch import Measured


def gauges(
    counted: Counters, measured: Measured, enforcement: Callable[[str], str], view: WorkerView | None
) -> dict[str, Gauge]:
    """What of a worker's limits is used, by limit: as the machine's kernel counts it where that kernel enforces it."""
    memory = Gauge(measured.usage.memory_bytes, measured.peak_memory_bytes)
    tasks = Gauge(measured.usage.threads, measured.peak_threads)
    if counted.memory_bytes is not None and enforcement("memory_max") != "watched":
        memory = Gauge(counted.memory_bytes, counted.memory_peak_bytes)
    if counted.tasks is not None and enforcement("tasks_max") != "watched":
        tasks = Gauge(counted.tasks, counted.tasks_peak)
    found = {
        "memory_max": memory,
        "memory_high": memory,
        "tasks_max": tasks,
        "cpu_quota": Gauge(measured.cpu_percent, measured.peak_cpu_percent),
    }
    if counted.swap_bytes is not None:
        found["swap_max"] = Gauge(counted.swap_bytes, counted.swap_peak_bytes)
    if view is not None:
        found |= {"slots": Gauge(view.running), "queue_max": Gauge(view.queue)}
    return found


def device_rows(
    inventory: Inventory, ledger: LedgerView, workers: Sequence[WorkerView], used: Sequence[Used]
) -> list[DeviceRow]:
    """What there is, how much of it is reserved and by whom. `used`: by each of `workers`, which have processes."""
    rows = [
        DeviceRow(
            kind="cpu",
            id="cpus",
            name=f"CPUs {CpuSet(cpu.number for cpu in inventory.cpus)}",
            total=ledger.capacity.millicpus / 1000,
            reserved=(ledger.capacity.millicpus - ledger.free.millicpus) / 1000,
            used=sum(one.cpu_percent for one in used) / 100,
            workers=tuple(view.name for view in workers if view.grant.millicpus),
            properties={
                "packages": str(inventory.packages),
                "cores": str(inventory.cores),
                "threads": str(inventory.threads),
                **_own_cpus(workers, inventory.cpu_set),
            },
        ),
        DeviceRow(
            kind="memory",
            id="memory",
            name="RAM",
            total=ledger.capacity.memory_bytes,
            reserved=ledger.capacity.memory_bytes - ledger.free.memory_bytes,
            used=sum(one.memory_bytes for one in used),
            workers=tuple(view.name for view in workers if view.grant.memory_bytes),
            properties={
                "machine_bytes": str(inventory.machine_memory_bytes),
                "swap_bytes": str(inventory.swap_bytes),
            },
        ),
    ]
    rows += [
        DeviceRow(
            kind="node",
            id=f"node{node.number}",
            name=f"NUMA node, CPUs {node.cpus}",
            total=node.memory_bytes,
            # By those who were started to prefer it.
            reserved=sum(view.grant.memory_bytes for view in workers if view.grant.memory_node == node.number),
            used=0,
            workers=tuple(view.name for view in workers if set(view.grant.cpus) & set(node.cpus)),
            properties=_own_cpus(workers, node.cpus),
        )
        for node in inventory.numa_nodes
    ]
    free = {gpu.uuid: gpu.memory_bytes for gpu in ledger.free.gpus}
    total = {gpu.uuid: gpu.memory_bytes for gpu in ledger.capacity.gpus}
    rows += [
        DeviceRow(
            kind="gpu",
            id=gpu.uuid,
            name=gpu.name,
            total=gpu.memory_bytes,
            reserved=total.get(gpu.uuid, 0) - free.get(gpu.uuid, 0),
            used=gpu.memory_used_bytes,
            workers=tuple(view.name for view in workers if gpu.uuid in view.grant.gpus),
            properties={"pci": gpu.pci_bus_id, "driver": inventory.gpus.driver_version},
        )
        for gpu in inventory.gpus.devices
    ]
    return rows


def _own_cpus(workers: Sequence[WorkerView], cpus: CpuSet) -> dict[str, str]:
    """Which of `cpus` are which worker's own, and which are shared; nothing where all are."""
    own = {view.name: CpuSet(set(view.grant.cpus) & set(cpus)) for view in workers}
    held = {f"exclusive:{name}": str(its) for name, its in own.items() if its}
    return held | {"shared": str(CpuSet(set(cpus).difference(*own.values())))} if held else {}
