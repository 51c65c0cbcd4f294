"""Transfer learning with CNNs: a course in tested notebooks, and the small fine-tuning module they export."""

import os
import sys
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name → the room that defines it. A room, and PyTorch with it, is imported when a name is first used.
_ROOMS = {
    "Settings": "settings", "read_settings": "settings", "TLError": "settings", "SettingsError": "settings",
    "DataError": "settings", "ModelError": "settings", "DeviceError": "settings", "TrainingError": "settings",
    "scan": "folder", "split": "folder", "check": "suspects", "Report": "report",
    "create": "backbones", "Network": "backbones", "replace_head": "backbones",
    "freeze": "freezing", "unfreeze": "freezing", "check_frozen": "freezing", "parameter_groups": "freezing",
    "fit": "training", "Event": "training", "probe": "recipes", "probe_then_tune": "recipes",
    "find_rate": "recipes", "cross_validate": "recipes", "evaluation": "metrics", "Evaluation": "metrics",
    "grad_cam": "explaining", "nearest": "explaining",
    "fine_tune": "fine_tuning", "load": "classifier", "Classifier": "classifier", "Prediction": "answers",
}
_LIGHT = ("settings", "folder", "report", "suspects", "metrics") # rooms that do without PyTorch
__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> Any:
    "Import the room of a public name when it is first asked for (PEP 562)."
    if name not in _ROOMS:
        raise AttributeError(f"tl_tutorial has no {name!r}; it has {', '.join(_ROOMS)}")
    if _ROOMS[name] not in _LIGHT and "torch" not in sys.modules:
        _need_a_folder(name)
    value = getattr(import_module(f"tl_tutorial.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def _need_a_folder(name: str) -> None:
    "PyTorch ends the whole process when it is imported in a folder that is gone: refuse before."
    try:
        os.getcwd()
    except OSError as error:
        from .settings import DataError

        raise DataError(f"{name}: the working folder was deleted, and PyTorch cannot start in it; "
                        "change into another one with os.chdir") from error


def __dir__() -> list[str]:
    "The public names."
    return sorted(__all__)
