"""Generative Pseudo-Labeling for pre-ranking. What `import gpl_core as gpl` offers: see docs/api.md."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpl_core.api import FeedReader, LakehouseReader, open_lakehouse
    from gpl_core.errors import ContractError, GplError, MissingInputError, UsageError
    from gpl_core.prerank.loss import dual_label_loss
    from gpl_core.prerank.serving import ServedModel

__version__ = "0.1.0"
__all__ = [
    "ContractError", "FeedReader", "GplError", "LakehouseReader", "MissingInputError", "ServedModel", "UsageError",
    "dual_label_loss", "open_lakehouse",
]  # fmt: skip
_MODULES = {
    "api": ("FeedReader", "LakehouseReader", "open_lakehouse"),
    "errors": ("ContractError", "GplError", "MissingInputError", "UsageError"),
    "prerank.loss": ("dual_label_loss",),
    "prerank.serving": ("ServedModel",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import what is asked for: no torch before a loss, nothing at all for a part of this package."""
    if name not in _HOME:
        raise AttributeError(f"module 'gpl_core' has no attribute '{name}'")
    return getattr(import_module(f"gpl_core.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
