"""The table of accelerators against what the vendors publish, and the names that lead into it."""

import math

import pytest

from conan_jax import hardware
from conan_jax.errors import ConfigError
from conan_jax.hardware import CHIPS, TOPOLOGIES, accelerator

# name -> chips, topology, hosts, chips a host, GKE machine type, Cloud TPU type: read off the vendor's tables of configurations.
PUBLISHED = {
    "v4-8": (4, "2x2x1", 1, 4, "ct4p-hightpu-4t", "v4-8"),
    "v5e-1": (1, "1x1", 1, 1, "ct5lp-hightpu-1t", "v5litepod-1"),
    "v5e-4": (4, "2x2", 1, 4, "ct5lp-hightpu-4t", "v5litepod-4"),
    "v5e-8": (8, "2x4", 1, 8, "ct5lp-hightpu-8t", "v5litepod-8"),
    "v5e-16": (16, "4x4", 4, 4, "ct5lp-hightpu-4t", "v5litepod-16"),
    "v5e-256": (256, "16x16", 64, 4, "ct5lp-hightpu-4t", "v5litepod-256"),
    "v5p-8": (4, "2x2x1", 1, 4, "ct5p-hightpu-4t", "v5p-8"),
    "v5p-64": (32, "2x4x4", 8, 4, "ct5p-hightpu-4t", "v5p-64"),
    "v5p-256": (128, "4x4x8", 32, 4, "ct5p-hightpu-4t", "v5p-256"),
    "v5p-4096": (2048, "8x16x16", 512, 4, "ct5p-hightpu-4t", "v5p-4096"),
    "v6e-1": (1, "1x1", 1, 1, "ct6e-standard-1t", "v6e-1"),
    "v6e-8": (8, "2x4", 1, 8, "ct6e-standard-8t", "v6e-8"),
    "v6e-256": (256, "16x16", 64, 4, "ct6e-standard-4t", "v6e-256"),
    "h100-1": (1, "", 1, 1, "a3-highgpu-1g", ""),
    "h100-8": (8, "", 1, 8, "a3-highgpu-8g", ""),
    "h100-64": (64, "", 8, 8, "a3-highgpu-8g", ""),
    "h200-16": (16, "", 2, 8, "a3-ultragpu-8g", ""),
    "cpu-8": (8, "", 1, 8, "", ""),
}
# Peak bfloat16 TFLOP/s, HBM as sold (GB or GiB), HBM GB/s, two-way inter-chip GB/s, network Gbit/s of a chip.
SHEETS = {
    "v4": (275, 32, 1200, 600, 50), "v5e": (197, 16, 819, 400, 25), "v5p": (459, 95, 2765, 1200, 50), "v6e": (918, 32, 1638, 800, 100),
    "h100": (989, 80, 3350, 900, 400), "h200": (989, 141, 4800, 900, 400), "a100": (312, 80, 2000, 600, 200),
    "a100_40gb": (312, 40, 1555, 600, 100),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_slices_are_those_of_the_published_tables(name):
    slice_ = accelerator(name)
    assert (slice_.chips, slice_.topology, slice_.hosts, slice_.chips_per_host, slice_.machine_type, slice_.tpu_vm_type) == PUBLISHED[name]
    assert slice_.name == name


@pytest.mark.parametrize("name", SHEETS)
def test_chips_are_those_of_the_data_sheets(name):
    chip, (tflops, memory, hbm, ici, network) = CHIPS[name], SHEETS[name]
    assert chip.peak_flops == tflops * 1e12
    assert 0.95 * memory * 1e9 < chip.hbm_bytes < 1.09 * memory * 1e9  # sold in GB or GiB, less what the system keeps
    assert chip.hbm_bandwidth == hbm * 1e9
    assert chip.ici_bandwidth == ici * 1e9 / 2
    assert chip.dcn_bandwidth == pytest.approx(network * 1e9 / 8)


@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_every_slice_is_a_whole_number_of_hosts_and_of_its_topology(kind):
    for chips, topology in TOPOLOGIES[kind].items():
        by_topology = accelerator(f"{kind}:{topology}")
        by_name = accelerator(f"{kind}-{chips * CHIPS[kind].units_per_chip}")
        assert by_topology == by_name
        assert math.prod(map(int, topology.split("x"))) == chips == by_name.hosts * by_name.chips_per_host


@pytest.mark.parametrize("kind", ["v5e", "v6e"])
def test_a_board_of_eight_is_one_host_or_two(kind):
    assert accelerator(f"{kind}-8", 8).hosts == 1
    two = accelerator(f"{kind}-8", 4)
    assert (two.hosts, two.machine_type) == (2, accelerator(f"{kind}-16").machine_type)


def test_cpu_devices_are_spread_over_processes():
    assert accelerator("cpu-2", 1).hosts == 2
    assert accelerator("cpu:256").hosts == 1


@pytest.mark.parametrize("name, per_host, words", [
    ("v5e-8", 2, "8 or 4"), ("v5e-256", 8, "a host has 4"), ("cpu-8", 3, "8 or 4 or 2 or 1"), ("h100-12", None, "whole number of nodes"),
    ("v5e-3", None, "v5e-256 (v5e:16x16)"), ("v5p-9", None, "v5p-8"), ("v5e:2x8", None, "there are"), ("b200-8", None, "must be one of"),
    ("v5e", None, "write a number"), ("v5e-0", None, "write a number"), ("v5e-2x2", None, "write a number"),
    ("v5e--4", None, "write a number"), ("v5e-²", None, "write a number"),
])
def test_what_cannot_be_rented_is_refused(name, per_host, words):
    with pytest.raises(ConfigError, match=None) as caught:
        accelerator(name, per_host)
    assert words in str(caught.value)


def test_device_kinds_name_one_chip_each():
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
    assert hardware.chip_of("TPU v5 lite") is CHIPS["v5e"] and hardware.chip_of("TPU v5") is CHIPS["v5p"]
    assert hardware.chip_of("Voodoo2") is None
