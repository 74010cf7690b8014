"""Training a part of a model while all else stays as it is."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from timm_varchan.errors import UserError
from timm_varchan.models import has_stems, stems

__all__ = ["choose_trained", "train_mode"]


def choose_trained(model: nn.Module, part: str) -> None:
    """Leave only a part of a model trainable.

    Args:
        model: A timm model or twin, not wrapped.
        part: `all`; `head`: the classifier; `stem`: what mixes the channels, its kernels apart.

    Raises:
        UserError: The model has no such part.
    """
    if part == "all":
        return
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in _parts(model, part):
        module.requires_grad_(True)


def _parts(model: nn.Module, part: str) -> Iterable[nn.Module]:
    if part == "stem":
        if not has_stems(model):
            raise UserError(
                f"{type(model).__name__} has no stem to train alone. Choose a dwg_ model, or "
                f"--train-only head."
            )
        return stems(model)
    heads = model.get_classifier()  # type: ignore[operator]  # every timm model has it
    found = [head for head in (heads if isinstance(heads, tuple) else (heads,)) if head is not None]
    if not any(True for head in found for _ in head.parameters()):
        raise UserError(f"{type(model).__name__} has no classifier to train alone.")
    return found


def train_mode(model: nn.Module, part: str) -> None:
    """Training mode; where only a part is trained, the rest keeps its statistics and drops nothing.

    Args:
        model: Wrapped or not.
        part: As `choose_trained` took it.
    """
    model.train()
    if part == "all":
        return
    for module in model.modules():
        own = list(module.parameters())
        if not any(parameter.requires_grad for parameter in own):
            module.eval()
