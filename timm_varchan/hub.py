"""Models in the hub's form: a folder with `config.json` and `model.safetensors`.

What the tests cover: the real clients of timm and huggingface_hub, each in a process of its own,
push to and pull from a local server that speaks the hub's LFS endpoints (`tests/hub_server.py`).
Not covered: the hub itself and its default way to upload, Xet (`HF_HUB_DISABLE_XET=1` is set).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import save_for_hf
from timm.models._input import get_model_input_config
from torch import nn

from timm_varchan.channels import RGB, ChannelSet
from timm_varchan.errors import ToolError, UserError
from timm_varchan.input_spec import InputSpec
from timm_varchan.models import has_stems, set_channels, stems
from timm_varchan.version import __version__

__all__ = ["CONFIG", "SavedModel", "check_img_size", "load", "push", "read_config", "save"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
#: Endings of files that may run code when they are opened.
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".tar"})
#: What name, token or network can cure: errors of the hub's client and of the HTTP library below
#: it. Other OSErrors (a full disk, a folder that may not be read) speak for themselves.
CLIENT_ERRORS: tuple[type[Exception], ...] = (
    *(base for base in HfHubHTTPError.__bases__ if base is not OSError),
    HfHubHTTPError, HFValidationError, EntryNotFoundError, FileMetadataError,
    LocalTokenNotFoundError,
    ConnectionError, TimeoutError,
)  # fmt: skip
#: What a wrong name, tag, weight or argument may end in, and a fault of ours too.
_WRONG = (
    TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, MemoryError,
    RuntimeError, ValueError,
)  # fmt: skip
_UNAUTHORIZED, _FORBIDDEN = 401, 403


@dataclass(frozen=True)
class SavedModel:
    """A loaded model, in evaluation mode, and what an image must be like to enter it."""

    model: nn.Module
    spec: InputSpec

    @property
    def channels(self) -> ChannelSet:
        """The channels of the spec."""
        return self.spec.channels

    def select(self, spec: str) -> ChannelSet:
        """Read a channel set as people write it; names may be those that only this data has."""
        return ChannelSet.parse(spec, own=self.channels)


def load(source: str | Path, *, cache_dir: str | Path | None = None, **kwargs: Any) -> SavedModel:
    """Load a model by name, from a folder or from the hub; never from a pickle.

    Args:
        source: A name (`"dwg_resnet18"`), a folder or `"local-dir:FOLDER"`, or
            `"hf-hub:ORG/NAME[@REVISION]"`.
        cache_dir: Where downloads are kept.
        **kwargs: What `timm.create_model` takes: `in_chans`, `num_classes`, `features_only`,
            `channel_set`, ...; `pretrained=False` leaves the weights random.

    Returns:
        The model with what its input must be like.

    Raises:
        FileNotFoundError: No such folder, repository or file in it.
        UserError: Pickled weights, a broken configuration, an architecture that is not there,
            weights that do not fit.
        ToolError: The hub cannot be reached or refuses.
    """
    text = str(source)
    kwargs = {"pretrained": True, "cache_dir": cache_dir, **kwargs}
    config: dict[str, Any] = {}
    if text.startswith(("hf-hub:", "hf_hub:")):
        folder: Path | None = _download(text.partition(":")[2], cache_dir)
    elif text.startswith("local-dir:"):
        folder = Path(text.removeprefix("local-dir:"))
    else:
        folder = Path(text) if Path(text).is_dir() or isinstance(source, Path) else None
    if folder is not None:
        config = read_config(folder, text)
        _check_weights(folder, text)
    elif not timm.is_model(text.partition(".")[0]):
        raise UserError(
            f"There is no model or folder {text!r}. Give a name of timm.list_models(), "
            f"local-dir:FOLDER or hf-hub:ORG/NAME."
        )
    name = text if folder is None else f"local-dir:{folder}"
    try:
        model = timm.create_model(name, **kwargs)
        return _describe(model.eval(), config, kwargs)
    except CLIENT_ERRORS as error:
        raise ToolError(
            f"Cannot load the weights of {text}: {_hub_reason(error, text)} pretrained=False does "
            f"without."
        ) from error
    except SafetensorError as error:
        raise UserError(
            f"{WEIGHTS} of {text} is damaged ({error}). Download or save it again."
        ) from error
    except UserError:
        raise
    except _WRONG as error:
        # Where the bare architecture can be built, what came with it is to blame; else it is us.
        timm.create_model(str(config.get("architecture", text)).partition(".")[0])
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = lines[1] if len(lines) > 1 and lines[0].endswith(":") else "".join(lines[:1])
        raise UserError(
            f"Cannot load {text}: {detail.rstrip('.')}. The weights, the configuration and the "
            f"arguments ({', '.join(kwargs)}) have to be of one model."
        ) from error


def _describe(model: nn.Module, config: dict[str, Any], kwargs: dict[str, Any]) -> SavedModel:
    """What goes in and comes out, from our configuration or from what timm knows."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    spec = InputSpec.from_dict(config["input"]) if "input" in config else InputSpec()
    return SavedModel(
        model,
        replace(
            spec,
            channels=_channels(cfg, spec.channels, kwargs),
            class_names=_class_names(model, cfg),
            img_size=int(get_model_input_config(model)["input_size"][-1]),
            crop_pct=float(cfg.get("crop_pct") or 1.0),
        ),
    )


