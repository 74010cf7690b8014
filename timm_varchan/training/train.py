"""A run from top to bottom: set-up, epoch, update, finish; its small parts stand below."""

from __future__ import annotations

import logging
import math
import os
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
    ProjectConfiguration,
    broadcast,
    set_seed,
)
from timm.data import Mixup
from timm.models import is_model, model_entrypoint, resolve_model_input_args
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn, unwrap_model
from torch import Tensor, nn
from tqdm.auto import tqdm

from timm_varchan.channels import ANONYMOUS, RGB, ChannelSet, seeded_rng
from timm_varchan.data import ImageData, preview_data
from timm_varchan.errors import UserError
from timm_varchan.evaluation import (
    DEFAULT_BUDGET,
    Evaluation,
    PlannedSet,
    Predictions,
    Validation,
    default_modes,
    evaluate_channel_sets,
    parse_sets,
    plan_sets,
    spread,
    validate_channel_sets,
)
from timm_varchan.hub import check_img_size, load
from timm_varchan.input_spec import InputSpec
from timm_varchan.models import (
    adapt,
    choose_virtual_channels,
    estimate_bn_buffers,
    has_stems,
    set_channels,
    stems,
    unexplained_variance,
)
from timm_varchan.results import Evaluated
from timm_varchan.training.checkpoint import Checkpoints, Progress, check_folder, claim_folder
from timm_varchan.training.config import MARK, EvaluateConfig, EvaluationFlags, TrainConfig
from timm_varchan.training.loaders import (
    StreamLoader,
    epoch_batches,
    eval_loader,
    evaluation_split,
    load_judged,
    load_run_data,
    train_loader,
)
from timm_varchan.training.report import RunLog, build_results, check_trackers, opening, write_run
from timm_varchan.views import DrawKey, draw_channels, full_share_for

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: Height and width of the images where nothing else is said.
DEFAULT_PIXELS = 64
#: What keeps the number of planes, which models without a stem need.
_FIXED_COUNT_AUGS = ("none", "shuffle", "hcs-mask")
#: What the names of averaged weights begin with in a checkpoint.
_AVERAGE = "average."


class NonFiniteLossError(UserError):
    """The loss became infinite or NaN."""


class Interrupted(Exception):  # noqa: N818 - not an error
    """A signal of this `number` asked training to stop, and a checkpoint is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Args:
        folder: Where everything was written; None where nothing was.
        results: The content of `results.json`.
        sets: The results of the channel sets.
        is_main: Whether this process is the one to speak.
    """

    folder: Path | None
    results: dict[str, Any]
    sets: Evaluation
    is_main: bool


def run(config: TrainConfig) -> Outcome:
    """Train and evaluate as configured, in the processes that the launcher started.

    Returns:
        What came of it, on every process; the files are written by the main process.

    Raises:
        UserError: Data, model, folder or launcher are not right, nothing was trained and no folder
            made; or a checkpoint cannot be written, or the loss is no number.
        OSError: Files that cannot be read.
        Interrupted: A signal came and a checkpoint is saved.
    """
    check_trackers(config)
    accelerator = create_accelerator(config)
    try:
        trainer, progress = set_up(config, accelerator)
        return trainer.finish(trainer.fit(progress))
    finally:
        accelerator.end_training()


def evaluate(config: EvaluateConfig) -> Outcome:
    """Judge a saved model on channel sets; raises as `run` does."""
    accelerator = Accelerator()
    folder = None if config.output is None else Path(config.output)
    if folder is not None and (folder / MARK).exists():
        raise UserError(f"{folder} holds a training run. Choose another --output.")
    try:
        saved = load(config.model)
        data = load_judged(config, saved, accelerator)
        model = saved.model.to(accelerator.device)
        check_img_size(model, data.spec.img_size)
        judge = Judge(config, accelerator, model, data)
        baseline = None if config.baseline is None else Predictions.load(config.baseline)
        if baseline is not None:
            _, split = evaluation_split(data)
            baseline.check(data.class_names, split.labels(), split.fingerprint())
        _say(accelerator, "%s", opening(config, data, model, accelerator))
        evaluated = judge.evaluate(baseline)
        return _leave(config, data, accelerator, evaluated, folder, model)
    finally:
        accelerator.end_training()


