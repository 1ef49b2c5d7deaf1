"""Write the report of a run: one self-contained HTML page with tables, curves and a gallery of answers.

    python -m ivr_jax.report --workdir=runs/demo

WORKDIR holds stage folders (image_tokenizer/ base/ sft/ rl/) and evaluations (eval_base/ eval_sft/ eval_rl/ ...); what
is missing is left out.  The page is WORKDIR/report.html, with its plots as PNG files beside it.
"""

from __future__ import annotations

from ivr_jax import cli
from ivr_jax.errors import UserError
from ivr_jax.report.collect import collect
from ivr_jax.report.pages import write_report


def main(call: cli.Call) -> None:
    page = call.workdir / "report.html"
    found = collect(call.workdir)
    if not found.runs and not found.evaluations:
        raise UserError(f"{call.workdir} holds no stage and no evaluation.", "Give the folder that holds the runs.")
    write_report(page, *found)
    print(f"report: {page}")


def entry() -> None:
    cli.run(main, config=False)


if __name__ == "__main__":
    entry()
