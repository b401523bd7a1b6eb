"""Import LeRobot 0.6.1 beside this project's pins: Python 3.11, CPU torch, no torchvision.

    with importable():  # reason() says why the adapters' tests cannot run; None if they can
        import lerobot

LeRobot asks for Python 3.12 and torch < 2.12. Its models need neither. On 3.11 three of its files
hold new syntax for type parameters, which is rewritten while they are loaded. Its configuration
imports torchvision and datasets, which its models never call: empty modules stand in for them. The
model classes under test are the installed ones.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import sys
import types

NEEDED = ("transformers", "lerobot", "draccus", "einops", "accelerate", "num2words")
RULES = (
    (r"^class (\w+)\[([^\]]*)\]\((.*)\):", r"class \1(\3, __import__('typing').Generic[\2]):"),
    (r"^def (\w+)\[[^\]]*\]\(", r"def \1("),
    (r"^type (\w+) = ", r"\1 = "),
)


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        text = self.get_data(self.path).decode()
        for pattern, replacement in RULES:
            text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
        if "from __future__" not in text:
            text = "from __future__ import annotations\n" + text
        return compile(text, self.path, "exec", dont_inherit=True)


class _Stub(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        root = name.split(".")[0]
        if (
            root in ("torchvision", "datasets")
            and importlib.machinery.PathFinder.find_spec(root) is None
        ):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        if name in (
            "lerobot.utils.io_utils",
            "lerobot.processor.pipeline",
            "lerobot.motors.motors_bus",
        ):
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            return (
                importlib.util.spec_from_loader(name, _Loader(name, spec.origin)) if spec else None
            )
        return None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


def missing():
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def reason():
    """Say why the adapters' tests cannot run; None if they can."""
    return f"not installed: {', '.join(missing())}" if missing() else None


@contextlib.contextmanager
def importable():
    """Make `import lerobot` work while it lasts, offline."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if sys.version_info >= (3, 12):
        yield
        return
    import transformers.utils.import_utils as available
    from transformers import AutoProcessor  # noqa: F401 - it looks for torchvision once, before the stand-in

    available.is_torchvision_available()
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Stub)]:
            del sys.modules[name]
