"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from timm_varchan.channels import ANONYMOUS, ChannelSet, seeded_rng
from timm_varchan.evaluation import Validation
from timm_varchan.models import has_stems, set_channels
from timm_varchan.training.averaging import WeightAverage
from timm_varchan.training.checkpoint import Progress
from timm_varchan.training.configuration import TrainConfig
from timm_varchan.training.fine_tuning import train_mode
from timm_varchan.training.folder import RunFolder
from timm_varchan.training.interruption import Interrupted, NonFiniteLossError, StepWatch
from timm_varchan.training.loaders import StreamLoader, epoch_batches
from timm_varchan.training.mixing import SeededMixup
from timm_varchan.training.step_clock import StepClock
from timm_varchan.training.tracking import RunLog
from timm_varchan.views import DrawKey, draw_channels, full_share_for

__all__ = ["Trainer", "tell_all_channels"]


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
        loader: Normalised training batches with all channels, `grad_accum_steps` an update.
        channels: All channels of the data.
        folder: Where checkpoints go.
        validate: Tests a model after every epoch.
        log: Hears of every epoch.
        mixup: Mixes images and labels, or None.
        average: Of the weights, or None.
    """

    config: TrainConfig
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    loader: DataLoader[tuple[Tensor, int]] | StreamLoader
    channels: ChannelSet
    folder: RunFolder
    validate: Callable[[nn.Module], Validation]
    log: RunLog
    mixup: SeededMixup | None = None
    average: WeightAverage | None = None
    #: Loss, correct and seen images of the epoch's steps so far, on this process.
    _sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._sums = torch.zeros(3, device=self.accelerator.device)

    @property
    def full_share(self) -> float:
        """The share of images with all channels."""
        share = self.config.full_share
        return full_share_for(len(self.channels)) if share is None else share

    @property
    def best_model(self) -> nn.Module:
        """What is tested and saved: the average where there is one."""
        return self.model if self.average is None else self.average.model

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
            CheckpointError: A checkpoint cannot be written.
        """
        self.log.start()
        with StepWatch(self.accelerator) as watch:
            try:
                while progress.epoch < self.config.epochs:
                    self._train_epoch(progress, watch)
            except NonFiniteLossError as error:
                good = self.folder.checkpoints.last()
                cure = f"The last good checkpoint is {good}" if good else "No checkpoint is saved"
                raise NonFiniteLossError(f"{error}. {cure}.") from None
        return progress

    def _train_epoch(self, progress: Progress, watch: StepWatch) -> None:
        """The rest of an epoch, its evaluation and its checkpoint."""
        config, epoch, clock = self.config, progress.epoch, StepClock()
        first = progress.step
        train_mode(self.model, config.train_only)
        batches = epoch_batches(self.loader, epoch, first * config.grad_accum_steps)
        micro = 0
        with tqdm(
            total=len(self.loader) // config.grad_accum_steps, initial=first, unit="step",
            disable=not self.accelerator.is_main_process, leave=False,
            desc=f"epoch {epoch + 1}/{config.epochs}",
        ) as bar:  # fmt: skip
            for x, labels in clock.waiting(batches):
                with self.accelerator.accumulate(self.model):
                    self._forward_backward(x, labels, progress, micro, watch)
                micro = (micro + 1) % config.grad_accum_steps
                if micro:
                    continue
                progress.step += 1
                progress.updates += 1
                bar.update()
                if progress.step % 10 == 0:
                    bar.set_postfix(loss=f"{float(self._sums[0] / self._sums[2]):.3f}")
                self._between_updates(progress, watch)
        watch.flush()
        images = (progress.step - first) * progress.images_per_update
        entry = {"seconds": clock.seconds, "loader_share": clock.loader_share}
        self._end_epoch(progress, entry | {"images_per_second": images / clock.seconds})
        if watch.stop and progress.epoch < config.epochs:
            raise Interrupted

    def _between_updates(self, progress: Progress, watch: StepWatch) -> None:
        """Save in the middle of an epoch, if it is time or a signal came."""
        every = self.config.checkpoint_steps
        if watch.stop or (every and progress.updates % every == 0):
            watch.flush()
            self._save(progress)
        if watch.stop:
            raise Interrupted

    def _end_epoch(self, progress: Progress, times: Mapping[str, float]) -> None:
        """Validate, log and save."""
        self._average_statistics()
        loss, correct, count = self.accelerator.reduce(self._sums).tolist()
        model = self.best_model
        with torch.compiler.set_stance("force_eager"):
            found = self.validate(model)
        tell_all_channels(model, self.channels, self.config.channel_identity)
        progress.history.append(
            {
                "epoch": progress.epoch,
                "train_loss": loss / count,
                "train_accuracy": correct / count,
                "eval_loss": found.loss,
                "eval_accuracy": found.accuracy,
                "lr": self.optimizer.param_groups[0]["lr"],
                **times,
                "eval_sets": dict(found.sets),
                "eval_not_finite": sum(found.num_not_finite.values()),
            }
        )
        progress.epoch, progress.step = progress.epoch + 1, 0
        self._sums.zero_()
        self.log.epoch(progress.history, self.config.epochs)
        self._save(progress)

    def _forward_backward(
        self, x: Tensor, labels: Tensor, progress: Progress, micro: int, watch: StepWatch
    ) -> None:
        """One forward and backward pass; the last of an update also moves the weights."""
        config, rank = self.config, self.accelerator.process_index
        start = (micro * self.accelerator.num_processes + rank) * config.batch_size
        key = DrawKey(config.seed, progress.epoch, progress.step, start)
        # Dropout and stochastic depth too hang on the step alone, not on what was drawn before.
        torch.manual_seed(seeded_rng("step", *vars(key).values()).getrandbits(63))
        if self.mixup is not None:
            x, targets = self.mixup(x, labels, key)
        else:
            targets = labels
        view = draw_channels(
            config.channel_aug, x, self.channels, key,
            identity=config.channel_identity, full_share=self.full_share,
        )  # fmt: skip
        view.tell(self.model)
        x = view.planes
        if config.compile:
            torch._dynamo.maybe_mark_dynamic(x, 1)
        if config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.scheduler is not None:
            self.scheduler.step_update(progress.updates)
        with self.accelerator.autocast():
            logits = self.model(x)
            smoothing = 0.0 if self.mixup is not None else config.smoothing
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        self.accelerator.backward(loss)
        if config.clip_grad is not None and self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None and self.accelerator.sync_gradients:
            self.average.update(unwrap_model(self.model), progress.updates + 1)
        watch.after_step(
            loss, f"epoch {progress.epoch + 1}, step {progress.step + 1} ({view}, lr "
            f"{self.optimizer.param_groups[0]['lr']:.3g})"
        )  # fmt: skip
        correct = (logits.detach().argmax(-1) == labels).sum()
        count = torch.full_like(loss.detach(), len(labels))
        self._sums += torch.stack(
            [loss.detach().float() * len(labels), correct.float(), count.float()]
        )

    def _save(self, progress: Progress) -> None:
        self.folder.checkpoints.save(self.accelerator, progress, self._own_state())

    def _own_state(self) -> dict[str, Tensor]:
        """What differs between processes, and on the main process what accelerate does not know."""
        state = {"sums": self._sums, **self._statistics()}
        if self.average is not None:
            state |= self.average.state(buffers_only=not self.accelerator.is_main_process)
        return {name: tensor.contiguous().clone() for name, tensor in state.items()}

    @torch.no_grad()
    def load_own_state(self, state: Mapping[str, Tensor], num_processes: int) -> None:
        """Take over what a checkpoint keeps of `_own_state`."""
        for name, buffer in self._statistics().items():
            buffer.copy_(state[name])
        if self.accelerator.num_processes == num_processes:
            self._sums.copy_(state["sums"])
        if self.average is not None:
            self.average.load(state)

    def _statistics(self) -> dict[str, Tensor]:
        """BatchNorm's running statistics, which every process has for itself within an epoch."""
        return {
            name: buffer
            for name, buffer in self.model.named_buffers()
            if name.endswith(("running_mean", "running_var"))
        }

    @torch.no_grad()
    def _average_statistics(self) -> None:
        """Give every process the mean of all processes' BatchNorm statistics."""
        if self.accelerator.num_processes == 1:
            return
        models = [self.model] if self.average is None else [self.model, self.average.model]
        for model in models:
            for name, buffer in model.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.copy_(self.accelerator.reduce(buffer, "mean"))
