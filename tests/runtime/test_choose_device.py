"""The choice of the device: what is there, and what this build of torch has code for."""

import os
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

import train_grpo
from grpo.config import TrainConfig
from grpo.model.loading import load
from grpo.report.opening import introduce
from grpo.runtime import device as devices
from grpo.runtime.device import TRAITS, choose_device, runs_code
from grpo.runtime.ranks import ConnectedRanks

CPU = torch.device("cpu")
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]  # as in torch's wheels
P100, V100, T4, ADA = (6, 0), (7, 0), (7, 5), (8, 9)


@pytest.fixture
def cards(monkeypatch):
    """Return a function that pretends that torch, which was built for `entries`, sees cards of some capabilities."""

    def pretend(*capabilities, entries=CUDA_13):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: entries)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index or 0])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index or 0}")
        for kind, is_available in (("cuda", lambda: True), ("mps", lambda: False)):
            monkeypatch.setitem(TRAITS, kind, replace(TRAITS[kind], is_available=is_available))
        devices.say_once.cache_clear()

    return pretend


def test_devices():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match=r"^--device is 'tpu'"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"^--device cuda is not available"):
            choose_device("cuda")


EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize(
    ("system", "release", "before", "after"),
    [
        ("linux", "6.8.0-generic", {}, EXPANDABLE),
        ("linux", "6.8.0-generic", {"PYTORCH_ALLOC_CONF": "a:1"}, {"PYTORCH_ALLOC_CONF": "a:1"}),
        ("linux", "6.8.0-generic", {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}),
        ("linux", "5.15.90.1-microsoft-standard-WSL2", {}, {}),
        ("win32", "11", {}, {}),
    ],
)
def test_cuda_may_extend_its_blocks_of_memory_unless_the_user_says_otherwise(
    system, release, before, after, cards, monkeypatch
):
    cards(T4)
    monkeypatch.setattr(devices.sys, "platform", system)
    monkeypatch.setattr(devices.platform, "release", lambda: release)
    monkeypatch.setattr(os, "environ", dict(before))
    choose_device("cpu")
    assert os.environ == before
    assert choose_device("cuda").type == "cuda"
    assert os.environ == after


@pytest.mark.parametrize(
    ("entry", "runs", "fails"),
    [
        # CUDA C++ Programming Guide, "Compatibility": a binary runs on later minor versions of its major version,
        # PTX on every later version, "a" on its own version only, "f" on the later minor versions of its family.
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_100", [(10, 0), (10, 3)], [(9, 0), (1, 0), (12, 0)]),
        ("compute_70", [(7, 0), (7, 5), (8, 0), (12, 0)], [(6, 1)]),
        ("sm_90a", [(9, 0)], [(9, 1), (10, 0)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(12, 0)]),
        ("compute_100f", [(10, 0), (10, 3)], [(12, 0)]),
    ],
)
def test_code_runs_where_the_cuda_guide_says(entry, runs, fails):
    assert [runs_code(entry, capability) for capability in runs] == [True] * len(runs)
    assert [runs_code(entry, capability) for capability in fails] == [False] * len(fails)


def test_auto_falls_back_from_a_card_without_code_and_says_so_once(cards, capsys):
    cards(P100)
    assert choose_device("auto") == CPU
    assert choose_device("auto") == CPU
    out, err = capsys.readouterr()
    assert out == "", "standard output is for results"
    assert err.count("\n") == 1
    assert "card 0 has CUDA capability 6.0" in err
    assert "sm_75" in err
    assert "runs on cpu instead" in err


@pytest.mark.parametrize("capability", [T4, ADA, (12, 1), (13, 0)], ids=str)
def test_auto_takes_a_card_that_has_code(capability, cards, capsys):
    cards(capability)  # 13.0 compiles the PTX of compute_120
    assert choose_device("auto").type == choose_device("cuda").type == "cuda"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("entries", [[], ["gfx90a", "gfx1100"]], ids=["not known", "ROCm"])
def test_a_card_is_used_if_torch_does_not_list_cuda_architectures(entries, cards):
    cards((9, 0), entries=entries)
    assert choose_device("auto").type == "cuda"


def test_cuda_is_refused_on_a_card_without_code_in_one_line_that_says_what_to_do(cards, tmp_path):
    cards(V100)
    result = CliRunner().invoke(train_grpo.main, ["--device", "cuda", "--output-dir", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "CUDA capability 7.0" in result.stderr
    assert "--device cpu" in result.stderr
    assert "https://pytorch.org/get-started/locally" in result.stderr


def test_a_process_is_refused_a_card_without_code(cards):
    cards(T4, V100)
    cuda = choose_device("cuda")
    assert ConnectedRanks(0, 2, local_rank=0).own_device(cuda) == torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"^card 1 has CUDA capability 7\.0"):
        ConnectedRanks(1, 2, local_rank=1).own_device(cuda)


@pytest.mark.parametrize(
    ("capabilities", "prompts", "processes"),
    [
        ([ADA, ADA], 4, 2),
        ([ADA, ADA, ADA], 4, 2),  # 3 processes cannot share 4 prompts
        ([ADA], 4, None),
        ([ADA, V100], 4, None),  # the second card has no code
        ([ADA, V100, ADA], 4, None),  # process 1 would get the card without code
        ([ADA, ADA], 5, None),
    ],
    ids=str,
)
def test_the_opening_names_the_cards_that_a_run_does_not_use(
    capabilities, prompts, processes, cards, capsys, monkeypatch
):
    cards(*capabilities)
    assert devices.processes_for(torch.device("cuda"), prompts) == (processes or 1)
    monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], count=TRAITS["cuda"].count))
    said = opening(prompts, capsys)
    assert said.count("torchrun") == (1 if processes else 0)
    assert (f"torchrun --nproc-per-node {processes} train_grpo.py" in said) == bool(processes)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "torchrun" not in opening(prompts, capsys), "torchrun has started this process"


def opening(prompts, capsys):
    lm = load("starter", CPU)
    machine = {"device": "a card", "threads": 1, "precision": "float32", "processes": 1}
    introduce(TrainConfig(batch_size=prompts), lm, machine)
    return capsys.readouterr().out
