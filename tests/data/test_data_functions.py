"""Batches from a function of the user."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pn_compiler.base.errors import ConfigError
from pn_compiler.data.sources import load_batches

MODULE = """
import collections
import numpy as np, torch
from torch.utils.data import DataLoader, TensorDataset

IMAGES = torch.arange(10 * 12, dtype=torch.float64).view(10, 3, 2, 2)
LABELS = torch.arange(10)
calls = collections.Counter()

def tensors():
    calls["tensors"] += 1
    yield from IMAGES.split(4)

def arrays(): return [part.numpy() for part in IMAGES.split(4)]
def pairs(): return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)
def lists(): return ([part, "labels"] for part in IMAGES.split(4))
def mappings(): return ({"input": part} for part in IMAGES.split(4))
class Made:
    batches = staticmethod(tensors)

def one(): return IMAGES
def dataset(): return TensorDataset(IMAGES, LABELS)
def nothing(): pass
def empty(): return []
def few(): yield IMAGES[:1]
def fails():
    yield IMAGES
    raise KeyError("no more\\nto read")
def asks(path): yield IMAGES
def text(): yield "images"
def hollow(): yield {}
def scalar(): yield torch.tensor(1.0)
def phases(): yield IMAGES + 1j
def strings(): yield np.array(["a", "b"])
def infinite(): yield from (IMAGES, IMAGES / (IMAGES != 50))
def misnamed(): yield {"image": IMAGES}
def uneven(): yield {"input": IMAGES, "extra": LABELS[:3]}
def shorter_first(): yield from (IMAGES[:3], IMAGES[:4])
numbers = [1, 2]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_data.py").write_text(MODULE)
    (tmp_path / "broken_data.py").write_text("import missing_package\n")
    (tmp_path / "wrong_data.py").write_text("def batches(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_data", raising=False)  # that of another test
    return tmp_path


NET = nn.Conv2d(3, 2, 1)
IMAGES = torch.arange(10 * 12, dtype=torch.float32).view(10, 3, 2, 2)


@pytest.mark.parametrize("function", ["tensors", "arrays", "pairs", "lists", "mappings", "Made.batches"])
def test_all_that_may_be_yielded(function: str) -> None:
    batches = load_batches(f"my_data:{function}", NET, allow_code=True)
    for _ in range(2):
        parts = [inputs.tensors()[0] for inputs in batches]
        assert [len(part) for part in parts] == [4, 4, 2]
        assert torch.equal(torch.cat(parts), IMAGES)  # in the dtype of the model
        parts[0].zero_()  # of a copy
    names = [list(inputs.kwargs) for inputs in batches]
    assert names == [["input"] if function == "mappings" else []] * 3


def test_it_is_called_once_for_each_iteration() -> None:
    batches = load_batches("my_data:tensors", NET, allow_code=True)
    import my_data

    assert my_data.calls["tensors"] == 0
    next(iter(batches))
    for _ in range(2):
        list(batches)
    assert my_data.calls["tensors"] == 3


def test_batches_of_a_fixed_size() -> None:
    batches = load_batches("my_data:tensors", NET, allow_code=True, batch_size=4, whole=True)
    assert [len(inputs.args[0]) for inputs in batches] == [4, 4]  # without the last
    for name, size in (("tensors", 3), ("shorter_first", 4)):
        with pytest.raises(ConfigError, match=f"batch 1 of my_data:{name} does not hold {size} samples"):
            list(load_batches(f"my_data:{name}", NET, allow_code=True, batch_size=size, whole=True))
    with pytest.raises(ConfigError, match="my_data:few holds too few samples: 1, and at least 4 are needed"):
        list(load_batches("my_data:few", NET, allow_code=True, batch_size=4, whole=True))


def test_no_code_is_run_without_leave(folder: Path) -> None:
    (folder / "my_data.py").write_text("raise SystemExit('code was run')")
    message = r"my_data:tensors is not a file, .* with --allow-data-code \(allow_code=True\)$"
    with pytest.raises(ConfigError, match=message):
        load_batches("my_data:tensors", NET)
    with pytest.raises(ConfigError, match=r"cannot read my_data:tensors: No such file"):
        load_batches(Path("my_data:tensors"), NET, allow_code=True)


