"""The paper's ablation in miniature, gathered: arms and seeds, the paper's figures beside ours, the claims one by one.

    reproduction.json   {"arms": {name: ARM}, "mixes": {name: ARM}, "claims": [GATE], "gates": [GATE], "missing": [...]}
    ARM                 {"title", "seeds": [...], "t1": [FIGURES], "t0": [FIGURES]}, one FIGURES a seed that is there
    FIGURES             {"images", "exact", "first_exact", "outcome", "pass_given_right", "pass_given_wrong", "direct",
                         "reflection", "multi_step", "sight", "sight_fault", "pass_own_wrong" (paired test),
                         "blind_pass_given_right", "blind_pass_given_wrong",
                         "images_by_edits": {...}, "exact_by_edits": {...}, "direct_by_edits": {...},
                         "exact_by_suite": {...}}, each figure an estimate with its 95% interval over prompts

Arms are compared by the mean over their seeds; each seed is given too.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ivr_jax.errors import UserError
from ivr_jax.report.answers import replace_file
from ivr_jax.report.collect import METRICS_FILE, read_curves
from ivr_jax.report.gates import REPRODUCE, Gate, entry_gates, print_gates
from ivr_jax.report.metrics import EVALUATION_FILE, read_evaluation
from ivr_jax.report.pages import render_page
from ivr_jax.report.plots import Curve
from ivr_jax.report.tables import BY_NAME, overall
from ivr_jax.reproduce import ablation_plots
from ivr_jax.reproduce.arm import Arm

RESULT_FILE, PAGE_FILE, PLOTS_FOLDER = "reproduction.json", "reproduction.html", "reproduction_plots"
BASELINES = {"base": "Base", "sft": "SFT", "direct": "SFT, always direct"}
TITLES = {
    "full": "SFT + RL, full",
    "no_step_reward": "RL without step reward",
    "no_bonus": "RL without complexity bonus",
    "bonus_10": "bonus × 1, no division by std",
    "bonus_07": "bonus × 0.7, no division by std",
    "bonus_05": "bonus × 0.5, no division by std",
    "bonus_03": "bonus × 0.3, no division by std",
    "final_evaluation": "final evaluation counts",
    "all_evaluations": "all evaluations count",
    "right_only": "bonus for flawless images alone",
    "truthful": "truthful: final, flawless, bonus × 0.2, no std",
    "direct_only": "direct only",
    "no_multi_step": "without multi-step",
    "no_reflection": "without reflection",
    "all_three": "all three modes",
}
PAPER_IMAGES = {"sft": 2.45, "no_step_reward": 1.62, "no_bonus": 2.73, "full": 1.56}
# Paper, table 2 and mode mix: GenEval (of 1), KRIS-Bench (of 100), OmniContext (of 10).
PAPER_SCORES = {
    "sft": ("0.86", "79.16", "9.12"),
    "no_step_reward": ("0.88", "79.65", "9.25"),
    "no_bonus": ("0.89", "80.25", "9.38"),
    "full": ("0.89", "80.18", "9.35"),
    "direct_only": ("0.86", "75.16", "8.89"),
    "no_multi_step": ("0.87", "77.24", "8.95"),
    "no_reflection": ("0.86", "75.21", "9.03"),
    "all_three": ("0.88", "78.24", "9.15"),
}
SUITES = ("geneval", "kris", "omnicontext")
_FIGURES = (
    "images", "exact", "first_exact", "outcome", "pass_given_right", "blind_pass_given_right", "pass_given_wrong",
    "blind_pass_given_wrong", "sight", "sight_fault", "direct", "reflection", "multi_step",
)  # fmt: skip
PNG_URI = "data:image/png;base64,"
_CURVES = {"images": "Images per answer", "outcome": "Outcome reward"}


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """What `gather` found; `curves` maps metric and arm to one training curve a seed."""

    arms: dict[str, Arm]
    mixes: dict[str, Arm]
    claims: tuple[Gate, ...]
    gates: tuple[Gate, ...]
    curves: dict[str, dict[str, tuple[Curve, ...]]]
    missing: tuple[str, ...]


def run_name(arm: str, seed: int) -> str:
    """The folder's name of one run of an arm."""
    return f"{arm}_seed{seed}"


def eval_folder(root: Path, name: str, temperature: int) -> Path:
    """Where the model `name` is evaluated at temperature 1 or 0."""
    return root / "eval" / f"{name}_t{temperature}"