def _leave(
    config: TrainConfig | EvaluateConfig,
    data: ImageData,
    accelerator: Accelerator,
    evaluated: Evaluated,
    folder: Path | None,
    model: nn.Module,
    progress: Progress | None = None,
    taken: Progress | None = None,
) -> Outcome:
    """Write everything that stays in the folder, the model too if it was trained."""
    results = build_results(
        config, data, accelerator, evaluated, model=model, progress=progress, taken=taken
    )
    if folder is not None and accelerator.is_main_process:
        write_run(results, evaluated, data, folder, None if progress is None else model)
    accelerator.wait_for_everyone()
    return Outcome(folder, results, evaluated.sets, accelerator.is_main_process)


# Set-up -------------------------------------------------------------------------------------------


def set_up(config: TrainConfig, accelerator: Accelerator) -> tuple[Trainer, Progress]:
    """Everything that training needs, at the beginning or where a checkpoint left it."""
    check_sharding(config, accelerator)
    check_folder(config, accelerator)
    set_seed(config.seed)
    spec = InputSpec(img_size=config.img_size or DEFAULT_PIXELS)
    data = load_run_data(config, spec, accelerator)
    loader, batch_size = train_loader(config, data, accelerator)
    given, config = config, replace(config, batch_size=batch_size)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = replace(config, channels_last=False)  # it broadcasts contiguous weights alone
    _say(accelerator, "Building %s.", config.model)
    model = build_model(config, data)
    Judge(config, accelerator, model, data)
    trainer = Trainer(config, accelerator, data, model, loader)
    progress = trainer.resume()
    if accelerator.is_main_process:
        claim_folder(given)
        if config.preview:
            from timm_varchan.plots import plot_preview  # matplotlib is slow to import

            plot_preview(preview_data(data), Path(config.output_dir) / "preview.png")
        logger.info("%s", opening(config, data, model, accelerator))
    return trainer, progress


def _say(accelerator: Accelerator, text: str, *values: object) -> None:
    """One line in the log, of all processes once."""
    if accelerator.is_main_process:
        logger.info(text, *values)


def _class_weights(config: TrainConfig, data: ImageData, device: torch.device) -> Tensor | None:
    """Weights that give every class the same sum over the images, of mean 1 over them."""
    if config.class_weights == "none" or data.train is None:
        return None
    counts = Counter(data.train.labels())
    even = sum(counts.values()) / len(counts)
    weights = [even / counts[i] if counts[i] else 0.0 for i in range(len(data.class_names))]
    return torch.tensor(weights, device=device)


def build_model(config: TrainConfig, data: ImageData) -> nn.Module:
    """The model to train, for the data's channels and classes.

    Raises:
        UserError: An unknown model, one that cannot be loaded, images of a size that it does not
            take, or an augmentation that changes the number of planes for a model without a stem.
    """
    model = _load(config, _arguments(config, data))
    if config.adapt:
        words, stats = _words(data.channels), _channel_stats(data.channels)
        adapt(model, in_chans=len(data.channels), **words, **stats)
    check_img_size(model, data.spec.img_size)
    if config.grad_checkpointing:
        model.set_grad_checkpointing()  # type: ignore[operator]  # every timm model has it
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if not has_stems(model) and config.channel_aug not in _FIXED_COUNT_AUGS:
        twin, cure = f"dwg_{architecture(model)}", "--adapt, which puts a stem into it"
        if ":" not in config.model and is_model(twin):
            cure = f"--model {twin}"
        raise UserError(
            f"{config.model} takes a fixed number of channels, --channel-aug {config.channel_aug} "
            f"changes it. Choose {cure}, or --channel-aug {', '.join(_FIXED_COUNT_AUGS)}."
        )
    return model.train()


def architecture(model: nn.Module) -> str:
    """What timm calls a model."""
    cfg: Any = model.pretrained_cfg
    return str(cfg["architecture"])


def _arguments(config: TrainConfig, data: ImageData) -> dict[str, Any]:
    """What the model is created with."""
    try:
        resolved = resolve_model_input_args(config.model, config.model_kwargs)
    except (AssertionError, KeyError, RuntimeError) as error:  # timm's words for an unknown name
        raise UserError(f"Cannot load --model {config.model}: {error!r}.") from error
    kwargs: dict[str, Any] = {"num_classes": len(data.class_names)}
    if not config.adapt:  # there the kernels stay those of the saved model
        kwargs["in_chans"] = len(data.channels)
    if resolved["pretrained_cfg"]["fixed_input_size"]:
        kwargs["img_size"] = data.spec.img_size
    if model_entrypoint(resolved["model_name"]).__module__.endswith("models.dwg_twins"):
        learned = tuple(resolved.get("channel_names", ()))
        kwargs |= _twin_arguments(config, learned, data.channels)
    if config.drop_path:
        kwargs["drop_path_rate"] = config.drop_path
    return kwargs | config.model_kwargs


