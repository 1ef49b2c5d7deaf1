"""GenEval2 (github.com/facebookresearch/GenEval2, CC BY-NC): atoms of a prompt, each asked about on its own.

The judge (Qwen3-VL-8B-Instruct) is asked every question of `vqa_list`; the score of an atom is the probability that its
first token is an accepted spelling of the right answer.  Servers report the likeliest tokens only, so that a spelling
outside of them counts 0: every judgement records how much probability was seen.

Quirk: " 3" with a leading space is tokenised as a bare space first, so the official script adds the probability of a
bare space to every count; `strict` does, `fixed` does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import datafiles
from ivr_jax.evaluate.benchmarks.figures import Figure, Score, flat
from ivr_jax.evaluate.benchmarks.interface import STRICT, Benchmark, Item, Judged, Kind, Question, only_one

SKILLS = ("object", "count", "attribute", "position", "verb")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SPACE = " "
_YES = ("Yes", "yes", " Yes", " yes")
_PROMPTS = "geneval2_data.jsonl"
_IMAGES = "image_paths.json"


def accepted_tokens(answer: str, skill: str) -> tuple[str, ...]:
    """First tokens that count as the right answer; for a count, the words and digits, and the bare space at the end."""
    if skill != "count":
        return _YES
    word = NUMBERS[int(answer)] if answer.isdecimal() and int(answer) < len(NUMBERS) else answer.lower()
    if word not in NUMBERS:
        raise UserError(f"the answer {answer!r} of a count is no number up to ten.", "Fetch the prompt file again.")
    spellings = [word, word.capitalize()]
    return (*spellings, *(SPACE + spelling for spelling in spellings), str(NUMBERS.index(word)), SPACE)


class GenEval2(Benchmark):
    """GenEval2, as the module describes it."""

    name = "geneval2"
    title = "GenEval2"
    headline = "AM"
    top = 100.0
    official_judge = "Qwen3-VL-8B-Instruct"
    count = 800
    notes = (
        "Probabilities come from the server's likeliest tokens: an accepted spelling outside of them counts 0 "
        "(`mass seen` is the mean of what was reported).",
    )

    def prompt_files(self, data: Path) -> list[Path]:
        return [datafiles.find_file(data, (_PROMPTS, f"*/{_PROMPTS}"), self.title)]

    def items(self, data: Path, scratch: Path) -> list[Item]:
        path = self.prompt_files(data)[0]
        kinds = {"prompt": str, "atom_count": int, "vqa_list": list, "skills": list}
        items = []
        for index, row in enumerate(datafiles.read_jsonl(path)):
            where = f"{path}, prompt {index}"
            datafiles.fields(row, kinds, where, self.title)
            pairs = row["vqa_list"]
            right = len(pairs) == len(row["skills"]) > 0 and set(row["skills"]) <= set(SKILLS)
            right = right and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
            if not right:
                raise UserError(f"{where}: `skills` and `vqa_list` do not match.", "Fetch the prompt file again.")
            items.append(Item(f"{index:05d}", row["prompt"], str(row["atom_count"]), (), row))
        datafiles.unique((item.prompt for item in items), str(path))
        return items

    def find_images(self, images: Path, item: Item) -> list[Path]:
        """`<index>.png`, or the path that the official `{prompt: path}` file names, relative to it."""
        named = images / _IMAGES
        if not named.is_file():
            return super().find_images(images, item)
        paths = datafiles.read_json(named)
        if not isinstance(paths, dict):
            raise UserError(f"{named} is no JSON object of prompts and paths.", "Write it again.")
        found = paths.get(item.prompt)
        if not isinstance(found, str | None):
            raise UserError(f"{named}: the path of {item.prompt!r} is no text.", "Write it again.")
        return only_one([path for path in [images / found] if path.is_file()], item) if found else []

    def questions(self, item: Item, sample: int, judge: str) -> list[Question]:
        questions = []
        for number, ((text, answer), skill) in enumerate(zip(item.data["vqa_list"], item.data["skills"], strict=True)):
            accepted = accepted_tokens(str(answer), skill)
            template = "geneval2_count" if skill == "count" else "geneval2_yes"
            questions.append(Question(f"atom {number}", Kind.PROBABILITY, template, {"question": text},
                                      accepted=accepted))  # fmt: skip
        return questions

    def _atoms(self, item: Item, judged: Judged, mode: str) -> list[float | None]:
        scores = []
        for number in range(len(item.data["skills"])):
            value = judged.value(item, f"atom {number}") or {}
            scores.append(value.get("with_space" if mode == STRICT else "probability"))
        return scores

    def figures(self, items: Sequence[Item], judged: Judged, mode: str) -> list[Figure]:
        arithmetic, geometric = [], []
        by_skill: dict[str, list[Score]] = {}
        by_count: dict[str, list[Score]] = {}
        for item in items:
            atoms = self._atoms(item, judged, mode)
            present = [atom for atom in atoms if atom is not None]
            whole = len(present) == len(atoms)
            am = 100 * math.fsum(present) / len(present) if whole else None
            gm = 100 * _geometric_mean(present) if whole else None
            arithmetic.append(Score(item.key, am, len(present), len(atoms)))
            geometric.append(Score(item.key, gm, len(present), len(atoms)))
            by_count.setdefault(item.category, []).append(arithmetic[-1])
            for skill, atom in zip(item.data["skills"], atoms, strict=True):
                score = Score(item.key, None if atom is None else 100 * atom, int(atom is not None))
                by_skill.setdefault(skill, []).append(score)
        counts = sorted(by_count, key=int)
        return [
            flat("AM", arithmetic),
            flat("GM", geometric),
            *(flat(f"skill {skill}", by_skill[skill]) for skill in SKILLS if skill in by_skill),
            *(flat(f"{number} atoms", by_count[number], number) for number in counts),
        ]

    def result_files(self, items: Sequence[Item], judged: Judged, model: str, judge: str) -> Mapping[str, str]:
        """The official list of lists, and the paths of the images; nothing while a judgement is missing."""
        scores = [self._atoms(item, judged, STRICT) for item in items]
        if any(atom is None for atoms in scores for atom in atoms):
            return {}
        paths = {item.prompt: judged.path(item) for item in items}
        return {"scores.json": json.dumps(scores) + "\n", _IMAGES: json.dumps(paths, ensure_ascii=False) + "\n"}


def first_token_value(tokens: Sequence[tuple[str, float]], accepted: Sequence[str]) -> dict[str, float]:
    """What is recorded of a first token: `probability` without the bare space, `with_space`, and the `mass` seen.

    Args:
      tokens: text and log-probability of the likeliest first tokens.
      accepted: see `accepted_tokens`.
    """
    chances: dict[str, float] = {}
    for text, log_probability in tokens:
        chances[text] = chances.get(text, 0.0) + math.exp(log_probability)
    space = chances.get(SPACE, 0.0) if SPACE in accepted else 0.0
    right = math.fsum(chances.get(text, 0.0) for text in dict.fromkeys(accepted) if text != SPACE)
    return {
        "probability": min(1.0, right),
        "with_space": min(1.0, right + space),
        "mass": min(1.0, math.fsum(chances.values())),
    }


def _geometric_mean(values: Sequence[float]) -> float:
    if min(values) <= 0:
        return 0.0
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


BENCHMARK = GenEval2()
