"""Mixer and kernel bank as one module, in the place and under the name of a first convolution."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import Conv2dSame, resample_patch_embed
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.stems.dwg import DWGMixer
from timm_varchan.stems.mixer import Mixer

#: What timm and others read from a first layer, also where it is a block of convolutions.
CONV_NUMBERS = frozenset(
    {"in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"}
)
#: What holds for the anchors as for the bank.
SHARED_NUMBERS = frozenset({"stride", "padding", "dilation", "padding_mode"})
CONV_TENSORS = frozenset({"weight", "bias"})
#: Methods of modules around a first convolution that put another one in its place.
REBUILDING = ("set_input_size", "fuse")


class _RecordWeight(TorchFunctionMode):
    """Notes the weight that a convolution is called with, standardised or not."""

    weight: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            self.weight = args[1] if len(args) > 1 else kwargs["weight"]
        return func(*args, **kwargs)


class _BankTensors(dict[str, Any]):
    """A stem's own parameters; asked for `weight` and `bias` by name it answers with the bank's.

    So those can be assigned, pruned, normalised and parametrised under the stem's name, and are
    listed, moved and saved once, as the bank's.
    """

    def __init__(self, bank: nn.Module) -> None:
        super().__init__()
        self.bank = bank

    def _is_banks(self, name: object) -> bool:
        return name in CONV_TENSORS and isinstance(self.bank, nn.Conv2d)

    def __contains__(self, name: object) -> bool:
        return name in self.bank._parameters if self._is_banks(name) else super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        return self.bank._parameters[name] if self._is_banks(name) else super().__getitem__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        if self._is_banks(name):
            self.bank.__dict__.pop(name, None)
            self.bank._parameters[name] = value
        else:
            super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        if self._is_banks(name):
            del self.bank._parameters[name]
        else:
            super().__delitem__(name)

    def __reduce__(self) -> Any:
        return _BankTensors, (self.bank,), None, None, iter(self.items())


@register_notrace_module
class Stem(nn.Module):
    """A first layer for any number of channels: a mixer before the untouched original convolution.

    `(B, C, H, W) -> (B, out, H', W')`. It loads the state dict of the convolution that it replaced
    as well as its own, and answers for every attribute of the convolution, which takes what is
    assigned. Tools that look layers up by name find its parts, the bank first, and the stem itself
    under `<name>.stem`: adapters and quantisers that replace `<name>` would take the mixer away.

    Args:
        mixer: Makes K virtual channels of C.
        bank: The original convolution for K channels, or the block that begins with it.
        anchors: A convolution without bias for the virtual channels that the bank has no kernels
            for (the last ones), with the bank's output; None: there are none.
    """

    def __init__(self, mixer: Mixer, bank: nn.Module, anchors: nn.Conv2d | None = None) -> None:
        super().__init__()
        self.__dict__["_parameters"] = _BankTensors(bank)
        # The bank comes first: some programs take the first leaf for the first convolution.
        self.bank = bank
        self.anchors = anchors
        self.mixer = mixer
        self.num_bank: int = mixer.num_virtual - (0 if anchors is None else anchors.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Mix, then convolve."""
        x = self.mixer(x)
        if self.anchors is None:
            return self.bank(x)
        return self.bank(x[:, : self.num_bank]) + self.anchors(x[:, self.num_bank :])

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Forward; for any tracer of torch.fx one node of its graph, under the stem's own name."""
        if isinstance(x, torch.fx.Proxy):
            return self._as_node(x)
        if torch.compiler.is_compiling():
            return super().__call__(x, *args, **kwargs)
        with contextlib.ExitStack() as stack:
            node = torch._C._current_autograd_node()
            if node is not None:  # computed again in the backward pass, by checkpointing
                stack.enter_context(self.mixer.recalled(node))
            if "parametrizations" in self._modules:
                stack.enter_context(self._lent_tensors())
            return super().__call__(x, *args, **kwargs)

    def _as_node(self, x: torch.fx.Proxy) -> Any:
        tracer: Any = x.tracer
        path = tracer.path_of_module(self).removesuffix(".stem")
        if getattr(tracer, "submodule_paths", None):
            tracer.submodule_paths[self] = path
        if tracer.is_leaf_module(self, path):
            return super().__call__(x)

        def node(*args: Any, **kwargs: Any) -> Any:
            return tracer.create_proxy("call_module", path, args, kwargs)

        return tracer.call_module(self, node, (x,), {})  # so that the tracer knows where it is

    @contextlib.contextmanager
    def _lent_tensors(self) -> Iterator[None]:
        """The bank with tensors that `torch.nn.utils.parametrize` computes for the stem."""
        names = [*self.parametrizations]
        for name in names:
            self.bank.__dict__[name] = getattr(self, name)
        try:
            yield
        finally:
            for name in names:
                del self.bank.__dict__[name]

    __jit_unused_properties__ = ("stem",)

    @property
    def stem(self) -> "Stem":
        """Itself, so that `get_submodule` finds it by the name of `named_modules`."""
        return self

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, nn.Module]]:
        """As of any module, with itself as `<prefix>.stem`."""
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            yield f"{prefix}.stem" if module is self and prefix else name, module

    @torch.jit.ignore
    def joined(self) -> nn.Module:
        """The bank and the anchors as one layer for all virtual channels, where that is possible.

        Where it is not (standardised weights would change), the bank alone.
        """
        bank = self.bank
        if self.anchors is None or type(bank) not in (nn.Conv2d, Conv2dSame):
            return bank
        assert isinstance(bank, nn.Conv2d)
        return _with_weight(bank, torch.cat([bank.weight, self.anchors.weight], 1))

    @torch.jit.ignore
    def with_joined(self, layer: nn.Module) -> "Stem":
        """A stem with the same mixer before a layer that was made of `joined`."""
        anchors = self.anchors
        if anchors is not None:
            assert isinstance(layer, nn.Conv2d)
            if layer.in_channels == self.num_bank:
                more = resample_patch_embed(anchors.weight.detach(), list(layer.kernel_size))
            else:
                more = layer.weight[:, self.num_bank :]
                layer = _with_weight(layer, layer.weight[:, : self.num_bank])
            anchors = _with_weight(like_bank(layer, anchors.in_channels), more)
            anchors.requires_grad_(layer.weight.requires_grad)
        return type(self)(self.mixer, layer, anchors).train(self.training)

    @torch.jit.ignore
    def generated_kernels(self, x: Tensor) -> Tensor:
        """The kernels `(B or 1, out, C, kh, kw)` that the stem applies to the channels of an input.

        `W[b, :, c] = sum_k a[b, c, k] bank[:, k]`; to look at, the forward pass never makes them.
        """
        if not isinstance(self.bank, nn.Conv2d):
            raise UserError(
                f"The bank is a {type(self.bank).__name__}, not one convolution, so there is no "
                f"single kernel a channel. Look at stem.mixer.coefficients(x) instead."
            )
        weight = effective_weight(self.bank)
        if self.anchors is not None:
            weight = torch.cat([weight, self.anchors.weight], 1)
        return torch.einsum("bck,okij->bocij", self.mixer.coefficients(x), weight)

    def __getattr__(self, name: str) -> Any:
        """Answer for the convolution; of a block of several only what it has in common with one."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            bank = self.__dict__["_modules"].get("bank")
            is_conv = isinstance(bank, nn.Conv2d) and not name.startswith("_")
            if bank is None or not (is_conv or name in CONV_NUMBERS | CONV_TENSORS):
                raise
        return getattr(bank, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Pass on to the convolution what is its own."""
        bank = self.__dict__.get("_modules", {}).get("bank")
        if name == "bank" and isinstance(value, nn.Module):
            self._parameters.bank = value  # type: ignore[attr-defined]
        if not isinstance(bank, nn.Conv2d) or name in ("training", "bank", "mixer", "anchors"):
            super().__setattr__(name, value)
        elif name in CONV_TENSORS:
            self._assign_tensor(bank, name, value)
        elif name in CONV_NUMBERS | SHARED_NUMBERS:  # not what others keep on modules: DeepSpeed
            self.__dict__.pop(name, None)
            setattr(bank, name, value)
            if self.anchors is not None and name in SHARED_NUMBERS:
                setattr(self.anchors, name, value)
        else:
            super().__setattr__(name, value)

    def _assign_tensor(self, bank: nn.Conv2d, name: str, value: Any) -> None:
        if self.anchors is not None:
            raise UserError(
                f"This stem has two convolutions, for the channels {self.mixer.virtual_channels}: "
                f"assign stem.bank.{name} and stem.anchors.weight instead of stem.{name}."
            )
        if name == "weight":
            self._check_weight(value, name)
        if isinstance(getattr(type(self), name, None), property):  # parametrised under its name
            super().__setattr__(name, value)
        else:
            setattr(bank, name, value)

    def __delattr__(self, name: str) -> None:
        """Of the convolution where it is its own."""
        bank = self._modules.get("bank")
        if name in CONV_TENSORS and bank is not None and name in bank.__dict__:
            del bank.__dict__[name]
        else:
            super().__delattr__(name)

    def __prepare_scriptable__(self) -> "Stem":
        """Numbers of the convolution as TorchScript sees them: it does not ask `__getattr__`."""
        self.__dict__.update({n: getattr(self, n) for n in CONV_NUMBERS if hasattr(self, n)})
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take the keys of the layer that this stem replaced; the mixer then stays as it is."""
        base_keys = [prefix + key for key in self.bank.state_dict()]
        mixed = any(key.startswith(f"{prefix}mixer.") for key in state_dict)
        if not mixed and all(key in state_dict for key in base_keys):
            self._check_weight(state_dict.get(f"{prefix}weight"), f"{prefix}weight")
            for key in base_keys:
                state_dict[f"{prefix}bank.{key.removeprefix(prefix)}"] = state_dict.pop(key)
            for key, value in self.state_dict().items():
                state_dict.setdefault(prefix + key, value)
        shape = None if self.anchors is None else self.anchors.weight.shape
        if mixed and shape != getattr(state_dict.get(f"{prefix}anchors.weight"), "shape", None):
            args[-1].append(
                f"the weights of {prefix.rstrip('.')} are of a twin with other virtual_channels=. "
                f"Create this one with the same, or keep whole models by timm_varchan.hub.save and "
                f"load."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_weight(self, weight: Tensor | None, name: str) -> None:
        """Refuse the kernels of a plain model for other channels than the bank's."""
        if weight is None or weight.dim() != 4 or not isinstance(self.bank, nn.Conv2d):
            return
        count = self.bank.in_channels // self.bank.groups  # its weight is gone while it is pruned
        if weight.shape[1] != count:
            raise UserError(
                f"{name} {tuple(weight.shape)} is of a plain model for {weight.shape[1]} channels, "
                f"and these kernels are for {count}. Load it into that plain "
                f"model (in_chans={weight.shape[1]}) and say what its channels are: "
                f"timm_varchan.adapt(model, virtual_channels=...)."
            )


