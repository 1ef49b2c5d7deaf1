"""OmniContext (OmniGen2): subject-driven generation with one or more reference images.

Images: `<model>/fullset/<task_type>/<key>.png`, one a prompt.  Two calls an image, prompt following (PF) and subject
consistency (SC), each a score from 0 to 10; an item is the geometric mean of both, Average the unweighted mean of the
tasks, language en.

Quirks: the official scripts take a *random* score for a reply that they cannot read (here it is missing, in both
modes), ask three times and keep the last reply (one call has the same distribution, so one is made), and never use the
scene form of the PF prompt: `strict` asks the plain form for scene tasks, `fixed` the scene form.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import datafiles
from ivr_jax.evaluate.benchmarks.figures import Figure, Group, Score, flat, macro
from ivr_jax.evaluate.benchmarks.interface import (
    ANSWER,
    FIXED,
    MODES,
    STRICT,
    Benchmark,
    Item,
    Judged,
    Kind,
    Picture,
    Question,
)

TASKS = ("single_character", "single_object", "multi_character", "multi_object", "multi_character_object",
         "scene_character", "scene_object", "scene_character_object")  # fmt: skip
LANGUAGE = "en"
LOW, HIGH = 0, 10
_AREA, _MULTIPLE = 1024 * 1024, 16
_NAMES = ("*.jsonl", "*/*.jsonl", "*.parquet", "*/*.parquet", "omnicontext*.json")


class OmniContext(Benchmark):
    """OmniContext, as the module describes it."""

    name = "omnicontext"
    title = "OmniContext"
    headline = "Average"
    top = 10.0
    official_judge = "gpt-4.1"
    notes = (
        "The official scripts replace an unreadable reply by a random score; here it is missing.",
        "They ask three times and keep the last reply; here one call is made.",
    )

    def prompt_files(self, data: Path) -> list[Path]:
        first = datafiles.find_file(data, _NAMES, self.title)
        return sorted(first.parent.glob(f"*{first.suffix}"))

    def items(self, data: Path, scratch: Path) -> list[Item]:
        kinds = {"key": str, "task_type": str, "instruction": str, "input_images": list, "instruction_language": str}
        items = []
        for path in self.prompt_files(data):
            for number, row in enumerate(datafiles.read_rows(path, scratch)):
                where = f"{path}, row {number}"
                datafiles.fields(row, kinds, where, self.title)
                if row["task_type"] not in TASKS:
                    raise UserError(f"{where}: there is no task_type {row['task_type']!r}.", "Fetch the file again.")
                if row["instruction_language"] != LANGUAGE:
                    continue
                folder = path.parent.relative_to(data)
                references = tuple(str(folder / name) for name in row["input_images"])
                key = f"{row['task_type']}/{row['key']}"
                items.append(Item(key, row["instruction"], row["task_type"], references, row))
        datafiles.unique((item.key for item in items), str(data))
        return items

    def image_path(self, item: Item, sample: int) -> str:
        return f"fullset/{item.key}.png"

    def questions(self, item: Item, sample: int, judge: str) -> list[Question]:
        shown = [Picture(f"Reference image {n}", path, _AREA, _MULTIPLE) for n, path in enumerate(item.references, 1)]
        pictures = (*shown, Picture("Result", ANSWER, _AREA, _MULTIPLE))

        def ask(metric: str, template: str, modes: tuple[str, ...]) -> Question:
            words = {"instruction": item.prompt}
            return Question(metric, Kind.SCORES, template, words, pictures, ("score",), LOW, HIGH, modes=modes)

        if is_scene(item):
            following = [ask("PF", "omnicontext_following_scene", (FIXED,)),
                         ask(f"PF ({STRICT})", "omnicontext_following", (STRICT,))]  # fmt: skip
        else:
            following = [ask("PF", "omnicontext_following", MODES)]
        return [*following, ask("SC", "omnicontext_consistency", MODES)]

    def _scores(self, item: Item, judged: Judged, mode: str) -> tuple[float | None, float | None]:
        metric = f"PF ({STRICT})" if mode == STRICT and is_scene(item) else "PF"
        return judged.score(item, metric, "score"), judged.score(item, "SC", "score")

    def figures(self, items: Sequence[Item], judged: Judged, mode: str) -> list[Figure]:
        by_task: dict[str, list[Score]] = {}
        parts: dict[str, dict[str, list[Score]]] = {"PF": {}, "SC": {}}
        for item in items:
            both = self._scores(item, judged, mode)
            got = sum(score is not None for score in both)
            value = math.sqrt(both[0] * both[1]) if got == 2 else None
            by_task.setdefault(item.category, []).append(Score(item.key, value, got, 2))
            for name, score in zip(parts, both, strict=True):
                parts[name].setdefault(item.category, []).append(Score(item.key, score, int(score is not None)))
        tasks = [task for task in TASKS if task in by_task]
        return [
            macro("Average", {task: by_task[task] for task in tasks}),
            *(Figure(name, tuple(Group(tuple(scores[task])) for task in tasks)) for name, scores in parts.items()),
            *(flat(task, by_task[task], task) for task in tasks),
        ]

    def result_files(self, items: Sequence[Item], judged: Judged, model: str, judge: str) -> Mapping[str, str]:
        """`<model>/<judge>/<task_type>/score.jsonl`, the scores of `strict`."""
        lines: dict[str, list[str]] = {}
        for item in items:
            following, consistency = self._scores(item, judged, STRICT)
            if following is None or consistency is None:
                continue
            metric = f"PF ({STRICT})" if is_scene(item) else "PF"
            row = {name: item.data[name] for name in ("key", "task_type", "instruction", "instruction_language")}
            row |= {
                "output_image_path": judged.path(item),
                "PF_score": int(following),
                "PF_score_reason": judged.reasoning(item, metric),
                "SC_score": int(consistency),
                "SC_score_reason": judged.reasoning(item, "SC"),
            }
            lines.setdefault(item.category, []).append(json.dumps(row, ensure_ascii=False))
        return {f"{model}/{judge}/{task}/score.jsonl": "\n".join(rows) + "\n" for task, rows in lines.items()}


def is_scene(item: Item) -> bool:
    """Whether subjects are to be put into a given scene."""
    return item.category.startswith("scene_")


BENCHMARK = OmniContext()
