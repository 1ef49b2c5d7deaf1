"""A small folder in the authors' released layout, made from photographs that scikit-image ships.

Five samples, so that every shape of the format occurs: one source, several, none; direct, reflection, multi-step.  The
edits are real ones on real pixels (grey, mirrored, darkened, side by side), the scores and reasons are ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from PIL import Image


def photograph(name: str, size: int = 64) -> np.ndarray:
    """The photograph `skimage.data.<name>()`, its middle square resized: uint8 [size, size, 3]."""
    pixels = getattr(skimage.data, name)()
    side = min(pixels.shape[:2])
    top, left = ((extent - side) // 2 for extent in pixels.shape[:2])
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def scores(instruction: int = 5, consistency: int = 5, quality: int = 5, knowledge: int = 5) -> dict[str, Any]:
    """An `evaluation` object of the released format."""
    given = {"consistency": consistency, "instruction": instruction, "quality": quality, "knowledge": knowledge}
    record: dict[str, Any] = {}
    for axis, score in given.items():
        record[f"{axis}_score"] = score
        record[f"{axis}_reasoning"] = "Nothing is wrong." if score == 5 else f"The {axis} is off."
    return record


def write_success(root: Path, size: int = 64) -> Path:
    """Makes `root/success` with five samples of size x size photographs, and returns it."""
    portrait, coffee, cat = (photograph(name, size) for name in ("astronaut", "coffee", "chelsea"))
    grey = np.repeat(portrait.mean(-1, keepdims=True).astype(np.uint8), 3, -1)
    mirrored = cat[:, ::-1]
    dark = (mirrored * 0.5).astype(np.uint8)
    success = root / "success"
    _write(success, "portrait_grey", "Turn the portrait into greyscale.", portrait, grey, scores())
    _write(
        success,
        "coffee_mirrored",
        "Mirror the cup.",
        coffee,
        coffee,
        scores(instruction=1),
        reflect=[("The cup was not mirrored.", "Flip the picture from left to right.", coffee[:, ::-1], scores())],
    )
    _write(
        success,
        "cat_dusk",
        "Mirror the cat, then make it dusk.",
        cat,
        cat,
        scores(instruction=1, knowledge=2),
        reflect=[("Nothing changed.", "Flip it and darken it.", cat[::-1], scores(instruction=2))],
        multi_step=[
            ("Mirror the cat; keep all else.", mirrored, scores()),
            ("Make it dusk; keep all else.", dark, scores(quality=4)),
        ],
    )
    _write(success, "cup_alone", "A cup of coffee on a table.", None, coffee, scores(consistency=3))
    _write(
        success,
        "cat_and_cup",
        "Show the cat beside the cup.",
        [cat, coffee],
        np.concatenate([cat, coffee], 1),
        scores(),
    )
    return success


def _write(
    success: Path,
    key: str,
    prompt: str,
    source: np.ndarray | list[np.ndarray] | None,
    first: np.ndarray,
    evaluation: dict[str, Any],
    reflect: list[tuple] = (),
    multi_step: list[tuple] = (),
) -> None:
    folder = success / key
    folder.mkdir(parents=True)

    def saved(name: str, pixels: np.ndarray) -> str:
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / name)
        return f"outputs/success/{key}/{name}"

    given: Any = None
    if isinstance(source, list):
        for i, pixels in enumerate(source):
            saved(f"original_image_{i}.png", pixels)
        given = [f"photographs/{key}_{i}.png" for i in range(len(source))]
    elif source is not None:
        saved("original_image.png", source)
        given = f"photographs/{key}.png"
    final = direct = saved("step1_direct_edit_result.png", first)
    rounds, steps = [], []
    for k, (analysis, plan, pixels, judged) in enumerate(reflect):
        final = saved(f"step2_reflect_edit_result_{k}.png", pixels)
        rounds.append(
            {
                "reflect_thinking": {"failure_analysis": analysis, "improvement_plan": plan},
                "reflect_image_path": final,
                "evaluation": judged,
            }
        )
    for i, (instruction, pixels, judged) in enumerate(multi_step):
        final = saved(f"step4_multi_step_edit_result_{i}.png", pixels)
        steps.append({"step_instruction": instruction, "step_image_path": final, "evaluation": judged})
    result = {
        "task_id": key,
        "edit_key": {"category": "test"},
        "original_image_path": given,
        "edit_prompt": prompt,
        "direct_edit_image_path": direct,
        "evaluation": evaluation,
        "reflect": rounds,
        "multi_step": steps,
        "final_edited_image_path": final,
        "failure_reason": None,
        "original_success": False,
    }
    (folder / "result.json").write_text(json.dumps(result, indent=4), encoding="utf-8")
