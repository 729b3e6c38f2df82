"""Labels of images from the folders that hold them."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pn_compiler.base.errors import ConfigError
from pn_compiler.data.image_folder import find_images
from pn_compiler.running.evaluation import run, untouched
from pn_compiler.running.inputs import Inputs
from pn_compiler.running.losses import floating_outputs, is_logits

_SYNSET = re.compile(r"n\d{8}")  # of WordNet, as ImageNet's folders are called
_IMAGENET = 1000  # classes


def labels_for(model: nn.Module, folder: Path, inputs: Inputs) -> Tensor:
    """The class of each image in `folder`, sorted by path, of those that `model` has.

    Args:
        inputs: a batch of them, to see how many classes there are.

    Raises:
        ConfigError: as `class_labels`, or the model does not run on them.
    """
    with untouched(model):
        outputs = floating_outputs(run(model, inputs, f"the images in {folder}"))
    logits = [tensor for tensor in outputs.values() if is_logits(tensor)]
    classes = logits[0].shape[1] if len(logits) == len(outputs) == 1 else None
    return torch.tensor(class_labels(folder, find_images(folder), classes))


def class_labels(folder: Path, paths: Sequence[str], classes: int | None = None) -> list[int]:
    """The class of each image, by the first folder below `folder` on its path.

    With as many folders as classes, the classes are the positions of the sorted names, as in torchvision's
    ``ImageFolder``. A folder with some of the classes must name them: by number, such as 0007 or 7, or, for
    the 1,000 classes of ImageNet, by synset, such as n01514668. Their order is then that of timm's list.

    Args:
        folder: holds one folder for each class.
        paths: of images in it.
        classes: how many classes the network has; None takes the folders to be all.

    Raises:
        ConfigError: an image is in no class folder, or it cannot be told which class a folder is.
    """
    names = [_class_folder(folder, path) for path in paths]
    found = sorted(set(names))
    if classes in (None, len(found)):
        numbers = {name: number for number, name in enumerate(found)}
    elif all(re.fullmatch(r"[0-9]+", name) for name in found):
        numbers = {name: int(name) for name in found}
    elif classes == _IMAGENET and all(_SYNSET.fullmatch(name) for name in found):
        order = {name: number for number, name in enumerate(_imagenet_synsets(folder))}
        numbers = {name: order.get(name, _IMAGENET) for name in found}
    else:
        raise ConfigError(
            f"{folder} holds {len(found)} class folders, and the network has {classes} classes: give a "
            "folder for each class, or name those that there are by the number of the class, from 0"
        )
    wrong = [name for name in found if classes is not None and numbers[name] >= classes]
    if wrong:
        raise ConfigError(f"{folder / wrong[0]} is none of the {classes} classes of the network, from 0")
    return [numbers[name] for name in names]


def _class_folder(folder: Path, path: str) -> str:
    parts = Path(path).relative_to(folder).parts
    if len(parts) < 2:
        raise ConfigError(f"{path} is in no class folder: labels are the names of the folders in {folder}")
    return parts[0]


def _imagenet_synsets(folder: Path) -> list[str]:
    """The synsets of ImageNet's classes, in order, from the files of timm, which is not imported."""
    found = importlib.util.find_spec("timm")
    for place in (found.submodule_search_locations or ()) if found else ():
        file = Path(place, "data", "_info", "imagenet_synsets.txt")
        if file.exists():
            return file.read_text().split()
    raise ConfigError(
        f"{folder} holds some of ImageNet's synsets, whose order is known from a folder of all {_IMAGENET} "
        "or from timm: pip install timm"
    )
