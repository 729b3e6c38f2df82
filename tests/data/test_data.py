"""Data files: what is read, and what is refused in one line."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save_file
from torch import Tensor, nn

from pn_compiler.base.errors import ConfigError
from pn_compiler.data.sources import load_batches
from pn_compiler.running.inputs import Inputs


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, image: Tensor, index: Tensor, flag: Tensor | None = None) -> Tensor:
        return image[index] * self.scale


IMAGES = np.random.default_rng(0).normal(size=(10, 3, 4, 4)).astype(np.float32)


def written(folder: Path, kind: str = "npz", **arrays: np.ndarray) -> Path:
    path = folder / f"data.{kind}"
    if kind == "npz":
        np.savez(path, **arrays)
    elif kind == "npy":
        np.save(path, *arrays.values())
    else:
        save_file({name: torch.tensor(array) for name, array in arrays.items()}, path)
    return path


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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["f2", "f4", "f8", "u1", "i2", "i8", "?"]).flatmap(
        lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=1, max_dims=4, min_side=2, max_side=5))
    ),
    st.integers(1, 6),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_the_same_from_every_kind_of_file(
    tmp_path: Path, values: np.ndarray, batch_size: int, dtype: torch.dtype
) -> None:
    model = nn.Linear(1, 1, dtype=dtype)
    found = []
    for kind in ("npy", "npz", "safetensors"):
        batches = load_batches(written(tmp_path, kind, x=values), model, batch_size=batch_size)
        try:
            found.append([inputs.args[0] for inputs in batches])
        except ConfigError as error:
            found.append(str(error).replace(kind, "npy"))
    assert isinstance(found[0], str) or (
        torch.cat(found[0]).dtype == (dtype if values.dtype.kind == "f" else torch.tensor(values).dtype)
    )
    for others in found[1:]:
        assert (others == found[0]) if isinstance(others, str) else all(map(torch.equal, others, found[0]))


def test_safetensors_are_read_from_disk_and_stay_as_they_are(tmp_path: Path) -> None:
    values = torch.randn(5, 3, 2, 2).bfloat16()
    save_file({"x": values}, tmp_path / "data.safetensors")
    batches = load_batches(str(tmp_path / "data.safetensors"), nn.Conv2d(3, 4, 1), batch_size=2)
    for _ in range(2):
        for number, inputs in enumerate(batches):
            assert torch.equal(inputs.args[0], values[2 * number : 2 * number + 2].float())
            inputs.args[0].zero_()  # as a model with operators in place may do
    save_file({"x": values.to(torch.float8_e5m2)}, tmp_path / "data.safetensors")
    (found,) = load_batches(tmp_path / "data.safetensors", nn.Conv2d(3, 4, 1))
    assert torch.equal(found.args[0], values.to(torch.float8_e5m2).float())


def test_safetensors_is_only_needed_for_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "safetensors", x=IMAGES)
    monkeypatch.setitem(sys.modules, "safetensors", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"data.safetensors needs safetensors: pip install safetensors$"):
        load_batches(path, nn.Identity())
    assert len(load_batches(written(tmp_path, "npy", x=IMAGES), nn.Identity())) == 1


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_several_arrays_are_arguments_by_name(tmp_path: Path, kind: str) -> None:
    index = np.arange(10)[::-1].copy()
    inputs = next(iter(load_batches(written(tmp_path, kind, index=index, image=IMAGES), Two(), batch_size=3)))
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
    images[7, 0, 0, 0] = 1e5  # beyond float16
    path = written(tmp_path, "safetensors", x=images)
    with pytest.raises(ConfigError, match=r"sample 7 holds nan or infinite values in float16"):
        list(load_batches(path, nn.Conv2d(3, 4, 1).half()))


ARRAYS = [
    (
        {"image": IMAGES, "label": np.arange(10)},
        r"arrays image, label, which are not the arguments .* of Two",
    ),
    ({"image": IMAGES, "flag": np.arange(10)}, r"missing a required argument: 'index'"),
    ({"image": IMAGES, "index": np.arange(9)}, r"different lengths: \{'image': 10, 'index': 9\}"),
    ({"image": IMAGES[:1]}, r"too few samples: 1, and at least 2 are needed"),
    ({"image": np.float32(3)}, r"holds float32 values of shape \(\): expected numbers"),
    ({"image": IMAGES + 1j, "index": np.arange(10)}, r"of image holds complex64 values"),
    ({}, r"holds no array"),
]


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize(("arrays", "message"), ARRAYS)
def test_arrays_that_do_not_fit(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str, kind: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_batches(written(tmp_path, kind, **arrays), Two())
    assert f"data.{kind}" in str(caught.value)


def test_text_and_objects(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds <U1 values of shape \(2,\): expected numbers"):
        load_batches(written(tmp_path, image=np.array(["a", "b"])), Two())
    with pytest.raises(ConfigError, match=r"damaged, or holds Python objects"):
        load_batches(written(tmp_path, image=np.array([{}, {}], dtype=object)), Two())


@pytest.mark.parametrize("option", ["mean", "std", "resize", "crop"])
def test_options_of_images_for_a_file(tmp_path: Path, option: str) -> None:
    path = written(tmp_path, x=IMAGES)
    with pytest.raises(ConfigError, match=f"a folder of images, for which {option} .* leave out --{option}$"):
        load_batches(path, nn.Identity(), **{option: [4, 4]})
    with pytest.raises(ConfigError, match=r"missing.npz: No such file"):
        load_batches(tmp_path / "missing.npz", nn.Identity(), **{option: [4, 4]})


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code of the file was run')",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.npy", None, "missing.npy: No such file"),
        ("images", None, "images: No such file"),
        ("data.txt", b"1 2", "data.txt: expected a file .npy, .npz or .safetensors, a folder of images, or"),
        ("empty.npy", b"", "empty.npy: it is damaged"),
        ("text.npz", b"samples, I promise", "text.npz: it is damaged, or holds Python objects"),
        ("text.safetensors", b"samples, I promise", "text.safetensors: it is damaged, or another format"),
        ("empty.safetensors", b"", "empty.safetensors: it is damaged, or another format"),
        ("missing.safetensors", None, "missing.safetensors: No such file"),
        ("bomb.npy", pickle.dumps(Bomb()), "bomb.npy: it is damaged, or holds Python objects"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_batches(tmp_path / name, nn.Identity())


@pytest.mark.parametrize("name", ["data.npy", "data.npz", "packed.npz", "data.safetensors"])
@pytest.mark.parametrize("kept", [0.001, 0.3, 0.9])
def test_files_cut_short(tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / name
    if name == "packed.npz":
        np.savez_compressed(path, x=IMAGES)
    else:
        written(tmp_path, name.rpartition(".")[2], x=IMAGES)
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
