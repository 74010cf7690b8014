"""What the evaluation of every channel set needs: a model that can, statistics for each set."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from timm_varchan.channels import ANONYMOUS, seeded_rng
from timm_varchan.data import ImageData, ImageSplit
from timm_varchan.errors import UserError
from timm_varchan.evaluation import choose_sets, default_modes, has_stems
from timm_varchan.models import channel_statistics
from timm_varchan.training.configuration import TrainConfig
from timm_varchan.training.loaders import eval_loader, evaluation_split

__all__ = ["check_evaluation", "set_statistics"]


def check_evaluation(config: TrainConfig, model: nn.Module, data: ImageData) -> None:
    """Refuse an evaluation that the model cannot do, before it is trained.

    Raises:
        UserError: No images; fewer sets than sizes; modes or statistics that need a stem; no
            images for statistics.
    """
    evaluation_split(data)
    try:
        choose_sets(data.channels, max_sets=config.eval_max_sets, seed=config.seed)
    except ValueError as error:
        raise UserError(f"--eval-max-sets: {error}") from error
    if not has_stems(model) and set(config.eval_modes or ()) - {"mask"}:
        raise UserError(
            f"--eval-modes {' '.join(config.eval_modes or ())} need a model with a stem. Leave it "
            f"out, or choose mask."
        )
    if config.eval_statistics and (not has_stems(model) or data.train is None):
        raise UserError(
            "--eval-statistics needs a model with a stem and training images; leave it out."
        )


def set_statistics(
    config: TrainConfig, model: nn.Module, data: ImageData
) -> dict[tuple[str, str], dict[str, Tensor]] | None:
    """Statistics for `evaluate_channel_sets(statistics=)`, the same on every process.

    Args:
        config: `eval_statistics` is the number of images; none are estimated if it is 0.
        model: Not wrapped.
        data: The training images are used.

    Returns:
        BatchNorm buffers by channel set and mode, or None.
    """
    if not config.eval_statistics or data.train is None:
        return None
    count = min(config.eval_statistics, len(data.train))
    chosen = seeded_rng("set statistics", config.seed).sample(range(len(data.train)), count)
    images = data.train.take(sorted(chosen))
    found = {}
    for indices in choose_sets(data.channels, max_sets=config.eval_max_sets, seed=config.seed):
        channel_set = data.channels.take(indices)
        for mode in config.eval_modes or default_modes(model, data.channels):
            told = channel_set if mode == "named" else ANONYMOUS
            batches = _planes(config, images, data, model, indices)
            found[str(channel_set), mode] = channel_statistics(model, batches, told)
    return found


def _planes(
    config: TrainConfig,
    images: ImageSplit,
    data: ImageData,
    model: nn.Module,
    indices: tuple[int, ...],
) -> Iterator[Tensor]:
    """The planes of a channel set, in batches on the model's device."""
    device = next(model.parameters()).device
    for x, _ in eval_loader(config, images, data.channels):
        yield x[:, indices].to(device)
