"""Labels from folders: the same as torchvision's where all classes are there, and never a guess elsewhere."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pn_compiler.base.errors import ConfigError
from pn_compiler.data.class_folders import class_labels
from pn_compiler.data.image_folder import find_images
from pn_compiler.data.sources import load_batches
from tests.zoo import torchvision


def images(folder: Path, *places: str) -> list[str]:
    for number, place in enumerate(places):
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (10 * number, 0, 0)).save(path)
    return find_images(folder)


@pytest.mark.parametrize(
    "names", [["cat", "dog", "ant"], ["0", "1", "10", "2"], ["n01514668", "n01440764"], ["B", "a", "_"]]
)
def test_positions_as_in_torchvision(tmp_path: Path, names: list[str]) -> None:
    paths = images(tmp_path, *[f"{name}/{i}.png" for name in names for i in range(2)], "cat/deep/er/3.png")
    torchvision()
    from torchvision.datasets import ImageFolder

    expected = dict(ImageFolder(tmp_path).samples)
    classes = len(set(expected.values()))
    for number in (classes, None):
        assert class_labels(tmp_path, paths, number) == [expected[path] for path in paths]


def test_some_of_the_classes_by_number(tmp_path: Path) -> None:
    paths = images(tmp_path, "0007/a.png", "0007/b.png", "12/c.png", "0/d.png")
    assert [Path(path).name for path in paths] == ["d.png", "a.png", "b.png", "c.png"]
    assert class_labels(tmp_path, paths, 1000) == [0, 7, 7, 12]
    assert class_labels(tmp_path, paths, 3) == [0, 1, 1, 2]  # all three: the order of the names
    with pytest.raises(ConfigError, match=r"12 is none of the 10 classes of the network, from 0"):
        class_labels(tmp_path, paths, 10)


def test_some_of_imagenets_synsets(tmp_path: Path) -> None:
    """Places in the usual list: tench is the first, toilet tissue the last, the cock the eighth."""
    pytest.importorskip("timm", reason="its list of synsets")
    paths = images(tmp_path, "n15075141/a.png", "n01440764/b.png", "n01514668/c.png")
    assert class_labels(tmp_path, paths, 1000) == [0, 7, 999]
    assert class_labels(tmp_path, paths, 3) == [0, 1, 2]
    with pytest.raises(ConfigError, match="3 class folders, and the network has 100 classes"):
        class_labels(tmp_path, paths, 100)
    paths = images(tmp_path, "n00000000/a.png")
    with pytest.raises(ConfigError, match="n00000000 is none of the 1000 classes"):
        class_labels(tmp_path, paths, 1000)


def test_names_that_say_nothing(tmp_path: Path) -> None:
    paths = images(tmp_path, "cat/a.png", "dog/b.png")
    with pytest.raises(ConfigError, match="2 class folders, and the network has 10 classes"):
        class_labels(tmp_path, paths, 10)
    paths = images(tmp_path, "c.png")
    with pytest.raises(ConfigError, match=r"c\.png is in no class folder"):
        class_labels(tmp_path, paths, 2)


class Classifier(nn.Module):
    """RGB images to `classes` logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


def test_batches_have_the_labels_of_their_images(tmp_path: Path) -> None:
    images(tmp_path, *[f"{i % 3}/{i}.png" for i in range(7)])
    model = Classifier(3).train()
    for _ in range(2):
        pairs = list(load_batches(tmp_path, model, batch_size=2, labelled=True))
        assert [len(labels) for _, labels in pairs] == [2, 2, 2, 1]
        assert torch.cat([labels for _, labels in pairs]).tolist() == [0, 0, 0, 1, 1, 2, 2]
        number = torch.cat([inputs.args[0][:, 0, 0, 0] for inputs, _ in pairs]) * 25.5
        assert number.round().tolist() == [0, 3, 6, 1, 4, 2, 5]
    assert model.training
    pairs = list(load_batches(tmp_path, Classifier(8), labelled=True))
    assert pairs[0][1].tolist() == [0, 0, 0, 1, 1, 2, 2]
    with pytest.raises(ConfigError, match="2 is none of the 2 classes"):
        load_batches(tmp_path, Classifier(2), labelled=True)
    segmentation = nn.Conv2d(3, 5, 1)  # whose classes are those of pixels
    assert next(iter(load_batches(tmp_path, segmentation, labelled=True)))[1].tolist() == [
        0,
        0,
        0,
        1,
        1,
        2,
        2,
    ]


def test_arrays_have_no_labels(tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "data.npy", np.zeros((4, 3, 4, 4)))
    with pytest.raises(ConfigError, match=r"data\.npy has no labels, which a metric needs: give a folder"):
        load_batches(tmp_path / "data.npy", Classifier(2), labelled=True)
    with pytest.raises(ConfigError, match="cannot read"):
        load_batches(tmp_path / "none.npy", Classifier(2), labelled=True)
