"""Folders of images: the same values as torchvision's, and errors that name the file."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from pn_compiler.base.errors import ConfigError
from pn_compiler.data import image_folder
from pn_compiler.data.image_folder import Preprocessing, read_image
from pn_compiler.data.sources import load_batches
from pn_compiler.loading import load_model
from tests.zoo import torchvision

RGB_NET = nn.Conv2d(3, 4, 1)
NAMES = ["a.jpg", "b.png", "c.webp", "d.bmp", "e.tif", "f.PPM", "g.jpeg", "h.pgm"]


def picture(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    if mode == "I;16":
        return Image.fromarray(values[..., :2].copy().view(np.uint16)[..., 0])
    return Image.fromarray(values).convert("RGB").convert(mode)


def folder_of(folder: Path, *sizes: tuple[int, int]) -> Path:
    folder.mkdir(exist_ok=True)
    for index, size in enumerate(sizes):
        picture(*size, seed=index).save(folder / f"{index:03}.png")
    return folder


def tensors(source: Path | str, model: nn.Module = RGB_NET, **options: Any) -> Tensor:
    return torch.cat([inputs.args[0] for inputs in load_batches(source, model, **options)])


def of_torchvision(gray: bool, **options: Any) -> Any:
    transforms = torchvision().transforms
    steps = [transforms.Grayscale()] if gray else []
    mode = transforms.InterpolationMode(options.get("interpolation", "bilinear"))
    steps += [transforms.Resize(options["resize"], mode)] if options.get("resize") else []
    steps += [transforms.CenterCrop(options["crop"])] if options.get("crop") else []
    steps += [transforms.ToTensor()]
    return transforms.Compose(
        [*steps, transforms.Normalize(options["mean"], options["std"])] if options.get("mean") else steps
    )


SIDES = st.integers(1, 40)
SIZES = st.none() | SIDES | st.tuples(SIDES, SIDES) | st.lists(SIDES, min_size=2, max_size=2)
MEANS = st.sampled_from([(0.485, 0.456, 0.406), (0.5,), [0.0, 1.0, 1 / 3]])


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(SIDES, SIDES),
    st.sampled_from(["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I", "F"]),
    SIZES,
    SIZES,
    st.none() | MEANS,
    st.booleans(),
    st.booleans(),
)
def test_the_same_values_as_torchvision(
    size: tuple[int, int], mode: str, resize: Any, crop: Any, mean: Any, gray: bool, bicubic: bool
) -> None:
    mean = mean[:1] if mean and gray else mean
    options = {"resize": resize, "crop": crop, "mean": mean, "std": mean and [0.229] * len(mean)}
    options |= {"interpolation": "bicubic"} if bicubic and resize else {}
    image = picture(*size, mode).convert("RGB")
    preprocessing = Preprocessing(1 if gray else 3, **options)
    result = preprocessing.values(torch.from_numpy(preprocessing.pixels(image))[None])[0]
    expected = of_torchvision(gray, **options)(image)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


def test_the_same_samples_as_the_image_folder_of_torchvision(tmp_path: Path) -> None:
    for folder in ("cats/black/old", "cats/white", "dogs"):
        (tmp_path / folder).mkdir(parents=True)
        for index, name in enumerate(NAMES):
            picture(20 + index, 30, seed=index + len(folder)).save(tmp_path / folder / name)
    options = {"resize": 16, "crop": (12, 14), "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.1]}
    theirs = torchvision().datasets.ImageFolder(tmp_path, transform=of_torchvision(False, **options))
    batches = load_batches(tmp_path, RGB_NET, batch_size=7, **options)
    assert len(batches) == 4
    assert [len(inputs.args[0]) for inputs in batches] == [7, 7, 7, 3]
    expected = {path: image for (path, _), (image, _) in zip(theirs.samples, theirs, strict=True)}
    assert batches.arrays[""].paths == sorted(expected)
    for _ in range(2):  # each iteration starts again
        result = torch.cat([inputs.args[0] for inputs in batches])
        assert torch.equal(result, torch.stack([expected[path] for path in sorted(expected)]))
    assert torchvision().datasets.folder.IMG_EXTENSIONS == image_folder.EXTENSIONS


def test_whole_batches_and_the_dtype_of_the_model(tmp_path: Path) -> None:
    folder_of(tmp_path, *[(4, 5)] * 5)
    batches = load_batches(tmp_path, nn.Conv2d(3, 4, 1).bfloat16(), batch_size=2, whole=True)
    assert len(batches) == 2
    assert [(i.args[0].shape, i.args[0].dtype) for i in batches] == [((2, 3, 4, 5), torch.bfloat16)] * 2
    with pytest.raises(ConfigError, match="too few samples: 5, and at least 6 are needed"):
        load_batches(tmp_path, RGB_NET, batch_size=6, whole=True)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_unusual_images_as_torchvision_reads_them(tmp_path: Path) -> None:
    load = torchvision().datasets.folder.default_loader
    for mode in ("RGBA", "LA", "P", "1", "I;16", "L"):
        picture(6, 9, mode).save(tmp_path / f"{mode.replace(';', '')}.png")
    picture(6, 9, "CMYK").save(tmp_path / "cmyk.jpg")
    picture(6, 9, "P").save(tmp_path / "transparent.png", transparency=bytes(range(200)))
    frames = [picture(6, 9, seed=seed) for seed in range(3)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by 90 degrees
    picture(6, 9).save(tmp_path / "turned.jpg", exif=exif)
    for path in tmp_path.iterdir():
        assert np.array_equal(read_image(str(path)), load(path)), path
    assert tensors(tmp_path).shape == (10, 3, 6, 9)  # the turned one included


def test_which_files_count(tmp_path: Path) -> None:
    folder_of(tmp_path / "z", (4, 4), (4, 4))
    folder_of(tmp_path / ".hidden", (5, 5))
    (tmp_path / "z" / ".000.png").write_bytes(b"left by a file system")
    (tmp_path / "labels.csv").write_text("1,2")
    (tmp_path / "readme.png.txt").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    picture(4, 4).save(tmp_path / "folder.png" / "B.PNG", format="PNG")
    (tmp_path / "linked.png").symlink_to(tmp_path / "z" / "000.png")
    (tmp_path / "z" / "above").symlink_to(tmp_path)  # a circle
    result = [os.path.relpath(path, tmp_path) for path in image_folder.find_images(tmp_path)]
    assert result == ["folder.png/B.PNG", "linked.png", "z/000.png", "z/001.png"]
    elsewhere = tmp_path / "of_links"
    elsewhere.mkdir()
    (elsewhere / "class").symlink_to(tmp_path / "z")
    assert len(image_folder.find_images(elsewhere)) == 4


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "channels"),
    [
        (nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 3, 1)), 1),
        (nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 1, 1)), 3),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), 3),
        (nn.Linear(4, 2), 3),
        (Untraceable(), 3),
    ],
)
def test_gray_or_rgb_by_the_first_layer(tmp_path: Path, model: nn.Module, channels: int) -> None:
    assert tensors(folder_of(tmp_path, (4, 4), (4, 4)), model).shape == (2, channels, 4, 4)


def test_gray_for_an_exported_program(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).eval()
    torch.export.save(torch.export.export(net, (torch.randn(2, 1, 8, 8),)), tmp_path / "net.pt2")
    folder_of(tmp_path / "images", (8, 8), (8, 8))
    assert tensors(tmp_path / "images", load_model(tmp_path / "net.pt2").model).shape == (2, 1, 8, 8)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    picture(1024, 1024).save(tmp_path / "0.jpg")
    for index in range(1, 40):
        os.link(tmp_path / "0.jpg", tmp_path / f"{index}.jpg")
    code = """if True:
        import os, sys
        from torch import nn
        from pn_compiler.data.sources import load_batches
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        sizes = [resident() for _ in load_batches(sys.argv[1], nn.Conv2d(3, 4, 1), batch_size=2)]
        print(max(sizes) - sizes[0])
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}  # what is freed is given back
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 5 * 3 * 1024 * 1024  # bytes: 5 of 40 images in uint8


