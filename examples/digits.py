"""From a trained BatchNorm network to an ONNX file without BatchNorm, on scikit-learn's digits.

Run by ``make demo``. Everything it makes lands in ``demo_output/``.
"""

import copy
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from digits_network import DigitsNet
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import pn_compiler

OUTPUT = Path("demo_output")
EPOCHS = 20
THREADS = 1


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,797 real 8x8 images of handwritten digits: 70 % to train, 30 % to test."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    rows = train_test_split(np.arange(len(labels)), test_size=0.3, stratify=labels, random_state=0)
    train, test = (torch.tensor(r) for r in rows)
    return images[train], labels[train], images[test], labels[test]


def train(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, lr: float) -> None:
    """AdamW on cross entropy in batches of 32, with one cycle of the learning rate."""
    steps = epochs * (len(images) // 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    model.train()
    with tqdm(total=steps, disable=None, leave=False, desc="training") as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(images))[: len(images) // 32 * 32].split(32):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(images[rows]), labels[rows], label_smoothing=0.05)
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    model.eval()


def replace_by_group_norm(model: nn.Module) -> nn.Module:
    """What is usually done: a GroupNorm in the place of each BatchNorm, with its weight and bias."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            norm = nn.GroupNorm(min(8, child.num_features), child.num_features, child.eps)
            norm.weight, norm.bias = child.weight, child.bias
            setattr(model, name, norm)
        else:
            replace_by_group_norm(child)
    return model


def make_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_onnx(path: Path, images: Tensor) -> Tensor:
    session = make_session(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def latency(path: Path, image: Tensor) -> float:
    """Median milliseconds for one image."""
    session = make_session(path)
    feed = {session.get_inputs()[0].name: image.numpy()}
    seconds = []
    for _ in range(1200):
        start = time.perf_counter()
        session.run(None, feed)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[200:])


def export_plainly(model: nn.Module, path: Path, image: Tensor) -> None:
    """What is usually done: torch.onnx.export."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.onnx.export(model, (image.repeat(2, 1, 1, 1),), dynamic_shapes=shapes, verbose=False)
        assert program is not None
        program.save(path)


def compile_by_command(model: Path, output: Path) -> None:
    """Runs the command that a user would type, and shows what it says at the end."""
    arguments = [
        *(str(model), "-o", str(output)),
        *("--arch", "examples.digits_network:DigitsNet", "--input-shape", "1,1,8,8"),
        *("--report", str(output.with_suffix(".json"))),
    ]
    print("$ pn-compile", *arguments)
    command = Path(sys.executable).with_name("pn-compile")
    done = subprocess.run([command, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    output.with_suffix(".log").write_text(done.stdout)
    print("\n".join(done.stdout.splitlines()[-3:]))


def main() -> None:
    OUTPUT.mkdir(exist_ok=True)
    torch.manual_seed(0)
    images, labels, test_images, test_labels = load_data()

    print(f"training a residual network with BatchNorm on {len(images)} digits ...")
    model = DigitsNet()
    train(model, images, labels, epochs=EPOCHS, lr=3e-3)
    torch.save(model.state_dict(), OUTPUT / "model.pt")
    compile_by_command(OUTPUT / "model.pt", OUTPUT / "model.onnx")

    plain = replace_by_group_norm(copy.deepcopy(model))
    converted = pn_compiler.transform(model)
    tuned = copy.deepcopy(converted)
    print("fine-tuning the converted network for one epoch ...")
    train(tuned, images, labels, epochs=1, lr=3e-4)
    pn_compiler.export_onnx(tuned, OUTPUT / "tuned.onnx", test_images[:1])
    export_plainly(model, OUTPUT / "batch_norm.onnx", test_images[:1])
    export_plainly(plain, OUTPUT / "group_norm.onnx", test_images[:1])

    rows = [
        ("BatchNorm", model, "batch_norm.onnx"),
        ("plain GroupNorm replacement", plain, "group_norm.onnx"),
        ("compiled, no data, no training", converted, "model.onnx"),
        ("compiled after one epoch", tuned, "tuned.onnx"),
    ]
    print(f"\n{'network':<32}{'accuracy':>9}{'size':>10}{'latency':>10}{'to PyTorch':>12}")
    for title, network, name in rows:
        path = OUTPUT / name
        logits = run_onnx(path, test_images)
        right = 100 * float((logits.argmax(1) == test_labels).double().mean())
        with torch.no_grad():
            difference = float((logits - network(test_images)).abs().max())
        print(
            f"{title:<32}"
            f"{right:>7.1f} %{path.stat().st_size / 1000:>7.0f} kB"
            f"{latency(path, test_images[:1]):>7.2f} ms{difference:>12.1e}"
        )
    print(
        f"\naccuracy of the ONNX files on {len(test_labels)} test images; latency: one image, onnxruntime "
        f"CPU, {THREADS} thread, median;\nto PyTorch: largest difference of a logit. All files: {OUTPUT}/\n\n"
        "digits flatter: what is left of ImageNet networks on real images, with your own folder of them,\n"
        "$ python -m benchmarks.real_networks --images IMAGENET"
    )


if __name__ == "__main__":
    main()