def _load(config: TrainConfig, kwargs: dict[str, Any]) -> nn.Module:
    pretrained = config.pretrained or ":" in config.model
    try:
        return load(config.model, pretrained=pretrained, **kwargs).model
    except UserError:
        if "drop_path_rate" not in kwargs:
            raise
        others = {k: v for k, v in kwargs.items() if k != "drop_path_rate"}
        load(config.model, pretrained=pretrained, **others)  # what else is wrong is said here
        raise UserError(f"{config.model} has no stochastic depth. Add --drop-path 0.") from None


def _twin_arguments(
    config: TrainConfig, learned: tuple[str, ...], channels: ChannelSet
) -> dict[str, Any]:
    """What a twin is told of its channels; a saved one keeps what it predicts them from."""
    arguments = _words(channels, learned)
    if ":" in config.model:
        return arguments
    named = config.channel_identity == "named" and not channels.is_anonymous
    if config.pretrained and named and config.train_only != "stem":
        arguments["stem"] = "prior"  # beside such weights the learned part gains nothing
    virtual = (
        choose_virtual_channels(channels)
        if config.virtual_channels is None
        else ChannelSet.parse(config.virtual_channels, own=channels.standardised())
    )
    if virtual != RGB:
        arguments["virtual_channels"] = virtual.to_dict()
    return arguments | _channel_stats(channels)


def _words(channels: ChannelSet, learned: tuple[str, ...] = ()) -> dict[str, Any]:
    """Names without a wavelength, of which a stem learns a code: those that it has come first."""
    words = [c.name for c in channels if c.name is not None and c.wavelength_nm is None]
    names = tuple(dict.fromkeys((*learned, *words)))
    return {"channel_names": names} if names else {}


def _channel_stats(channels: ChannelSet) -> dict[str, Any]:
    """The correlation of the normalised planes, where it is known and belongs to names."""
    if channels.correlation is None or any(c.is_anonymous for c in channels):
        return {}
    return {"channel_stats": channels.standardised().to_dict()}


def choose_trained(model: nn.Module, part: str) -> None:
    """Leave only a part of a model trainable: `all`, its `head`, or the mixer of its `stem`.

    Raises:
        UserError: The model has no such part.
    """
    if part == "all":
        return
    if part == "stem":
        found: list[nn.Module] = [*stems(model)] if has_stems(model) else []
    else:
        heads = model.get_classifier()  # type: ignore[operator]  # every timm model has it
        found = [head for head in (heads if isinstance(heads, tuple) else (heads,)) if head]
    if not any(list(module.parameters()) for module in found):
        other = "head" if part == "stem" else "stem"
        raise UserError(
            f"{type(model).__name__} has no {part} to train alone. Choose another model (a dwg_ "
            f"twin has a stem), or --train-only {other}."
        )
    model.requires_grad_(False)
    for module in found:
        module.requires_grad_(True)


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    try:
        return create_optimizer_v2(
            model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        )  # fmt: skip
    except ValueError as error:  # timm's word for an unknown name
        raise UserError(f"--opt {config.opt}: {error}") from error


