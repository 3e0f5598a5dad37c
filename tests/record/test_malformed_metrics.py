"""Metrics files that are not as a run writes them: written anew by a run that continues, refused by name in plots."""

import json

import pytest
from click.testing import CliRunner

import plot_metrics
from grpo.record.metrics import FILE_NAME, same_rows
from tests.helpers.malformed import DEEP, HUGE, refusal, train

pytestmark = pytest.mark.usefixtures("no_plots")


AT_A_RESUME = {
    "empty": b"",
    "cut short": b'{"schema_version":1,"config":{},"steps":[{"st',
    "binary": bytes(range(256)),
    "nested": DEEP.encode(),
    "a list": b"[]",
    "finished nowhere": b'{"schema_version":1,"config":{},"steps":[],"evals":[],"finished":5}',
    "finished in a list": b'{"schema_version":1,"config":{},"steps":[],"evals":[],"finished":[1]}',
    "finished without a reason": b'{"schema_version":1,"config":{},"steps":[],"evals":[],"finished":{"step":2}}',
    "finished without a test": b'{"schema_version":1,"config":{},"steps":[],"evals":[],'
    b'"finished":{"step":2,"reason":"x"}}',
}


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("content", AT_A_RESUME.values(), ids=AT_A_RESUME)
def test_damaged_metrics_are_written_anew_from_the_checkpoint(content, more, model, run):
    whole = json.loads((run / FILE_NAME).read_bytes())
    (run / FILE_NAME).write_bytes(content)
    result = train(model, run, num_iterations=2 + more)
    if result.exit_code:
        refusal(result, FILE_NAME)
        return
    record = json.loads((run / FILE_NAME).read_bytes())
    assert same_rows(record["steps"][:2], whole["steps"])
    assert record["finished"]["step"] == 2 + more


def test_metrics_that_are_a_folder_are_refused_by_name(model, run):
    (run / FILE_NAME).unlink()
    (run / FILE_NAME).mkdir()
    refusal(train(model, run, num_iterations=3), FILE_NAME)


@pytest.mark.parametrize("command", ["plot", "train"])
def test_metrics_that_are_a_link_to_itself_are_refused_by_name(command, model, run):
    (run / FILE_NAME).unlink()
    (run / FILE_NAME).symlink_to(run / FILE_NAME)
    if command == "plot":
        refusal(CliRunner().invoke(plot_metrics.main, [str(run)]), FILE_NAME)
    else:
        result = train(model, run, num_iterations=3)
        assert result.exit_code == 0 or refusal(result, FILE_NAME)


@pytest.mark.parametrize(
    "content",
    [
        '{"schema_version": 1, "config": {}, "steps": [{"step": 1, "kl": NaN}], "evals": []}',
        '{"schema_version": 1, "config": {}, "steps": [{"step": 1, "kl": -Infinity}], "evals": []}',
        '{"schema_version": 1, "config": {}, "steps": [{"step": ' + HUGE + "}]}",
        '{"schema_version": 1, "config": {"model": ' + DEEP + "}}",
        '{"schema_version": 1, "config": {}, "steps": [], "evals": [], "findings": [1]}',
        '{"schema_version": 1, "config": {}, "steps": [], "evals": []}\n{}',
        "\ufeff{}",
    ],
    ids=["NaN", "infinity", "a huge number", "nested", "findings", "two records", "a byte order mark"],
)
def test_json_that_no_run_writes_is_refused_by_name(content, tmp_path):
    (tmp_path / FILE_NAME).write_text(content, encoding="utf-8")
    refusal(CliRunner().invoke(plot_metrics.main, [str(tmp_path)]), FILE_NAME)


@pytest.mark.parametrize(
    "config", [{"model": 5, "seed": [1], "beta": {}}, {"model": "a$b_{", "seed": None}, {"model": "\x00\n" * 50}]
)
def test_a_config_of_any_kind_is_drawn_or_refused_by_name(config, tmp_path):
    rows = [{"step": 1, "reward_mean": 0.5, "kl": 0.1}]
    record = {"schema_version": 1, "config": config, "steps": rows, "evals": []}
    (tmp_path / FILE_NAME).write_text(json.dumps(record), encoding="utf-8")
    result = CliRunner().invoke(plot_metrics.main, [str(tmp_path)])
    if result.exit_code:
        refusal(result, FILE_NAME)
