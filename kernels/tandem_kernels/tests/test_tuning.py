"""Which file a device's configurations come from."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tandem_kernels import tuning


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tuned files of two devices: one shape in both, and one more in each."""
    found: dict[str, dict[str, Any]] = {
        "NVIDIA H100 80GB HBM3": {"gemm": {"8x8": {"1": [1]}, "16x8": {"1": [2]}}},
        "NVIDIA H200": {
            "gemm": {"8x8": {"1": [3], "64": []}, "32x8 gate": {"1": [4]}},
            "decode attention": {"8/2x64": {"4": [132, 3, 0], "32": [264, 4, 1]}},
        },
    }
    monkeypatch.setattr(tuning, "_read", lambda name: found.get(name, {}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tuning._shapes.cache_clear()
    yield
    tuning._shapes.cache_clear()


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), [[1], [2], None]),
        ("NVIDIA H200", (9, 0), [[3], [2], [4]]),
        ("NVIDIA B200", (10, 0), [None, None, None]),
    ],
)
def test_a_devices_own_file_goes_before_the_nearest_ones(
    device: str,
    capability: tuple[int, int],
    expected: list[list[int] | None],
    files: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    shapes = [(8, 8, False), (16, 8, False), (32, 8, True)]
    assert [tuning.tuned_gemm(1, *shape) for shape in shapes] == expected


def test_more_rows_than_were_tuned(files: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert tuning.tuned_gemm(9, 8, 8, False) == []  # cuBLAS
    assert tuning.tuned_gemm(65, 8, 8, False) is None


@pytest.mark.parametrize(
    ("batch", "expected"), [(1, [132, 3, 0]), (5, [264, 4, 1]), (256, [264, 4, 1])]
)
def test_splits_of_a_batch(
    batch: int, expected: list[int], files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert tuning.tuned_decode(batch, 8, 2, 64) == expected
    assert tuning.tuned_decode(batch, 8, 4, 64) is None
