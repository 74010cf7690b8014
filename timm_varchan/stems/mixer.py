"""The part that all stems have in common: C channels in, K virtual channels out.

Axes: B batch, S channel sets at once (1, or B for mixed batches), N rows (different channels), P
places of planes in a table, C channels, K virtual channels, H W pixels, D width.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from timm_varchan.channels import (
    ANONYMOUS,
    RGB,
    Channel,
    ChannelSet,
    ChannelSetLike,
    known_channels,
)
from timm_varchan.errors import UserError
from timm_varchan.stems.prior import PRIORS, SAME_BAND_NM, SCALES, Prior, find_channel

#: What `set_channels` takes: a channel set, None for the default rule, or one set a sample.
ChannelsLike = ChannelSetLike | None
Channels = ChannelSet | tuple[ChannelSet, ...] | None

#: Tables grow in steps of this many places, so that compiled graphs do not depend on the count.
PLACE_STEP = 16
#: Earlier channel sets that a forward pass can be computed again for, in the backward pass.
NUM_EARLIER = 8
#: Numbers of channels whose tables are kept ready.
NUM_READY = 64


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on another device, without waiting for what that device is doing."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _named_stats(given: ChannelSetLike | None, virtual: ChannelSet) -> ChannelSet | None:
    """Statistics of channels with names; without names they are those of the virtual channels."""
    if given is None:
        return None
    stats = ChannelSet.parse(given)
    if stats.is_anonymous and len(stats) == len(virtual) and not virtual.is_anonymous:
        pairs = zip(virtual, stats, strict=True)
        named = tuple(replace(v, mean=c.mean, std=c.std) for v, c in pairs)
        return ChannelSet(named, stats.correlation)
    if any(c.is_anonymous for c in stats):
        raise UserError(
            f"The statistics are of {len(stats)} channels without names, and the virtual "
            f"channels are {virtual} ({len(virtual)}). Say what was measured: "
            f"timm_varchan.measure_channels(loader, 'B02+B03+...')."
        )
    return stats


@dataclass(frozen=True, eq=False)
class Plan:
    """The channels of an input, and the tables for them; worked out on the CPU."""

    channels: Channels  # as `set_channels` was given them, parsed
    index: Tensor  # (1 or S, C), the row of each plane, -1 where a shorter set has none
    solver: Prior  # of subsets of the N rows
    by_row: dict[str, Tensor]  # what a subclass knows of each row, (N, ...) each
    shape: tuple[int, int] | None = None  # of a mixed batch: samples and planes
    tables: dict[str, Tensor] = field(default_factory=dict)  # (U or 1 or S, P, ...), U subsets
    which: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))  # (S,) of U

    def __deepcopy__(self, memo: Any) -> "Plan":
        return self  # nothing in it changes


class Mixer(nn.Module):
    """Mixes any number of channels into the K virtual channels that a kernel bank was made for.

    `(B, C, H, W) -> (B, K, H, W)`, for any C, H, W >= 1. This class holds which channels the input
    has, as tables that reach the graph as tensors, and applies the coefficients; subclasses say
    what the coefficients are. On its own it is the fixed prior without learned parts.

    The tables are plain attributes and no buffers: whatever copies, broadcasts, averages or
    materialises buffers leaves them alone. They follow the module to another device or type.

    Args:
        virtual_channels: What the K planes of the kernel bank stand for.
        default_channels: The set that an input with exactly as many channels is taken for, as long
            as `set_channels` says nothing else; inputs with another count are anonymous.
        prior: How an absent virtual channel is made of the others: `measured`, `spectral`,
            `nearest`, `mean` or `zero` (see `Prior`); None: measured where the correlation is
            known, else spectral.
        channel_stats: Mean, deviation and correlation of the planes as the model sees them.
        prior_scale: `plain`, or `matched`: see `Prior`.
        device: Where parameters and tables live.
        dtype: Their type.

    Raises:
        UserError: `virtual_channels` without a count, default channels that the mixer cannot
            serve, another prior or scale, or statistics without names.
    """

    #: Whether it takes channels that have neither name nor wavelength; else it refuses them.
    supports_anonymous: bool = True
    #: The module that puts it before a convolution, for mixers that need another than `Stem`.
    stem_type: ClassVar[type[nn.Module] | None] = None

    # No postponed annotations in this package: TorchScript reads these as types.
    prior: Tensor
    present: Tensor
    num_named: Tensor
    fallback: Tensor

    def __init__(
        self,
        virtual_channels: ChannelSetLike = RGB,
        default_channels: ChannelSetLike = RGB,
        *,
        prior: str | None = None,
        channel_stats: ChannelSetLike | None = None,
        prior_scale: str = "plain",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.virtual_channels = ChannelSet.parse(virtual_channels)
        self.default_channels = ChannelSet.parse(default_channels)
        if not len(self.virtual_channels):
            raise UserError(
                "virtual_channels needs a count: name them, or use ChannelSet.anonymous(K)."
            )
        self.num_virtual = len(self.virtual_channels)
        self.measured = _named_stats(channel_stats, self.virtual_channels)
        has_table = self.measured is not None and self.measured.correlation is not None
        self.prior_name = prior or ("measured" if has_table else "spectral")
        self.prior_scale = prior_scale
        if self.prior_name not in PRIORS or prior_scale not in SCALES:
            raise UserError(
                f"prior is {prior!r} and prior_scale {prior_scale!r}; choose of "
                f"{', '.join(PRIORS)} and of {', '.join(SCALES)}."
            )
        self.supports_anonymous = self.supports_anonymous and self.prior_name != "zero"
        self._check_channels(self.default_channels)
        like = torch.empty(0, device=device, dtype=dtype or torch.get_default_dtype())
        self._home = (like.device, like.dtype)
        self._earlier: deque[tuple[int, Plan]] = deque(maxlen=NUM_EARLIER)
        self._forgotten = 0
        self.channels: Channels = None
        self._put(self.plan(None))

    @classmethod
    def before(cls, bank: nn.Module, *args: Any, **kwargs: Any) -> "Mixer":
        """The mixer for a bank, for subclasses that need to know its shape."""
        return cls(*args, **kwargs)

    # What the input is ----------------------------------------------------------------------------

    @torch.jit.ignore
    def set_channels(
        self,
        channels: ChannelsLike | Sequence[ChannelSet],
        present: Tensor | None = None,
    ) -> None:
        """Say which channels the input has from now on, see `timm_varchan.set_channels`."""
        self.follow(self.plan(channels, present))

    @torch.jit.ignore
    def plan(
        self, channels: ChannelsLike | Sequence[ChannelSet], present: Tensor | None = None
    ) -> Plan:
        """Work out what `set_channels` would do, which raises what it raises."""
        if present is not None and isinstance(channels, ChannelSet) and channels == self.channels:
            plan = self._plan
        else:
            parsed = self._parsed(channels)
            self._check_channels(parsed)
            plan = self._without_tables(parsed)
        mask = plan.index >= 0
        if present is not None:
            mask = _checked_mask(present, plan.channels, self._sets(plan.channels))
        with torch.device("cpu"), torch.no_grad():
            return self._with_tables(plan, mask, present is not None)

    @torch.jit.ignore
    def follow(self, plan: Plan) -> None:
        """Do what was planned, and keep in mind what held before."""
        if len(self._earlier) == NUM_EARLIER:
            self._forgotten = self._earlier[0][0]
        self._earlier.append((_sequence_number(), self._plan))
        self._put(plan)

    def _put(self, plan: Plan) -> None:
        self._plan, self.channels = plan, plan.channels
        self.mixed = plan.shape is not None
        self._place_tables(*self._home)

    @contextlib.contextmanager
    def recalled(self, node: Any) -> Iterator[None]:
        """What held when a node of the backward graph was made: for a forward computed again.

        Checkpointing runs a stem again in the backward pass, when the model may have been told of
        other channels. The numbers of nodes grow with time.

        Raises:
            UserError: That was too long ago.
        """
        number = node._sequence_nr()
        if number < self._forgotten:
            raise UserError(
                f"Checkpointing computes a forward pass again whose channels were set more than "
                f"{NUM_EARLIER} calls of set_channels ago. Use timm_varchan.share(model, channels) "
                f"for each of the views."
            )
        now = self._plan
        then = next((plan for until, plan in self._earlier if number < until), now)
        if then is now:
            yield
            return
        self._put(then)
        try:
            yield
        finally:
            self._put(now)

    def _parsed(self, channels: ChannelsLike | Sequence[ChannelSet]) -> Channels:
        """Tell the three things that `set_channels` takes apart; own channels are known by name."""
        if channels is None:
            return None
        if isinstance(channels, (list, tuple)) and channels:
            sets = tuple(s for s in channels if isinstance(s, ChannelSet))
            if len(sets) == len(channels):
                if not all(len(s) for s in sets):
                    raise UserError(
                        "In a mixed batch every sample's set needs a count: use "
                        "ChannelSet.anonymous(n) in place of 'anonymous'."
                    )
                return sets
        return ChannelSet.parse(channels, own=self.own_channels())  # type: ignore[arg-type]

    def _without_tables(self, channels: Channels) -> Plan:
        """What the tables of subsets of these channels are taken from."""
        sets = self._sets(channels)
        different = {c.identity: c for s in sets for c in s} or {(None, None): Channel()}
        row_of = {identity: row for row, identity in enumerate(different)}
        rows = ChannelSet(tuple(different.values()))
        longest = max(1, *(len(s) for s in sets))
        with torch.device("cpu"):
            index = torch.full((len(sets), longest), -1)
            for number, channel_set in enumerate(sets):
                found = [row_of[c.identity] for c in channel_set]
                index[number, : len(found)] = torch.tensor(found, dtype=torch.long)
            return Plan(channels, index, self.prior_of(rows), self.row_tables(rows))

    def _with_tables(self, plan: Plan, mask: Tensor, masked: bool) -> Plan:
        """The tables of samples that have these of the planes; solved once for equal samples."""
        planes = torch.where(mask, plan.index, -1)
        which = torch.zeros(1, dtype=torch.long)
        if len(planes) > 1:
            planes, which = torch.unique(planes, dim=0, return_inverse=True)
        index, mask = planes.clamp(min=0), planes >= 0
        count = torch.zeros(len(index), plan.solver.num_rows, dtype=torch.float64)
        count.scatter_add_(1, index, mask.double())
        place = index[:, :, None].expand(-1, -1, self.num_virtual)
        prior = plan.solver.coefficients(count).gather(1, place) * mask[:, :, None]
        rows = plan.index.clamp(min=0)
        tables = {"prior": prior, "present": mask.double()}
        tables |= {name: table[rows] for name, table in plan.by_row.items()}
        mixed = masked or isinstance(plan.channels, tuple)
        num_places = rows.shape[1] + int(mixed)  # wider batches: the last place is absent
        padding = -num_places % PLACE_STEP + int(mixed)
        tables = {
            name: nn.functional.pad(table, [0, 0] * (table.dim() - 2) + [0, padding])
            for name, table in tables.items()
        }
        shape = (len(which), rows.shape[1]) if mixed else None
        return replace(plan, shape=shape, tables=tables, which=which)

    def row_tables(self, channels: ChannelSet) -> dict[str, Tensor]:
        """What subclasses need to know of each channel, by name, `(N, ...)` each.

        They are found under these names, `(S, P, ...)`, and no others.
        """
        return {}

    @torch.jit.unused
    def prior_of(self, channels: ChannelSet) -> Prior:
        """The prior of subsets of these channels, computed on the CPU."""
        with torch.device("cpu"):
            return Prior(
                channels, self.virtual_channels, self.prior_name, self.measured, self.prior_scale
            )

    def _sets(self, channels: Channels) -> tuple[ChannelSet, ...]:
        """The channel sets that the tables describe."""
        if isinstance(channels, tuple):
            return channels
        return (self.default_channels if channels is None else channels,)

    @torch.jit.ignore
    def own_channels(self) -> list[Channel]:
        """Channels that this mixer knows by name, those with statistics last."""
        sets = [self.virtual_channels, self.default_channels, *self._sets(self.channels)]
        sets += [] if self.measured is None else [self.measured]
        registry = known_channels()
        words = [registry.get(n, Channel(n)) for n in getattr(self, "channel_names", ())]
        return [*words, *(channel for channel_set in sets for channel in channel_set)]

    def _check_channels(self, channels: Channels) -> None:
        """Refuse channel sets that this mixer cannot serve."""
        for channel_set in channels if isinstance(channels, tuple) else (channels,):
            if channel_set is None:
                continue
            if self.prior_name == "zero":
                self._check_places(channel_set)
            if not self.supports_anonymous and (
                not channel_set.channels or any(c.is_anonymous for c in channel_set)
            ):
                raise UserError(
                    f"{type(self).__name__} needs to know each channel, but {channel_set} has "
                    f"anonymous ones. Name the channels or give their wavelengths in nm."
                )

    def _check_places(self, channels: ChannelSet) -> None:
        """With zeros for what is absent, a channel that is none of the virtual ones is lost."""
        virtual = self.virtual_channels
        lost = [c.label for c in channels if find_channel(c, virtual.channels, SAME_BAND_NM) < 0]
        if lost or not len(channels):
            raise UserError(
                f"prior='zero' has no place for {', '.join(lost) or 'unnamed channels'}: its "
                f"kernels are for {virtual}. Name the channels (and virtual_channels), leave "
                f"those out, or take another prior."
            )

    # Forward --------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Mix `(B, C, H, W)` to `(B, K, H, W)`; an input that does not fit is a UserError."""
        x = self.checked(x)
        weights = self.coefficients(x).to(x.dtype)
        B, C, H, W = x.shape
        mixed = torch.bmm(weights.expand(B, C, self.num_virtual).transpose(1, 2), x.flatten(2))
        return mixed.view(B, self.num_virtual, H, W)

    def checked(self, x: Tensor) -> Tensor:
        """The input, refused if it does not fit; absent planes of a mixed batch are zeros."""
        if not torch.jit.is_scripting():
            self._check_input(x)
        if self.mixed:
            x = x.masked_fill(self.tables(x)["present"][:, :, :, None] == 0, 0.0)
        return x

    def coefficients(self, x: Tensor) -> Tensor:
        """The mixing coefficients `(B or 1, C, K)`: how much of each channel goes where."""
        return self.tables(x)["prior"]

    def tables(self, x: Tensor) -> dict[str, Tensor]:
        """What the coefficients need to know of the channels of an input, by name.

        `prior` `(S, C, K)`, `present` `(S, C, 1)` and what subclasses add.
        """
        if torch.jit.is_scripting():
            return self.described(x)
        return self._ready_tables(x)

    @torch.jit.ignore
    def _ready_tables(self, x: Tensor) -> dict[str, Tensor]:
        """The tables, made once for each number of channels where no graph is being made."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[no-untyped-call]
            return self.described(x)
        found = self._ready.get(x.shape[1])
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = self.described(x)
            real = all(type(table) is Tensor for table in found.values())  # not a tracer's
            if real and len(self._ready) < NUM_READY:
                self._ready[x.shape[1]] = found
        return found

    def described(self, x: Tensor) -> dict[str, Tensor]:
        """The tables of an input, by arithmetic on tensors, see `rows`."""
        rows, named, count = self.rows(x)
        present = torch.where(named, self.present[:, rows], torch.ones_like(self.fallback))
        prior = torch.where(named, self.prior[:, rows], self.fallback / count)
        return {"prior": prior, "present": present.unsqueeze(-1)}

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the channels of an input stand in the tables, as tensor arithmetic.

        An `if` on the number of channels would be frozen by export and compilation.

        Returns:
            Place of each channel `(C,)`; whether the tables apply `()` (else the fallback does);
            the number of channels `()`.
        """
        ones = torch.ones(x.shape[1], dtype=self.fallback.dtype, device=x.device)
        count = ones.sum()
        rows = torch.arange(x.shape[1], device=x.device).clamp(max=self.prior.shape[1] - 1)
        named = count >= self.num_named if self.mixed else count == self.num_named
        return rows, named, count

    @torch.jit.unused
    def _strict(self) -> bool:
        """Whether an input with another count is an error rather than anonymous."""
        return not self.supports_anonymous or self.mixed or self.channels not in (None, ANONYMOUS)

    @torch.jit.ignore
    def _check_input(self, x: Tensor) -> None:
        """Refuse inputs that do not fit the channel set; bring the tables to where they are."""
        if torch.compiler.is_compiling():
            return
        if x.dim() != 4 or 0 in x.shape[1:]:
            raise UserError(
                f"The input has shape {tuple(x.shape)}; needed is (batch, channels, height, width) "
                f"with at least one channel and pixel. Add missing axes with x[None] or x[:, None]."
            )
        if not x.is_floating_point():
            raise UserError(
                f"The input is {x.dtype}; needed are floating-point planes. Scale and normalise "
                f"them first, e.g. x.float() / 255."
            )
        if not torch.jit.is_tracing():  # type: ignore[no-untyped-call]
            # Weights may have been assigned without a word (`assign=True`).
            weight = self._own_weight()
            home = (x.device, self._home[1] if weight is None else weight.dtype)
            if home != self._home:
                self._place_tables(*home)
        declared = self._sets(self.channels)[0]
        if self._plan.shape is not None:
            num_samples, num_planes = self._plan.shape
            if x.shape[0] != num_samples or x.shape[1] < num_planes:
                raise UserError(
                    f"The input has {x.shape[0]} samples of {x.shape[1]} channels, but the model "
                    f"was told of a mixed batch of {num_samples} sets of up to {num_planes} "
                    f"channels, which holds until set_channels is called again: "
                    f"set_channels(model, channels) for inputs that all have the same channels, "
                    f"or with the masks or sets of this batch, padded to {num_planes} planes."
                )
        elif x.shape[1] != len(declared) and self._strict():
            raise UserError(
                f"The input has {x.shape[1]} channels, but the channel set is {declared} "
                f"({len(declared)}). Call timm_varchan.set_channels(model, ...) with the "
                f"input's own channels, 'anonymous', or None for the default rule."
            )

    # Where the tables are -------------------------------------------------------------------------

    def _place_tables(self, device: torch.device, dtype: torch.dtype) -> None:
        """Assign the tables (in place would break a backward that still needs the old ones).

        They travel together, those of equal samples once.
        """
        self._home = (device, dtype)
        plan, counts = self._plan, len(self._sets(self.channels)[0])
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        with torch.inference_mode(False), torch.no_grad():
            scalars = {
                "num_named": torch.tensor(1.0 if self.mixed else float(counts), device="cpu"),
                "fallback": torch.tensor(math.nan if self._strict() else 1.0, device="cpu"),
            }
            tables = {"which": plan.which, **plan.tables, **scalars}
            parts = [table.to(exact).flatten() for table in tables.values()]
            together = torch.split(sent(torch.cat(parts), device), [len(part) for part in parts])
            which = together[0].long()
            for (name, table), part in zip([*tables.items()][1:], together[1:], strict=True):
                placed = part.view(table.shape)
                placed = placed.to(dtype if table.is_floating_point() else table.dtype)
                if name in ("prior", "present") and len(plan.which) > 1:
                    placed = placed.index_select(0, which)
                setattr(self, name, placed)
        self.table_names = tuple(tables)[1:]
        self._ready: dict[int, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: earlier plans, and tables made ready, are not needed."""
        return {**self.__dict__, "_earlier": deque(maxlen=NUM_EARLIER), "_ready": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Mixer":
        """Follow `.to(...)`, `.cuda()`, `to_empty` and their kind."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            device, dtype = self._home
            start = "cpu" if device.type == "meta" else device  # nothing can be copied out of meta
            probe = fn(torch.zeros((), device=start, dtype=dtype))
        if (probe.device, probe.dtype) != self._home:
            self._place_tables(probe.device, probe.dtype)
        return self

    def _own_weight(self) -> Tensor | None:
        """A weight of the mixer, if it has any, whose type the tables have."""
        return next((p for p in self.parameters() if p.is_floating_point()), None)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        channels = f"default {self.default_channels}" if self.channels is None else self.channels
        if self._plan.shape is not None:
            channels = f"{self._plan.shape[0]} sets"
        return f"virtual={self.virtual_channels}, prior={self.prior_name}, channels={channels}"


def _checked_mask(present: Tensor, channels: Channels, sets: tuple[ChannelSet, ...]) -> Tensor:
    """A presence mask on the CPU, refused if it does not fit the channels."""
    if isinstance(channels, tuple) or not len(sets[0]):
        raise UserError(
            "Presence masks need one channel set with a count. Call set_channels(model, "
            "'R+G+B+...', present=mask), or give ChannelSet.anonymous(n)."
        )
    mask = present.detach().cpu().bool()
    if mask.dim() != 2 or mask.shape[1] != len(sets[0]) or not len(mask):
        raise UserError(
            f"The mask has shape {tuple(mask.shape)}, and the channels are {sets[0]}; needed is "
            f"(batch, {len(sets[0])}), one column for each channel."
        )
    if not bool(mask.any(1).all()):
        raise UserError("A sample has no channel at all. Leave it out or give it one.")
    return mask


def _sequence_number() -> int:
    """A number above those of all nodes of the autograd graph that this thread made before."""
    with torch.inference_mode(False), torch.enable_grad():
        made: Any = torch.ones((), device="cpu", requires_grad=True).view(()).grad_fn
    return made._sequence_nr()