def _channels(cfg: dict[str, Any], saved: ChannelSet, kwargs: dict[str, Any]) -> ChannelSet:
    """The channels of the input: those asked for, else those of the data, else RGB."""
    num = int(kwargs.get("in_chans") or cfg["input_size"][0])
    channels = RGB if num == len(RGB) else ChannelSet.anonymous(num)
    mean, std = cfg.get("mean"), cfg.get("std")
    if mean and std and len(mean) == len(std) == num:
        channels = channels.with_stats(mean, std)
    if len(saved) and (len(saved) == num or not kwargs.get("in_chans")):
        channels = saved
    wanted = kwargs.get("channel_set")
    return channels if wanted is None else ChannelSet.parse(wanted, own=channels)


def _class_names(model: nn.Module, cfg: dict[str, Any]) -> tuple[str, ...]:
    """Names from the configuration, else ImageNet's where timm can tell which ImageNet it is."""
    num_classes = int(getattr(model, "num_classes", 0))
    names = cfg.get("label_names") or ()
    if isinstance(names, dict):
        names = [names.get(str(i), str(i)) for i in range(num_classes)]
    if len(names) == num_classes:
        return tuple(names)
    subset = infer_imagenet_subset(model) if num_classes else None
    if not subset:
        return ()
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(num_classes))


def save(
    model: nn.Module,
    folder: str | Path,
    spec: InputSpec | None = None,
    *,
    files: Iterable[str | Path] = (),
    **fields: Any,
) -> Path:
    """Save a classifier for `load` and `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    The folder is written under another name first, so that it is never half there.

    Args:
        model: A timm model or twin, not wrapped. What `set_channels` told it last is saved too.
        folder: Where to; replaced if it holds a saved model.
        spec: What an image must be like to enter the model.
        files: Further files to put beside it: results, curves, a model card.
        **fields: Fields of the spec, in place of its own: `channels=RGB`, `img_size=224`,
            `class_names=["cat", "dog"]`, `value_scale=10000`.

    Returns:
        The folder.

    Raises:
        UserError: The folder holds something else, a further file is a pickle, or class names that
            are as many as no classes of the model.
        FileNotFoundError: A further file is not there.
    """
    folder, spec = Path(folder), InputSpec.of(spec, **fields)
    if folder.exists() and not (folder / CONFIG).is_file():
        raise UserError(f"{folder} exists and is no saved model. Choose another folder.")
    _normalise(model)
    beside = [Path(file) for file in files]
    _refuse_pickles(beside)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary) / "new"
        save_for_hf(
            model,
            str(new),
            model_config={
                "label_names": list(spec.class_names),  # timm's and transformers' name for them
                "input": spec.to_dict(),
                "timm_varchan": __version__,
            },
            safe_serialization=True,
            data_config=_data_config(model, spec),
        )
        _say_classes_once(new / CONFIG)
        # safetensors lets nobody else read what it wrote
        (new / WEIGHTS).chmod((new / CONFIG).stat().st_mode)
        for file in beside:
            shutil.copy(file, new / file.name)
        if folder.exists():
            shutil.move(folder, Path(temporary) / "old")
        os.replace(new, folder)
    return folder


