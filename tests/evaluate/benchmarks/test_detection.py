"""The transformers detector: tiny models with random weights, saved in a folder, and what is made of their outputs."""

from __future__ import annotations

import numpy as np
import pytest

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks.detection import TransformersDetector, _crop, _extent
from ivr_jax.evaluate.benchmarks.suites.geneval import COLORS, keep_boxes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of a few thousand weights with a byte vocabulary."""
    import json

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {"vocab_size": 600, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    characters = [chr(c) for c in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *characters, *(c + "</w>" for c in characters)]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detr(tmp_path_factory):
    """A detector with boxes but no masks."""
    folder = tmp_path_factory.mktemp("yolos")
    torch.manual_seed(0)
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        patch_size=8, num_detection_tokens=6, id2label={0: "dog", 1: "cup"}, label2id={"dog": 0, "cup": 1},
    )  # fmt: skip
    transformers.YolosForObjectDetection(config).save_pretrained(folder)
    transformers.YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_boxes_and_colors_come_from_models_in_local_folders(detr, clip):
    detector = TransformersDetector(detr, clip)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    found = detector.detect(pixels, ["dog", "cup"])
    assert found and set(found) <= {"dog", "cup"}
    for boxes in found.values():
        assert all(len(box) == 5 and 0.3 <= box[4] <= 1 for box in boxes)
    name, boxes = next(iter(keep_boxes(found, "colors").items()))
    colors = detector.colors(pixels, name, boxes)
    assert len(colors) == len(boxes) and set(colors) <= set(COLORS)
    assert detector.colors(pixels, name, boxes) == colors
    assert detector.name.startswith("yolos") and detector.settings["clip"] == clip.name
    with pytest.raises(UserError):
        detector.detect(pixels, ["unicorn"])


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    """An instance segmenter of the official family, with a very small Swin backbone."""
    folder = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=1,
        encoder_feedforward_dim=16, dim_feedforward=16, decoder_layers=2, num_attention_heads=2, num_queries=6,
        id2label={0: "dog", 1: "cup"}, label2id={"dog": 0, "cup": 1},
    )  # fmt: skip
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.bias[0] = 6  # every query is a dog
    model.save_pretrained(folder)
    transformers.Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_a_segmenter_gives_masks_of_its_boxes(mask2former, clip):
    detector = TransformersDetector(mask2former, clip)
    assert detector.name.startswith("mask2former")  # not the official one: its backbone is smaller
    pixels = np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8)
    found = detector.detect(pixels, ["dog", "cup"])
    assert set(found) == {"dog"}
    for name, boxes in found.items():
        assert all(0 <= box[0] < box[2] <= 64 and 0 <= box[1] < box[3] <= 48 and box[4] >= 0.3 for box in boxes)
        assert set(detector.colors(pixels, name, boxes)) <= set(COLORS)


def test_masks_give_boxes_and_grey_what_is_outside():
    mask = np.zeros((10, 12), bool)
    mask[2:5, 3:9] = True
    assert _extent(mask) == [3.0, 2.0, 9.0, 5.0]
    pixels = np.full((10, 12, 3), 200, np.uint8)
    mask[2, 3] = False
    crop = np.asarray(_crop(pixels, [3.0, 2.0, 9.0, 5.0, 0.9], mask))
    assert crop.shape == (3, 6, 3) and crop[0, 0].tolist() == [0x99] * 3 and crop[1, 1].tolist() == [200] * 3


def test_a_folder_without_a_model_is_one_clear_error(tmp_path, clip):
    with pytest.raises(UserError):
        TransformersDetector(tmp_path / "nowhere", clip)
