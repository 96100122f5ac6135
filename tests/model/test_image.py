"""Image files: pixel for pixel transformers' input, upright, RGB from every mode; read ahead.

What is no image, or a damaged or hostile one, is in test_broken_images.py.
"""

import threading
import time

import numpy as np
import pytest
import torch
from helpers import complaint_about
from PIL import Image, ImageFilter
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from model.io import image as image_module
from model.io.image import load_image, read_ahead, square, to_network

SHAPES = [(640, 480), (333, 517), (56, 56), (57, 55), (1200, 31), (40, 900), (9, 7), (1, 1)]  # width, height
ORIENTATION, DESCRIPTION, COMMENT = 0x0112, 0x010E, "a picture"


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth shapes, hard edges, grain and clipped lights, as in a photograph."""
    rng = np.random.default_rng([seed, width, height])
    rough = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    pixels = np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64)
    y, x = np.mgrid[:height, :width]
    pixels += 90 * ((x // 7 + y // 5) % 3 == 0)[..., None] + rng.normal(0, 12, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def theirs(image: Image.Image, size: int) -> torch.Tensor:
    """What transformers' processor makes of it, with the settings of the official checkpoints."""
    settings = dict(resample=3, do_convert_rgb=True, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = SiglipImageProcessorPil(size={"height": size, "width": size}, **settings)
    return processor(image, return_tensors="pt")["pixel_values"][0]


def write(image: Image.Image, file, **options):
    image.save(file, **options)
    return file


def unlike(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two RGB images, in levels."""
    assert a.mode == b.mode == "RGB" and a.size == b.size
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


# Pixels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [56, 224])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_transformers(shape, size):
    """Resized and scaled alike: 1e-6 is far less than a hundredth of a grey level."""
    image = photo(*shape)
    ours = to_network(square(image, size))
    assert ours.shape == (3, size, size) and ours.dtype == torch.float32
    assert (ours - theirs(image, size)).abs().max() <= 1e-6
    assert ours.min() >= -1 and ours.max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "1"])
def test_modes_as_transformers(mode, tmp_path):
    """Whatever mode a file has, it is turned into RGB as transformers does, and resized then."""
    source = photo(90, 70).convert(mode)
    file = write(source, tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png"))
    with Image.open(file) as image:
        assert image.mode == mode
        assert (to_network(square(load_image(file), 56)) - theirs(image, 56)).abs().max() <= 1e-6


def test_32_bits_a_pixel(tmp_path):
    """Which value is white is known only of those from 0 to 255: others would be black or white all over."""
    grey = np.linspace(0, 255, 120, dtype=np.float32).reshape(10, 12)
    for pixels, words in (
        (grey / 255, "from 0 to 1"),
        (grey - 300, "from -300 to -45"),
        ((grey * 257).astype(np.int32), "from 0 to 65535"),
    ):
        Image.fromarray(pixels).save(tmp_path / "a.tif")
        assert words in complaint_about(tmp_path / "a.tif", load_image)
    for pixels in (grey, grey.astype(np.int32), 0 * grey):
        assert np.array_equal(
            load_image(Image.fromarray(pixels)), pixels.astype(np.uint8)[..., None].repeat(3, 2)
        )


def test_batches_of_pixels():
    """Bytes 0 and 255 are exactly -1 and 1; leading dimensions stay; the source is not written to."""
    pixels = np.zeros((2, 4, 5, 3), np.uint8)
    pixels[1, 2, 3] = 255, 51, 102
    before = pixels.copy()
    tensor = to_network(pixels)
    assert tensor.shape == (2, 3, 4, 5) and tensor[0].eq(-1).all()
    assert torch.allclose(tensor[1, :, 2, 3], torch.tensor([1.0, -0.6, -0.2]), atol=1e-6)
    assert tensor[1, 0, 2, 3] == 1 and (pixels == before).all()


# Files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_orientation(orientation, suffix, tmp_path):
    """A photograph whose camera was turned comes out upright, its marked corner where a person sees it."""
    upright = Image.new("RGB", (48, 32), "grey")
    upright.paste("red", (0, 0, 24, 16))
    upright.paste("blue", (24, 16, 48, 32))
    flip = Image.Transpose
    undo = {  # how the sensor saw it: the inverse of what EXIF asks for
        1: [], 2: [flip.FLIP_LEFT_RIGHT], 3: [flip.ROTATE_180], 4: [flip.FLIP_TOP_BOTTOM],
        5: [flip.TRANSPOSE], 6: [flip.ROTATE_90], 7: [flip.TRANSVERSE], 8: [flip.ROTATE_270],
    }[orientation]  # fmt: skip
    sensor = upright
    for step in undo:
        sensor = sensor.transpose(step)
    exif = Image.Exif()
    exif[ORIENTATION], exif[DESCRIPTION] = orientation, COMMENT
    lossless = {"jpg": dict(quality=100, subsampling=0), "webp": dict(lossless=True)}.get(suffix, {})
    image = load_image(write(sensor, tmp_path / f"a.{suffix}", exif=exif, **lossless))
    assert unlike(image, upright) <= 4


@pytest.mark.parametrize("name", ["a.jpg", "turned.jpg", "a.png", "palette.png", "grey.png", "alpha.png"])
def test_reduced(name, tmp_path):
    """To no fewer pixels a side than are enough, and to what resizing the whole picture gives, about."""
    image = photo(1000, 700).filter(ImageFilter.GaussianBlur(9))
    kinds = dict(palette=image.quantize(250), grey=image.convert("L"), alpha=image.convert("RGBA"))
    exif = Image.Exif()
    exif[ORIENTATION] = 6 if name.startswith("turned") else 1
    file = write(kinds.get(name.partition(".")[0], image), tmp_path / name, exif=exif)
    whole = load_image(file)
    for enough, factor in ((351, 1), (350, 2), (160, 4)):
        reduced = load_image(file, enough)
        assert reduced.size == tuple(-(-side // factor) for side in whole.size)
        apart = np.abs(square(reduced, 64).astype(int) - square(whole, 64))
        assert apart.mean() < 1.5 and apart.max() <= 12
    assert load_image(file, 9999).tobytes() == whole.tobytes()


def test_grey_and_palette(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = Image.fromarray(np.repeat(ramp[..., None], 3, axis=2))
    assert unlike(load_image(write(Image.fromarray(ramp), tmp_path / "grey.png")), grey) == 0
    assert unlike(load_image(write(Image.fromarray(ramp), tmp_path / "grey.gif")), grey) == 0
    colours = photo(20, 20).quantize(17)
    assert unlike(load_image(write(colours, tmp_path / "palette.png")), colours.convert("RGB")) == 0


def test_transparency_is_dropped(tmp_path):
    """As in transformers: the colours under transparent pixels show."""
    image = photo(30, 20)
    layered = image.copy()
    layered.putalpha(Image.linear_gradient("L").resize((30, 20)))
    assert unlike(load_image(write(layered, tmp_path / "a.png")), image) == 0


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits(suffix, tmp_path):
    """Grey levels of 16 bits keep their order: cut off at 255, all but the darkest would be white."""
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
    image = load_image(write(Image.fromarray(ramp.astype(np.uint16)), tmp_path / f"a.{suffix}"))
    assert np.abs(np.asarray(image, float) - (ramp / 257)[..., None]).max() <= 1


def test_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    file = write(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert unlike(load_image(file), frames[0]) == 0


def test_several_pictures_in_a_jpeg(tmp_path):
    """As cameras with two lenses write them: the first counts."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    file = write(frames[0], tmp_path / "a.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert unlike(load_image(file), frames[0]) <= 2


def test_suffix_does_not_matter(tmp_path):
    """A PNG that is called .jpg is a picture all the same."""
    assert load_image(write(photo(20, 10), tmp_path / "a.jpg", format="PNG")).size == (20, 10)


def test_file_can_be_removed_afterwards(tmp_path):
    """The image does not depend on its file any more."""
    file = write(photo(20, 10), tmp_path / "a.png")
    image = load_image(str(file))
    file.unlink()
    assert np.asarray(image).shape == (10, 20, 3)


# Reading ahead ----------------------------------------------------------------------------------------------


def test_read_ahead(tmp_path):
    """In order, in batches, errors where they belong, and not the whole folder at once."""
    files = []
    for i in range(11):
        files.append(tmp_path / f"{i}.png")
        Image.new("RGB", (4, 4), (i, 0, 0)).save(files[-1])
    files[3].write_text("no picture")
    taken = []

    def told():
        for file in files:
            taken.append(file)
            yield file

    seen = []
    for batch in read_ahead(told(), 2):
        assert len(taken) <= len(seen) + 4
        for file, reading in batch:
            seen.append(file)
            if file == files[3]:
                with pytest.raises(ValueError, match="3.png"):
                    reading.result()
            else:
                assert reading.result().getpixel((0, 0)) == (int(file.stem), 0, 0)
    assert seen == files and threading.active_count() < 20


@pytest.mark.parametrize("sides", [[40] * 9, [4] * 9, [4, 4, 90, 4, 4, 40, 40, 40, 4, 0, 4, 4]])
def test_pixels_read_ahead(sides, tmp_path, monkeypatch):
    """However large the images: what the caller has, and what is decoded or being decoded for it, stay within
    the limit, or are one image. In order, and all of them; small ones come in whole batches."""
    lock, decoded, limit, most = threading.Lock(), [], 4 * 40**2, []
    real = image_module.load_image

    def load(file):
        with lock:
            decoded.append(file)
        return real(file)

    monkeypatch.setattr(image_module, "load_image", load)
    files = {}
    for i, side in enumerate(sides):
        files[tmp_path / f"{i}.png"] = side**2
        Image.new("RGB", (max(side, 1),) * 2, (i, 0, 0)).save(tmp_path / f"{i}.png")
        if not side:
            (tmp_path / f"{i}.png").write_text("no picture")
    seen, sizes = [], []
    for batch in read_ahead(files, 3, limit):
        time.sleep(0.05)  # all that can be read ahead is
        with lock:
            held = [file for file in decoded if file not in seen]
        most.append(sum(files[file] for file in held))
        assert most[-1] <= limit or len(held) == 1
        seen += [file for file, _ in batch]
        sizes.append(len(batch))
        for file, reading in batch:
            if files[file]:
                assert reading.result().size == (files[file] ** 0.5,) * 2
    assert seen == list(files) and max(sizes) <= 3
    assert max(most) > limit or sizes == ([3, 3, 3] if sides[0] == 4 else [2, 2, 2, 2, 1])
