"""Image files in every common form, and files that are none."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from ivr_jax import images
from ivr_jax.errors import UserError
from ivr_jax.images import decode_image, fit, fitted_size, image_name, load_image, save_png

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3)).astype(np.uint8)


def test_names_tell_content_and_shape_apart():
    assert image_name(PIXELS) == image_name(PIXELS.copy())
    assert image_name(PIXELS) != image_name(PIXELS.reshape(4, 6, 3))
    assert image_name(PIXELS) != image_name(255 - PIXELS)
    assert len(image_name(PIXELS)) == 32 and int(image_name(PIXELS), 16) >= 0
    assert image_name(PIXELS[:, ::-1]) == image_name(np.ascontiguousarray(PIXELS[:, ::-1]))


@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), "x"])
def test_only_rgb_pixels_have_names(bad, tmp_path):
    with pytest.raises(UserError, match="uint8"):
        image_name(bad)
    with pytest.raises(UserError, match="uint8"):
        save_png(tmp_path / "x.png", bad)
    assert not list(tmp_path.iterdir())


def test_saving_is_exact_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "deep" / "image.png"
    save_png(path, PIXELS)
    save_png(path, PIXELS)
    assert (load_image(path) == PIXELS).all()
    assert [p.name for p in path.parent.iterdir()] == ["image.png"]


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=str(tmp_path)):
        save_png(tmp_path / "file" / "image.png", PIXELS)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=str(tmp_path)):
        save_png(tmp_path / "folder.png", PIXELS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_pipe_is_an_error_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError) as raised:
        load_image(tmp_path / "pipe.png")
    assert "pipe.png" in raised.value.what


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(PIXELS).save(tmp_path / "turned.png", exif=exif)
    assert (load_image(tmp_path / "turned.png") == np.rot90(PIXELS, -1)).all()


def test_transparency_shows_white(tmp_path):
    alpha = np.zeros((6, 4), np.uint8)
    alpha[:3] = 255
    Image.fromarray(np.dstack([PIXELS, alpha])).save(tmp_path / "alpha.png")
    loaded = load_image(tmp_path / "alpha.png")
    assert (loaded[:3] == PIXELS[:3]).all() and (loaded[3:] == 255).all()


def test_grey_palette_and_two_level_images_become_rgb(tmp_path):
    grey = PIXELS[..., 0]
    for name, image in (("grey", Image.fromarray(grey)), ("palette", Image.fromarray(grey).convert("P")),
                        ("bits", Image.fromarray((grey > 127).astype(np.uint8) * 255).convert("1"))):
        image.save(tmp_path / f"{name}.png")
        loaded = load_image(tmp_path / f"{name}.png")
        wanted = (grey > 127) * 255 if name == "bits" else grey
        assert loaded.shape == (6, 4, 3) and (loaded == wanted[..., None]).all()


def test_transparent_palettes_and_grey_with_alpha(tmp_path):
    image = Image.fromarray(np.zeros((4, 4), np.uint8)).convert("P")
    image.save(tmp_path / "palette.png", transparency=0)
    assert (load_image(tmp_path / "palette.png") == 255).all()
    Image.merge("LA", [Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 0)]).save(tmp_path / "la.png")
    assert (load_image(tmp_path / "la.png") == 255).all()


def test_16_bit_grey_keeps_its_high_bits(tmp_path):
    deep = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png")[..., 0].tolist() == [[0, 0, 1], [128, 255, 255]]


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "ink.jpg")
    loaded = load_image(tmp_path / "ink.jpg")
    assert loaded.shape == (8, 8, 3)
    assert loaded[..., 0].min() > 200 and loaded[..., 1:].max() < 60


def test_extreme_shapes_load(tmp_path):
    Image.new("RGB", (5000, 1), "red").save(tmp_path / "thin.png")
    assert load_image(tmp_path / "thin.png").shape == (1, 5000, 3)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_truncated_file_is_a_user_error(tmp_path, form, share):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(buffer, form)
    path = tmp_path / "cut"
    path.write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * share)])
    with pytest.raises(UserError, match="cut"):
        load_image(path)


def written_png(colour: int, interlaced: bool, size: int, data: bytes) -> bytes:
    """A file of `size` by `size` pixels of 8 bits with the pixel `data` in two chunks."""
    packed = zlib.compress(data)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, colour, 0, 0, interlaced)), (b"IDAT", packed[:9]),
              (b"IDAT", packed[9:]), (b"IEND", b"")]  # fmt: skip
    written = [struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
               for name, body in chunks]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


@pytest.mark.parametrize(("colour", "interlaced", "whole"), [
    (0, False, 5 * 6), (2, False, 5 * 16), (6, False, 5 * 21), (4, False, 5 * 11),
    (0, True, 2 + 2 + 3 + 2 * 2 + 4 + 3 * 3 + 2 * 6), (2, True, 4 + 4 + 7 + 2 * 4 + 10 + 3 * 7 + 2 * 16),
])  # fmt: skip
def test_a_png_whose_pixels_end_early_is_an_error_and_a_black_one_is_black(colour, interlaced, whole):
    assert decode_image(written_png(colour, interlaced, 5, bytes(whole)), "black.png").shape == (5, 5, 3)
    with pytest.raises(UserError, match="short.png"):
        decode_image(written_png(colour, interlaced, 5, bytes(whole - 7)), "short.png")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", bytes(1000)])
def test_other_files_are_user_errors(tmp_path, content):
    (tmp_path / "note.png").write_bytes(content)
    with pytest.raises(UserError, match="note.png"):
        load_image(tmp_path / "note.png")


def test_missing_files_and_folders_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="absent.png"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(UserError, match=str(tmp_path)):
        load_image(tmp_path)


def test_huge_images_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_MEGAPIXELS", 0.001)
    save_png(tmp_path / "large.png", np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(UserError, match="megapixels"):
        load_image(tmp_path / "large.png")


@pytest.mark.parametrize(
    ("height", "width", "side", "expected"),
    [  # by hand: h = floor(sqrt(area / (width / height))), w = floor(h * width / height), then to the nearest 16
        (37, 37, 512, (512, 512)),
        (1080, 1920, 512, (384, 688)),  # 384, 682
        (300, 400, 720, (624, 832)),  # 623, 830
        (1920, 1080, 1024, (1360, 768)),  # 1365, 767
        (720, 720, 720, (720, 720)),
        (5000, 1, 512, (36208, 16)),  # 36203, 7
        (1, 5000, 512, (16, 35008)),  # 7, 35000
    ],
)
def test_an_image_keeps_its_shape_at_about_the_wanted_area(height, width, side, expected):
    assert fitted_size(height, width, side**2, 16) == expected


def test_resizing_is_bicubic_and_a_fitting_image_stays(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3)).astype(np.uint8)
    fitted = fit(pixels, 64 * 64, 16)
    assert fitted.shape == (48, 80, 3)
    wanted = Image.fromarray(pixels).resize((80, 48), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(fitted, np.array(wanted))
    assert fit(fitted, 64 * 64, 16) is fitted


def test_a_program_for_a_printer_is_no_image_and_is_not_run(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "picture.eps")
    (tmp_path / "picture.eps").rename(tmp_path / "picture.png")
    with pytest.raises(UserError, match="picture.png"):
        load_image(tmp_path / "picture.png")


def test_a_line_that_would_grow_when_it_is_fitted_is_refused(tmp_path):
    Image.new("RGB", (1, 32_768)).save(tmp_path / "line.png")
    assert load_image(tmp_path / "line.png").shape == (32_768, 1, 3)
    Image.new("RGB", (32_769, 1)).save(tmp_path / "line.png")
    with pytest.raises(UserError, match="32769"):
        load_image(tmp_path / "line.png")


# Files from the wild


def odd_exif(orientation: int) -> bytes:
    """EXIF with an orientation, and a resolution of -1/0, which Pillow reads and cannot write back."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0) + struct.pack("<HHII", 0x011A, 10, 1, 38)
    return b"Exif\0\0" + b"II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4) + struct.pack("<ii", -1, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tags_that_cannot_be_written_back_do_not_keep_a_picture_from_being_turned(tmp_path, orientation):
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :16] = 255
    good, path = Image.Exif(), tmp_path / "turned.jpg"
    good[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=good, quality=95, subsampling=0)
    with Image.open(path) as image:
        wanted = np.array(ImageOps.exif_transpose(image))
    Image.fromarray(pixels).save(path, exif=odd_exif(orientation), quality=95, subsampling=0)
    np.testing.assert_array_equal(load_image(path), wanted)


