"""The device: peak memory, and the options of glibc's malloc."""

import ctypes
import platform

import pytest
import torch

from grpo.runtime import device
from grpo.runtime.device import FEW_PARAMETERS, keep_freed_memory, peak_memory


def test_peak_memory_is_that_of_this_process():
    assert 50 * 2**20 < peak_memory(torch.device("cpu")) < 2**40


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's")
def test_glibc_accepts_the_options(monkeypatch):
    library, answers = ctypes.CDLL(None), []

    class Library:
        def mallopt(self, option, value):
            answers.append((option, library.mallopt(option, value)))

    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: Library())
    keep_freed_memory(FEW_PARAMETERS + 1)
    assert not answers
    keep_freed_memory(FEW_PARAMETERS)
    assert answers == [(-4, 1), (-1, 1)], "M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h; 1 is yes"


def test_another_c_library_is_left_unchanged(monkeypatch):
    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: object())
    keep_freed_memory(1)
