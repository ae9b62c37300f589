from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsv3.config.hardware import HardwareConfig, KernelConfig
from dsv3.errors import InvalidValue, UserError
from dsv3.planning import hardware
from dsv3.planning.hardware import Machine, detect_hardware, host_memory, require_gpu, visible_gpus
from tests.planning.presets import CONF

AUTO = HardwareConfig(name="auto")
H200 = "NVIDIA H200, 143771\nNVIDIA H200, 143771\n"


def machine(told: str = "", root: Path = Path("/nowhere"), **environment: str) -> Machine:
    return Machine(lambda: told, root, environment)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("path", sorted((CONF / "hardware").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_choice_is_a_valid_config_of_its_name(path: Path) -> None:
    node: dict[str, Any] = yaml.safe_load(path.read_text())
    assert node.pop("defaults") == ["/schema/hardware@_here_", "_self_"]
    config = HardwareConfig(**node)
    config.validate()
    assert config.name == path.stem
    assert all(not isinstance(value, str) for key, value in node.items() if key != "name")
    if config.name in ("auto", "cpu"):
        return
    assert config.peak_flops_bf16
    assert config.memory_bandwidth
    assert config.intra_node_bandwidth
    # The order of magnitude of a slipped exponent, and a sparse number in place of the dense one.
    assert 100 <= config.peak_flops_bf16 / config.memory_bandwidth <= 320
    assert config.peak_flops_fp8 in (None, 2 * config.peak_flops_bf16)
    assert 2 <= config.memory_bandwidth / config.intra_node_bandwidth <= 17


def test_a_known_gpu_brings_its_numbers() -> None:
    found = detect_hardware(AUTO, 2, machine(H200))
    assert (found.name, found.memory_bytes) == ("h200", 141_000_000_000)
    assert (found.peak_flops_bf16, found.intra_node_bandwidth) == (989.5e12, 450e9)


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("NVIDIA A100-SXM4-80GB, 81920", "a100"),
        ("NVIDIA H100 80GB HBM3, 81559", "h100"),
        ("NVIDIA H800, 81559", "h800"),
        ("NVIDIA B200, 183359", "b200"),
        ("NVIDIA GB200, 189471", "gb200"),
        ("NVIDIA GB300, 284208", "gb300"),
        ("NVIDIA GH200 480GB, 97871", "NVIDIA GH200 480GB"),
        ("NVIDIA H100 PCIe, 81559", "NVIDIA H100 PCIe"),
        ("NVIDIA GeForce RTX 4090, 24564", "NVIDIA GeForce RTX 4090"),
    ],
)
def test_names_of_nvidia_smi(told: str, name: str) -> None:
    assert detect_hardware(AUTO, 1, machine(told)).name == name


def test_an_unknown_gpu_has_the_memory_it_reports_and_no_peak() -> None:
    found = detect_hardware(AUTO, 1, machine("NVIDIA L4, 23034"))
    assert (found.memory_bytes, found.peak_flops_bf16) == (23034 * 2**20, None)


def test_the_smallest_memory_counts() -> None:
    assert detect_hardware(AUTO, 1, machine("NVIDIA A100-SXM4-40GB, 40960")).memory_bytes == 40960 * 2**20
    assert (
        detect_hardware(AUTO, 2, machine("NVIDIA L4, 23034\nNVIDIA T4, 15360")).memory_bytes == 15360 * 2**20
    )
    assert detect_hardware(AUTO, 1, machine("NVIDIA GB10, [N/A]")).memory_bytes is None


def test_only_visible_gpus_count() -> None:
    told = "NVIDIA L4, 23034\nNVIDIA T4, 15360\nNVIDIA L4, 23034\n"
    assert len(visible_gpus(machine(told))) == 3
    assert visible_gpus(machine(told, CUDA_VISIBLE_DEVICES="1")) == ["NVIDIA T4, 15360"]
    assert len(visible_gpus(machine(told, CUDA_VISIBLE_DEVICES="GPU-8a,GPU-9b"))) == 2
    for hidden in ("", "-1"):
        assert detect_hardware(AUTO, 1, machine(told, CUDA_VISIBLE_DEVICES=hidden)).name == "cpu"


