"""The device layer: detection beside a broken torch_npu, precision, memory, bandwidth."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lm.device import (
    bandwidth,
    choose_dtype,
    memory,
    memory_figures,
    peak_bandwidth,
    processor,
    reset_peak_memory,
    resolve_device,
    seed_everything,
)
from lm.errors import UserError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

BROKEN = {
    "no CANN libraries": (
        "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory', name='_C')",
        "ImportError: libhccl.so: cannot open shared object file",
    ),
    "two accelerators": (
        "raise RuntimeError('Two accelerators cannot be used at the same time in PyTorch: npu and cuda.')",
        "RuntimeError: Two accelerators cannot be used",
    ),
    "half an environment": (
        "raise Exception('ASCEND_OPP_PATH environment variable is not set.')",
        "Exception: ASCEND_OPP_PATH environment variable is not set.",
    ),
    "a warning on stdout, then no CANN libraries": (
        "print('Warning: ASCEND_HOME_PATH is not set')\nraise ImportError('libascendcl.so: cannot open')",
        "ImportError: libascendcl.so",
    ),
    "fine, but no card": (
        """
import types, torch
torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", types.SimpleNamespace(is_available=lambda: False, device_count=lambda: 0))
""",
        "torch_npu loaded, no NPU visible",
    ),
}

PROBE = """
import json, torch
from lm.device import resolve_device
from lm.errors import UserError
choice = resolve_device("auto")
try:
    resolve_device("npu:1")
    refusal = None
except UserError as error:
    refusal = [error.param, str(error)]
