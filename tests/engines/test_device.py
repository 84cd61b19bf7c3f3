"""The CUDA driver: absent, broken, without a GPU, and with two."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from fwl_export.engines.device import Device, Driver, query_driver


class FakeCuda:
    """Fakes the calls of libcuda that we use, on a machine with the given GPUs."""

    def __init__(self, devices: tuple[Device, ...] = (), status: int = 0) -> None:
        self.devices, self.status = devices, status

    def cuInit(self, flags: int) -> int:  # noqa: N802 - CUDA's names
        return self.status

    def cuDriverGetVersion(self, number: Any) -> int:  # noqa: N802
        number._obj.value = 12080
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.devices)
        return 0

    def cuDeviceGet(self, handle: Any, index: int) -> int:  # noqa: N802
        handle._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, handle: Any) -> int:  # noqa: N802
        name.value = self.devices[handle.value].name.encode()
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, handle: Any) -> int:  # noqa: N802
        value._obj.value = divmod(self.devices[handle.value].sm, 10)[attribute - 75]
        return 0


def query(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> Driver:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: cuda)
    return query_driver()


def test_devices_come_with_name_and_sm(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = (Device("Fast One", 89), Device("Other", 120))
    assert query(monkeypatch, FakeCuda(devices)) == Driver("12.8", devices, "")


@pytest.mark.parametrize(
    ("cuda", "reason"),
    [(FakeCuda(), "finds no GPU"), (FakeCuda(status=100), "answers with error 100")],
)
def test_no_device(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, reason: str) -> None:
    driver = query(monkeypatch, cuda)
    assert (driver.version, driver.devices) == ("12.8", ())
    assert reason in driver.reason


def test_no_driver() -> None:
    assert query_driver("libnone.so.1") == Driver("", (), "libnone.so.1 is not installed")
