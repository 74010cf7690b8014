"""The training loop."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, skip_first_batches
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm

from timm_varchan.channels import ANONYMOUS, ChannelSet, seeded_rng
from timm_varchan.evaluation import has_stems
from timm_varchan.models import set_channels
from timm_varchan.training.channel_draws import DrawKey, draw_channels
from timm_varchan.training.checkpoint import Progress, RunFolder
from timm_varchan.training.configuration import TrainConfig
from timm_varchan.training.interruption import Interrupted, NonFiniteLossError, StepWatch

__all__ = ["EpochSampler", "Trainer", "tell_all_channels"]


class EpochSampler(Sampler[int]):
    """All images in an order that depends on seed and epoch alone."""

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images, self.seed, self.epoch = num_images, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.num_images))
        seeded_rng("order", self.seed, self.epoch).shuffle(order)
        return iter(order)


def tell_all_channels(model: nn.Module, channels: ChannelSet, identity: str) -> None:
    """Tell a model that it gets all channels of the data, or that it will not be told."""
    if has_stems(model):
        set_channels(model, channels)
        if identity == "anonymous" or channels.is_anonymous:
            # After the above, which leaves the number of channels in what is saved.
            set_channels(model, ANONYMOUS)


@dataclass
class Trainer:
    """One run's training: everything the loop needs, prepared by the accelerator.

    Args:
        config: What to do.
        accelerator: On which devices.
        model: The classifier.
        optimizer: Its optimizer.
        scheduler: A timm scheduler in updates, or None; not prepared, each process steps its own.
        train_loader: Normalised training batches with all channels.
        eval_loader: Normalised validation batches, not shuffled; None without validation images.
        channels: All channels of the data.
        folder: Where checkpoints and `summary.csv` go.
    """

    config: TrainConfig
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    train_loader: DataLoader[tuple[Tensor, int]]
    eval_loader: DataLoader[tuple[Tensor, int]] | None
    channels: ChannelSet
    folder: RunFolder

    def fit(self, progress: Progress) -> Progress:
        """Train until the last epoch.

        Args:
            progress: Where to begin.

        Returns:
            The progress at the end.

        Raises:
            Interrupted: A signal came; a checkpoint is saved.
            NonFiniteLossError: The loss is no number; names the step, the channels and the last
                good checkpoint.
        """
        progress.images_per_step = self.config.batch_size * self.accelerator.num_processes
        with StepWatch(self.accelerator) as watch:
            try:
                while progress.epoch < self.config.epochs:
                    self._train_epoch(progress, watch)
            except NonFiniteLossError as error:
                good = self.folder.last()
                cure = f"The last good checkpoint is {good}" if good else "No checkpoint is saved"
                raise NonFiniteLossError(f"{error}. {cure}.") from None
        return progress

    def _train_epoch(self, progress: Progress, watch: StepWatch) -> None:
        """The rest of an epoch, its evaluation and its checkpoint."""
        config, epoch, started = self.config, progress.epoch, time.perf_counter()
        self._set_epoch(epoch)
        main = self.accelerator.is_main_process
        sums = torch.tensor(progress.sums if main else (0.0,) * 3, device=self.accelerator.device)
        loader = skip_first_batches(self.train_loader, progress.step)
        first_step = progress.step
        self.model.train()
        with tqdm(
            total=len(self.train_loader), initial=first_step, disable=not main, unit="step",
            desc=f"epoch {epoch + 1}/{config.epochs}", leave=False,
        ) as bar:  # fmt: skip
            for x, labels in loader:
                sums += self._step(x, labels, progress, watch)
                bar.update()
                if progress.step % 10 == 0:
                    bar.set_postfix(loss=f"{float(sums[0] / sums[2]):.3f}")
                if watch.stop:
                    self._save_and_stop(progress, sums, watch)
        watch.flush()
        seconds = time.perf_counter() - started
        images = (progress.step - first_step) * progress.images_per_step
        self._average_statistics()
        loss, correct, count = self.accelerator.reduce(sums).tolist()
        eval_loss, eval_accuracy = self._validate()
        progress.history.append(
            {
                "epoch": epoch,
                "train_loss": loss / count,
                "train_accuracy": correct / count,
                "eval_loss": eval_loss,
                "eval_accuracy": eval_accuracy,
                "lr": self.optimizer.param_groups[0]["lr"],
                "images_per_second": images / seconds,
                "seconds": seconds,
            }
        )
        progress.epoch, progress.step, progress.sums = epoch + 1, 0, (0.0, 0.0, 0.0)
        self._write_summary(progress)
        self.folder.save(self.accelerator, progress)
        if watch.stop and progress.epoch < config.epochs:
            raise Interrupted

    def _step(self, x: Tensor, labels: Tensor, progress: Progress, watch: StepWatch) -> Tensor:
        """One update; returns the sums of loss, correct and images."""
        config = self.config
        start = self.accelerator.process_index * config.batch_size
        key = DrawKey(config.seed, progress.epoch, progress.step, start)
        x, told = draw_channels(
            config.channel_aug, x, self.channels, key, identity=config.channel_identity
        )
        if has_stems(self.model):
            set_channels(self.model, told)
        if self.scheduler is not None:
            self.scheduler.step_update(progress.updates)
        with self.accelerator.autocast():
            logits = self.model(x)
            loss = F.cross_entropy(logits, labels, label_smoothing=config.smoothing)
        self.accelerator.backward(loss)
        if config.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step += 1
        progress.updates += 1
        named = "mixed channel sets" if isinstance(told, tuple) else f"channels {told}"
        watch.after_step(
            loss, f"epoch {progress.epoch + 1}, step {progress.step} ({named}, lr "
            f"{self.optimizer.param_groups[0]['lr']:.3g})"
        )  # fmt: skip
        correct = (logits.detach().argmax(-1) == labels).sum()
        count = torch.full_like(loss.detach(), len(labels))
        return torch.stack([loss.detach().float() * len(labels), correct.float(), count.float()])

    def _save_and_stop(self, progress: Progress, sums: Tensor, watch: StepWatch) -> None:
        """Save in the middle of an epoch."""
        watch.flush()
        self._average_statistics()
        loss, correct, count = self.accelerator.reduce(sums).tolist()
        progress.sums = (loss, correct, count)
        self.folder.save(self.accelerator, progress)
        raise Interrupted

    def _set_epoch(self, epoch: int) -> None:
        """Order and augmentation of an epoch, wherever accelerate keeps them."""
        sampler: Any = self.train_loader.batch_sampler
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        sampler.sampler.set_epoch(epoch)
        set_epoch = getattr(self.train_loader.dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    @torch.no_grad()
    def _average_statistics(self) -> None:
        """Give every process the mean of all processes' BatchNorm statistics."""
        if self.accelerator.num_processes == 1:
            return
        for name, buffer in self.model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(self.accelerator.reduce(buffer, "mean"))

    @torch.no_grad()
    def _validate(self) -> tuple[float, float]:
        """Loss and accuracy on the validation images with all channels."""
        if self.eval_loader is None:
            return float("nan"), float("nan")
        self.model.eval()
        tell_all_channels(self.model, self.channels, self.config.channel_identity)
        rows = []
        for x, labels in self.eval_loader:
            with self.accelerator.autocast():
                logits = self.model(x)
            loss = F.cross_entropy(logits.float(), labels, reduction="none")
            right = (logits.argmax(-1) == labels).float()
            rows.append(self.accelerator.gather_for_metrics(torch.stack([loss, right], dim=1)))
        loss, right = torch.cat(rows).double().mean(0).tolist()
        return loss, right

    def _write_summary(self, progress: Progress) -> None:
        """`summary.csv`, one line an epoch, as timm's scripts write it."""
        if not self.accelerator.is_main_process:
            return
        with (self.folder.path / "summary.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(progress.history[0]))
            writer.writeheader()
            writer.writerows(progress.history)
