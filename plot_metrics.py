"""Draw the plots of a run again, from its metrics file.

    python plot_metrics.py                     ./grpo_metrics.json
    python plot_metrics.py runs/a              the run in a folder
    python plot_metrics.py runs/a --out pics   draw into another folder

Writes grpo_training_curve.png and grpo_kl_divergence.png. Works while a run goes on, and on one that was
cut short.
"""

from pathlib import Path

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run", type=click.Path(path_type=Path), default=".")
@click.option("--out", type=click.Path(path_type=Path), help="folder to draw into  [default: beside the metrics]")
def main(run: Path, out: Path | None) -> None:
    """Draw the plots of RUN: a metrics file, or the folder of a run (default: this folder)."""
    from grpo.metrics import load_metrics
    from grpo.plots import draw_all

    try:
        record = load_metrics(run)
        folder = out or (run if run.is_dir() else run.parent)
        folder.mkdir(parents=True, exist_ok=True)
        for path in draw_all(record, folder):
            click.echo(path)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
