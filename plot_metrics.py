"""Draw the plots of a run again, from its metrics file, or those of several runs in one picture.

    python plot_metrics.py                                             ./grpo_metrics.json
    python plot_metrics.py runs/a                                      the run in a folder
    python plot_metrics.py runs/a --out pics                           draw into another folder
    python plot_metrics.py runs/a --html                               and a page with everything: grpo_report.html
    python plot_metrics.py runs/a runs/b --label first --label second  compare: grpo_comparison.png

A run gets grpo_training_curve.png, grpo_overview.png, grpo_kl_divergence.png if it has a reference, and
grpo_sft_curve.png if it fine-tuned first. Works during a run, and on one that was cut short. Runs of the same label
become one curve with a band from the smallest to the largest; without labels, so do runs that differ in their seed
only.
"""

from pathlib import Path

import click

from grpo.launch.command import Script, run_script


@click.command(cls=Script, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, metavar="[RUN]...")
@click.option("--label", "labels", multiple=True, help="name of a run, where several are compared; once for each")
@click.option("--out", type=click.Path(path_type=Path), help="folder to draw into  [default: beside the metrics]")
@click.option("--html", is_flag=True, help="also write grpo_report.html, one page with everything on the run")
def main(runs: tuple[Path, ...], labels: tuple[str, ...], out: Path | None, html: bool) -> None:
    """Draw the plots of RUN: a metrics file, or the folder of a run (default: this folder).

    Several are compared in one picture, written to this folder if --out names no other.
    """
    from grpo.record.metrics import load_metrics

    runs = runs or (Path(),)
    try:
        _refuse(runs, labels, html)
        records = [load_metrics(run) for run in runs]
        beside = runs[0] if runs[0].is_dir() else runs[0].parent
        folder = out or (beside if len(runs) == 1 else Path())
        if len(runs) > 1:
            from grpo.plots.comparison import draw_comparison
            from grpo.plots.series import group_runs

            groups = group_runs(runs, records, labels)
            folder.mkdir(parents=True, exist_ok=True)
            written = draw_comparison(groups, folder)
        else:
            from grpo.plots.figures import draw_all

            folder.mkdir(parents=True, exist_ok=True)
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
        raise ValueError("--label names runs that are compared; give several runs, or leave it out")
    if len(runs) > 1 and html:
        raise ValueError("--html writes the page of one run; give it one run at a time")
    if labels and len(labels) != len(runs):
        raise ValueError(f"there are {len(runs)} runs and {len(labels)} labels; give one --label for each run")
    places = [run.resolve() for run in runs]
    for run, place in zip(runs, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"{run} is given twice; it would count as two seeds")


if __name__ == "__main__":
    run_script(main)
