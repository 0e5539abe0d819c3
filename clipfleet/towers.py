"""The towers of CLIP and SigLIP for inference, built from a checkpoint's config and safetensors.

transformers' own classes give the same vectors (the tests compare with them) but take 2 s to import, and run the last layer
for every position although one of them is used.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from clipfleet.checkpoint import Checkpoint

_tanh_gelu = partial(functional.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
}


class Weights:
    """A checkpoint's tensors by name, as `dtype`. Names that are missing or have another shape are gathered in `wrong`."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype
        self._open = ExitStack()
        files = [self._open.enter_context(safe_open(path, framework="pt")) for path in checkpoint.weight_files()]
        self._file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        self.wrong: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.close()

    def tensor(self, name: str, *shape: int) -> Tensor:
        file = self._file_of.get(name)
        if file is None or tuple(file.get_slice(name).get_shape()) != shape:
            self.wrong.append(name)
            return torch.empty(shape, dtype=self._dtype)
        return file.get_tensor(name).to(self._dtype, copy=True)  # not the mapped file, which may be overwritten

    def parameter(self, name: str, *shape: int) -> nn.Parameter:
        return nn.Parameter(self.tensor(name, *shape), requires_grad=False)

    def linear(self, *names: str, inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
        """A linear layer of (outputs, inputs) weights; several names are stacked into one layer."""
        weight = torch.cat([self.tensor(f"{name}.weight", outputs, inputs) for name in names])
        layer = nn.Linear(*reversed(weight.shape), bias=bias, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias:
            stacked = torch.cat([self.tensor(f"{name}.bias", outputs) for name in names])
            layer.bias = nn.Parameter(stacked, requires_grad=False)
        return layer

    def norm(self, name: str, width: int, epsilon: float) -> nn.LayerNorm:
        layer = nn.LayerNorm(width, epsilon, device="meta")
        layer.weight = self.parameter(f"{name}.weight", width)
        layer.bias = self.parameter(f"{name}.bias", width)
        return layer


class Mlp(nn.Module):
    def __init__(self, weights: Weights, name: str, config: Any) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.up = weights.linear(f"{name}.fc1", inputs=width, outputs=inner)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.down = weights.linear(f"{name}.fc2", inputs=inner, outputs=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Layer(nn.Module):
    """One transformer layer. Queries, keys and values come from one product."""

    def __init__(self, weights: Weights, name: str, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm1 = weights.norm(f"{name}.layer_norm1", width, config.layer_norm_eps)
        parts = (f"{name}.self_attn.{part}_proj" for part in "qkv")
        self.qkv = weights.linear(*parts, inputs=width, outputs=width)
        self.out = weights.linear(f"{name}.self_attn.out_proj", inputs=width, outputs=width)
        self.norm2 = weights.norm(f"{name}.layer_norm2", width, config.layer_norm_eps)
        self.mlp = Mlp(weights, f"{name}.mlp", config)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """x (n, length, width) to the same; `mask` (n, 1, 1 or length, length) is True where a position may be seen."""
        queries, keys, values = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.out(attend(queries, keys, values, self.heads, mask, causal=causal))
        return x + self.mlp(self.norm2(x))

    def at(self, x: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """As forward, for one position (n,) of each row alone: (n, width)."""
        width = x.shape[-1]
        seen = self.norm1(x)
        index = positions.view(-1, 1, 1).expand(-1, 1, width)
        x = x.gather(1, index)
        queries = functional.linear(seen.gather(1, index), self.qkv.weight[:width], self.qkv.bias[:width])
        keys, values = functional.linear(seen, self.qkv.weight[width:], self.qkv.bias[width:]).chunk(2, dim=-1)
        x = x + self.out(attend(queries, keys, values, self.heads, mask))
        return (x + self.mlp(self.norm2(x))).squeeze(1)


class Layers(nn.Module):
    def __init__(self, weights: Weights, name: str, config: Any) -> None:
        super().__init__()
        layers = [
            Layer(weights, f"{name}.encoder.layers.{number}", config) for number in range(config.num_hidden_layers)
        ]
        self.first, self.last = nn.ModuleList(layers[:-1]), layers[-1]

    def forward(self, x: Tensor) -> Tensor:
        """x (n, length, width) to the same."""
        for layer in self.first:
            x = layer(x)
        return self.last(x)

    def at(self, x: Tensor, positions: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """x (n, length, width) to what comes out at one position (n,) of each row: (n, width)."""
        for layer in self.first:
            x = layer(x, mask, causal=causal)
        if causal:
            mask = torch.arange(x.shape[1], device=x.device) <= positions.view(-1, 1, 1, 1)
        return self.last.at(x, positions, mask)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, heads: int, mask: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Attention with several heads: (n, m, width) queries over (n, length, width) keys and values."""
    split = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (queries, keys, values))
    attended = functional.scaled_dot_product_attention(*split, attn_mask=mask, is_causal=causal)
    return attended.transpose(1, 2).flatten(2)


class Patches(nn.Module):
    """Pixels (n, 3, H, W), normalised, to one vector for each patch: (n, patches, width)."""

    def __init__(self, weights: Weights, config: Any, *, bias: bool) -> None:
        super().__init__()
        name, width, patch = "vision_model.embeddings.patch_embedding", config.hidden_size, config.patch_size
        self.count = (config.image_size // patch) ** 2
        self.convolution = nn.Conv2d(3, width, patch, stride=patch, bias=bias, device="meta")
        self.convolution.weight = weights.parameter(f"{name}.weight", width, 3, patch, patch)
        if bias:
            self.convolution.bias = weights.parameter(f"{name}.bias", width)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.convolution(pixels).flatten(2).transpose(1, 2)


class ClipImageTower(nn.Module):
    """Normalised pixels (n, 3, H, W) to vectors (n, d), not yet of unit length. So is SiglipImageTower."""

    def __init__(self, weights: Weights, config: Any) -> None:
        super().__init__()
        vision, width = config.vision_config, config.vision_config.hidden_size
        self.patches = Patches(weights, vision, bias=False)
        self.start = weights.parameter("vision_model.embeddings.class_embedding", width)
        name = "vision_model.embeddings.position_embedding.weight"
        self.positions = weights.parameter(name, self.patches.count + 1, width)
        self.before = weights.norm("vision_model.pre_layrnorm", width, vision.layer_norm_eps)
        self.layers = Layers(weights, "vision_model", vision)
        self.after = weights.norm("vision_model.post_layernorm", width, vision.layer_norm_eps)
        self.projection = weights.linear("visual_projection", inputs=width, outputs=config.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patches(pixels)
        x = torch.cat([self.start.expand(patches.shape[0], 1, -1), patches], dim=1)
        start = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        return self.projection(self.after(self.layers.at(self.before(x + self.positions), start)))


class ClipTextTower(nn.Module):
    """Token ids (n, length), padded on the right, to vectors (n, d), not yet of unit length."""

    def __init__(self, weights: Weights, config: Any) -> None:
        super().__init__()
        text, width = config.text_config, config.text_config.hidden_size
        self.end = text.eos_token_id
        self.tokens, self.positions = _text_embeddings(weights, text)
        self.layers = Layers(weights, "text_model", text)
        self.after = weights.norm("text_model.final_layer_norm", width, text.layer_norm_eps)
        self.projection = weights.linear("text_projection", inputs=width, outputs=config.projection_dim, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        # Configs from before transformers 4.31 say 2 whatever the tokenizer uses; its end token then has the largest id.
        ends = (ids if self.end == 2 else (ids == self.end).int()).argmax(1)
        x = functional.embedding(ids, self.tokens) + self.positions[: ids.shape[1]]
        return self.projection(self.after(self.layers.at(x, ends, causal=True)))


class SiglipImageTower(nn.Module):
    def __init__(self, weights: Weights, config: Any) -> None:
        super().__init__()
        vision, width = config.vision_config, config.vision_config.hidden_size
        self.heads = vision.num_attention_heads
        self.patches = Patches(weights, vision, bias=True)
        name = "vision_model.embeddings.position_embedding.weight"
        self.positions = weights.parameter(name, self.patches.count, width)
        self.layers = Layers(weights, "vision_model", vision)
        self.after = weights.norm("vision_model.post_layernorm", width, vision.layer_norm_eps)
        # What follows pools the patches by attention with one learned query.
        head = "vision_model.head"
        self.probe = weights.parameter(f"{head}.probe", 1, 1, width)
        self.in_weight = weights.parameter(f"{head}.attention.in_proj_weight", 3 * width, width)
        self.in_bias = weights.parameter(f"{head}.attention.in_proj_bias", 3 * width)
        self.out = weights.linear(f"{head}.attention.out_proj", inputs=width, outputs=width)
        self.norm = weights.norm(f"{head}.layernorm", width, vision.layer_norm_eps)
        self.mlp = Mlp(weights, f"{head}.mlp", vision)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.after(self.layers(self.patches(pixels) + self.positions))
        width = x.shape[-1]
        queries = functional.linear(self.probe, self.in_weight[:width], self.in_bias[:width]).expand(x.shape[0], -1, -1)
        keys, values = functional.linear(x, self.in_weight[width:], self.in_bias[width:]).chunk(2, dim=-1)
        x = self.out(attend(queries, keys, values, self.heads)).squeeze(1)
        return x + self.mlp(self.norm(x))


class SiglipTextTower(nn.Module):
    """Token ids (n, context length) to vectors (n, d), not yet of unit length."""

    def __init__(self, weights: Weights, config: Any) -> None:
        super().__init__()
        text, width = config.text_config, config.text_config.hidden_size
        self.tokens, self.positions = _text_embeddings(weights, text)
        self.layers = Layers(weights, "text_model", text)
        self.after = weights.norm("text_model.final_layer_norm", width, text.layer_norm_eps)
        self.head = weights.linear("text_model.head", inputs=width, outputs=config.vision_config.hidden_size)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """`mask` (n, length) is 0 at padding where the tokenizer says so; otherwise padding is seen, as in training."""
        seen = mask.bool()[:, None, None, :]
        x = functional.embedding(ids, self.tokens) + self.positions[: ids.shape[1]]
        end = torch.full_like(ids[:, 0], ids.shape[1] - 1)
        return self.head(self.after(self.layers.at(x, end, seen)))


TOWERS: dict[tuple[str, str], Callable[[Weights, Any], nn.Module]] = {
    ("clip", "image"): ClipImageTower,
    ("clip", "text"): ClipTextTower,
    ("siglip", "image"): SiglipImageTower,
    ("siglip", "text"): SiglipTextTower,
}


def _text_embeddings(weights: Weights, config: Any) -> tuple[nn.Parameter, nn.Parameter]:
    name, width = "text_model.embeddings", config.hidden_size
    return (
        weights.parameter(f"{name}.token_embedding.weight", config.vocab_size, width),
        weights.parameter(f"{name}.position_embedding.weight", config.max_position_embeddings, width),
    )