def gather(root: Path, config: Any) -> Reproduction:
    """Everything that is evaluated so far under `root`; what is not is named in `missing`.

    Raises UserError when the fine-tuned model is not evaluated: nothing can be compared then.
    """
    missing: list[str] = []

    def read(name: str, temperature: int) -> dict[str, Any] | None:
        folder = eval_folder(root, name, temperature)
        if (folder / EVALUATION_FILE).is_file():
            return read_evaluation(folder)
        missing.append(folder.name)
        return None

    def arm_of(name: str, runs: Mapping[int, str], both: bool = True) -> Arm:
        found = {seed: (read(run, 1), read(run, 0) if both else None) for seed, run in runs.items()}
        found = {seed: pair for seed, pair in found.items() if pair[0]}
        return Arm(
            BASELINES.get(name) or TITLES.get(name, name.replace("_", " ")),
            tuple(found),
            tuple(_figures(t1) for t1, _ in found.values()),
            tuple(_figures(t0) for _, t0 in found.values() if t0),
        )

    arms = {name: arm_of(name, {0: name}, both=name != "base") for name in BASELINES}
    if not arms["sft"].t1:
        raise UserError(f"{root} holds no evaluation of the fine-tuned model.", "Leave --report_only out.")
    for arm in (*config.arms, *config.variants):
        seeds = config.seeds if arm in config.arms else config.seeds[:1]
        arms[arm] = arm_of(arm, {seed: run_name(arm, seed) for seed in seeds})
    mixes = {mix: arm_of(mix, {0: f"mix_{mix}"}, both=False) for mix in config.mixes}
    arms, mixes = ({k: v for k, v in group.items() if v.t1} for group in (arms, mixes))
    results = {name: read(name, 1) for name in ("base", "sft", "direct", "multi_step")}
    gates = entry_gates(results | {"kinds": read("kinds", 0)}, REPRODUCE)
    return Reproduction(
        arms, mixes, claims(arms, mixes), gates, _curves(root, config), tuple(dict.fromkeys(missing))
    )


def _figures(result: Mapping[str, Any]) -> dict[str, Any]:
    summary = overall(result)
    found: dict[str, Any] = {name: BY_NAME[name].of(summary) for name in _FIGURES}
    for name in ("images", "exact", "direct"):
        found[f"{name}_by_edits"] = {k: BY_NAME[name].of(v) for k, v in result["by_edits"].items()}
    found["pass_own_wrong"] = summary["paired"].get("pass_own_wrong", {})
    found["exact_by_suite"] = {k: BY_NAME["exact"].of(v) for k, v in result["by_suite"].items()}
    return found


def _curves(root: Path, config: Any) -> dict[str, dict[str, tuple[Curve, ...]]]:
    found: dict[str, dict[str, list[Curve]]] = {name: {} for name in _CURVES}
    for arm in config.arms:
        for seed in config.seeds:
            path = root / "arms" / arm / str(seed) / METRICS_FILE
            for curve in read_curves(path) if path.is_file() else ():
                if curve.name in found:
                    found[curve.name].setdefault(arm, []).append(curve)
    return {name: {arm: tuple(curves) for arm, curves in by_arm.items()} for name, by_arm in found.items()}


def claims(arms: Mapping[str, Arm], mixes: Mapping[str, Arm] | None = None) -> tuple[Gate, ...]:
    """The claim, one condition at a time, by means over seeds; see `docs/results/reproduction.md`."""
    sft, full, plain = arms["sft"], arms.get("full"), arms.get("no_bonus")
    found = []
    for t in (1, 0):
        ratio = _ratio(full, sft, t)
        found.append(Gate.of(f"Full: images against SFT, temperature {t}", 0.70, ratio, at_most=True, unit="×"))
    for t, lead in ((1, 0.05), (0, 0.0)):
        found.append(Gate.of(f"Full: exact above SFT, temperature {t}", lead, _lead(full, sft, t)))
    for t in (1, 0):
        ratio = _ratio(plain, sft, t)
        found.append(Gate.of(f"Without bonus: images against SFT, temperature {t}", 0.95, ratio, unit="×"))
    hardest = max((g for seed in sft.t1 for g in seed["direct_by_edits"]), key=int, default="")
    easy, hard = (full and full.mean("direct_by_edits", 1, group) for group in ("1", hardest))
    found.append(Gate.of("Full: one-edit prompts answered with one image", 0.90, easy))
    several = None if hard is None else 1 - hard
    found.append(Gate.of(f"Full: prompts of {hardest} edits answered with several", 0.30, several))
    passes = full and full.mean("pass_own_wrong")
    found.append(Gate.of("Full: P(pass | own wrong image), paired test", 0.15, passes, at_most=True))
    found.append(Gate.of("Full: answers that reflect", 0.05, full and full.mean("reflection")))
    found.append(Gate.of("Mode mix: exact of all three modes, less the best other mix", 0.0, _mix_lead(mixes or {})))
    return (*found, *_truthful_claims(arms.get("truthful"), full, plain))