def test_damage_is_found_where_it_is_read(tmp_path: Path) -> None:
    folder_of(tmp_path, *[(8, 8)] * 6)
    content = (tmp_path / "004.png").read_bytes()
    (tmp_path / "004.png").write_bytes(content[: len(content) // 2])
    batches, seen = load_batches(tmp_path, RGB_NET, batch_size=2), []
    with pytest.raises(ConfigError, match=r"cannot read the image .*004.png: .*truncated"):
        seen.extend(batches)
    assert len(seen) == 2
    (tmp_path / "004.png").unlink()
    with pytest.raises(ConfigError, match=r"cannot read the image .*004.png: No such file"):
        list(batches)
    (tmp_path / "000.png").write_text("not an image")
    with pytest.raises(ConfigError, match=r"000.png: it is damaged, or not an image"):
        load_batches(tmp_path, RGB_NET)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(NAMES), st.data())
@pytest.mark.filterwarnings("ignore")
def test_whatever_a_damaged_image_provokes_is_an_error_that_names_it(
    tmp_path: Path, name: str, data: st.DataObject
) -> None:
    path = tmp_path / name
    picture(12, 10).save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    message = ""
    try:
        read_image(str(path))  # a pixel may just have another colour
    except ConfigError as error:
        message = str(error)
    assert not message or message.startswith(f"cannot read the image {path}: ")
    assert "\n" not in message


def test_an_image_of_too_many_pixels(tmp_path: Path) -> None:
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ConfigError, match=r"bomb.png: Image size \(200000000 pixels\) exceeds limit"):
        load_batches(tmp_path, RGB_NET)