def test_without_a_gpu_the_ranks_share_the_host(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/meminfo": "MemTotal:       24000000 kB\nMemFree: 1 kB\n"})
    found = detect_hardware(AUTO, 4, machine(root=root))
    assert (found.name, found.memory_bytes, found.peak_flops_bf16) == ("cpu", 24_000_000 * 1024 // 4, None)
    assert (
        detect_hardware(HardwareConfig(name="cpu"), 1, machine(H200, root)).memory_bytes == 24_000_000 * 1024
    )


def test_what_the_user_gives_wins() -> None:
    given = replace(AUTO, memory_bytes=10**9)
    assert detect_hardware(given, 2, machine(H200)).memory_bytes == 10**9
    assert detect_hardware(given, 2, machine(H200)).peak_flops_bf16 == 989.5e12
    h800 = HardwareConfig(name="h800", memory_bytes=5)
    assert detect_hardware(h800, 8, machine(H200)) == h800


def test_a_cgroup_of_version_2_limits_the_host_also_from_above(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": "MemTotal: 24000000 kB\n",
        "proc/self/cgroup": "0::/pod/job\n",
        "sys/fs/cgroup/pod/job/memory.max": "max\n",
        "sys/fs/cgroup/pod/memory.max": "8000000000\n",
    }
    assert host_memory(write(tmp_path, files)) == 8_000_000_000


def test_a_cgroup_of_version_1_limits_the_host(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": "MemTotal: 24000000 kB\n",
        "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/a\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9000000000\n",
    }
    root = write(tmp_path, files)
    assert host_memory(root) == 9_000_000_000
    write(root, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"})
    assert host_memory(root) == 24_000_000 * 1024


def test_a_machine_that_tells_nothing_leaves_the_memory_unknown() -> None:
    assert detect_hardware(AUTO, 1, machine()).memory_bytes is None


def test_no_nvidia_smi_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "QUERY", ["/nowhere/nvidia-smi"])
    assert hardware.query_nvidia_smi() == ""
    monkeypatch.setattr(hardware, "QUERY", ["sleep", "5"])
    monkeypatch.setattr(hardware, "QUERY_SECONDS", 0.05)
    assert hardware.query_nvidia_smi() == ""


def test_without_nvidia_smi_a_named_gpu_is_taken_where_there_is_a_driver(tmp_path: Path) -> None:
    named, root = HardwareConfig(name="h100"), write(tmp_path, {"dev/nvidiactl": ""})
    require_gpu(named, machine(root=root))
    for without in (machine(), machine(root=root, CUDA_VISIBLE_DEVICES="")):
        with pytest.raises(UserError, match="no GPU here"):
            require_gpu(named, without)


def test_numbers_are_above_zero() -> None:
    with pytest.raises(InvalidValue, match="memory_bytes=0"):
        HardwareConfig(name="x", memory_bytes=0).validate()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"memory_bandwidth": 1e-320}, "memory_bandwidth"),
        ({"intra_node_bandwidth": 0.5}, "intra_node_bandwidth"),
        ({"peak_flops_bf16": 1e30}, "peak_flops_bf16"),
        ({"source": "\x1b[2J"}, "source"),
        ({"source": "x" * 501}, "source"),
    ],
)
def test_rates_that_no_device_has_are_refused(values: dict[str, Any], key: str) -> None:
    """A plan divides by them, and a file of measurements is somebody's."""
    with pytest.raises(InvalidValue) as caught:
        HardwareConfig("x", **values).validate()
    assert caught.value.key == key
    for node in (KernelConfig(memory=1e-320), KernelConfig(launch_seconds=1e300)):
        with pytest.raises(InvalidValue):
            node.validate()