def _data_config(model: nn.Module, spec: InputSpec) -> dict[str, Any]:
    """What timm wants to know: the model's own count; a stem may take the data's all the same."""
    channels, num = spec.channels, int(getattr(model, "in_chans", len(spec.channels)))
    size = spec.img_size or int(get_model_input_config(model)["input_size"][-1])
    config: dict[str, Any] = {"input_size": (num, size, size), "crop_pct": spec.crop_pct}
    if channels.mean is not None and len(channels) == num:
        config |= {"mean": channels.mean, "std": channels.std}
    return config


def check_img_size(model: nn.Module, img_size: int | None) -> None:
    """Refuse images of a size that the backbone does not take; names the sizes that fit."""
    first = next(model.parameters())
    if img_size is None or first.is_meta or not first.numel():  # divided among processes
        return
    training, cfg = model.training, cast("dict[str, Any]", model.pretrained_cfg)
    try:
        with torch.no_grad():
            size = (1, int(getattr(model, "in_chans", 3)), img_size, img_size)
            model.eval()(torch.zeros(size).to(first))
        return
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["it does not say why"])[0].rstrip(".")
    finally:
        model.train(training)
    step = _patch_size(model)
    fitting = [size for size in (img_size // step * step, (img_size // step + 1) * step) if size]
    fixed = int(get_model_input_config(model)["input_size"][-1])
    if cfg.get("fixed_input_size") and fixed != img_size:
        fitting = [fixed]
    raise UserError(
        f"The {cfg['architecture']} does not take images of {img_size} x {img_size} px ({reason}). "
        f"Sizes that fit: --img-size {' or '.join(map(str, fitting))}."
    )


def _patch_size(model: nn.Module) -> int:
    """What an image's side must be a multiple of."""
    patches = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patches is not None:
        return int(patches[0] if isinstance(patches, (tuple, list)) else patches)
    info: Any = getattr(model, "feature_info", None)
    return max((int(entry["reduction"]) for entry in info or ()), default=32)


def _say_classes_once(file: Path) -> None:
    """Leave `num_classes` out of the model's arguments: transformers would pass it twice."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _normalise(model: nn.Module) -> None:
    """Put the channel set into the form that is saved; refuse stems that no architecture has."""
    if not has_stems(model):
        return
    set_channels(model, stems(model)[0].channels)
    architecture = model.pretrained_cfg["architecture"]  # type: ignore[index]
    if not str(architecture).startswith("dwg_"):
        raise UserError(
            f"This {architecture} has a stem that timm.create_model cannot build again (another "
            f"mechanism than 'dwg', or further arguments). Keep its state_dict() and adapt() anew."
        )


def read_config(folder: Path, named: str) -> dict[str, Any]:
    """Read and check `config.json`."""
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no {file}. Give a folder that timm_varchan.hub.save or timm's save_for_hf "
            f"wrote."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{CONFIG} of {named} is no JSON ({error}). Save the model anew."
        ) from error
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str):
        raise UserError(
            f"{CONFIG} of {named} names no architecture, so it is not that of a timm model. Save "
            f"the model with timm_varchan.hub.save, or give another repository."
        )
    if not timm.is_model(architecture):
        raise UserError(
            f"{named} holds a {architecture!r}, which timm {timm.__version__} with timm_varchan "
            f"{__version__} does not have. Install the versions that it was made with."
        )
    return config


def _check_weights(folder: Path, named: str) -> None:
    """Refuse a folder without safetensors."""
    if (folder / WEIGHTS).is_file():
        return
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLES)
    if pickles:
        raise _pickled_error(named, pickles[0])
    raise FileNotFoundError(f"{named} has no {WEIGHTS}. Save the model with timm_varchan.hub.save.")


def _pickled_error(named: str, file: str) -> UserError:
    """The error for weights that are a pickle, with the command that converts them."""
    return UserError(
        f"{named} has no {WEIGHTS} but {file}, a pickle, which may run code when opened. If you "
        f'trust it, convert it: python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{file}', weights_only=True), '{WEIGHTS}')\""
    )


def _refuse_pickles(files: Iterable[Path]) -> None:
    """Refuse files that may run code when they are opened."""
    pickles = sorted(str(file) for file in files if file.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{pickles[0]} is a pickle, which may run code when opened. Only safetensors are "
            f"saved and pushed: remove it or convert it with safetensors.torch.save_file."
        )


def push(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool = True,
    revision: str | None = None,
    commit_message: str = "Add model",
) -> str:
    """Upload a saved folder to the hub in one commit; the repository is made if it is not there.

    Repeated after a failure it goes on: weights that the hub has already are not sent again.

    Args:
        folder: What `save` wrote, and whatever else stands in it.
        repo_id: `"ORG/NAME"`.
        token: A token that may write; by default `HF_TOKEN` or the one of `hf auth login`.
        private: Whether a new repository is private; one that is there stays as it is.
        revision: The branch.
        commit_message: First line of the commit.

    Returns:
        The address of the repository.

    Raises:
        FileNotFoundError: The folder is no saved model.
        ValueError: It holds pickles, or its configuration is broken.
        ToolError: The upload failed; the folder is as it was, and the message holds the command
            that repeats it.
    """
    folder = Path(folder)
    read_config(folder, str(folder))
    _check_weights(folder, str(folder))
    _refuse_pickles(folder.rglob("*"))
    api = HfApi(token=token, library_name="timm_varchan", library_version=__version__)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
        )
    except CLIENT_ERRORS as error:
        again = ["timm-varchan", "push", str(folder), repo_id]
        again += [] if private else ["--public"]
        again += [] if revision is None else ["--revision", revision]
        raise ToolError(
            f"Could not push to {repo_id}: {_hub_reason(error, repo_id)} Nothing is lost, the "
            f"model is in {folder}; repeat with: {shlex.join(again)}"
        ) from error
    return str(repository)


def _download(name: str, cache_dir: str | Path | None) -> Path:
    """Fetch configuration and weights of a repository; the folder they lie in."""
    repo_id, _, revision = name.partition("@")
    where: dict[str, Any] = {"revision": revision or None, "cache_dir": cache_dir}
    try:
        config = hf_hub_download(repo_id, CONFIG, **where)
        try:
            hf_hub_download(repo_id, WEIGHTS, **where)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            for pickled in ("pytorch_model.bin", "model.bin", "pytorch_model.pth"):
                if HfApi().file_exists(repo_id, pickled, revision=where["revision"]):
                    raise _pickled_error(f"hf-hub:{name}", pickled) from error
            raise
    except CLIENT_ERRORS as error:
        missing = isinstance(error, (RepositoryNotFoundError, EntryNotFoundError))
        kind = FileNotFoundError if missing and not _is_offline(error) else ToolError
        raise kind(f"Cannot load hf-hub:{name}: {_hub_reason(error, repo_id)}") from error
    return Path(config).parent


def _is_offline(error: BaseException) -> bool:
    return isinstance(error, LocalEntryNotFoundError)


def _hub_reason(error: BaseException, repo_id: str) -> str:
    """One sentence that says what the hub's client met, and one that says the cure."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    login = "Log in with `hf auth login` or set HF_TOKEN"
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no token. {login}."
    if isinstance(error, GatedRepoError) or status == _FORBIDDEN:
        return f"access to {repo_id} is not granted. {login} of an account that has access."
    if status == _UNAUTHORIZED:
        return f"no valid token, or there is no {repo_id}. {login}, and check the name."
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision. Check what stands after the @."
    if isinstance(error, RepositoryNotFoundError):
        return f"you can see no repository {repo_id}. Check the name. {login} if it is private."
    if isinstance(error, HFValidationError):
        return f"{line}. Give ORG/NAME."
    if isinstance(error, EntryNotFoundError) and not _is_offline(error):
        return f"it lacks {CONFIG} or {WEIGHTS}. Give the repository of a timm model."
    if status is not None:
        return f"the hub answered {status} ({line}). Try again later."
    return f"the hub cannot be reached ({type(error).__name__}). Check the network and HF_ENDPOINT."