class KeptStem:
    """A method of the module around a stem that replaces its convolution (timm's `set_input_size`).

    While it runs, the convolution stands in its place as if there were no stem; what it puts there,
    or returns to be put in place of all of it (`fuse`), becomes the stem's bank. Set on that one
    module, under the method's name.

    Args:
        parent: The module around the stem.
        name: Of the stem in it.
        method: Of the parent.
    """

    def __init__(self, parent: nn.Module, name: str, method: str) -> None:
        self.parent, self.name, self.method = parent, name, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method on the parent without its stem, and put the stem back."""
        modules = self.parent._modules
        method = getattr(type(self.parent), self.method)
        stem = modules[self.name]
        if not isinstance(stem, Stem):
            return method(self.parent, *args, **kwargs)
        layer = modules[self.name] = stem.joined()
        try:
            made = method(self.parent, *args, **kwargs)
        finally:
            new, modules[self.name] = modules[self.name], stem
        if new is not layer and new is not None:
            modules[self.name] = stem.with_joined(new)
        return stem.with_joined(made) if isinstance(made, nn.Conv2d) else made


def _with_weight(conv: nn.Conv2d, weight: Tensor) -> nn.Conv2d:
    """The same convolution with another weight, perhaps for another number of channels."""
    changed = copy.copy(conv)
    changed._parameters = dict(conv._parameters)
    changed.in_channels = weight.shape[1] * conv.groups
    changed.weight = nn.Parameter(weight.detach().clone(), conv.weight.requires_grad)
    return changed


def put_layer(parent: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a stem in the place of its convolution, where it stays when its parent rebuilds that.

    Or, in the place of a stem, a layer that is none.
    """
    setattr(parent, name, layer)
    for method in REBUILDING:
        if isinstance(layer, Stem) and callable(getattr(type(parent), method, None)):
            parent.__dict__[method] = KeptStem(parent, name, method)
        elif isinstance(parent.__dict__.get(method), KeptStem):
            del parent.__dict__[method]


