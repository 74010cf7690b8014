"""Any timm model on any number, order and subset of input channels.

Importing the package registers a twin `dwg_<architecture>` with timm for every architecture that
begins with a convolution: at once where timm is there, else as soon as timm is imported. Nothing
else is imported before it is used, so that a command shows its help without torch.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from timm_varchan.version import __version__

if TYPE_CHECKING:
    from timm_varchan.channels import ANONYMOUS, RGB, Channel, ChannelSet, register_channel
    from timm_varchan.filling import fill_missing
    from timm_varchan.folding import fold
    from timm_varchan.measure import measure_channels
    from timm_varchan.models import (
        adapt,
        estimate_bn_buffers,
        register_model,
        set_channels,
        share,
        unexplained_variance,
    )
    from timm_varchan.stems import DWGMixer, Stem, register_stem

__all__ = [
    "ANONYMOUS",
    "RGB",
    "Channel",
    "ChannelSet",
    "DWGMixer",
    "Stem",
    "__version__",
    "adapt",
    "estimate_bn_buffers",
    "fill_missing",
    "fold",
    "measure_channels",
    "register_channel",
    "register_model",
    "register_stem",
    "set_channels",
    "share",
    "unexplained_variance",
]

#: Where public names live, those that need the least first.
_HOMES = ("channels", "measure", "filling", "stems", "models", "folding")
#: Modules that are attributes of the package before anybody imported them.
_MODULES = ("channels", "data", "export", "hub", "models", "plots", "predict", "stems")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    homes = (importlib.import_module(f"{__name__}.{home}") for home in _HOMES)
    value = next(vars(home)[name] for home in homes if name in vars(home))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


class _WithTimm(MetaPathFinder):
    """Has the twins registered when timm has been imported; the other finders find it.

    Where timm is imported by our stems, of which the twins are made, these come to an end first.
    """

    def __init__(self) -> None:
        self._loading: set[str] = set()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """The spec of timm or of our stems, whose loader also registers the twins."""
        if fullname not in ("timm", f"{__name__}.stems"):
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                self._loading.add(fullname)
                try:
                    execute(module)
                finally:
                    self._loading.remove(fullname)
                if not self._loading:
                    importlib.import_module(f"{__name__}.models")

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "timm" in sys.modules:
    importlib.import_module(f"{__name__}.models")
else:
    sys.meta_path.insert(0, _WithTimm())