def grey_ramp(dtype: type, scale: float) -> Image.Image:
    """0 to 252/255 of `scale`, 48 rows."""
    return Image.fromarray((np.tile(np.arange(0, 256, 4), (48, 1)) * (scale / 255)).astype(dtype))


@pytest.mark.parametrize(("name", "image"), [
    ("i32.tif", grey_ramp(np.int32, 255)), ("i32w.tif", grey_ramp(np.int32, 1 << 30)),
    ("f1.tif", grey_ramp(np.float32, 1)), ("f255.tif", grey_ramp(np.float32, 255)),
    ("i12.tif", grey_ramp(np.uint16, 4095)), ("i12.png", grey_ramp(np.uint16, 4095)),
    ("i14.tif", grey_ramp(np.uint16, 16383)), ("nan.tif", grey_ramp(np.float32, float("nan"))),
])  # fmt: skip
def test_samples_of_unknown_range_are_named_and_never_black(tmp_path, name, image):
    image.save(tmp_path / name)
    with pytest.raises(UserError) as caught:
        load_image(tmp_path / name)
    assert name in caught.value.what and "white" in caught.value.what


@pytest.mark.parametrize(("name", "image", "white"), [
    ("i16.tif", grey_ramp(np.uint16, 65535), None), ("i16.png", grey_ramp(np.uint16, 65535), None),
    ("i12.tif", grey_ramp(np.uint16, 4095), 4095), ("i32.tif", grey_ramp(np.int32, 255), 255),
])  # fmt: skip
def test_deep_greys_of_known_range_are_a_ramp(tmp_path, name, image, white):
    image.save(tmp_path / name, **({"tiffinfo": {281: white}} if white else {}))
    ramp = load_image(tmp_path / name)
    assert ramp.shape == (48, 64, 3)
    np.testing.assert_allclose(ramp[0, :, 0].astype(int), np.arange(0, 256, 4), atol=1)


