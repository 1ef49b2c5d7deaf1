"""Write the report of a run: one self-contained HTML page with tables, curves and a gallery of answers.

    python -m ivr_jax.report --workdir=runs/demo
    python -m ivr_jax.report --live=runs/demo/rl            a page that follows a run; several --live compare runs

WORKDIR holds stage folders (image_tokenizer/ base/ sft/ rl/) and evaluations (eval_base/ eval_sft/ eval_rl/ ...); what
is missing is left out.  The page is WORKDIR/report.html, with its plots as PNG files beside it.

--live serves a page on this machine (over SSH: `ssh -L 8323:127.0.0.1:8323 HOST`) with curves, throughput, alarms, what
the judge took and the newest gallery of rollouts; it draws again by itself while the runs continue.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from ivr_jax import cli
from ivr_jax.cloud import inputs
from ivr_jax.cloud.objects import Objects
from ivr_jax.errors import UserError
from ivr_jax.report.collect import ReportInputs, collect
from ivr_jax.report.pages import write_report

PAGE = "report.html"


def add_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string("live", [], "follow the run in this workdir, or the runs in its subfolders",
                              flag_values=values)
    flags.DEFINE_integer("port", 8323, "of the live page on 127.0.0.1; 0 takes a free one", 0, 65535,
                         flag_values=values)


def main(call: cli.Call) -> None:
    if call.flags.live:
        serve_live([Path(folder).expanduser() for folder in call.flags.live], call.flags.port)
        return
    if call.workdir is None:
        raise UserError("no work directory was named.", "Add --workdir=runs/NAME, or --live=runs/NAME.")
    if call.bucket is not None:
        report_in_bucket(call.bucket)
        return
    page = call.workdir / PAGE
    found = collected(call.workdir)
    write_report(page, *found)
    print(f"report: {page}")


def report_in_bucket(url: str) -> None:
    """The report on what a folder in a bucket shows now, also while a run writes there; it is one object of it."""
    found = collected(inputs.local(url, without="checkpoints"))
    with tempfile.TemporaryDirectory() as folder:
        write_report(Path(folder) / PAGE, *found)
        Objects(url).upload({PAGE: Path(folder) / PAGE})
    print(f"report: {url}/{PAGE}")


def collected(folder: Path) -> ReportInputs:
    """What a folder of runs holds; UserError when there is nothing."""
    found = collect(folder)
    if not found.runs and not found.evaluations:
        raise UserError(f"{folder} holds no stage and no evaluation.", "Give the folder that holds the runs.")
    return found


def serve_live(folders: list[Path], port: int) -> None:
    """See `live.serve`.  Raises UserError where the web server is not installed."""
    try:
        from ivr_jax.report import live
    except ImportError as error:
        raise UserError(f"{error.name} is not installed.", "pip install 'ivr_jax[serve]'") from error
    live.serve(folders, port)


def entry() -> None:
    argv = with_live_folder(sys.argv)
    cli.run(main, config=False, workdir=False, add_flags=add_flags, argv=argv, opens_bucket=True)


def with_live_folder(argv: Sequence[str]) -> list[str]:
    """`--live DIR` as `--live=DIR`."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] in ("--live", "-live") and not word.startswith("-"):
            words[-1] = f"--live={word}"
        else:
            words.append(word)
    return words


if __name__ == "__main__":
    entry()
