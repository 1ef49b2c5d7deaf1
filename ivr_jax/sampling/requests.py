"""What a user asks for: one request from flags, or many from a JSONL file, checked and made ready for the sampler.

A line of the file is an object with `prompt` and, where wanted, `image` (a path or a list of paths, relative to the
file's folder, or URLs in a bucket), `task`, `aspect_ratio`, `seed`, `key` (names the answer's folder; by default the
line's number), and for evaluations `explanation` (what a judge should know about the right result) and `category`:

    {"prompt": "Replace the cup by the cat.", "image": ["table.jpg", "cat.png"], "aspect_ratio": "4:3"}
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ivr_jax import files
from ivr_jax.checkpoints.system import System
from ivr_jax.cloud import inputs
from ivr_jax.cloud.objects import is_url
from ivr_jax.errors import UserError
from ivr_jax.images import Pixels, fit, fitted_size, image_name, load_image
from ivr_jax.protocol import codec as codec_lib
from ivr_jax.protocol import markers
from ivr_jax.protocol.grammar import FREE
from ivr_jax.protocol.text import TextTokenizer
from ivr_jax.sampling.engine import pad_prompts
from ivr_jax.trajectory import TASKS, Sample, checked_key

MAX_CELLS = 99  # a side of an image, in latent cells: its size is written in two digits
AUTO, FREE_SIZE = "auto", "free"
_RATIO = re.compile(r"(\d{1,4}(?:\.\d{1,4})?):(\d{1,4}(?:\.\d{1,4})?)")
_KINDS = {
    "prompt": str, "image": (str, list), "task": str, "aspect_ratio": str, "seed": int, "key": str, "explanation": str,
    "category": str,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Request:
    """One request: `images` are the references in order, paths or pixels; see the module's text for the rest."""

    key: str
    prompt: str
    images: tuple[str | Pixels, ...] = ()
    task: str = ""
    aspect_ratio: str = AUTO
    seed: int = 0
    explanation: str = ""
    category: str = ""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request as the sampler takes it.

    Attributes:
      images: pixels of the references, uint8 [height, width, 3], resized to the tokenizer's cells, by name.
      size: latent rows and columns of every drawn image, or `grammar.FREE`.
      prompt_tokens: what the prompt takes of the context, padding included.
    """

    sample: Sample
    images: dict[str, np.ndarray]
    size: tuple[int, int]
    prompt_tokens: int


def read_requests(path: str, seed: int = 0, task: str = "", aspect_ratio: str = AUTO) -> list[Request]:
    """The requests of a JSONL file, in order.  Raises UserError naming the line.

    Args:
      seed, task, aspect_ratio: of lines that do not say their own.
    """
    file = inputs.local_list(path)
    try:
        lines = files.read_text(file).split("\n")  # JSON texts may hold other ends of lines
    except (OSError, ValueError) as error:
        raise UserError(f"the file of prompts {path!r} cannot be read ({error}).", "Give a JSONL file.") from error
    requests: dict[str, Request] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        request = _request(line, where, file.parent, Request(f"{number:04d}", "", (), task, aspect_ratio, seed))
        if request.key in requests:
            raise UserError(f"{where} has the key {request.key!r} of an earlier line.", "Give each line its own key.")
        requests[request.key] = request
    if not requests:
        raise UserError(f"the file of prompts {path!r} is empty.", 'Write lines such as {"prompt": "A red cup."}.')
    return list(requests.values())


def _request(line: str, where: str, folder: Path, default: Request) -> Request:
    fields = files.parse_json(line, where, 'Write lines such as {"prompt": "A red cup."}.')
    if not isinstance(fields, Mapping) or not set(fields) <= set(_KINDS) or "prompt" not in fields:
        raise UserError(f"{where} must be an object with a prompt and only the fields {', '.join(_KINDS)}.",
                        "Correct the line.")
    for name, value in fields.items():
        if not isinstance(value, _KINDS[name]) or isinstance(value, bool):
            raise UserError(f"{where}: `{name}` is {value!r}.", "Correct the line.")
    given = fields.get("image", [])
    paths = [given] if isinstance(given, str) else given
    if not all(isinstance(path, str) and path.strip() and "\0" not in path for path in paths):
        raise UserError(f"{where}: `image` is {given!r}.", "Name one file, or a list of files.")
    key = checked_key(fields.get("key", default.key), where)
    request = Request(
        markers.check_user_text(key, f"{where}: the key"),
        fields["prompt"],
        tuple(path if is_url(path) else str(files.written_path(folder, path)) for path in paths),
        fields.get("task", default.task),
        fields.get("aspect_ratio", default.aspect_ratio),
        fields.get("seed", default.seed),
        fields.get("explanation", ""),
        fields.get("category", ""),
    )
    check(request, f"{where}: ")
    return request


def check(request: Request, where: str = "") -> None:
    """Raises UserError for what can be seen to be wrong before a model is loaded; images are not opened."""
    if not request.prompt.strip():
        raise UserError(f"{where}the prompt is empty.", 'Give one, such as "Put a red circle at b2."')
    markers.check_user_text(request.prompt, f"{where}the prompt")
    if not 0 <= request.seed < 2**32:
        raise UserError(f"{where}the seed {request.seed} is out of range.", "Use 0 to 4294967295.")
    if request.task not in ("", *TASKS):
        raise UserError(f"{where}there is no task {request.task!r}.", f"The tasks are {', '.join(TASKS)}.")
    if request.aspect_ratio not in (AUTO, FREE_SIZE):
        _ratio(request.aspect_ratio, where)


def _ratio(text: str, where: str = "") -> tuple[float, float]:
    """Width and height of an aspect ratio."""
    match = _RATIO.fullmatch(text)
    width, height = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    if 0 in (width, height):
        raise UserError(f"{where}{text!r} is no aspect ratio.", "Write WIDTH:HEIGHT, such as 16:9, or auto, or free.")
    return width, height


def prepare(request: Request, system: System, area: int = 0) -> Prepared:
    """Loads and resizes the references to about `area` pixels (0: the image tokenizer's own), and settles the size.

    Output size by Emu3.5's rule: an aspect ratio decides; else one reference gives its own size, several leave the
    size to the model, and none gives a square.  (A model whose images have fewer than ten cells a side cannot write a
    size in two digits, so there the first of several references decides.)
    """
    config = system.image_codec.config
    area = area or config.resolution**2
    images, names, shapes = {}, [], []
    for file in request.images:
        whole = load_image(file) if isinstance(file, str) else file
        pixels = fit(whole, area, config.factor)
        rows, columns = (side // config.factor for side in pixels.shape[:2])
        if max(rows, columns) > MAX_CELLS:
            named = file if isinstance(file, str) else "a reference"
            raise UserError(
                f"{named} is too long and narrow: {whole.shape[1]}x{whole.shape[0]} pixels.",
                f"Crop it; at its area a side may take {MAX_CELLS} cells of {config.factor} pixels.",
            )
        names.append(image_name(pixels))
        shapes.append((rows, columns))
        images[names[-1]] = pixels
    sample = Sample(request.key, request.prompt, tuple(names), task_word=request.task)
    codes = dict(zip(images, system.image_codec.encode(list(images.values())), strict=True))
    tokens, _ = pad_prompts([codec_lib.encode_prompt(system.tokenizer, sample, codes)], system.tokenizer.vocab.pad)
    return Prepared(sample, images, output_size(request.aspect_ratio, shapes, area, config.factor), tokens.shape[1])


def output_size(ratio: str, shapes: Sequence[tuple[int, int]], area: int, factor: int) -> tuple[int, int]:
    """Latent rows and columns of the images of an answer, or `grammar.FREE`; see `prepare`.

    Args:
      ratio: of a request; shapes: rows and columns of its references; area: pixels of an image; factor: a cell's side.
    """
    if ratio == FREE_SIZE:
        return FREE
    if ratio == AUTO and shapes:
        free = len(shapes) > 1 and area >= (10 * factor) ** 2
        return FREE if free else shapes[0]
    width, height = (1.0, 1.0) if ratio == AUTO else _ratio(ratio)
    rows, columns = (side // factor for side in fitted_size(height, width, area, factor))
    if max(rows, columns) > MAX_CELLS:
        raise UserError(f"an image of aspect ratio {ratio} would take {rows} x {columns} cells.",
                        f"A side may take {MAX_CELLS}: ask for a smaller image_area, or a ratio nearer to 1:1.")
    return rows, columns


def image_tokens(rows: int, columns: int) -> int:
    """Most tokens of an image block: its cells, the ends of its rows, its size in digits, and the marks around it."""
    return rows * (columns + 1) + 7


def unfinished_size(tokenizer: TextTokenizer, tokens: np.ndarray) -> tuple[int, int] | None:
    """Rows and columns of the image that an answer began and did not draw; None when it has none."""
    begins = np.flatnonzero(tokens == tokenizer.vocab.boi)
    if not len(begins) or tokenizer.vocab.eoi in tokens[begins[-1] :]:
        return None
    size = re.match(r"(\d+)\*(\d+)", tokenizer.decode(tokens[begins[-1] + 1 :]))
    return None if size is None else (int(size[1]), int(size[2]))


def room(prepared: Prepared, system: System, wanted: int, area: int = 0) -> int:
    """Answer tokens: `wanted` (0: enough for five images, at least 640), or what the prompt leaves of the context.

    An image whose size the model chooses is expected to be as large as its own images are (`_own_area`).

    Raises UserError when that is less than one image.
    """
    config, context = system.image_codec.config, system.config.max_position_embeddings
    side = round((area or config.resolution**2) ** 0.5) // config.factor
    rows, columns = (side, side) if prepared.size == FREE else prepared.size
    left, image = context - prepared.prompt_tokens, image_tokens(rows, columns)
    if left <= image:
        raise UserError(
            f"an image of {rows} x {columns} cells needs {image} tokens, and the prompt takes "
            f"{prepared.prompt_tokens} of the {context} tokens of the context.",
            "Shorten it, give fewer images, or ask for smaller ones.",
        )
    if prepared.size == FREE:
        side = round(max(area, _own_area(system)) ** 0.5) // config.factor
        image = max(image, image_tokens(side, side))
    return min(wanted or max(640, 5 * image), left)


def _own_area(system: System) -> int:
    """Pixels of the images that an imported model was trained to draw, by its config.json; 0 where it does not say."""
    area = system.meta.get("hf_config", {}).get("image_area")
    return area if isinstance(area, int) and not isinstance(area, bool) else 0