def _truthful_claims(own: Arm | None, full: Arm | None, plain: Arm | None) -> list[Gate]:
    """The conditions on the truthful variant, beside the other arms' runs of the same seeds."""
    if not own or not full or not plain:
        return []
    full, plain = full.at(own.seeds), plain.at(own.seeds)
    if not full.t1 or not plain.t1:
        return []
    saved = plain.mean("images") - full.mean("images")
    kept = (plain.mean("images") - own.mean("images")) / saved if saved > 0 else None
    rarest = min(own.mean(mode) or 0.0 for mode in ("direct", "reflection", "multi_step"))
    return [
        Gate.of("Truthful variant: share of the image saving that it keeps", 0.80, kept),
        Gate.of("Truthful variant: exact against no bonus", -0.02, _lead(own, plain, 1)),
        Gate.of("Truthful variant: P(passes | wrong)", 0.15, own.mean("pass_given_wrong"), at_most=True),
        Gate.of("Truthful variant: share of its rarest mode", 0.02, rarest),
    ]


def _mix_lead(mixes: Mapping[str, Arm]) -> float | None:
    """Exact match of the mix of all three modes, less that of the best other mix."""
    exact = {name: arm.mean("exact") for name, arm in mixes.items()}
    ours = exact.pop("all_three", None)
    others = [value for value in exact.values() if value is not None]
    return None if ours is None or not others else ours - max(others)


def _ratio(arm: Arm | None, reference: Arm, temperature: int) -> float | None:
    ours, theirs = arm and arm.mean("images", temperature), reference.mean("images", temperature)
    return ours / theirs if ours and theirs else None


def _lead(arm: Arm | None, reference: Arm, temperature: int) -> float | None:
    ours, theirs = arm and arm.mean("exact", temperature), reference.mean("exact", temperature)
    return None if ours is None or theirs is None else ours - theirs


# -- on the terminal, and as a page -----------------------------------------------------------------------------------


