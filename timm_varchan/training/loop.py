"""The training loop, from top to bottom: the run, an epoch, a pass; its small parts stand below."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data import Mixup
from timm.utils import ModelEmaV3, distribute_bn, unwrap_model
from torch import Tensor, nn
from tqdm.auto import tqdm

from timm_varchan.channels import ANONYMOUS, ChannelSet, seeded_rng
from timm_varchan.evaluation import PlannedSet, Validation, default_modes, validate_channel_sets
from timm_varchan.models import has_stems, set_channels
from timm_varchan.training.checkpoint import Checkpoints, Progress
from timm_varchan.training.config import TrainConfig
from timm_varchan.training.loaders import Loader, StreamLoader, epoch_batches
from timm_varchan.training.report import RunLog
from timm_varchan.views import DrawKey, draw_channels, full_share_for

__all__ = [
    "Interrupted",
    "NonFiniteLossError",
    "Trainer",
    "tell_all_channels",
    "trained_mode",
    "warn_not_finite",
]

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: What the names of averaged weights begin with in a checkpoint.
_AVERAGE = "average."


class Interrupted(Exception):  # noqa: N818 - not an error
    """Training was asked to stop and has saved a checkpoint."""


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or NaN."""


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
        validation: Batches to test on after every epoch, or None.
        validation_sets: The channel sets of these tests, all channels first.
        channels: All channels of the data.
        checkpoints: Where they go.
        log: Hears of every epoch.
        mixup: Mixes images and labels, or None.
        average: Of weights and BatchNorm statistics over the updates, or None; its decay rises, so
            that short runs average too. It is tested and saved in the model's place.
    """

    config: TrainConfig
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    loader: Loader | StreamLoader
    validation: Loader | None
    validation_sets: Sequence[PlannedSet]
    channels: ChannelSet
    checkpoints: Checkpoints
    log: RunLog
    mixup: Mixup | None = None
    average: ModelEmaV3 | None = None
    #: Loss, correct and seen images of the epoch's steps so far, on this process.
    _sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._sums = torch.zeros(3, device=self.accelerator.device)

    @property
    def best_model(self) -> nn.Module:
        """What is tested and saved: the average where there is one."""
        return self.model if self.average is None else self.average.module

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
                raise NonFiniteLossError(f"{error}. {self.checkpoints.last_good()}.") from None
        return progress

    def _train_epoch(self, progress: Progress, watch: StepWatch) -> None:
        """The rest of an epoch: its updates, its validation, its checkpoint."""
        config, clock, first = self.config, StepClock(), progress.step
        train_mode(self.model, config.train_only)
        batches = epoch_batches(self.loader, progress.epoch, first * config.grad_accum_steps)
        with tqdm(
            total=len(self.loader) // config.grad_accum_steps, initial=first, unit="step",
            disable=not self.accelerator.is_main_process, leave=False,
            desc=f"epoch {progress.epoch + 1}/{config.epochs}",
        ) as bar:  # fmt: skip
            for number, (x, labels) in enumerate(clock.waiting(batches)):
                micro = number % config.grad_accum_steps
                with self.accelerator.accumulate(self.model):
                    self._forward_backward(x, labels, progress, micro, watch)
                if micro < config.grad_accum_steps - 1:
                    continue
                progress.step += 1
                progress.updates += 1
                bar.update()
                if progress.step % 10 == 0:
                    bar.set_postfix(loss=f"{float(self._sums[0] / self._sums[2]):.3f}")
                self._between_updates(progress, watch)
        watch.flush()
        self._end_epoch(progress, clock.entry((progress.step - first) * progress.images_per_update))
        if watch.stop and progress.epoch < config.epochs:
            raise Interrupted

    def _forward_backward(
        self, x: Tensor, labels: Tensor, progress: Progress, micro: int, watch: StepWatch
    ) -> None:
        """One forward and backward pass; the last of an update also moves the weights."""
        config, rank = self.config, self.accelerator.process_index
        start = (micro * self.accelerator.num_processes + rank) * config.batch_size
        key = DrawKey(config.seed, progress.epoch, progress.step, start)
        # Dropout and stochastic depth too hang on the step alone, not on what was drawn before.
        torch.manual_seed(seeded_rng("step", *vars(key).values()).getrandbits(63))
        targets, smoothing = labels, config.smoothing
        if self.mixup is not None:
            (x, targets), smoothing = mix(self.mixup, x, labels, key), 0.0
        share = config.full_share
        view = draw_channels(
            config.channel_aug, x, self.channels, key, identity=config.channel_identity,
            full_share=full_share_for(len(self.channels)) if share is None else share,
        )  # fmt: skip
        view.tell(self.model)
        planes = view.planes
        if config.compile:
            torch._dynamo.maybe_mark_dynamic(planes, 1)
        if config.channels_last:
            planes = planes.contiguous(memory_format=torch.channels_last)
        if self.scheduler is not None:
            self.scheduler.step_update(progress.updates)
        with self.accelerator.autocast():
            logits = self.model(planes)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        self.accelerator.backward(loss)
        if config.clip_grad is not None and self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None and self.accelerator.sync_gradients:
            self.average.update(unwrap_model(self.model), step=progress.updates + 1)
        watch.after_step(
            loss, f"epoch {progress.epoch + 1}, step {progress.step + 1} ({view}, lr "
            f"{self.optimizer.param_groups[0]['lr']:.3g})"
        )  # fmt: skip
        correct = (logits.detach().argmax(-1) == labels).sum()
        count = torch.full_like(loss.detach(), len(labels))
        self._sums += torch.stack(
            [loss.detach().float() * len(labels), correct.float(), count.float()]
        )

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
        found = self._validate()
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

    def _average_statistics(self) -> None:
        """Give every process the mean of all processes' BatchNorm statistics."""
        if self.accelerator.num_processes > 1:
            for model in dict.fromkeys((self.model, self.best_model)):
                distribute_bn(model, self.accelerator.num_processes, reduce=True)

    def _validate(self) -> Validation:
        """Test the best model on some channel sets; afterwards it is told all channels again."""
        model, found = self.best_model, Validation()
        if self.validation is not None:
            mode = trained_mode(self.config, model, self.channels)
            with torch.compiler.set_stance("force_eager"):  # not a graph for every channel set
                found = validate_channel_sets(
                    model, self.validation, self.channels, self.validation_sets, mode,
                    accelerator=self.accelerator,
                )  # fmt: skip
        warn_not_finite(found.num_not_finite, self.accelerator)
        tell_all_channels(model, self.channels, self.config.channel_identity)
        return found

    def _save(self, progress: Progress) -> None:
        """Save what the accelerator prepared, and what it does not know or differs by process."""
        own = {"sums": self._sums, **self._statistics()}
        if self.average is not None:
            average = self.average.module
            elsewhere = {} if self.accelerator.is_main_process else dict(average.named_parameters())
            own |= {
                _AVERAGE + name: tensor
                for name, tensor in average.state_dict().items()
                if name not in elsewhere
            }
        own = {name: tensor.contiguous().clone() for name, tensor in own.items()}
        self.checkpoints.save(self.accelerator, progress, own)

    @torch.no_grad()
    def load_own_state(self, own: Mapping[str, Tensor], num_processes: int) -> None:
        """Take over what a checkpoint holds besides the accelerator's own.

        Args:
            own: What `Checkpoints.load` gave.
            num_processes: That wrote it.
        """
        for name, buffer in self._statistics().items():
            buffer.copy_(own[name])
        if self.accelerator.num_processes == num_processes:
            self._sums.copy_(own["sums"])
        if self.average is not None:
            self.average.module.load_state_dict(
                {k.removeprefix(_AVERAGE): v for k, v in own.items() if k.startswith(_AVERAGE)}
            )

    def _statistics(self) -> dict[str, Tensor]:
        """BatchNorm's running statistics, which every process has for itself within an epoch."""
        return {
            name: buffer
            for name, buffer in self.model.named_buffers()
            if name.endswith(("running_mean", "running_var"))
        }