class Trainer:
    """One run: what moves the weights, prepared by the accelerator.

    Args:
        config: What to do; its batch is one that the training images fill.
        accelerator: On which devices.
        data: Images, channels and how they are read.
        model: The classifier.
        loader: Normalised training batches with all channels, `grad_accum_steps` an update.

    Raises:
        UserError: A part that the model lacks, a full disk, an unknown optimizer.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        data: ImageData,
        model: nn.Module,
        loader: Any,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.data, self.channels = data, data.channels
        tell_all_channels(model, data.channels, config.channel_identity)
        choose_trained(model, config.train_only)
        self.checkpoints = Checkpoints(config.folder / "checkpoints")
        # Weights, two moments of them, an average.
        copies = 3 if config.ema_decay is None else 4
        self.checkpoints.check_space(
            copies * sum(p.numel() * p.element_size() for p in model.parameters())
        )
        # accelerate's wrappers must hold the model that they are given: the average comes after.
        optimizer = _optimizer(config, model)
        if config.compile:
            model.compile()
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.loader, self.validation = loader, None
        if not isinstance(loader, StreamLoader):
            self.loader = accelerator.prepare_data_loader(loader)
        if data.validation is not None:
            batches: Any = eval_loader(config, data.validation, data.spec)
            self.validation = accelerator.prepare_data_loader(batches)
        sets = spread(plan_sets(data.channels, seed=config.seed), max(2, config.val_max_sets))
        self.validation_sets = sets[: max(1, config.val_max_sets)]
        #: Of weights and buffers over the updates; its decay rises, so that short runs average too.
        self.average: ModelEmaV3 | None = None
        if config.ema_decay is not None:
            self.average = ModelEmaV3(
                unwrap_model(self.model), decay=config.ema_decay, use_warmup=True
            )
        # In updates, and not prepared: each process steps its own.
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched=config.sched, num_epochs=config.epochs, min_lr=config.min_lr,
            warmup_lr=config.lr / 100, warmup_epochs=min(config.warmup_epochs, config.epochs - 1),
            step_on_epochs=False, updates_per_epoch=len(self.loader) // config.grad_accum_steps,
        )  # fmt: skip
        self.mixup = Mixup(
            config.mixup, config.cutmix, label_smoothing=config.smoothing,
            num_classes=len(data.class_names),
        )  # fmt: skip
        self.class_weights = _class_weights(config, data, accelerator.device)
        self.log = RunLog(accelerator, config)
        #: Loss, correct and seen images of the epoch's steps so far, on this process.
        self._sums = torch.zeros(3, device=accelerator.device)
        # From here on only what differs between processes anyway (dropout) draws from generators.
        set_seed(config.seed, device_specific=True)

    @property
    def best_model(self) -> nn.Module:
        """What is tested and saved: the average where there is one."""
        return self.model if self.average is None else self.average.module

    def resume(self) -> Progress:
        """The progress of the checkpoint that `--resume` means, once it is loaded; or none yet."""
        config, processes = self.config, self.accelerator.num_processes
        images = config.batch_size * config.grad_accum_steps * processes
        checkpoint = self.checkpoints.resume_from(config.resume)
        if checkpoint is None:
            return Progress(images_per_update=images, num_processes=processes)
        progress, extra = self.checkpoints.load(self.accelerator, checkpoint)
        if progress.images_per_update != images:
            raise UserError(
                f"{checkpoint} was trained with {progress.images_per_update} images an update, "
                f"this run has {images} ({processes} processes x {config.batch_size} x "
                f"{config.grad_accum_steps}). Use as many processes as before, or change "
                f"--batch-size."
            )
        self._load_own_state(extra, progress.num_processes)
        progress.num_processes = processes
        _say(
            self.accelerator, "Resuming from %s: epoch %d, step %d",
            checkpoint, progress.epoch, progress.step,
        )  # fmt: skip
        return progress

    # Epoch ----------------------------------------------------------------------------------------

    def fit(self, progress: Progress) -> Progress:
        """Train from where the progress stands until the last epoch."""
        self.log.start()
        with StepWatch(self.accelerator) as watch:
            try:
                while progress.epoch < self.config.epochs:
                    self._epoch(progress, watch)
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"{error}. {self.checkpoints.last_good()}.") from None
        return progress

    def _epoch(self, progress: Progress, watch: StepWatch) -> None:
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
                    self._update(x, labels, progress, micro, watch)
                if micro < config.grad_accum_steps - 1:
                    continue
                progress.step += 1
                progress.updates += 1
                bar.update()
                if progress.step % 10 == 0:
                    bar.set_postfix(loss=f"{watch.loss:.3f}")
                self._between_updates(progress, watch)
        watch.flush()
        self._end_epoch(progress, clock.entry((progress.step - first) * progress.images_per_update))
        if watch.stop and progress.epoch < config.epochs:
            raise Interrupted(watch.number)

    def _between_updates(self, progress: Progress, watch: StepWatch) -> None:
        """Save in the middle of an epoch, if it is time or a signal came."""
        every = self.config.checkpoint_steps
        if watch.stop or (every and progress.updates % every == 0):
            watch.flush()
            self._save(progress)
        if watch.stop:
            raise Interrupted(watch.number)

    def _end_epoch(self, progress: Progress, times: Mapping[str, float]) -> None:
        """Validate, log and save."""
        self._average_buffers()
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

    def _average_buffers(self) -> None:
        """Give every process the mean of all processes' BatchNorm statistics."""
        if self.accelerator.num_processes > 1:
            for model in dict.fromkeys((self.model, self.best_model)):
                distribute_bn(model, self.accelerator.num_processes, reduce=True)

    def _validate(self) -> Validation:
        """Test the best model on some channel sets, once it is told all channels again."""
        model, found = self.best_model, Validation()
        tell_all_channels(model, self.channels, self.config.channel_identity)
        if self.validation is not None:
            mode, *_ = default_modes(model, self.channels)
            with torch.compiler.set_stance("force_eager"):  # not a graph for every channel set
                found = validate_channel_sets(
                    model, self.validation, self.channels, self.validation_sets, mode,
                    accelerator=self.accelerator,
                )  # fmt: skip
        warn_not_finite(found.num_not_finite, self.accelerator)
        return found

    # Update ---------------------------------------------------------------------------------------

    def _update(
        self, x: Tensor, labels: Tensor, progress: Progress, micro: int, watch: StepWatch
    ) -> None:
        """One forward and backward pass; the last of an update also moves the weights."""
        config, rank = self.config, self.accelerator.process_index
        start = (micro * self.accelerator.num_processes + rank) * config.batch_size
        key = DrawKey(config.seed, progress.epoch, progress.step, start)
        # Dropout and stochastic depth too depend on the step alone, not on what was drawn before.
        torch.manual_seed(seeded_rng("step", *vars(key).values()).getrandbits(63))
        targets, smoothing = labels, config.smoothing
        if config.mixes:
            (x, targets), smoothing = mix(self.mixup, x, labels, key), 0.0
        share = config.full_share
        view = draw_channels(
            config.channel_aug, x, self.channels, key, identity=config.channel_identity,
            full_share=full_share_for(len(self.channels)) if share is None else share,
            has_absent=getattr(getattr(self.loader, "dataset", None), "keep_absent", False),
        )  # fmt: skip
        view.tell(self.model)
        planes = view.planes
        if config.channels_last:
            planes = planes.contiguous(memory_format=torch.channels_last)
        if config.compile:
            torch._dynamo.maybe_mark_dynamic(planes, 1)
        if self.scheduler is not None:
            self.scheduler.step_update(progress.updates)
        with self.accelerator.autocast():
            logits = self.model(planes)
            loss = F.cross_entropy(
                logits.float(), targets, label_smoothing=smoothing, weight=self.class_weights
            )
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
        self._count(loss.detach(), logits.detach(), labels)

    def _count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a step to the sums of the epoch, on the device."""
        correct = (logits.argmax(-1) == labels).sum()
        count = torch.full_like(loss, len(labels), dtype=torch.float32)
        self._sums += torch.stack([loss.float() * len(labels), correct.float(), count])

    # Finish ---------------------------------------------------------------------------------------

    def finish(self, progress: Progress) -> Outcome:
        """Evaluate the chosen model on the channel sets and write everything that stays."""
        config, accelerator = self.config, self.accelerator
        model, taken = self._chosen(progress)
        evaluated = Judge(config, accelerator, model, self.data).evaluate(None)
        model.to(memory_format=torch.contiguous_format)  # safetensors knows no other layout
        return _leave(
            config, self.data, accelerator, evaluated, config.folder, model, progress, taken
        )

    def _chosen(self, progress: Progress) -> tuple[nn.Module, Progress]:
        """The whole model that is tested and saved, on every process, and how far it is trained."""
        apart = self.data.validation is not None and self.data.test is not None
        which = self.config.eval_checkpoint or ("best" if apart else "last")
        best = self.checkpoints.best() if which == "best" else None
        if best is not None and best != self.checkpoints.last():
            progress, extra = self.checkpoints.load(self.accelerator, best)
            self._load_own_state(extra, progress.num_processes)
        model = whole_model(
            self.accelerator, self.best_model, lambda: build_model(self.config, self.data)
        )
        tell_all_channels(model, self.channels, self.config.channel_identity)
        return model, progress

    # Checkpoints ----------------------------------------------------------------------------------

    def _save(self, progress: Progress) -> None:
        """Save what the accelerator prepared, and what it does not know or differs by process."""
        extra = {"sums": self._sums, **self._running()}
        if self.average is not None:
            average = self.average.module
            elsewhere = {} if self.accelerator.is_main_process else dict(average.named_parameters())
            extra |= {
                _AVERAGE + name: tensor
                for name, tensor in average.state_dict().items()
                if name not in elsewhere
            }
        extra = {name: tensor.contiguous().clone() for name, tensor in extra.items()}
        self.checkpoints.save(self.accelerator, progress, extra)

    @torch.no_grad()
    def _load_own_state(self, extra: Mapping[str, Tensor], num_processes: int) -> None:
        """Take over what a checkpoint of so many processes holds besides the accelerator's own."""
        for name, buffer in self._running().items():
            buffer.copy_(extra[name])
        if self.accelerator.num_processes == num_processes:
            self._sums.copy_(extra["sums"])
        if self.average is not None:
            self.average.module.load_state_dict(
                {k.removeprefix(_AVERAGE): v for k, v in extra.items() if k.startswith(_AVERAGE)}
            )

    def _running(self) -> dict[str, Tensor]:
        """BatchNorm's running statistics, which every process has for itself within an epoch."""
        return {
            name: buffer
            for name, buffer in self.model.named_buffers()
            if name.endswith(("running_mean", "running_var"))
        }


