"""The ablation by one command: its plan, how its branches run, and what is concluded from their evaluations."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ivr_jax import cli
from ivr_jax.config import load_config
from ivr_jax.demo.steps import Branch, Step, run_branches
from ivr_jax.errors import UserError
from ivr_jax.report.metrics import SCHEMA, write_evaluation
from ivr_jax.reproduce import __main__ as reproduce
from ivr_jax.reproduce import ablation, ablation_plots

CONFIG = load_config("micro_reproduce")


# -- the plan ---------------------------------------------------------------------------------------------------------


def all_steps(root: Path) -> list[Step]:
    return [*reproduce.trunk(root, CONFIG), *(s for b in reproduce.branches(root, CONFIG) for s in b.steps)]


def test_every_command_is_one_that_its_module_accepts_and_has_a_folder_of_its_own(tmp_path):
    folders = []
    for step in all_steps(tmp_path / "run"):
        arguments = [a for a in step.arguments if not a.startswith("--workdir")]
        call = cli.parse([step.module, *arguments], config=True, workdir=False)
        assert call.config is not None
        folders += [a for a in step.arguments if a.startswith("--workdir")]
    assert len(set(folders)) == len(folders) > 60


def test_every_folder_that_a_command_reads_is_written_by_an_earlier_one_of_its_branch_or_of_the_trunk(tmp_path):
    made = set()
    trunk = reproduce.trunk(tmp_path, CONFIG)
    for branch in (Branch("trunk", tuple(trunk)), *reproduce.branches(tmp_path, CONFIG)):
        mine = set(made)
        for step in branch.steps:
            read = [a.split("=")[-1] for a in step.arguments[2:] if a.split("=")[-1].startswith(str(tmp_path))]
            assert {str(Path(r).parent) if r.endswith("/dataset") else r for r in read} <= mine
            mine.add(step.arguments[1].split("=", 1)[1])
        made |= mine if branch.name == "trunk" else set()


def test_arms_differ_from_the_full_reward_in_their_own_rule_alone(tmp_path):
    def settings(arm: str, seed: int) -> dict[str, object]:
        branch = next(b for b in reproduce.branches(tmp_path, CONFIG) if b.name == ablation.run_name(arm, seed))
        arguments = [a for a in branch.steps[0].arguments if not a.startswith("--workdir")]
        config = cli.parse(["train", *arguments], config=True, workdir=False).config
        return {**config.to_dict(), "reward": None} | {f"reward.{k}": v for k, v in config.reward.items()}

    def changed(arm: str) -> dict[str, object]:
        full, other = settings("full", 0), settings(arm, 0)
        return {key: other[key] for key in full if full[key] != other[key]}

    assert changed("no_bonus") == {"reward.bonus_weight": 0.0}
    assert changed("no_step_reward") == {"reward.step_weight": 0.0}
    assert changed("bonus_03") == {"reward.bonus_weight": 0.3, "reward.divide_by_std": False}
    one, two = settings("full", 0), settings("full", 1)
    assert {key for key in one if one[key] != two[key]} == {"seed", "prompts"}


# -- branches ---------------------------------------------------------------------------------------------------------

FINE, BROKEN = Step("think", "timeit", ("-n1", "pass")), Step("fail", "json.tool", ("/nowhere",))


@pytest.mark.parametrize("jobs", [1, 2])
def test_branches_run_and_leave_their_logs(tmp_path, jobs):
    run_branches([Branch("a", (FINE, FINE)), Branch("b", (FINE,))], jobs, tmp_path / "logs", "test")
    log = (tmp_path / "logs" / "a.log").read_text()
    assert log.count(f"$ {FINE.command}\n") == 2 and log.count("best of") == 2 and "status 0" in log
    assert (tmp_path / "logs" / "b.log").read_text().count("status 0") == 1


@pytest.mark.parametrize(("on_path", "typed"), [(True, "python"), (False, "env/bin/python3")])
def test_a_command_names_the_interpreter_as_the_reader_would_type_it(tmp_path, monkeypatch, on_path, typed):
    folder = tmp_path / "env" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "python3"):
        (folder / name).symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(folder / "python3"))
    monkeypatch.setenv("PATH", str(folder) if on_path else str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert FINE.command == f"{typed} -m timeit -n1 pass"


def test_a_failure_names_its_log_and_nothing_is_begun_after_it(tmp_path):
    with pytest.raises(UserError) as caught:
        run_branches([Branch("a", (BROKEN, FINE)), Branch("b", (FINE,))], 1, tmp_path, "test")
    assert str(tmp_path / "a.log") in caught.value.what
    assert "timeit" not in (tmp_path / "a.log").read_text()
    assert not (tmp_path / "b.log").exists() or "timeit" not in (tmp_path / "b.log").read_text()


# -- what is concluded ------------------------------------------------------------------------------------------------


def estimate(value: float) -> dict:
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 100}


def evaluation(images: float, exact: float, easy: float = 1.0, hard: float = 0.5, wrong: float = 0.4) -> dict:
    """An evaluation of the given averages; `easy`, `hard`: shares of direct answers at 1 and 4 edits."""

    def summary(direct: float) -> dict:
        return {
            "answers": 100, "images": estimate(images), "exact": estimate(exact), "first_exact": estimate(exact),
            "outcome": estimate(0.9),
            "modes": {"direct": estimate(direct), "reflection": estimate(0.0), "multi_step": estimate(1 - direct)},
            "calibration": {"images": {"pass_given_right": estimate(0.9), "pass_given_wrong": estimate(wrong),
                                       "accuracy": estimate(0.8)}},
        }  # fmt: skip

    return {"schema": SCHEMA, "overall": summary((easy + hard) / 2), "by_suite": {"kris": summary(hard)},
            "by_edits": {"1": summary(easy), "4": summary(hard)}}  # fmt: skip


def run_of(root: Path, **answers: dict) -> ablation.Reproduction:
    for name, result in answers.items():
        for temperature in (1, 0):
            write_evaluation(ablation.eval_folder(root, name, temperature), result)
    return ablation.gather(root, CONFIG)


def test_the_claim_is_judged_by_means_over_seeds(tmp_path):
    found = run_of(
        tmp_path,
        sft=evaluation(2.0, 0.60),
        full_seed0=evaluation(1.2, 0.66), full_seed1=evaluation(1.4, 0.68), full_seed2=evaluation(1.3, 0.64),
        no_bonus_seed0=evaluation(2.1, 0.7), truthful_seed0=evaluation(1.5, 0.69, wrong=0.1),
    )  # fmt: skip
    verdicts = {claim.name: (claim.measured, claim.met) for claim in found.claims}
    assert verdicts["Full: images against SFT, temperature 1"] == ("0.65 ×", True)
    assert verdicts["Full: exact above SFT, temperature 1"] == ("6.0%", True)
    assert verdicts["Without bonus: images against SFT, temperature 0"] == ("1.05 ×", True)
    assert verdicts["Full: one-edit prompts answered with one image"] == ("100.0%", True)
    assert verdicts["Full: prompts of 4 edits answered with several"] == ("50.0%", True)
    # at the variant's own seed 2.1 - 1.2 = 0.9 images are saved by the bonus, of which 0.6 are kept
    assert verdicts["Truthful variant: share of the image saving that it keeps"] == ("66.7%", False)
    assert verdicts["Truthful variant: exact against no bonus"] == ("−1.0%", True)
    assert verdicts["Truthful variant: P(passes | wrong)"] == ("10.0%", True)
    assert verdicts["Truthful variant: share of its rarest mode"] == ("0.0%", False)
    assert found.arms["full"].seeds == (0, 1, 2) and "no_bonus_seed1_t1" in found.missing


def test_what_was_not_run_is_not_judged(tmp_path):
    found = run_of(tmp_path, sft=evaluation(2.0, 0.6))
    assert all(claim.met is None and claim.measured == "" for claim in found.claims)
    assert "full_seed0_t1" in found.missing and "mix_direct_only_t1" in found.missing
    with pytest.raises(UserError) as caught:
        ablation.gather(tmp_path / "elsewhere", CONFIG)
    assert str(tmp_path / "elsewhere") in caught.value.what


def test_the_page_the_figures_and_the_plots(tmp_path, capsys):
    found = run_of(tmp_path, sft=evaluation(2.0, 0.6), full_seed0=evaluation(1.3, 0.66),
                   mix_direct_only=evaluation(1.0, 0.5))  # fmt: skip
    folder = tmp_path / "arms" / "full" / "0"
    folder.mkdir(parents=True)
    lines = [{"step": i, "images": 2 - i / 10, "outcome": 0.9} for i in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = ablation.gather(tmp_path, CONFIG)
    ablation.write(tmp_path, found)
    page = (tmp_path / "reproduction.html").read_text()
    assert page.count("data:image/png;base64,") == 6 and "0.64" in page and "not met" in page
    record = json.loads((tmp_path / "reproduction.json").read_text())
    assert record["arms"]["full"]["t1"][0]["images"]["value"] == 1.3 and record["mixes"]["direct_only"]["t1"]
    assert {path.name for path in (tmp_path / "reproduction_plots").iterdir()} == {
        "images_by_edits.png", "exact_by_edits.png", "pareto.png", "images_over_training.png",
        "outcome_over_training.png", "calibration.png",
    }  # fmt: skip
    ablation.print_tables(found, Console(width=200))
    assert "SFT + RL, full" in capsys.readouterr().out


def test_labels_of_the_front_keep_their_order_and_stay_apart():
    heights = {"a": 0.5, "b": 0.51, "c": 0.52, "d": 0.99, "e": 1.0, "f": 0.1}
    placed = ablation_plots._apart(heights, 0.05)
    assert sorted(placed, key=placed.get) == sorted(heights, key=heights.get)
    values = sorted(placed.values())
    assert all(b - a >= 0.05 - 1e-9 for a, b in zip(values, values[1:], strict=False)) and values[-1] <= 1.0
    assert placed["f"] == 0.1