def tell_all_channels(model: nn.Module, channels: ChannelSet, identity: str) -> None:
    """Tell a model that it gets all channels of the data, or that it will not be told."""
    if has_stems(model):
        set_channels(model, channels)
        if identity == "anonymous" or channels.is_anonymous:
            # After the above, which leaves the number of channels in what is saved.
            set_channels(model, ANONYMOUS)


def trained_mode(config: TrainConfig, model: nn.Module, channels: ChannelSet) -> str:
    """How training told the model its channels: one of `MODES`."""
    if config.eval_only is None and has_stems(model):
        if config.channel_identity == "anonymous":
            return "anonymous"
        if not channels.is_anonymous:
            return "named"
    return default_modes(model, channels)[0]


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
        if not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()


def mix(mixup: Mixup, x: Tensor, labels: Tensor, key: DrawKey) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix as the key draws it, all planes of an image in the same way.

    Args:
        mixup: timm's, which draws from NumPy's global generator.
        x: `(B, C, H, W)`, mixed in place.
        labels: `(B,)`.
        key: What the draw depends on.

    Returns:
        The images, and targets `(B, num_classes)`.
    """
    state = np.random.get_state()
    np.random.seed(seeded_rng("mixup", *vars(key).values()).getrandbits(32))
    try:
        return mixup(x, labels)
    finally:
        np.random.set_state(state)


def warn_not_finite(counts: Mapping[str, int], accelerator: Accelerator) -> None:
    """One line on the channel sets with logits that are not finite, of so many images."""
    if not counts or not accelerator.is_main_process:
        return
    shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:5])
    more = f" and {len(counts) - 5} sets more" if len(counts) > 5 else ""
    logger.warning(
        "Logits that are not finite numbers count as wrong: %s%s images. Look for NaN in the "
        "images, or lower the learning rate.", shown, more,
    )  # fmt: skip


class StepClock:
    """Adds up the time that a loop waits for its loader, beside the time that it takes.

    On an accelerator the work runs on while the loop asks for the next batch: a share of the
    loader near 0 says that the device never waits for images.
    """

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.loading = 0.0

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, the waits for them noted."""
        iterator, end = iter(batches), object()
        while True:
            asked = time.perf_counter()
            batch: Any = next(iterator, end)
            self.loading += time.perf_counter() - asked
            if batch is end:
                return
            yield batch

    def entry(self, num_images: int) -> dict[str, float]:
        """The times of an epoch in the history."""
        seconds = time.perf_counter() - self.started
        return {
            "seconds": seconds,
            "loader_share": self.loading / max(seconds, 1e-9),
            "images_per_second": num_images / seconds,
        }


