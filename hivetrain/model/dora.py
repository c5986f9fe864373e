"""Which parameters train: a DoRA or LoRA adapter, and optionally embeddings and norms beside it.

LoRA and plain DoRA are peft's; the linear form of DoRA is `hivetrain.model.linear`.

Embeddings and norms are trained by ``requires_grad`` alone. peft's ``modules_to_save`` would copy them and
silently untie a tied head. A head that is tied to the embeddings stays tied, and trains with them once.

DoRA's weight is ``W' = diag(m / ||W + sBA||) (W + sBA)``, the norm taken per output row and held constant in the
backward pass (https://arxiv.org/abs/2402.09353, section 4.3). peft forms ``BA`` and the norm of the whole matrix
in every forward pass. W is frozen, so `FactoredDora` keeps ``||W||^2`` and expands the square instead:
``||W + sBA||^2 = ||W||^2 + 2s <W A^T, B> + s^2 <B A A^T, B>``, which never forms a matrix of W's size.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hivetrain import run
from hivetrain.errors import ConfigError
from hivetrain.model.linear import LinearDora, frozen_a

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def attach_adapter(model: PreTrainedModel, adapter: run.Adapter, seed: int) -> nn.Module:
    """Freeze ``model``, then make trainable what the recipe names; the model is changed in place.

    Args:
        model: any causal LM, on the CPU.
        adapter: the recipe's table. ``"full"`` trains everything and attaches nothing.
        seed: draws the adapter's A; the same seed gives the same adapter, and no global generator moves.

    Returns:
        the module to call, in evaluation mode: dropout, wherever it hides, would make a replay differ.

    Raises:
        ConfigError: `adapter.target_modules` names no linear layer of the model, or nothing would train.
    """
    if adapter.kind == "full":
        whole: nn.Module = model.requires_grad_(True)
        return whole.eval()
    targets = _target_modules(model, adapter.target_modules)
    model.requires_grad_(False)
    linear = adapter.kind == "dora_linear"
    wrapped = _wrap_linear(model, adapter, targets, seed) if linear else _wrap(model, adapter, targets, seed)
    if adapter.train_embeddings:
        _train_embeddings(model)
    if adapter.train_norms:
        _train_norms(model)
    return wrapped.eval()


def _target_modules(model: PreTrainedModel, wanted: tuple[str, ...]) -> list[str]:
    """Full names of the linear layers to adapt: all but the head, or those whose name ends as ``wanted`` says."""
    linears = [name for name, module in model.named_modules() if _is_linear(module)]
    if not wanted:
        head = model.get_output_embeddings()
        linears = [name for name in linears if model.get_submodule(name) is not head]
    for suffix in wanted:
        if not any(_ends_as(name, suffix) for name in linears):
            raise ConfigError(f"adapter.target_modules: no linear layer is named {suffix!r}; there are {linears[:8]}")
    targets = [name for name in linears if not wanted or any(_ends_as(name, suffix) for suffix in wanted)]
    if not targets:
        raise ConfigError(f"{type(model).__name__} has no linear layer to adapt; use adapter.kind = 'full'")
    return targets


def _ends_as(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _wrap_linear(model: PreTrainedModel, adapter: run.Adapter, targets: list[str], seed: int) -> nn.Module:
    scaling = adapter.alpha / adapter.rank
    for name in targets:
        base, transposed = model.get_submodule(name), _is_conv1d(model.get_submodule(name))
        in_features = base.weight.shape[0 if transposed else 1]
        a = frozen_a(seed, 0, name, adapter.rank, in_features, scaling)
        model.set_submodule(name, LinearDora(base, a, scaling=scaling, transposed=transposed))
    wrapped: nn.Module = model
    return wrapped


def _wrap(model: PreTrainedModel, adapter: run.Adapter, targets: list[str], seed: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.dora import DoraLinearLayer

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=0.0,
        use_dora=adapter.kind == "dora",
        target_modules=targets,
        fan_in_fan_out=any(_is_conv1d(model.get_submodule(name)) for name in targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft asks transformers by a name that transformers deprecates; neither is ours to change.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        torch.default_generator.manual_seed(seed)
        wrapped: nn.Module = get_peft_model(model, config)
    for module in list(wrapped.modules()):
        layers = getattr(module, "lora_magnitude_vector", {})
        for name, layer in list(layers.items()):
            if type(layer) is DoraLinearLayer:
                layers[name] = FactoredDora(layer, _base_weight(module, layer.fan_in_fan_out))
    return wrapped


def _base_weight(module: nn.Module, fan_in_fan_out: bool) -> Tensor:
    """W as [out, in]."""
    weight: Tensor = module.get_base_layer().weight  # type: ignore[operator]
    return weight.T if fan_in_fan_out else weight


class FactoredDora(nn.Module):
    """peft's `DoraLinearLayer` with the row norms by expansion of the square; same parameters, same values.

    Args:
        layer: the layer that it takes the place of; its magnitude [out] is kept as it is.
        base_weight: W [out, in], frozen while this layer lives.
    """

    weight: nn.Parameter
    fan_in_fan_out: bool
    squared_norm: Tensor

    def __init__(self, layer: nn.Module, base_weight: Tensor) -> None:
        super().__init__()
        self.weight = layer.weight  # type: ignore[assignment]
        self.fan_in_fan_out = layer.fan_in_fan_out  # type: ignore[assignment]
        self.register_buffer("squared_norm", _squared_norm(base_weight), persistent=False)

    def rebase_(self, base_weight: Tensor) -> None:
        """Take the row norms of another W [out, in], which the layer has now."""
        self.squared_norm.copy_(_squared_norm(base_weight))

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Module,
        lora_B: nn.Module,
        scaling: float,
        base_layer: nn.Module,
        base_result: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """What DoRA adds to the base layer's output: [..., in] -> [..., out]."""
        weight: Tensor = base_layer.weight.T if self.fan_in_fan_out else base_layer.weight  # type: ignore[assignment]
        bias: Tensor | None = base_layer.bias  # type: ignore[assignment]
        gain = self.weight / self._row_norms(weight, lora_A.weight, lora_B.weight, scaling)  # type: ignore[arg-type]
        if base_result is None:
            base_result = F.linear(x, weight)
        elif bias is not None:
            base_result = base_result - bias
        # B is small: scaling its rows costs [out, r] where scaling its output would cost [tokens, out].
        update = F.linear(lora_A(x), lora_B.weight * (gain * scaling).unsqueeze(1))  # type: ignore[operator]
        return torch.addcmul(update, base_result, gain - 1)

    @torch.no_grad()
    def _row_norms(self, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """||W + s B A|| per row [out], in float32 under autocast too."""
        with torch.autocast(device_type=weight.device.type, enabled=False):
            product = torch.addmm(b @ (a @ a.T), weight, a.T, beta=scaling, alpha=2.0)  # [out, r]
            return (self.squared_norm + scaling * (product * b).sum(dim=1)).clamp_min(0).sqrt()


def _squared_norm(weight: Tensor) -> Tensor:
    """||W||^2 per row [out]."""
    return weight.detach().float().square().sum(dim=1)


def _train_embeddings(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.requires_grad_(True)
    head = model.get_output_embeddings()
    if head is not None:
        head.weight.requires_grad_(True)


def _train_norms(model: PreTrainedModel) -> None:
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
