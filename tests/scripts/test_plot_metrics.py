"""Test plot_metrics.py as a user runs it."""

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import plot_metrics
from grpo.plots import figures as module
from grpo.plots.comparison import COMPARISON
from grpo.plots.figures import CURVE, KL, OVERVIEW
from grpo.plots.html_report import PAGE
from grpo.record.metrics import FILE_NAME
from tests.helpers.scripts import invoke, refusal, snapshot


def test_plots_are_drawn_again_from_a_folder_a_file_and_the_current_folder(copy_of_run, tmp_path, monkeypatch):
    for name in ("training_curve", "kl_divergence", "overview"):  # empty, for speed
        monkeypatch.setattr(module, name, lambda record: plt.figure(figsize=(1, 1)))
    figures = [copy_of_run / name for name in (CURVE, KL, OVERVIEW)]
    for args, place in (
        ([], copy_of_run),
        (["."], copy_of_run),
        (["copy"], tmp_path),
        ([f"copy/{FILE_NAME}"], tmp_path),
    ):
        for figure in figures:
            figure.unlink()
        result = invoke(plot_metrics.main, *args, folder=place)
        assert result.exit_code == 0, result.output
        assert result.stdout.count(".png") == 3
        assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)
    before = snapshot(copy_of_run)
    result = invoke(plot_metrics.main, "copy", "--out", "new/pictures", folder=tmp_path)
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "new/pictures").iterdir()} == {CURVE, KL, OVERVIEW}
    assert snapshot(copy_of_run) == before


def test_several_runs_are_compared_in_one_picture_in_the_current_folder(copy_of_run, run, tmp_path):
    before = snapshot(copy_of_run)
    result = invoke(plot_metrics.main, "copy", run[0], "--label", "one", "--label", "one", folder=tmp_path)
    assert (result.exit_code, result.stdout) == (0, f"{COMPARISON}\n"), result.output
    assert (tmp_path / COMPARISON).read_bytes().startswith(b"\x89PNG")
    assert snapshot(copy_of_run) == before


def test_the_page_of_a_run_is_written_beside_its_pictures(copy_of_run, tmp_path):
    result = invoke(plot_metrics.main, "copy", "--html", folder=tmp_path)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(Path("copy") / PAGE)
    assert (copy_of_run / PAGE).read_text(encoding="utf-8").count("<img") == 3


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["copy", "copy/."], "given twice"),
        (["copy", "other", "--label", "a"], "2 runs and 1 labels"),
        (["copy", "--label", "a"], "--label"),
        (["copy", "other", "--html"], "--html"),
        (["copy", "other"], FILE_NAME),
    ],
)
def test_a_comparison_that_makes_no_sense_is_refused(args, said, copy_of_run, tmp_path):
    (tmp_path / "other").mkdir()
    before = snapshot(tmp_path)
    assert said in refusal(invoke(plot_metrics.main, *args, folder=tmp_path))
    assert snapshot(tmp_path) == before


BAD_METRICS = {
    "missing": None,
    "empty": "",
    "cut short": '{"schema_version":1,"config":{},"steps":[{"step":1,"kl":0.',
    "of another program": '{"log_history": [{"step": 1, "loss": 0.5}]}',
    "a list": "[1, 2]",
    "not JSON": "step,loss\n1,0.5\n",
    "binary": b"\x89PNG\r\n\x1a\n\xff\xfe",
    "of another version": '{"schema_version": 99, "config": {}, "steps": [], "evals": []}',
    "with a wrong step": '{"schema_version": 1, "config": {}, "steps": [7], "evals": []}',
    "with a wrong metric": '{"schema_version": 1, "config": {}, "steps": [{"step": 1, "kl": {}}], "evals": []}',
    "with half an evaluation": '{"schema_version": 1, "config": {}, "steps": [],'
    ' "evals": [{"step": 0, "split": "validation"}]}',
    "a folder": ...,
}


@pytest.mark.parametrize("content", BAD_METRICS.values(), ids=BAD_METRICS)
def test_a_metrics_file_that_cannot_be_read_is_named_and_nothing_is_drawn(content, tmp_path):
    path = tmp_path / FILE_NAME
    if content is ...:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = snapshot(tmp_path)
    for args in ([], [FILE_NAME]):
        if content is ... and args:
            continue  # then it is a folder without a run: the same as "missing"
        result = invoke(plot_metrics.main, *args, folder=tmp_path)
        assert FILE_NAME in refusal(result)
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("place", ["taken", "taken/below"])
def test_a_folder_that_cannot_be_drawn_into_is_named(place, run, tmp_path):
    (tmp_path / "taken").write_text("a file of the user", encoding="utf-8")
    result = invoke(plot_metrics.main, run[0], "--out", place, folder=tmp_path)
    assert "taken" in refusal(result)
    assert snapshot(tmp_path) == {"taken": b"a file of the user"}