total = (torch.ones(3, device=choice.device) * 2).sum().item()
print(json.dumps([choice.device.type, choice.reason, refusal, total]))
"""


def install_torch_npu(site: Path, body: str) -> None:
    """A package as pip leaves it, with the entry point by which torch loads it at `import torch`."""
    package = site / "torch_npu"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(body + "\n\ndef _autoload(): pass\n", encoding="utf-8")
    metadata = site / "torch_npu-2.13.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n", encoding="utf-8")


def run_python(code: str, site: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(site), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(("body", "finding"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_torch_npu_leaves_the_cpu_usable_and_says_why(body: str, finding: str, tmp_path: Path) -> None:
    install_torch_npu(tmp_path, body)
    result = run_python(PROBE, tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert result.returncode == 0, result.stderr
    kind, reason, (param, refusal), total = json.loads(result.stdout)  # and nothing else stands on stdout
    assert (kind, total) == ("cpu", 6.0)
    assert reason.startswith("auto: ")
    assert finding in reason
    assert param == "device"
    assert refusal.startswith("device: 'npu:1' cannot be used: ")
    assert finding in refusal


def test_the_broken_package_of_these_tests_would_stop_torch_itself(tmp_path: Path) -> None:
    install_torch_npu(tmp_path, BROKEN["no CANN libraries"][0])
    result = run_python("import torch", tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert result.returncode != 0
    assert "Failed to load the backend extension: torch_npu" in result.stderr


def test_the_cpu_is_taken_when_asked_for() -> None:
    choice = resolve_device("cpu")
    assert choice.device == CPU
    assert choice.reason == "asked for"
    assert choice.name


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "npu:x", "cpu:0", "auto:1", "", "NPU", "cpu\n"])
def test_a_device_that_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="must be auto, cpu, cuda") as caught:
        resolve_device(name)
    assert caught.value.param == "device"
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["cuda:99", "npu:99"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' cannot be used: "):
        resolve_device(name)


X86 = "processor : 0\nmodel name\t: Some Xeon\nflags\t\t: fpu avx2{}\n\nprocessor : 1\nmodel name : Other\nflags : x\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16\nCPU part\t: 0xd01\n"


def test_the_first_processor_speaks_for_all() -> None:
    found = processor.parse_cpuinfo(X86.format(" avx512_bf16"))
    assert found.name == "Some Xeon"
    assert found.flags == {"fpu", "avx2", "avx512_bf16"}


def test_a_processor_without_a_name_goes_by_its_architecture() -> None:
    found = processor.parse_cpuinfo(ARM)
    assert found.name
    assert found.flags == {"fp", "asimd", "bf16"}


@pytest.mark.parametrize(
    ("cpuinfo", "name", "words"),
    [
        (X86.format(" avx512_bf16"), "bf16", "auto: the processor has avx512_bf16"),
        (X86.format(" amx_bf16 amx_tile"), "bf16", "auto: the processor has amx_bf16"),
        (X86.format(""), "fp32", "has neither amx_bf16 nor avx512_bf16"),
        (ARM, "fp32", "has neither"),
        (None, "fp32", "has neither"),
    ],
)
def test_auto_takes_bf16_where_the_processor_is_fast_at_it(
    cpuinfo: str | None, name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo, encoding="utf-8")
    monkeypatch.setattr(processor, "CPUINFO", path)
    choice = choose_dtype("auto", CPU)
    assert choice.name == name
    assert choice.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    assert words in choice.reason


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_dtype_that_is_asked_for_is_taken(name: str, dtype: torch.dtype) -> None:
    choice = choose_dtype(name, CPU)
    assert (choice.name, choice.dtype, choice.reason) == (name, dtype, "asked for")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(UserError, match=r"must be auto, fp32, bf16, fp16 \(got 'int8'\)") as caught:
        choose_dtype("int8", CPU)
    assert caught.value.param == "dtype"


def test_the_peak_follows_what_was_used_until_it_is_reset() -> None:
    size = 96 << 20
    reset_peak_memory(CPU)
    before = memory_figures(CPU)
    tensor = torch.ones(size // 4)
    with_tensor = memory_figures(CPU)
    assert with_tensor.allocated - before.allocated > 0.8 * size
    del tensor
    after = memory_figures(CPU)
    assert after.allocated - before.allocated < 0.2 * size
    assert after.peak_allocated - before.allocated > 0.8 * size
    reset_peak_memory(CPU)
    assert memory_figures(CPU).peak_allocated < after.peak_allocated - 0.8 * size


def test_the_figures_agree_with_each_other() -> None:
    figures = memory_figures(CPU)
    assert 0 < figures.allocated <= figures.reserved <= figures.total
    assert figures.peak_active == figures.peak_allocated <= figures.peak_reserved
    assert 0 < figures.free < figures.total


CGROUPS: dict[str, dict[str, Any]] = {
    "version 2": {
        "memory.max": 8 << 30,
        "memory.current": 3 << 30,
        "memory.stat": f"anon {1 << 30}\ninactive_file {1 << 30}\n",
    },
    "version 1": {
        "memory/memory.limit_in_bytes": 8 << 30,
        "memory/memory.usage_in_bytes": 3 << 30,
        "memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {1 << 30}\n",
    },
}


@pytest.mark.parametrize("files", CGROUPS.values(), ids=CGROUPS.keys())
def test_a_container_limits_the_memory(files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_machine(tmp_path, monkeypatch, total_gib=64, available_gib=40)
    write_files(tmp_path / "cgroup", files)
    figures = memory_figures(CPU)
    assert (figures.total, figures.free) == (8 << 30, 6 << 30)


@pytest.mark.parametrize("files", [{}, {"memory.max": "max"}, {"memory/memory.limit_in_bytes": 2**63 - 4096}])
def test_without_a_limit_the_machine_counts(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_machine(tmp_path, monkeypatch, total_gib=64, available_gib=40)
    write_files(tmp_path / "cgroup", files | {"memory/memory.usage_in_bytes": 1, "memory/memory.stat": ""})
    figures = memory_figures(CPU)
    assert (figures.total, figures.free) == (64 << 30, 40 << 30)
    assert (figures.allocated, figures.peak_allocated) == (5 << 10, 7 << 10)


def write_machine(folder: Path, monkeypatch: pytest.MonkeyPatch, *, total_gib: int, available_gib: int) -> None:
    files = {
        "self/status": "Name:\tpython\nVmHWM:\t       7 kB\nVmRSS:\t       5 kB\nThreads:\t1\n",
        "meminfo": f"MemTotal: {total_gib << 20} kB\nMemAvailable: {available_gib << 20} kB\nHugePages_Total: 0\n",
    }
    write_files(folder / "proc", files)
    monkeypatch.setattr(memory, "PROC", folder / "proc")
    monkeypatch.setattr(memory, "CGROUP", folder / "cgroup")


def write_files(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n", encoding="ascii")


def test_the_bandwidth_of_the_cpu_is_measured() -> None:
    bytes_per_second, source = peak_bandwidth(CPU)
    assert source == "measured"
    assert 1e8 < bytes_per_second < 1e13


@pytest.mark.parametrize(
    ("name", "gib", "expected"),
    [
        ("Ascend910B4", 32, 0.8e12),
        ("Ascend910B3", 64, 1.6e12),
        ("Ascend910_9382", 64, 1.6e12),
        ("Ascend310P3", 48, 0.204e12),
        ("Ascend1234", 64, 1.6e12),
        ("Ascend1234", 32, 0.8e12),
    ],
)
def test_the_bandwidth_of_an_npu_is_assumed_from_its_name_or_memory(name: str, gib: int, expected: float) -> None:
    assert bandwidth.assumed_bandwidth(name, gib << 30) == expected


def test_a_seed_repeats_the_random_numbers() -> None:
    drawn = []
    for seed in (1, 1, 2):
        seed_everything(seed, CPU)
        drawn.append((random.random(), torch.rand(2).tolist()))
    assert drawn[0] == drawn[1] != drawn[2]
