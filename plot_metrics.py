"""Draw the plots of a run from its metrics file, or compare several runs in one picture.

    python plot_metrics.py                                             ./grpo_metrics.json
    python plot_metrics.py runs/a                                      the run in this folder
    python plot_metrics.py runs/a --out pics                           draw into the folder pics
    python plot_metrics.py runs/a --html                               also write a report: grpo_report.html
    python plot_metrics.py runs/a runs/b --label first --label second  compare: grpo_comparison.png

A run gets grpo_training_curve.png, grpo_overview.png, grpo_kl_divergence.png if it has a reference, and
grpo_sft_curve.png if it has supervised steps. The run may still be running, or it may have been stopped. In a
comparison, runs with the same label become one curve with a band from the smallest to the largest value. Without
labels, runs become one curve if they differ only in the seed and in settings that do not affect the curves, such as
the output folder.
"""

from pathlib import Path

import click

from grpo.launch.command import Script, run_script


@click.command(cls=Script, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, metavar="[RUN]...")
@click.option("--label", "labels", multiple=True, help="label of a run in a comparison; give one for each run")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="folder to draw into  [default: the run's folder; for several runs, the current one]",
)
@click.option("--html", is_flag=True, help="also write grpo_report.html, one page with everything about the run")
def main(runs: tuple[Path, ...], labels: tuple[str, ...], out: Path | None, html: bool) -> None:
    """Draw the plots of RUN: a metrics file, or the folder of a run (default: the current folder).

    Several runs are compared in one picture, which is written to the current folder or to --out.
    """
    from grpo.record.metrics import load_metrics

    runs = runs or (Path(),)
    try:
        _refuse(runs, labels, html)
        records = [load_metrics(run) for run in runs]
        beside = runs[0] if runs[0].is_dir() else runs[0].parent
        folder = out or (beside if len(runs) == 1 else Path())
        folder.mkdir(parents=True, exist_ok=True)
        if len(runs) > 1:
            from grpo.plots.comparison import draw_comparison
            from grpo.plots.series import group_runs

            written = draw_comparison(group_runs(runs, records, labels), folder)
        else:
            from grpo.plots.figures import draw_all

            written = draw_all(records[0], folder)
        if html:
            from grpo.plots.html_report import write_page

            written.append(write_page(records[0], written, beside, folder))
        for path in written:
            click.echo(path)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None


def _refuse(runs: tuple[Path, ...], labels: tuple[str, ...], html: bool) -> None:
    """Raise ValueError if the combination of arguments makes no sense."""
    if len(runs) == 1 and labels:
        raise ValueError("--label names the runs of a comparison; give several runs, or leave --label out")
    if len(runs) > 1 and html:
        raise ValueError("--html writes the page of one run; give it one run at a time")
    if labels and len(labels) != len(runs):
        raise ValueError(f"there are {len(runs)} runs and {len(labels)} labels; give one --label for each run")
    for run in runs:
        if [other.resolve() for other in runs].count(run.resolve()) > 1:
            raise ValueError(f"{run} is given twice, and would count as two seeds; give each run once")


if __name__ == "__main__":
    run_script(main)