class StepWatch:
    """Hears SIGTERM and SIGINT while it is entered, and looks at every loss.

    What one process hears or sees, all of them act on at the same step. Losses are looked at one
    step late, when the device has them anyway, so that it never waits.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.stop = False
        self._accelerator = accelerator
        self._heard = False
        self._pending: tuple[Tensor, str] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StepWatch:
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGTERM, signal.SIGINT)
            self._before = {number: signal.signal(number, self._hear) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._heard:  # the second time: at once
            raise KeyboardInterrupt
        self._heard = True

    def after_step(self, loss: Tensor, where: str) -> None:
        """Note a step's loss; look at that of the step before.

        Args:
            loss: The loss on this process.
            where: The step and its channels, for the error.

        Raises:
            NonFiniteLossError: The step before had a loss that is no number.
        """
        heard = torch.full_like(loss.detach(), float(self._heard), dtype=torch.float32)
        flags = torch.stack([(~loss.detach().isfinite()).float(), heard])
        if self._accelerator.num_processes > 1:
            flags = self._accelerator.reduce(flags)
        else:
            self.stop |= self._heard
        self.flush()
        self._pending = (flags, where)

    def flush(self) -> None:
        """Look at the last step too: before anything is saved."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        is_bad, heard = pending[0].tolist()
        self.stop |= heard > 0
        if is_bad:
            raise NonFiniteLossError(
                f"The loss is not a finite number at {pending[1]}. Lower --lr, set --clip-grad 1, "
                f"or look for values in the data that are not finite"
            )