def test_sizes_that_differ(tmp_path: Path) -> None:
    folder_of(tmp_path, (8, 6), (8, 6), (8, 6), (6, 8))
    batches, seen = load_batches(tmp_path, RGB_NET, batch_size=2), []
    message = r"000.png has 8x6 and .*003.png 6x8 pixels: make them equal with --resize and --crop$"
    with pytest.raises(ConfigError, match=message):
        seen.extend(batches)
    assert len(seen) == 1
    with pytest.raises(ConfigError, match=r"16x12 and .*003.png 12x16 pixels: .* --resize H,W or --crop$"):
        tensors(tmp_path, resize=12)
    assert tensors(tmp_path, resize=(5, 7)).shape == (4, 3, 5, 7)
    assert tensors(tmp_path, crop=9).shape == (4, 3, 9, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": [0.5]}, "mean and std go together"),
        ({"std": [0.5]}, "mean and std go together"),
        ({"mean": [0.5] * 2, "std": [0.5]}, "mean has 2 values, and the images 3 channels"),
        ({"mean": [0.5], "std": [0.5] * 4}, "std has 4 values, and the images 3 channels"),
        ({"mean": [], "std": []}, "mean has 0 values"),
        ({"mean": [123.7, 116.3, 103.5], "std": [1.0]}, "on the scale 0 to 1, not to 255"),
        ({"mean": [float("nan")], "std": [1.0]}, "on the scale 0 to 1"),
        ({"mean": [0.5], "std": [0.0]}, "expected positive values"),
        ({"mean": [0.5], "std": [float("inf")]}, "expected positive values"),
        ({"resize": 0}, "resize 0: expected pixels, or"),
        ({"crop": (4, -4)}, r"crop \(4, -4\): expected pixels, or"),
        ({"crop": (4, 4, 4)}, r"crop \(4, 4, 4\): expected"),
        ({"resize": [4.5, 4]}, r"resize \[4.5, 4\]: expected"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    folder_of(tmp_path, (4, 4), (4, 4))
    with pytest.raises(ConfigError, match=message):
        load_batches(tmp_path, RGB_NET, **options)


def test_folders_that_do_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "data.npy", np.zeros((2, 3, 4, 4)))
    with pytest.raises(ConfigError, match=r"holds no images: expected files .jpg, .jpeg, .png"):
        load_batches(tmp_path, RGB_NET)
    folder_of(tmp_path, (4, 4))
    with pytest.raises(ConfigError, match="too few samples: 1, and at least 2 are needed"):
        load_batches(tmp_path, RGB_NET)
    with pytest.raises(ConfigError, match="the model takes 4 channels, and images have 1 or 3"):
        load_batches(tmp_path, nn.Sequential(nn.Conv2d(4, 4, 1)))
    monkeypatch.setitem(sys.modules, "PIL", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "pn_compiler.data.image_folder")
    with pytest.raises(ConfigError, match=r"needs Pillow: pip install pillow$"):
        load_batches(tmp_path, RGB_NET)
