"""Data files: what is read, and what is refused in one line."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pn_compiler.data import load_batches
from pn_compiler.errors import ConfigError
from pn_compiler.inputs import Inputs


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, image: Tensor, index: Tensor, flag: Tensor | None = None) -> Tensor:
        return image[index] * self.scale


IMAGES = np.random.default_rng(0).normal(size=(10, 3, 4, 4)).astype(np.float32)


def written(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", np.longdouble])
def test_one_array_in_batches_of_the_dtype_of_the_model(tmp_path: Path, dtype: str) -> None:
    values = IMAGES.astype(dtype)
    np.save(tmp_path / "data.npy", values)
    batches = load_batches(tmp_path / "data.npy", nn.Conv2d(3, 4, 1), batch_size=4)
    assert isinstance(batches.arrays[""], np.memmap)  # read batch by batch
    packed = load_batches(written(tmp_path, whatever=values), nn.Conv2d(3, 4, 1), batch_size=4)
    for found in (batches, packed, batches):  # the last once more from the start
        parts = [inputs.args[0] for inputs in found]
        assert [len(part) for part in parts] == [4, 4, 2]
        assert len(found) == 3
        assert {part.dtype for part in parts} == {torch.float32}
        np.testing.assert_array_equal(torch.cat(parts).numpy(), values.astype(np.float32))
    assert load_batches(tmp_path / "data.npy", nn.Linear(2, 2).bfloat16()).dtype == torch.bfloat16


def test_whole_batches_only(tmp_path: Path) -> None:
    path = written(tmp_path, x=IMAGES)
    batches = load_batches(path, nn.Identity(), batch_size=4, whole=True)
    assert [len(inputs.args[0]) for inputs in batches] == [4, 4]
    assert len(batches) == 2
    with pytest.raises(ConfigError, match=r"data.npz holds too few samples: 10, and at least 16 are needed"):
        load_batches(path, nn.Identity(), batch_size=16, whole=True)


def test_several_arrays_are_arguments_by_name(tmp_path: Path) -> None:
    index = np.arange(10)[::-1]
    inputs = next(iter(load_batches(written(tmp_path, index=index, image=IMAGES), Two(), batch_size=3)))
    assert isinstance(inputs, Inputs)
    assert (inputs.args, set(inputs.kwargs)) == ((), {"image", "index"})
    assert inputs.kwargs["image"].dtype == torch.float64
    assert inputs.kwargs["index"].tolist() == [9, 8, 7]


def test_bad_values_are_found_when_they_are_read(tmp_path: Path) -> None:
    images = IMAGES.copy()
    images[7, 0, 0, 0] = np.nan
    np.save(tmp_path / "data.npy", images)
    seen = []
    with pytest.raises(ConfigError, match=r"data.npy: sample 7 holds nan or infinite values"):
        seen.extend(load_batches(tmp_path / "data.npy", nn.Identity(), batch_size=4))
    assert len(seen) == 1
    images[7, 0, 0, 0] = -np.inf
    path = written(tmp_path, image=images, index=np.arange(10))
    with pytest.raises(ConfigError, match=r"data.npz: sample 7 of image holds nan or infinite values"):
        list(load_batches(path, Two()))


ARRAYS = [
    (
        {"image": IMAGES, "label": np.arange(10)},
        r"arrays image, label, which are not the arguments .* of Two",
    ),
    ({"image": IMAGES, "flag": np.arange(10)}, r"missing a required argument: 'index'"),
    ({"image": IMAGES, "index": np.arange(9)}, r"different lengths: \{'image': 10, 'index': 9\}"),
    ({"image": IMAGES[:1]}, r"too few samples: 1, and at least 2 are needed"),
    ({"image": np.float32(3)}, r"holds float32 values of shape \(\): expected numbers"),
    ({"image": np.array(["a", "b"])}, r"holds <U1 values of shape \(2,\): expected numbers"),
    ({"image": IMAGES + 1j, "index": np.arange(10)}, r"of image holds complex64 values"),
    ({"image": np.array([{}, {}], dtype=object)}, r"damaged, or holds Python objects"),
    ({}, r"data.npz holds no array"),
]


@pytest.mark.parametrize(("arrays", "message"), ARRAYS)
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_batches(written(tmp_path, **arrays), Two())
    assert "data.npz" in str(caught.value)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code of the file was run')",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.npy", None, "missing.npy: No such file"),
        ("data.txt", b"1 2", "data.txt: expected a file .npy or .npz"),
        ("empty.npy", b"", "empty.npy: it is damaged"),
        ("text.npz", b"samples, I promise", "text.npz: it is damaged, or holds Python objects"),
        ("bomb.npy", pickle.dumps(Bomb()), "bomb.npy: it is damaged, or holds Python objects"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_batches(tmp_path / name, nn.Identity())


@pytest.mark.parametrize("name", ["data.npy", "data.npz", "packed.npz"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_files_cut_short(tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / name
    if name == "data.npy":
        np.save(path, IMAGES)
    else:
        (np.savez if name == "data.npz" else np.savez_compressed)(path, x=IMAGES)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ConfigError, match="it is damaged"):
        load_batches(path, nn.Identity())


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "data.npz", x=IMAGES)
        content = bytearray((tmp_path / "data.npz").read_bytes())
        content[len(content) // 2] ^= 255
        (tmp_path / "data.npz").write_bytes(content)
        with pytest.raises(ConfigError, match="it is damaged"):
            load_batches(tmp_path / "data.npz", nn.Identity())
