"""One machine for all tests that need a booted one. It is slow: `pytest` without a path leaves them out."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import image
from guest import boot
from service import UNIT, Service


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Booting takes half a minute, and building what is booted minutes: only for who asks, as `make test-vm` does."""
    return None if config.args_source is pytest.Config.ArgsSource.ARGS else True


@pytest.fixture(scope="session")
def installed() -> Iterator[Service]:
    """A booted machine with the service installed."""
    with boot(image.build()) as guest:
        service = Service(guest)
        service.install()
        yield service


@pytest.fixture
def service(installed: Service) -> Service:
    """The service, active, whatever the test before did."""
    installed.run(f"systemctl start {UNIT}")
    return installed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the journal's end with a failure: the machine is gone when somebody reads of it."""
    report = yield
    service = getattr(item, "funcargs", {}).get("installed") or getattr(item, "funcargs", {}).get("service")
    if report.failed and isinstance(service, Service):
        try:
            journal = service.run("journalctl --boot --no-pager --lines=60 --output=short-monotonic", check=False)
            report.sections.append(("journal of the machine", journal.stdout))
        except (AssertionError, OSError) as error:
            report.sections.append(("journal of the machine", f"could not be read: {error}"))
    return report
