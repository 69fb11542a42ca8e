"""Devices by name or by numbers: data sheets, what may be filled, what is refused."""

from __future__ import annotations

import pytest
import torch

from sftcore.errors import UserInputError
from sftcore.train.devices import GPUS, Device, choose_device, device_here, peak_flops_of


@pytest.mark.parametrize(
    ("name", "gigabytes", "teraflops"),
    [("a100", 80, 312), ("h100", 80, 989), ("H200", 141, 989), ("l40s", 48, 362), ("h100-pcie", 80, 756)],
)
def test_a_name_stands_for_its_data_sheet(name, gigabytes, teraflops):
    device = choose_device(name)
    assert device.is_gpu and device.memory_bytes == gigabytes * 10**9
    assert device.peak_flops == pytest.approx(teraflops * 1e12)


def test_numbers_go_before_the_data_sheet_or_stand_alone():
    forty = choose_device("a100", memory_gigabytes=40, teraflops=100)
    assert (forty.memory_bytes, forty.peak_flops) == (40 * 10**9, 1e14)
    own = choose_device(memory_gigabytes=96)
    assert own.is_gpu and own.memory_bytes == 96 * 10**9 and own.peak_flops is None


def test_what_is_not_known_is_refused_by_name():
    with pytest.raises(UserInputError, match="h1000.*\n.*a100, l40s"):
        choose_device("h1000")
    with pytest.raises(UserInputError, match="--gpu-tflops: how much memory"):
        choose_device(teraflops=312)


def test_drivers_names_find_the_right_sheet():
    """A100 holds A10, and H100 PCIe holds H100."""
    assert peak_flops_of("NVIDIA A100-SXM4-80GB") == GPUS["A100"][0] != GPUS["A10"][0]
    assert peak_flops_of("NVIDIA H100 PCIe") == GPUS["H100 PCIe"][0] != GPUS["H100"][0]
    assert peak_flops_of("NVIDIA H100 80GB HBM3") == GPUS["H100"][0]
    assert peak_flops_of("Quadro") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_wish_it_is_this_machine():
    here = choose_device()
    assert here == device_here() and not here.is_gpu and here.memory_bytes > 10**8


def test_ranks_share_a_machine_but_not_a_gpu():
    for is_gpu, share in ((True, 900), (False, 225)):
        assert Device(name="d", is_gpu=is_gpu, memory_bytes=1000).usable_bytes(world=4) == share
