"""`make demo`: real data, real models, one backend name changed.

Trains a small convolution net on scikit-learn's handwritten digits and runs a transformer encoder over the patches of a
photograph from scikit-image, each with `backend="llmkernels"` and with eager, and prints what the backend did with every
region: which kernel, its error against float64 beside eager's, its time beside eager's and Inductor's, and the decision.
Every figure is measured by this run. Uses the GPU if there is one.

    python benchmarks/demo.py [--epochs 4] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

import torch_llmkernels
from torch_llmkernels.registry import RegionReport

console = Console(width=None if sys.stdout.isatty() else 180)


class DigitsNet(nn.Module):
    """Two convolution + ReLU + max-pool stages and a linear classifier over (N, 1, 16, 16) images, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(64 * 4 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        return self.head(x.flatten(1))


class PatchEncoder(nn.Module):
    """A pre-norm transformer encoder over (N, tokens, 16*16*3) image patches."""

    def __init__(self, width: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(16 * 16 * 3, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        batch, tokens, width = x.shape
        for i in range(len(self.qkv)):
            q, k, v = self.qkv[i](self.norms[2 * i](x)).view(batch, tokens, 3, 8, width // 8).permute(2, 0, 3, 1, 4)
            x = x + self.out[i](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))
            x = x + self.down[i](F.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return F.softmax(self.norms[-1](x), -1)


def digits(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Handwritten digits as (N, 1, 16, 16) float32, mean 0 and variance 1: train images and labels, test images and labels."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = F.interpolate(torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16, scale_factor=2, mode="bilinear")
    images = (images - images.mean()) / images.std()  # well conditioned: training does not blow up differences of rounding
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].to(device), labels[order].to(device)
    return images[:1536], labels[:1536], images[1536:1792], labels[1536:1792]


def patches(device: str) -> torch.Tensor:
    """The astronaut photograph as (1, 1024, 768) float32 patches of 16 x 16 pixels."""
    from skimage.data import astronaut

    image = torch.tensor(astronaut(), dtype=torch.float32).permute(2, 0, 1)[None] / 255
    return F.unfold(image, 16, stride=16).transpose(1, 2).contiguous().to(device)


def train(step_model: Callable[[torch.Tensor], torch.Tensor], model: nn.Module, data: tuple, epochs: int) -> list[float]:
    """SGD over batches of 128; the mean loss of each epoch."""
    images, labels, *_ = data
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    means = []
    for _ in range(epochs):
        losses = []
        for batch, target in zip(images.split(128), labels.split(128), strict=True):
            loss = F.cross_entropy(step_model(batch), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(statistics.fmean(losses))
    return means


def interleaved_ms(calls: dict[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Median milliseconds per call, the contenders taking turns so that drift hits all of them alike."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    sync = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            sync()
            begin = time.perf_counter()
            call()
            sync()
            samples[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def regions_table() -> Table:
    """Every region the backend has looked at in this process, with the evidence for its decision."""
    table = Table(title="Regions (error: relative Frobenius against float64, normal data; times in ms)", title_justify="left")
    for column in ("region", "task", "inputs", "kernel", "from", "error", "eager's", "kernel", "eager", "Inductor", "decision"):
        table.add_column(column, overflow="fold", no_wrap=column in ("region", "task"), ratio=1 if column == "decision" else None)
    seen = set()
    for graph in torch_llmkernels.report():
        for region in graph.regions:
            if region.key and region.key not in seen:
                seen.add(region.key)
                table.add_row(*region_row(region))
    return table


def region_row(region: RegionReport) -> list[str]:
    """One line of the table; what was not measured stays a dash."""
    row = [region.signature, region.key[:8], region.shapes, region.considered or "-", region.origin or "-"]
    evaluation = region.evaluation
    if evaluation is None or not evaluation.errors:
        return [*row, *"-----", region.reason]
    worst = max((e for e in evaluation.errors if e.distribution == "normal"), key=lambda e: e.frobenius)
    times = {"kernel": evaluation.time_ms, **dict(evaluation.baselines_ms)}
    shown = [f"{times[name]:.4f}" if times.get(name) else "-" for name in ("kernel", "eager", "inductor")]
    return [*row, f"{worst.frobenius:.1e}", f"{worst.frobenius_yardstick:.1e}", *shown, region.reason]


def accuracies(nets: dict[str, nn.Module], data: tuple) -> dict[str, float]:
    """The share of the test images that each backend's net, run eagerly, gets right."""
    with torch.no_grad():
        return {backend: (net(data[2]).argmax(1) == data[3]).float().mean().item() for backend, net in nets.items()}


def training_table(losses: dict[str, list[float]], accuracy: dict[str, float]) -> Table:
    """Loss of each epoch and accuracy on the test images for each backend, and how far they are apart."""
    table = Table(title="Training on digits: the same seed, the same batches", title_justify="left")
    for column in ("backend", *(f"loss, epoch {i + 1}" for i in range(len(losses["eager"]))), "test accuracy"):
        table.add_column(column)
    for backend in losses:
        table.add_row(backend, *(f"{loss:.6f}" for loss in losses[backend]), f"{accuracy[backend]:.2%}")
    apart = [f"{abs(a - b):.1e}" for a, b in zip(losses["eager"], losses["llmkernels"], strict=True)]
    table.add_row("|difference|", *apart, f"{abs(accuracy['eager'] - accuracy['llmkernels']):.2%}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    data = digits(args.device)
    nets, losses = {}, {}
    for backend in ("eager", "llmkernels"):
        torch.manual_seed(0)
        nets[backend] = DigitsNet().to(args.device)
        console.print(f"training on digits with {backend} ...")
        losses[backend] = train(torch.compile(nets[backend], backend=backend), nets[backend], data, args.epochs)

    torch.manual_seed(0)
    encoder, tokens = PatchEncoder().to(args.device).eval(), patches(args.device)
    contenders: dict[str, dict[str, Callable[[], torch.Tensor]]] = {"digits CNN, 256 images": {}, "encoder, 1024 patches": {}}
    net = nets["llmkernels"].eval()
    torch._dynamo.reset()  # a batch of another size than in training is no reason for dynamic shapes here
    with torch.no_grad():
        for backend in ("eager", "inductor", "llmkernels"):
            console.print(f"compiling both models for inference with {backend} ...")
            cnn, enc = torch.compile(net, backend=backend), torch.compile(encoder, backend=backend)
            contenders["digits CNN, 256 images"][backend] = lambda f=cnn: f(data[2])
            contenders["encoder, 1024 patches"][backend] = lambda f=enc: f(tokens)
            for calls in contenders.values():
                calls[backend]()
        outputs = {name: {b: call() for b, call in calls.items()} for name, calls in contenders.items()}
        times = {name: interleaved_ms(calls) for name, calls in contenders.items()}

    console.print(regions_table())
    console.print(training_table(losses, accuracies(nets, data)))
    table = Table(title="Inference, end to end", title_justify="left")
    for column in ("model", "eager ms", "Inductor ms", "llmkernels ms", "vs eager", "vs Inductor", "max |difference|"):
        table.add_column(column)
    for name, ms in times.items():
        difference = (outputs[name]["llmkernels"] - outputs[name]["eager"]).abs().max().item()
        ratio = [ms["eager"] / ms["llmkernels"], ms["inductor"] / ms["llmkernels"]]
        row = [*(f"{ms[b]:.3f}" for b in ("eager", "inductor", "llmkernels")), *(f"{r:.2f}x" for r in ratio), f"{difference:.1e}"]
        table.add_row(name, *row)
    console.print(table)


if __name__ == "__main__":
    main()
