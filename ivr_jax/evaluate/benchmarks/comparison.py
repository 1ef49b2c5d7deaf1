"""`--compare A B`: two finished runs side by side, as files and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivr_jax import cli, files
from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import compare, datafiles, gallery, judgements, registry, run_folder
from ivr_jax.evaluate.benchmarks.interface import FIXED, Benchmark, Item, Judged
from ivr_jax.evaluate.benchmarks.session import SCRATCH
from ivr_jax.evaluate.benchmarks.tables import readable
from ivr_jax.report.benchmark_page import PageTable, write_page

FILE, PAGE = "comparison.json", "comparison.html"
_FIGURES = ("Figure", "Difference", "95% interval", "Prompts", "Wins", "Losses", "Ties", "Sign test")
_WINS = ("Category", "Wins", "Losses", "Ties")


def compare_runs(call: cli.Call) -> dict[str, Any]:
    """Compares the two folders of `--compare`, the second against the first."""
    wanted = call.flags
    if len(wanted.compare) != 2:
        raise UserError("--compare needs two run folders.", "Write --compare RUN_A RUN_B.")
    folders = [Path(name) for name in wanted.compare]
    runs = [run_folder.read_run(folder) for folder in folders]
    overridden = compare.check_comparable(runs[0], runs[1], wanted.force)
    if not wanted.data:
        raise UserError("--data is missing.", "Name the folder with the benchmark's published files.")
    if call.workdir is None:
        raise UserError("no work directory was named.", "Add --workdir=runs/NAME; it is made when it does not exist.")
    benchmark, data = registry.load(runs[0]["benchmark"]), Path(wanted.data).expanduser()
    items = benchmark.items(data, (call.workdir / SCRATCH).absolute())
    hashes = datafiles.fingerprint(benchmark.prompt_files(data), data)
    if hashes not in (runs[0]["data"], runs[1]["data"]):
        told = "; ".join(datafiles.changed(runs[0]["data"], hashes))
        raise UserError(f"the prompts were others: {told}.", "Name the data that the runs were made on.")
    sides = [_side(benchmark, folder, run, items, data) for folder, run in zip(folders, runs, strict=True)]
    names = [folder.name if runs[0]["model"] == runs[1]["model"] else run["model"]
             for folder, run in zip(folders, runs, strict=True)]  # fmt: skip
    for side, name in zip(sides, names, strict=True):
        side.title = name
    found = compare.compare(benchmark, items, sides[0].judged, sides[1].judged, int(runs[1]["seed"]))
    found |= {"schema": run_folder.SCHEMA, "benchmark": benchmark.name, "first": names[0], "second": names[1],
              "folders": list(map(str, folders)), "not_comparable": overridden}  # fmt: skip
    files.write_json(call.workdir / FILE, found)
    shown = gallery.side_by_side(sides[0], sides[1], items, found["items"][FIXED])
    _write_page(call.workdir / PAGE, benchmark, found, shown)
    _show(benchmark, found, call.workdir)
    return found


def _side(
    benchmark: Benchmark, folder: Path, run: Mapping[str, Any], items: list[Item], data: Path
) -> gallery.Run:
    if not run.get("judge"):
        raise UserError(f"{folder} has not been judged.", "Judge it first.")
    images = Path(run["answers"]) if run["answers"] else folder / run_folder.IMAGES
    found = run_folder.find_images(benchmark, images, items, run["samples"])
    label = run["judge"]["label"]
    known = {
        judgement.address: judgement
        for judgement in judgements.read(folder).values()
        if judgement.judge == label
    }
    judged = Judged(known, found.samples, {at: str(path) for at, path in found.paths.items()})
    name = run["judge"]["name"]
    form = "world" if benchmark.judges == ("world",) else "chat" if run["judge"].get("prompts") else "detector"
    return gallery.Run(name, benchmark, folder, data, judged, found.paths, form)


def _write_page(path: Path, benchmark: Benchmark, found: Mapping[str, Any], sections: Any) -> None:
    digits = benchmark.decimals
    tables = []
    for mode, figures in found["figures"].items():
        rows = tuple(_figure_row(readable(name), figure, digits) for name, figure in figures.items())
        lead = f"{found['second']} minus {found['first']}, over the prompts that both were judged on."
        tables.append(PageTable(f"Differences, {mode}", lead, _FIGURES, rows))
    wins = tuple((readable(name), *map(str, counts)) for name, counts in found["wins"][FIXED].items())
    tables.append(PageTable("Wins by category", "Prompts on which the second run is better, worse, the same.",
                            _WINS, wins))  # fmt: skip
    notes = [f"Not comparable, and compared nevertheless: {reason}." for reason in found["not_comparable"]]
    title = f"{benchmark.title}: {found['second']} against {found['first']}"
    write_page(path, title, "Paired bootstrap and two-sided sign test over prompts.", notes, tables, (), (), sections)


def _figure_row(name: str, figure: Mapping[str, Any], digits: int) -> tuple[str, ...]:
    if figure["difference"] is None:
        return (name, "\u2013", "", "0", "0", "0", "0", "")
    interval = "" if figure["low"] is None else f"{figure['low']:+.{digits}f} to {figure['high']:+.{digits}f}"
    test = "" if figure["sign_test"] is None else f"p = {figure['sign_test']:.3g}"
    counts = (str(figure[name]) for name in ("n", "wins", "losses", "ties"))
    return (name, f"{figure['difference']:+.{digits}f}", interval, *counts, test)


def _show(benchmark: Benchmark, found: Mapping[str, Any], workdir: Path) -> None:
    print(f"{benchmark.title}: {found['second']} minus {found['first']}")
    for mode, figures in found["figures"].items():
        row = _figure_row(benchmark.headline, figures[benchmark.headline], benchmark.decimals)
        named = ", ".join(f"{title.lower()} {cell}" for title, cell in zip(_FIGURES[1:], row[1:], strict=True) if cell)
        print(f"{mode}: {named}")
    print(workdir / PAGE)