def main_rows(found: Reproduction) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The headline table as text: columns and rows, one an arm, with the paper's ratio of images beside ours."""
    columns: tuple[str, ...] = (
        "", "images, T 1", "× SFT", "paper", "by edits", "exact, T 1", "by edits", "images, T 0", "exact, T 0"
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for name, arm in found.arms.items():
        paper = f"{PAPER_IMAGES[name] / PAPER_IMAGES['sft']:.2f}" if name in PAPER_IMAGES else ""
        rows.append((
            arm.title,
            _with_seeds(arm, "images", 1, "{:.2f}"),
            _number(_ratio(arm, found.arms["sft"], 1), "{:.2f}"),
            paper,
            _by_group(arm, "images_by_edits", "{:.1f}"),
            _with_seeds(arm, "exact", 1, "{:.1%}"),
            _by_group(arm, "exact_by_edits", "{:.0%}"),
            _with_seeds(arm, "images", 0, "{:.2f}"),
            _with_seeds(arm, "exact", 0, "{:.1%}"),
        ))  # fmt: skip
    return columns, rows


def mode_rows(found: Reproduction) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """How each arm answers, and whether it knows when it is right: verdicts beside those of a blind rule."""
    shares = {
        "own first image exact": "first_exact", "P(passes | right)": "pass_given_right",
        "blind rule": "blind_pass_given_right", "P(passes | wrong)": "pass_given_wrong",
        "blind rule ": "blind_pass_given_wrong", "sight, own wrong image": "sight", "sight, one fault": "sight_fault",
        "direct": "direct", "reflection": "reflection", "multi-step": "multi_step",
    }  # fmt: skip
    rows = []
    for arm in found.arms.values():
        values = [_number(arm.mean(name), "{:.1%}") for name in shares.values()]
        rows.append((arm.title, _number(arm.mean("outcome"), "{:.3f}"), *values))
    return ("", "R_o", *shares), rows


def score_rows(found: Reproduction) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Benchmarks beside the paper's: exact match on our splits, and what the paper reports for its own."""
    columns: tuple[str, ...] = ("exact on ours", *SUITES, "images", "paper: GenEval", "KRIS", "OmniContext")
    rows: list[tuple[str, ...]] = []
    for name, arm in {**found.arms, **found.mixes}.items():
        if name in PAPER_SCORES:
            ours = (_number(arm.mean("exact_by_suite", 1, suite), "{:.1%}") for suite in SUITES)
            rows.append((arm.title, *ours, _number(arm.mean("images"), "{:.2f}"), *PAPER_SCORES[name]))
    return columns, rows


def mix_rows(found: Reproduction) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Fine-tuning on each mode mix."""
    columns: tuple[str, ...] = ("", "exact", "by edits", "images", "by edits", "own first image exact")
    rows: list[tuple[str, ...]] = [
        (arm.title, _with_interval(arm, "exact"), _by_group(arm, "exact_by_edits", "{:.0%}"),
         _number(arm.mean("images"), "{:.2f}"), _by_group(arm, "images_by_edits", "{:.1f}"),
         _number(arm.mean("first_exact"), "{:.1%}"))
        for arm in found.mixes.values()
    ]  # fmt: skip
    return columns, rows


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _with_seeds(arm: Arm, figure: str, temperature: int, form: str) -> str:
    """ "1.36 (1.31 1.40 1.37)": the mean, and each seed when there are several."""
    values = arm.values(figure, temperature)
    each = f" ({' '.join(form.format(v).rstrip('%') for v in values)})" if len(values) > 1 else ""
    return _number(arm.mean(figure, temperature), form) + each


def _with_interval(arm: Arm, figure: str) -> str:
    estimate = arm.t1[0][figure]
    return f"{estimate['value']:.1%} [{estimate['low']:.0%}–{estimate['high']:.0%}]".replace("%–", "–")


def _by_group(arm: Arm, figure: str, form: str) -> str:
    groups = sorted({group for seed in arm.t1 for group in seed[figure]}, key=int)
    return " ".join(_number(arm.mean(figure, 1, group), form).rstrip("%") for group in groups)


def print_tables(found: Reproduction, console: Console) -> None:
    """All tables on the terminal; of the headline table the columns that fit into 80 characters."""
    columns, rows = main_rows(found)
    brief = [columns.index(name) for name in ("", "images, T 1", "× SFT", "exact, T 1", "exact, T 0")]
    rows = [[row[index].partition(" (")[0] for index in brief] for row in rows]
    _print("Arms", [columns[index] for index in brief], rows, console)
    _print("Benchmarks, and the paper's", *score_rows(found), console)
    _print("Mode mix, fine-tuning alone", *mix_rows(found), console)
    print_gates(found.gates, console)
    print_gates(found.claims, console, "The claim")
    if found.missing:
        console.print(f"Not evaluated yet: {', '.join(found.missing)}", soft_wrap=True)


def _print(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    if rows:
        output = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            output.add_row(*map(Text, row))
        console.print(output)


def write(root: Path, found: Reproduction) -> None:
    """Writes reproduction.json, the page and its plots into `root`."""
    record = {
        "arms": {name: dataclasses.asdict(arm) for name, arm in found.arms.items()},
        "mixes": {name: dataclasses.asdict(arm) for name, arm in found.mixes.items()},
        "claims": [dataclasses.asdict(claim) for claim in found.claims],
        "gates": [dataclasses.asdict(gate) for gate in found.gates],
        "missing": list(found.missing),
    }
    try:
        plots = ablation_plots.draw(root / PLOTS_FOLDER, found.arms, found.curves, _CURVES)
        replace_file(root / RESULT_FILE, (json.dumps(record, indent=1) + "\n").encode())
        replace_file(root / PAGE_FILE, _page(root, found, plots).encode())
    except OSError as error:
        raise UserError(f"cannot write into {root}: {error}.", "Choose a folder you can write to.") from None


def _page(root: Path, found: Reproduction, plots: Sequence[tuple[str, Path]]) -> str:
    pictures = [(title, PNG_URI + base64.b64encode(path.read_bytes()).decode()) for title, path in plots]
    return render_page(
        "reproduction.html",
        "Interleaved reasoning in miniature",
        folder=root.name,
        tables=[
            ("Arms", "Mean over seeds, each seed in brackets. Images and exact match on held-out prompts; “paper” is "
             "the same ratio in the paper's table 2.", *main_rows(found)),
            ("Modes and verdicts", "Temperature 1, means over seeds. The model's verdict on each image against the "
             "analyzer's, with a rule that sees the prompt alone and passes as often; sight by the paired test; the "
             "mode it chose.", *mode_rows(found)),
            ("Beside the paper's benchmarks", "Our splits copy the manner of the paper's benchmarks, not their "
             "content: compare orders, not values.", *score_rows(found)),
            ("Mode mix, fine-tuning alone", "Temperature 1, one seed, 95% intervals.", *mix_rows(found)),
        ],
        claims=found.claims, gates=found.gates, plots=pictures, missing=found.missing,
    )  # fmt: skip