def effective_weight(conv: nn.Conv2d) -> Tensor:
    """The weight `(out, in, kh, kw)` that a convolution applies, standardised or not."""
    size = [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    with _RecordWeight() as record:
        conv(conv.weight.new_zeros(1, conv.in_channels, *size))
    assert record.weight is not None
    return record.weight


def like_bank(bank: nn.Conv2d, in_channels: int) -> nn.Conv2d:
    """A convolution without bias that answers in the bank's shape, all zero."""
    if bank.groups != 1 or bank.padding_mode != "zeros":
        raise UserError(
            f"Further virtual channels need an ordinary first convolution, not one with "
            f"{bank.groups} groups and padding {bank.padding_mode!r}."
        )
    # timm's convolutions that pad as TensorFlow does, depending on the input's size
    same = isinstance(bank, Conv2dSame) or bool(getattr(bank, "same_pad", False))
    conv = (Conv2dSame if same else nn.Conv2d)(
        in_channels,
        bank.out_channels,
        bank.kernel_size,  # type: ignore[arg-type]
        stride=bank.stride,  # type: ignore[arg-type]
        padding=0 if same else bank.padding,  # type: ignore[arg-type]
        dilation=bank.dilation,  # type: ignore[arg-type]
        bias=False,
        device=bank.weight.device,
        dtype=bank.weight.dtype,
    )
    nn.init.zeros_(conv.weight)
    return conv


#: The mixers by the name that `adapt(model, stem=...)` takes.
STEMS: dict[str, type[Mixer]] = {"dwg": DWGMixer, "prior": Mixer}


def register_stem(name: str, cls: type[Mixer]) -> None:
    """Make a further stem known to `adapt(model, stem=name)` and `create_model(..., stem=name)`.

    Args:
        name: The new name.
        cls: A `Mixer`: what its `coefficients` say is done with the channels.

    Raises:
        UserError: A name that exists, or a class that is no `Mixer`.
    """
    if name in STEMS:
        raise UserError(f"There is a stem {name!r} already; choose another name.")
    if not (isinstance(cls, type) and issubclass(cls, Mixer)):
        raise UserError(f"{cls!r} is no class of timm_varchan.stems.Mixer; derive it from that.")
    STEMS[name] = cls


def make_stem(
    name: str,
    bank: nn.Module,
    virtual_channels: ChannelSetLike = "RGB",
    default_channels: ChannelSetLike = "RGB",
    *,
    num_bank: int | None = None,
    **kwargs: Any,
) -> Stem:
    """A stem before a first convolution, on its device and in its type.

    Args:
        name: Key of `STEMS`.
        bank: The first convolution, or the block that begins with it.
        virtual_channels: What its channels stand for, then those it has no kernels for.
        default_channels: The set an input with as many channels is taken for.
        num_bank: How many of the virtual channels the bank has kernels for; all where None. The
            others get kernels that start at zero.
        **kwargs: Further arguments of the mixer.

    Returns:
        The stem, in the bank's mode (training or evaluation).

    Raises:
        UserError: An unknown name, or further virtual channels where there is no single
            convolution to stand beside.
    """
    if name not in STEMS:
        raise UserError(f"Unknown stem {name!r}. Choose one of: {', '.join(STEMS)}.")
    virtual = ChannelSet.parse(virtual_channels)
    num_anchors = 0 if num_bank is None else len(virtual) - num_bank
    anchors = None
    if num_anchors > 0:
        if not isinstance(bank, nn.Conv2d):
            raise UserError(
                f"The first layer is a {type(bank).__name__}, not one convolution, so it takes no "
                f"further virtual channels. Name the {num_bank} that it has kernels for."
            )
        anchors = like_bank(bank, num_anchors).requires_grad_(bank.weight.requires_grad)
    like = next(bank.parameters(), None)
    if like is not None:
        kwargs = {"device": like.device, "dtype": like.dtype, **kwargs}
    mixer = STEMS[name].before(bank, virtual, default_channels, **kwargs)
    kind: Any = mixer.stem_type or Stem
    made: Stem = kind(mixer, bank, anchors)
    return made.train(bank.training)