def test_a_path_with_a_colon_is_a_path() -> None:
    np.save("my_data:tensors.npy", np.zeros((2, 3, 2, 2)))
    os.rename("my_data:tensors.npy", "my_data:tensors")
    with pytest.raises(ConfigError, match=r"cannot read my_data:tensors: expected a file .npy"):
        load_batches("my_data:tensors", NET, allow_code=True)
    os.rename("my_data:tensors", "my_data:images.npy")
    assert len(list(load_batches("my_data:images.npy", NET))) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("my_data:numbers", "my_data:numbers is a list, not a function that yields batches"),
        ("my_data:missing", "my_data:missing: my_data.missing cannot be imported"),
        ("no_such_data:batches", "no_such_data:batches: no_such_data.batches cannot be imported"),
        ("broken_data:batches", "importing broken_data failed: No module named 'missing_package'"),
        ("wrong_data:batches", "importing wrong_data failed: invalid syntax"),
    ],
)
def test_functions_that_cannot_be_found(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_batches(source, NET, allow_code=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one", "my_data:one returned a Tensor, not batches: yield them, or return a list or a DataLoader"),
        ("dataset", "my_data:dataset returned a TensorDataset, not batches"),
        ("nothing", "my_data:nothing returned a NoneType, not batches"),
        ("empty", "my_data:empty holds too few samples: 0, and at least 2 are needed"),
        ("few", "my_data:few holds too few samples: 1, and at least 2 are needed"),
        ("fails", "my_data:fails failed: KeyError: 'no more"),
        ("asks", r"my_data:asks failed: TypeError: asks\(\) missing 1 required positional argument: 'path'"),
        ("text", "batch 1 of my_data:text holds a str: expected an array"),
        ("hollow", "batch 1 of my_data:hollow holds no array"),
        ("scalar", r"batch 1 of my_data:scalar holds float32 values of shape \(\): expected numbers"),
        ("phases", "batch 1 of my_data:phases holds complex128 values"),
        ("strings", "batch 1 of my_data:strings holds <U1 values"),
        ("infinite", "batch 2 of my_data:infinite: sample 4 holds nan or infinite values in float32"),
        ("misnamed", "holds the arrays image, which are not the arguments of the forward of Conv2d: missing"),
        ("uneven", r"holds arrays of different lengths: \{'input': 10, 'extra': 3\}"),
    ],
)
def test_batches_that_do_not_fit(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        list(load_batches(f"my_data:{name}", NET, allow_code=True))
    assert "\n" not in str(caught.value)


def test_options_of_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="my_data:tensors is not a folder of images, for which mean, std"):
        load_batches("my_data:tensors", NET, allow_code=True, mean=[0.5], std=[0.5])


def test_memory_does_not_grow_with_the_number_of_batches(folder: Path) -> None:
    code = """
import weakref, torch
made = []
def batches():
    for number in range(20):
        assert sum(batch() is not None for batch in made) <= 1
        batch = torch.full((2, 3, 2, 2), float(number))
        made.append(weakref.ref(batch))
        yield batch
"""
    (folder / "counted_data.py").write_text(code)
    for number, inputs in enumerate(load_batches("counted_data:batches", NET, allow_code=True)):
        assert inputs.args[0].unique().tolist() == [number]


def test_labels_are_yielded_with_their_inputs() -> None:
    pairs = list(load_batches("my_data:pairs", NET, allow_code=True, labelled=True))
    assert torch.equal(torch.cat([inputs.args[0] for inputs, _ in pairs]), IMAGES)
    assert torch.cat([labels for _, labels in pairs]).tolist() == list(range(10))
    with pytest.raises(ConfigError, match="batch 1 of my_data:tensors has no labels"):
        list(load_batches("my_data:tensors", NET, allow_code=True, labelled=True))
