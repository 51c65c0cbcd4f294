"""Adds a number to every random seed that a process and its children set, so that claims meet other draws.

`install(1000)` changes what `torch.manual_seed`, `torch.Generator.manual_seed`, `numpy.random.default_rng` and `random.Random`
are given. `environment(1000)` gives the variables under which any Python process does so from its start, with the processes
that it starts in turn. Used by `python -m tools.robust`; nothing in the package knows of it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import random
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "TL_SEED_SHIFT"
START = "import os\nfrom tools.seed_shift import install\ninstall(int(os.environ['TL_SEED_SHIFT']))\n"


def shifted(seed: Any, shift: int) -> Any:
    "The seed and the number to add; whatever is not a whole number, or a list of them, stays as it is."
    if isinstance(seed, (list, tuple)):
        return [shifted(seed[0], shift), *seed[1:]] if seed else seed
    return seed + shift if hasattr(seed, "__index__") and not isinstance(seed, bool) else seed


def shift_random(shift: int) -> None:
    "random.Random; the module's own functions draw from an instance that is made before."
    class Random(random.Random):
        def __init__(self, x: Any = None) -> None:
            super().__init__(shifted(x, shift))

        def seed(self, a: Any = None, version: int = 2) -> None:
            super().seed(a, version)

    random.Random = Random  # type: ignore[misc]


def shift_numpy(module: ModuleType, shift: int) -> None:
    "numpy.random.default_rng."
    plain = module.default_rng
    module.default_rng = lambda seed=None: plain(shifted(seed, shift))


def shift_torch(module: ModuleType, shift: int) -> None:
    "torch.manual_seed, and Generator.manual_seed through a subclass, since the type itself cannot be changed."
    plain, kind = module.manual_seed, module.Generator

    class Generator(kind):  # type: ignore[misc, valid-type]
        def manual_seed(self, seed: int) -> Any:
            return super().manual_seed(shifted(seed, shift))

    module.manual_seed = lambda seed: plain(shifted(seed, shift))
    module.random.manual_seed = module.manual_seed
    module.Generator = Generator


CHANGES: Mapping[str, Callable[[ModuleType, int], None]] = {"numpy.random": shift_numpy, "torch": shift_torch}


class Loader(importlib.abc.Loader):
    "A module's own loader, and then the change."

    def __init__(self, plain: Any, shift: int) -> None:
        self.plain, self.shift = plain, shift

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.plain.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.plain.exec_module(module)
        CHANGES[module.__name__](module, self.shift)

    def __getattr__(self, name: str) -> Any: # resources, sources: whatever else a loader can do
        return getattr(self.plain, name)


class Finder(importlib.abc.MetaPathFinder):
    "Finds torch and numpy.random as before, and hands them over changed."

    def __init__(self, shift: int) -> None:
        self.shift = shift

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            spec.loader = Loader(spec.loader, self.shift)
        return spec


def install(shift: int) -> None:
    "Change what is imported already, and what will be."
    if not shift:
        return
    shift_random(shift)
    for name, change in CHANGES.items():
        if name in sys.modules:
            change(sys.modules[name], shift)
    sys.meta_path.insert(0, Finder(shift))


def environment(shift: int) -> dict[str, str]:
    "Variables for processes that shift from their start: Python runs `sitecustomize` before anything else."
    folder = Path(tempfile.mkdtemp(prefix="seed-shift-"))
    (folder / "sitecustomize.py").write_text(START)
    root = Path(__file__).resolve().parent.parent
    paths = [str(folder), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {VARIABLE: str(shift), "PYTHONPATH": os.pathsep.join(paths)}
