"""What the engine runs a model with: the fastest way there is, for a few tokens and for many.

What    `runner(model)` is an object with `hidden(ids, positions=, cache=)` and `logits(hidden)`. On a CPU it is a
        `Step`: up to MAX_TOKENS tokens go through the whole decoder in one call of kernels.cpp. Everything else (longer
        pieces of a prompt, GPUs, dtypes without a kernel) goes through the `Decoder`, which is also the reference.
Why     At one token an operation of torch costs more to start than to do; a model of 24 layers starts 500 of them.
How     fast = runner(model); states = fast.hidden(ids, positions=window.positions, cache=window)
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moss.engine.cache import Window
from moss.engine.kernels import KINDS, MAX_TOKENS, Batch, Layer, Library, Linear, Model, Norm, describe, library
from moss.engine.quant import QuantLinear
from moss.model import Decoder, RMSNorm


class Runner(Protocol):
    """What the engine asks of a model."""

    def hidden(self, ids: Tensor, *, positions: Tensor, cache: Any) -> Tensor:
        """ids, positions (B, T) -> hidden states (B, T, D); the cache takes the new keys and values."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (B, D) -> logits (B, V)."""
        ...


def runner(model: Decoder, path: str | None = None) -> Runner:
    """The fastest runner for a model; `path` forces one of the kernels' paths. Weights are read where they lie."""
    usable = model.head_kind == "lm" and all(_has_kernel(module) for module in model.modules())
    kernels = library(path) if usable else None
    return model if kernels is None else Step(model, kernels)


def _has_kernel(module: nn.Module) -> bool:
    """Whether the kernels know this module's weights."""
    if isinstance(module, QuantLinear):
        return module.codes.device.type == "cpu"
    if isinstance(module, nn.Linear | nn.Embedding):
        return module.weight.device.type == "cpu" and module.weight.dtype in KINDS and module.weight.is_contiguous()
    # An adapter's weights, say, belong to no kernel.
    return isinstance(module, RMSNorm | nn.LayerNorm) or not any(True for _ in module.parameters(recurse=False))


class Step:
    """A decoder on a CPU. Norms and biases are copied where they are not float32; other weights stay where they are."""

    def __init__(self, model: Decoder, kernels: Library) -> None:
        self.model, self.kernels = model, kernels
        self._kept: list[Tensor] = []  # what the structures below point into
        self._layers = (Layer * model.config.num_layers)(*(self._layer(block) for block in model.blocks))
        head = model.embed if model.head is None else model.head
        self._head = self._linear(head)
        self._model = self._describe()

    def _float(self, tensor: Tensor | None) -> Tensor | None:
        """As contiguous float32 that lives as long as this object."""
        if tensor is None:
            return None
        self._kept.append(tensor.detach().float().contiguous())
        return self._kept[-1]

    def _norm(self, module: nn.Module | None) -> Norm:
        if module is None:
            return Norm()
        weight, bias = (self._float(getattr(module, name, None)) for name in ("weight", "bias"))
        return Norm(*(None if part is None else part.data_ptr() for part in (weight, bias)))

    def _linear(self, module: Any) -> Linear:
        if module is None:
            return Linear()
        if isinstance(module, QuantLinear):
            self._kept += module.buffers()
            return module.describe()
        self._kept.append(module.weight.detach())
        return describe(self._kept[-1], self._float(getattr(module, "bias", None)))

    def _layer(self, block: Any) -> Layer:
        attn, mlp = block.attn, block.mlp
        norms = (block.attn_norm, block.mlp_norm, attn.q_norm, attn.k_norm)
        linears = (attn.q, attn.k, attn.v, attn.o, mlp.gate, mlp.up, mlp.down)
        return Layer(*map(self._norm, norms), *map(self._linear, linears))

    def _describe(self) -> Model:
        model, config = self.model, self.model.config
        rotary = self._float(model.rotary)
        assert rotary is not None
        linears = self.linears()
        return Model(
            num_layers=config.num_layers,
            hidden=config.hidden,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rotary_dim=config.rotary_dim,
            ffn=config.ffn,
            moss=config.family == "moss",
            max_cols=max(linear.cols for linear in linears),
            quantized=any(linear.kind > 1 for linear in linears),
            eps=config.norm_eps,
            rotary_factor=model.rotary_factor,
            rotary=rotary.data_ptr(),
            embed=self._linear(model.embed),
            norm=self._norm(model.norm),
            layers=self._layers,
        )

    def linears(self) -> list[Linear]:
        """The linear layers that every token goes through, in their order, the head last."""
        names = [field[0] for field in Layer._fields_ if field[1] is Linear]
        layers = [getattr(layer, name) for layer in self._layers for name in names]
        return [*(linear for linear in layers if linear.rows), self._head]

    def hidden(self, ids: Tensor, *, positions: Tensor, cache: Any) -> Tensor:
        """ids, positions (B, T) -> hidden states (B, T, D): float32 from the kernels, else the model's dtype."""
        if ids.numel() > MAX_TOKENS or not isinstance(cache, Window) or cache.keys[0].dtype not in KINDS:
            return self.model.hidden(ids, positions=positions, cache=cache)
        rows, num_new = ids.shape
        keys = cache.keys[0]
        assert cache.length <= keys.shape[2] and keys.is_contiguous(), (cache.length, keys.shape)
        out = torch.empty(rows, num_new, self.model.config.hidden)
        # All that is pointed to must live until the call returns.
        ids, positions = ids.contiguous(), positions.contiguous()
        starts = (ctypes.c_int64 * rows)(*cache.starts)
        places = ctypes.c_void_p * len(cache.keys)
        all_keys, all_values = (places(*(part.data_ptr() for part in parts)) for parts in (cache.keys, cache.values))
        batch = Batch(
            rows=rows,
            num_new=num_new,
            first=cache.rows.start,
            threads=torch.get_num_threads(),
            ids=ids.data_ptr(),
            positions=positions.data_ptr(),
            starts=ctypes.addressof(starts),
            keys=ctypes.addressof(all_keys),
            values=ctypes.addressof(all_values),
            row_stride=keys.stride(0),
            head_stride=keys.stride(1),
            kind=KINDS[keys.dtype],
            out=out.data_ptr(),
        )
        self.kernels.step(self._model, batch)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (B, D) -> logits (B, V) float32."""
        if len(hidden) > MAX_TOKENS:
            return self.model.logits(hidden.to(self.model.embed.weight.dtype)).float()
        return self.kernels.linear(self._head, hidden)
