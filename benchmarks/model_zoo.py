"""The models of `benchmarks/models.py`, with random weights: torchvision, timm, transformers, and small ones of our own.

A family is imported when one of its models is made; one that cannot be imported is skipped with the reason.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the models that every end-to-end test runs


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """One model.

    Attributes:
        name: As users know it.
        family: The package it comes from; `small` is our own.
        make: Makes the module, on the CPU in float32, in train mode.
        inputs: Makes the inputs for a batch size, on the CPU; floating ones in float32.
        batches: Two batch sizes for inference; the second is that of the training step.
        half: The half-precision dtype it is run in.
        training: Whether a training step is measured.
        images: Whether its floating inputs and weights are put into channels_last for half precision.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[torch.Tensor, ...]]
    batches: tuple[int, int]
    half: torch.dtype = torch.float16
    training: bool = False
    images: bool = False


def enliven(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> nn.Module:
    """The module, changed in place so that its outputs depend on its inputs in half precision too, whatever its initialisation.

    A head that starts at zero (timm's MLP-Mixer) gives only zeros, whose error says nothing; batch norms that never saw data let
    the activations of a deep network (MobileNetV3) vanish in float16. Linear layers of zeros get small random weights, batch
    norms the statistics of one batch.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.02)
    norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    if norms:
        momenta = [layer.momentum for layer in norms]
        for layer in norms:
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches, here of one
        with torch.no_grad():
            module.train()(*inputs)
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum
    return module


class Tokens(nn.Module):
    """A transformers model as a function from token ids to its first output.

    Args:
        model: Made from a config.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False, return_dict=False)[0]


class Encoder(Tokens):
    """The same for models without a cache."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, return_dict=False)[0]


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(weights=None, **options)

    return make


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False)

    return make


def _transformers(kind: str, model: str, wrapper: type[Tokens] = Tokens, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return wrapper(getattr(transformers, model)(getattr(transformers, f"{kind}Config")(**config)))

    return make


def _images(size: int, channels: int = 3) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda batch: (torch.randn(batch, channels, size, size),)


def _ids(length: int, vocabulary: int) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda batch: (torch.randint(0, vocabulary, (batch, length)),)


NO_DROPOUT_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NO_DROPOUT_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA_1B = {
    "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 100}

LARGE = (
    ModelCase("alexnet", "torchvision", _torchvision("alexnet"), _images(224), (32, 128), images=True),
    ModelCase("vgg16", "torchvision", _torchvision("vgg16"), _images(224), (8, 32), images=True),
    ModelCase("resnet50", "torchvision", _torchvision("resnet50"), _images(224), (8, 32), images=True, training=True),
    ModelCase("mobilenet_v3", "torchvision", _torchvision("mobilenet_v3_large"), _images(224), (8, 64), images=True),
    ModelCase("convnext_t", "torchvision", _torchvision("convnext_tiny"), _images(224), (8, 32), images=True),
    ModelCase("vit_b16", "timm", _timm("vit_base_patch16_224"), _images(224), (8, 32), training=True),
    ModelCase("swin_t", "timm", _timm("swin_tiny_patch4_window7_224"), _images(224), (8, 32)),
    ModelCase("mixer_b16", "timm", _timm("mixer_b16_224"), _images(224), (8, 32)),
    ModelCase(
        "bert_base", "transformers", _transformers("Bert", "BertModel", Encoder, **NO_DROPOUT_BERT), _ids(512, 30000), (1, 16),
        training=True,
    ),
    ModelCase(
        "gpt2", "transformers", _transformers("GPT2", "GPT2LMHeadModel", **NO_DROPOUT_GPT2), _ids(512, 50000), (1, 8),
        torch.bfloat16, training=True,
    ),
    ModelCase(
        "llama_1b", "transformers", _transformers("Llama", "LlamaForCausalLM", **LLAMA_1B), _ids(1024, 32000), (1, 4),
        torch.bfloat16,
    ),
)  # fmt: skip


def small() -> tuple[ModelCase, ...]:
    """Small versions for two cores: the models of the test suite, and tiny configurations of the large ones."""
    import small_models
    import zoo

    own = [
        ModelCase(
            name, "small", make, _batched(inputs), (1, 2), torch.bfloat16, training=name in ("resnet", "gpt", "encoder", "digits")
        )
        for name, (make, inputs) in {**zoo.CASES, **small_models.CASES}.items()
        if name != "dropout"  # its training step is random, and a model in eval mode has none
    ]
    tiny = [
        ModelCase(
            "tiny_bert",
            "transformers",
            _transformers("Bert", "BertModel", Encoder, **TINY, **NO_DROPOUT_BERT),
            _ids(16, 100),
            (1, 2),
        ),
        ModelCase("tiny_llama", "transformers", _transformers("Llama", "LlamaForCausalLM", **TINY), _ids(16, 100), (1, 2)),
        ModelCase("tiny_resnet", "torchvision", _torchvision("resnet18", num_classes=10), _images(64), (1, 2), images=True),
        ModelCase("tiny_vit", "timm", _timm("vit_tiny_patch16_224"), _images(224), (1, 2)),
    ]
    return (*own, *tiny)


def _batched(inputs: Callable[[], tuple[torch.Tensor, ...]]) -> Callable[[int], tuple[torch.Tensor, ...]]:
    """Inputs of a test model, repeated along the batch."""
    return lambda batch: tuple(t.repeat(batch, *[1] * (t.ndim - 1)) for t in inputs())