# Evaluation ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """Judges a model by the test images of its data, else validation, else training.

    Args:
        config: How: channel sets, modes, orders, batch, seed.
        accelerator: On which devices.
        model: The classifier, not wrapped.
        data: The images.

    Raises:
        UserError: An evaluation that the model cannot do: no images; channels that the data lacks,
            fewer sets than sizes; modes or buffers that need a stem; no images for buffers.
    """

    config: TrainConfig | EvaluateConfig
    accelerator: Accelerator
    model: nn.Module
    data: ImageData

    def __post_init__(self) -> None:
        flags: EvaluationFlags = self.config
        evaluation_split(self.data)
        try:
            self.plan()
        except UserError as error:
            raise UserError(f"--sets: {error}") from error
        if not has_stems(self.model) and set(flags.eval_modes or ()) - {"mask"}:
            raise UserError(
                f"--eval-modes {' '.join(flags.eval_modes or ())} need a model with a stem. Leave "
                f"it out, or choose mask."
            )
        if flags.eval_statistics and (not has_stems(self.model) or self.data.train is None):
            raise UserError(
                "--eval-statistics needs a model with a stem and training images; leave it out."
            )

    def plan(self) -> list[PlannedSet]:
        """The sets to evaluate; one less by default where all channels are also shuffled."""
        channels, missing, also = self.data.channels, self.config.missing, []
        if missing is not None:
            gone = {i for indices in parse_sets(channels, missing) for i in indices}
            also = [[i for i in range(len(channels)) if i not in gone]]
            if not also[0]:
                raise UserError(f"--missing {missing} leaves no channel of {channels}.")
        budget = DEFAULT_BUDGET - int(not has_stems(self.model))
        seed = self.config.seed
        return plan_sets(channels, self.config.sets, seed=seed, budget=budget, also=also)

    def evaluate(self, baseline: Predictions | None) -> Evaluated:
        """The answers on every set, and what they come to."""
        name, split = evaluation_split(self.data)
        channels, names, started = self.data.channels, self.data.class_names, time.perf_counter()
        modes: tuple[str, ...] = self.config.eval_modes or default_modes(self.model, channels)
        plan = self.plan()
        loader: Any = eval_loader(self.config, split, self.data.spec)
        with torch.compiler.set_stance("force_eager"):  # not a graph for every channel set
            sets = evaluate_channel_sets(
                self.model, self.accelerator.prepare_data_loader(loader), channels,
                num_classes=len(names), accelerator=self.accelerator, modes=modes,
                orders=self.config.eval_orders, sets=plan, seed=self.config.seed,
                bn_buffers=self._bn_buffers(plan, modes),
                progress=self.accelerator.is_main_process,
            )  # fmt: skip
        bad = {s.name: s.num_not_finite for s in sets if s.num_not_finite}
        warn_not_finite(bad, self.accelerator)
        _say(self.accelerator, "Evaluated in %.0f s.", time.perf_counter() - started)
        return Evaluated(
            name, sets,
            Predictions.of(
                sets, channels, class_names=names, model=architecture(self.model),
                fingerprint=split.fingerprint(),
            ),
            [self._unexplained(s.mode, s.indices) for s in sets],
            baseline,
        )  # fmt: skip

    def _unexplained(self, mode: str, indices: tuple[int, ...]) -> float | None:
        """The unexplained fraction of variance, mean over the virtual channels, where known."""
        if mode != "named":
            return None
        subset = self.data.channels.take(indices)
        error = statistics.fmean(unexplained_variance(self.model, subset).values())
        return error if math.isfinite(error) else None

    def _bn_buffers(
        self, plan: Sequence[PlannedSet], modes: Sequence[str]
    ) -> dict[tuple[tuple[int, ...], str], dict[str, Tensor]] | None:
        """BatchNorm's buffers of every set and mode on training images, equal on every process.

        Returns:
            What `evaluate_channel_sets(bn_buffers=)` takes; None without `--eval-statistics`.
        """
        train, channels = self.data.train, self.data.channels
        if not self.config.eval_statistics or train is None:
            return None
        count = min(self.config.eval_statistics, len(train))
        if count > 1 and count % self.config.eval_batch_size == 1:
            count -= 1  # BatchNorm has nothing to average in a last batch of one image
        chosen = seeded_rng("set statistics", self.config.seed).sample(range(len(train)), count)
        images, device = train.take(sorted(chosen)), next(self.model.parameters()).device
        found = {}
        for planned in plan:
            for mode in modes:
                subset = channels.take(planned.indices) if mode == "named" else ANONYMOUS
                loader = eval_loader(self.config, images, self.data.spec)
                batches = (x[:, planned.indices].to(device) for x, _ in loader)
                found[planned.indices, mode] = estimate_bn_buffers(self.model, batches, subset)
        return found


def tell_all_channels(model: nn.Module, channels: ChannelSet, identity: str) -> None:
    """Tell a model that it gets all channels of the data, or that it will not be told."""
    if has_stems(model):
        set_channels(model, channels)
        if identity == "anonymous" or channels.is_anonymous:
            # After the above, which leaves the number of channels in what is saved.
            set_channels(model, ANONYMOUS)


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


# Small parts --------------------------------------------------------------------------------------


def train_mode(model: nn.Module, part: str) -> None:
    """Training mode; what `choose_trained` left out keeps its statistics and drops nothing."""
    model.train()
    if part == "all":
        return
    for module in model.modules():
        if not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()


def mix(mixup: Mixup, x: Tensor, labels: Tensor, key: DrawKey) -> tuple[Tensor, Tensor]:
    """Images mixed in place as the key draws it, and targets `(B, num_classes)`."""
    state = np.random.get_state()
    np.random.seed(seeded_rng("mixup", *vars(key).values()).getrandbits(32))
    try:
        return mixup(x, labels)
    finally:
        np.random.set_state(state)


class StepClock:
    """Adds up the time that a loop waits for its loader, beside the time that it takes."""

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

    What one process hears or sees, all of them act on at the same step. What a step came to is
    copied to the host behind it and looked at one step late, so that nothing ever waits.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.stop, self.number = False, int(signal.SIGTERM)
        #: Of the step before the last.
        self.loss = math.nan
        self._accelerator = accelerator
        self._heard = False
        self._pending: tuple[Tensor, Any, str] | None = None
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
        self._heard, self.number = True, number

    def after_step(self, loss: Tensor, where: str) -> None:
        """Note a step's loss, and refuse that of the step before if it is no number."""
        loss = loss.detach().float()
        heard = torch.full_like(loss, float(self._heard))
        flags = torch.stack([(~loss.isfinite()).float(), heard, loss])
        if self._accelerator.num_processes > 1:
            flags = self._accelerator.reduce(flags)
        else:
            self.stop |= self._heard
        copied = flags.to("cpu", non_blocking=True)
        event = None
        if flags.device.type != "cpu":
            event = torch.Event(flags.device)
            event.record()
        self.flush()
        self._pending = (copied, event, where)

    def flush(self) -> None:
        """Look at the last step too: before anything is saved."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        flags, event, where = pending
        if event is not None:
            event.synchronize()
        is_bad, heard, loss = flags.tolist()
        self.loss = loss / self._accelerator.num_processes
        self.stop |= heard > 0
        if is_bad:
            raise NonFiniteLossError(
                f"The loss is not a finite number at {where}. Lower --lr, set --clip-grad 1, or "
                f"look for values in the data that are not finite"
            )


# Processes ----------------------------------------------------------------------------------------

#: What may be asked for and silently not done, with the cure.
_ASKED = {
    DistributedType.DEEPSPEED: "Leave ACCELERATE_USE_CPU unset together with --use_deepspeed.",
    DistributedType.FSDP: "FSDP needs GPUs under accelerate; on CPUs use configs/zero3.yaml.",
}
_TWO_ON_CPU = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {n} --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --main_process_port 0 -m timm_varchan train"
)


def create_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a run, after checking that the launcher did what it was asked.

    DDP does not broadcast buffers: it would send the first process's channel tables to all others,
    whose batches have other channel sets; BatchNorm's statistics are averaged each epoch instead.

    Raises:
        UserError: Processes that do not know of each other, fewer than expected, or DeepSpeed,
            FSDP or fp16 that was asked for and is not on.
    """
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    wants_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if wants_deepspeed and not torch.cuda.is_available():
        # DeepSpeed's own choice on a CPU leaves every process alone.
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.grad_accum_steps, sync_with_dataloader=False
        ),
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(str(config.folder), str(config.folder / "tensorboard")),
        kwargs_handlers=handlers,
    )
    problem = next(_problems(accelerator, config.expect_processes), None)
    if problem is not None:
        accelerator.end_training()
        raise UserError(problem)
    if accelerator.state.deepspeed_plugin is not None:
        # What the flags say: left to itself DeepSpeed clips at 1.
        accelerator.state.deepspeed_plugin.deepspeed_config.update(
            gradient_clipping=config.clip_grad or 0.0,
            gradient_accumulation_steps=config.grad_accum_steps,
            train_micro_batch_size_per_gpu=config.batch_size,
            zero_allow_untested_optimizer=True,
        )
    return accelerator