def test_a_black_deep_picture_is_black(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "black.png")
    assert load_image(tmp_path / "black.png").max() == 0


def png(depth: int, colour_type: int, rows: np.ndarray, before: bytes = b"") -> bytes:
    """A PNG of big-endian samples [height, width, channels], with chunks `before` its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], depth, colour_type, 0, 0, 0))
    extra = chunk(before[:4], before[4:]) if before else b""
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + extra + data + chunk(b"IEND", b"")


DEEP = np.tile(np.arange(0, 65536, 1024, dtype=np.uint16)[:, None], (4, 1, 1))  # [4, 64, 1]


def test_colours_of_12_in_16_bits_are_named(tmp_path):
    (tmp_path / "colour.png").write_bytes(png(16, 2, np.repeat(DEEP // 16, 3, 2)))
    with pytest.raises(UserError) as caught:
        load_image(tmp_path / "colour.png")
    assert "colour.png" in caught.value.what


def test_the_transparent_sample_of_a_deep_grey_png_is_white():
    pixels = decode_image(png(16, 0, DEEP, b"tRNS\0\0"), "deep.png")
    assert (pixels[:, 0] == 255).all() and pixels[0, 1:, 0].tolist() == list(range(4, 256, 4))


def test_white_behind_a_transparent_part_does_not_hide_that_the_colours_would_be_black():
    alpha = np.where(np.arange(64)[:, None] < 32, 65535, 0).astype(np.uint16)
    rows = np.concatenate([DEEP // 16] * 3 + [np.tile(alpha, (4, 1, 1))], axis=2)
    with pytest.raises(UserError):
        decode_image(png(16, 6, rows), "deep.png")


def test_a_deep_file_that_states_its_range_is_read_and_a_type_s_largest_number_states_none(tmp_path):
    deep = grey_ramp(np.uint16, 4095)
    deep.save(tmp_path / "default.tif", tiffinfo={281: 65535})
    with pytest.raises(UserError):
        load_image(tmp_path / "default.tif")
    grey_ramp(np.float32, 1).save(tmp_path / "stated.tif", tiffinfo={341: 1.0})
    assert load_image(tmp_path / "stated.tif")[0, :, 0].tolist() == list(range(0, 256, 4))
    dark = b"P5 4 1 4095\n" + struct.pack(">4H", 0, 160, 320, 480)
    assert decode_image(dark, "dark.pgm")[0, :, 0].tolist() == [0, 10, 20, 30]


def test_a_large_text_in_a_png_and_the_second_picture_of_an_mpo_are_left_alone(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", "a" * (4 << 20), zip=True)
    info.add_itxt("workflow", "b" * (34 << 20), zip=True)
    Image.fromarray(PIXELS).save(tmp_path / "text.png", pnginfo=info)
    np.testing.assert_array_equal(load_image(tmp_path / "text.png"), PIXELS)
    first, second = (Image.new("RGB", (32, 16), colour) for colour in ("white", "black"))
    first.save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=[second])
    assert load_image(tmp_path / "camera.jpg").shape == (16, 32, 3) and load_image(tmp_path / "camera.jpg").min() > 250


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000"])
def test_mutated_files_are_pictures_or_user_errors(form):
    """Bounded fuzz: bytes changed, cut, doubled and moved, with a fixed seed."""
    rng = np.random.default_rng(sum(form.encode()))
    buffer = io.BytesIO()
    options = {"exif": odd_exif(6)} if form == "JPEG" else {}
    Image.fromarray(rng.integers(0, 256, (24, 32, 3)).astype(np.uint8)).save(buffer, form, **options)
    whole = buffer.getvalue()
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(int(rng.integers(1, 6))):
            place, size = int(rng.integers(0, len(data))), int(rng.integers(1, 40))
            kind = rng.integers(0, 4)
            if kind == 0:
                data[place : place + size] = rng.bytes(len(data[place : place + size]))
            elif kind == 1:
                del data[place : place + size]
            elif kind == 2:
                data[place:place] = data[place : place + size]
            else:
                data[min(place, 64)] ^= 1 << int(rng.integers(0, 8))
            if not data:
                data = bytearray(b"\0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damaged tags
            try:
                pixels = decode_image(bytes(data), "mutant")
            except UserError as error:
                assert "mutant" in error.what
                continue
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        assert pixels.shape[0] * pixels.shape[1] <= images.MAX_MEGAPIXELS * 1e6
