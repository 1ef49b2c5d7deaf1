"""Finding objects and their colours in an image, for benchmarks that count and locate.

A detector is anything with the methods of `Detector`.  `TransformersDetector` loads an instance-segmentation or
detection model and a CLIP model of the `transformers` library from local folders; both need the extra `detector`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks.suites.geneval import COLORS, OFFICIAL_DETECTOR, THRESHOLD, Box
from ivr_jax.images import Pixels

_GREY = (0x99, 0x99, 0x99)  # around a masked crop
_WORDINGS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class Detector(Protocol):
    """Attributes:
      name: for people and for the record ("mask2former-swin-s" for the official one).
      version: of its weights.
      settings: JSON values on which it depends.
    """

    name: str
    version: str
    settings: Mapping[str, Any]

    def detect(self, pixels: Pixels, names: Sequence[str]) -> dict[str, list[Box]]:
        """Boxes [x1, y1, x2, y2, score] of each of `names` in uint8 [height, width, 3], in any order."""

    def colors(self, pixels: Pixels, name: str, boxes: Sequence[Box]) -> list[str]:
        """The colour of each box of `name`, one of `COLORS`."""


class TransformersDetector:
    """See `Detector`.

    Args:
      model: folder of an instance-segmentation model (Mask2Former, MaskFormer) or an object detector (DETR and its
        kin) that knows the COCO names.
      clip: folder of a CLIP model.
    """

    def __init__(self, model: Path, clip: Path):
        self._load(Path(model), Path(clip))
        config = self._model.config
        swin_small = tuple(getattr(getattr(config, "backbone_config", None), "depths", ())) == (2, 2, 18, 2)
        official = config.model_type == "mask2former" and swin_small
        self.name = OFFICIAL_DETECTOR if official else f"{config.model_type} ({Path(model).name})"
        self.version = Path(model).name
        self.settings = {"clip": Path(clip).name, "kind": config.model_type}
        self._labels = {str(label).lower(): index for index, label in config.id2label.items()}
        self._masks: dict[tuple[str, tuple[float, ...]], np.ndarray] = {}

    def _load(self, model: Path, clip: Path) -> None:
        try:
            import torch
            import transformers
        except ImportError:
            raise UserError("the detector needs torch and transformers, which are not installed.",
                            "pip install ivr_jax[detector].") from None
        self._torch = torch
        for path in (model, clip):
            if not (path / "config.json").is_file():
                raise UserError(f"there is no model in the folder {path}.", "Fetch it, and name its folder.")
        try:
            self._processor = transformers.AutoImageProcessor.from_pretrained(model, local_files_only=True)
            self._model = _segmenter_or_detector(transformers, model)
            self._clip = transformers.CLIPModel.from_pretrained(clip, local_files_only=True).eval()
            self._clip_processor = transformers.CLIPProcessor.from_pretrained(clip, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"the detector cannot be loaded ({str(error).splitlines()[0]}).",
                            "Name folders in the format of the transformers library, with safetensors.") from None

    def detect(self, pixels: Pixels, names: Sequence[str]) -> dict[str, list[Box]]:
        image, torch = Image.fromarray(pixels), self._torch
        with torch.inference_mode():
            outputs = self._model(**self._processor(images=image, return_tensors="pt"))
        wanted = {self._labels[name.lower()]: name for name in names if name.lower() in self._labels}
        missing = sorted(set(names) - set(wanted.values()))
        if missing:
            raise UserError(f"the detector does not know the name {missing[0]!r}.", "Use one trained on COCO.")
        self._masks.clear()
        size = [pixels.shape[:2]]
        found: dict[str, list[Box]] = {}
        if hasattr(self._processor, "post_process_instance_segmentation"):
            result = self._processor.post_process_instance_segmentation(
                outputs, threshold=THRESHOLD, target_sizes=size, return_binary_maps=True
            )[0]
            masks = np.asarray(result["segmentation"]).astype(bool) if result["segments_info"] else []
            for mask, segment in zip(masks, result["segments_info"], strict=True):
                name = wanted.get(segment["label_id"])
                if name is not None and mask.any():
                    box = [*_extent(mask), float(segment["score"])]
                    self._masks[name, tuple(box)] = mask
                    found.setdefault(name, []).append(box)
            return found
        result = self._processor.post_process_object_detection(outputs, threshold=THRESHOLD, target_sizes=size)[0]
        for score, kind, box in zip(result["scores"], result["labels"], result["boxes"], strict=True):
            if int(kind) in wanted:
                found.setdefault(wanted[int(kind)], []).append([*map(float, box), float(score)])
        return found

    def colors(self, pixels: Pixels, name: str, boxes: Sequence[Box]) -> list[str]:
        """CLIP's likeliest colour of each crop, everything outside of the object's mask grey."""
        torch = self._torch
        crops = [_crop(pixels, box, self._masks.get((name, tuple(box)))) for box in boxes]
        with torch.inference_mode():
            inputs = self._clip_processor(images=crops, return_tensors="pt")
            seen = _features(self._clip.get_image_features(**inputs))
        nearest = (_unit(seen) @ self._classifier(name).T).argmax(1)
        return [COLORS[int(index)] for index in nearest]

    @functools.cache  # noqa: B019 (one detector lives as long as the process)
    def _classifier(self, name: str) -> np.ndarray:
        """One unit vector a colour, the mean of its wordings: float32 [colours, width]."""
        rows = []
        for color in COLORS:
            texts = [wording.format(color=color, name=name) for wording in _WORDINGS]
            with self._torch.inference_mode():
                inputs = self._clip_processor(text=texts, return_tensors="pt", padding=True)
                rows.append(_unit(_features(self._clip.get_text_features(**inputs))).mean(0))
        return _unit(np.stack(rows))


def _segmenter_or_detector(transformers: Any, model: Path) -> Any:
    kind = transformers.AutoConfig.from_pretrained(model, local_files_only=True).model_type
    segments = kind in ("mask2former", "maskformer", "oneformer")
    loader = transformers.AutoModelForUniversalSegmentation if segments else transformers.AutoModelForObjectDetection
    return loader.from_pretrained(model, local_files_only=True, use_safetensors=True).eval()


def _extent(mask: np.ndarray) -> list[float]:
    """x1, y1, x2, y2 of a mask, bool [height, width]; the ends are exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def _crop(pixels: Pixels, box: Box, mask: np.ndarray | None) -> Image.Image:
    if mask is not None:
        pixels = np.where(mask[..., None], pixels, np.asarray(_GREY, np.uint8))
    left, top = (max(0, int(box[axis])) for axis in (0, 1))
    right, bottom = (max(low + 1, int(np.ceil(end))) for low, end in ((left, box[2]), (top, box[3])))
    return Image.fromarray(pixels[top:bottom, left:right])


def _features(output: Any) -> np.ndarray:
    """The projected features, float32 [batch, width]; newer library versions wrap them."""
    return np.asarray(getattr(output, "pooler_output", output), np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