def _problems(accelerator: Accelerator, expected: int | None) -> Iterator[str]:
    """What the launcher did otherwise than it was asked, and the cure."""
    started, running = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    # accelerate sets the address for several processes, then starts one if it is given --cpu.
    launched_alone = "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    if started != running:
        yield (
            f"The launcher started {started} processes, but each works on its own ({running} of "
            f"{running}): they would do the same work and overwrite each other's files. Without a "
            f"GPU launch as: {_TWO_ON_CPU.format(n=started)}"
        )
    if expected not in (None, running):
        yield (
            f"{expected} processes were expected, but {running} run. `accelerate launch --cpu` "
            f"starts only one; launch as: {_TWO_ON_CPU.format(n=expected)}"
        )
    if expected is None and launched_alone and "ACCELERATE_MIXED_PRECISION" in os.environ:
        yield (
            f"accelerate was asked for several processes, but started one, as it does with --cpu. "
            f"Launch as: {_TWO_ON_CPU.format(n=2)} - or, if one process is right, say "
            f"--expect-processes 1"
        )
    for wanted, cure in _ASKED.items():
        asked = os.environ.get(f"ACCELERATE_USE_{wanted.name}", "false").lower() == "true"
        if asked and accelerator.distributed_type != wanted:
            got = accelerator.distributed_type.value
            yield f"{wanted.name} was asked for, but the launcher set up {got}. {cure}"
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        yield (
            "fp16 was asked for, but on a CPU accelerate computes in float32 without a word. Give "
            "--mixed-precision bf16 or no."
        )


def _is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process has all weights: ZeRO-3, FSDP."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        return int(plugin.zero_stage) == 3  # the stage that divides the weights too
    return accelerator.distributed_type == DistributedType.FSDP


def check_sharding(config: TrainConfig, accelerator: Accelerator) -> None:
    """Refuse what needs all weights on every process, where none has them."""
    if _is_sharded(accelerator) and config.ema_decay is not None:
        raise UserError(
            "--ema-decay needs all weights on every process, which ZeRO-3 and FSDP divide. Add "
            "--ema-decay None, or use ZeRO-2."
        )


@torch.no_grad()
def whole_model(
    accelerator: Accelerator, model: nn.Module, build: Callable[[], nn.Module]
) -> nn.Module:
    """The trained model, unwrapped, with all its weights on every process.

    Where they are divided, a model that `build` makes takes them up.
    """
    if not _is_sharded(accelerator):
        return unwrap_model(model)
    weights = accelerator.get_state_dict(model)  # all of them, on the main process alone
    whole = build()
    if accelerator.is_main_process:
        whole.load_state_dict(weights)
    whole.to(accelerator.device)
    for tensor in whole.state_dict().values():
        tensor.copy_(broadcast(tensor))
    return whole
