"""The device: peak memory, the options of glibc's malloc, and the first call of the vector functions."""

import ctypes
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

import train_grpo
from grpo.runtime import device
from grpo.runtime.device import FEW_PARAMETERS, TRAITS, keep_freed_memory, return_freed_memory
from tests.helpers.runs import ROOT


def test_peak_memory_is_that_of_this_process():
    assert 50 * 2**20 < TRAITS["cpu"].peak_memory(torch.device("cpu")) < 2**40


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's")
def test_memory_in_pieces_is_returned_of_a_large_model_only():
    def resident():
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096

    pieces = [bytes([i % 256]) * 50_000 for i in range(4000)]  # 200 MB, in the heap and not in separate mappings
    del pieces[:-1]  # the last one holds the end of the heap
    held = resident()
    return_freed_memory(FEW_PARAMETERS)
    assert resident() > held - 20 * 2**20
    return_freed_memory(FEW_PARAMETERS + 1)
    assert resident() < held - 100 * 2**20


TINY = "--num-iterations 2 --batch-size 2 --num-generations 2 --num-inner-updates 1 --eval-every 2 --eval-problems 4"
TINY += " --sft-steps 1 --sft-batch-size 2 --max-operand 1 --max-new-tokens 4 --train-anyway"


def test_memory_that_would_grow_is_released_after_each_step(monkeypatch, tmp_path):
    sizes = []
    monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], end_step=sizes.append))
    result = CliRunner().invoke(train_grpo.main, [*TINY.split(), "--output-dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert len(sizes) == 3, "a supervised step and two of GRPO"
    assert set(sizes) == {sizes[0]}
    assert sizes[0] > 1e5


def test_on_mps_the_cache_is_emptied_after_a_step_and_on_cuda_nothing(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: emptied.append("mps"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("cuda"))
    TRAITS["mps"].end_step(100)
    TRAITS["cuda"].end_step(100)
    assert emptied == ["mps"]


def test_another_c_library_is_left_unchanged(monkeypatch):
    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: object())
    keep_freed_memory(1)
    return_freed_memory(FEW_PARAMETERS + 1)


FIRST_CALL = """
import torch
from grpo.runtime.device import begin_vector_math
begin_vector_math()
x = torch.arange(1920)[:, None] * torch.logspace(0, -4, 64)
print(torch.equal(x.cos(), x.cos()))
"""
BUSY = "import torch\nwhile True: torch.randn(512, 512) @ torch.randn(512, 512)"


@pytest.mark.slow
def test_the_first_call_of_the_vector_functions_gives_what_the_second_does_on_a_busy_machine():
    command, how = [sys.executable, "-c", FIRST_CALL], {"cwd": ROOT, "capture_output": True, "text": True}
    with subprocess.Popen([sys.executable, "-c", BUSY]) as busy:
        try:
            said = {subprocess.run(command, check=True, **how).stdout for _ in range(30)}
        finally:
            busy.kill()
    assert said == {"True\n"}
