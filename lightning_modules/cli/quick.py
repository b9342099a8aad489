"""Answers `--help`, `--print_config` and every config error without importing torch, which would take ten seconds.

`schema.py` has written down the signatures of all classes that a config can name. Here a child process puts empty
classes with these signatures in the place of torch, lightning and our modules, and then runs the same LightningCLI and
jsonargparse code as a real run. So the answers are the same, letter for letter. Where a stub cannot stand for the
real thing (a class of the user's own, a function as class path) the real parser is asked instead.
"""

import functools
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import io
import os
import pickle
import sys
import typing
from abc import ABCMeta
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from enum import Enum
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
ROOMS = ("lightning_modules", "datamodules", "callbacks")
# Small modules that run for real beside the stubs; all other modules that are not Python's own are stubs.
REAL_MODULES = ("lightning.pytorch.cli", "lightning_modules.cli.parser", "lightning_modules.cli.quick")
REAL_PACKAGES = ("jsonargparse", "yaml", "docstring_parser", "typeshed_client", "typing_extensions", "fsspec")
REAL_PACKAGES += ("lightning_utilities", "packaging", "importlib_resources", "_yaml", "attr", "attrs", "pydantic")
NO_ANSWER = 75


class NoAnswer(BaseException):
    """Only the real parser knows; not an Exception, so that no `except` of a library swallows it."""


class Parsed(BaseException):
    """The config is valid: the real run may begin."""


def is_real(module: str) -> bool:
    package = module.split(".")[0]
    return module in REAL_MODULES or package in REAL_PACKAGES or package in sys.stdlib_module_names


def cache_file() -> Path:
    """Where the schema of these sources and these installed packages is kept."""
    digest = hashlib.sha256(sys.version.encode())
    for room in ROOMS:
        for source in sorted((ROOT / room).rglob("*.py")):
            digest.update(source.read_bytes())
    for folder in map(Path, sys.path):
        if folder.name in ("site-packages", "dist-packages") and folder.is_dir():
            digest.update(" ".join(sorted(name for name in os.listdir(folder) if name.endswith("-info"))).encode())
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):  # a user without a home: nothing is kept
        cache = os.devnull
    return Path(cache, "limelight", f"{digest.hexdigest()[:20]}.pickle")


def answer() -> int | None:
    """Answer this process's command line if that needs no torch.

    Returns:
        The exit status, or None where the real parser must go on (also with every valid run).
    """
    if not hasattr(os, "fork") or "LOCAL_RANK" in os.environ:
        return None
    try:
        schema = pickle.loads(cache_file().read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (EOFError, pickle.UnpicklingError):
        cache_file().unlink()
        return None
    child = os.fork()
    if child == 0:
        status = NO_ANSWER
        try:
            install_stubs(schema)
            status = parse()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status in (0, 2) else None


def install_stubs(schema: dict[str, Any]) -> None:
    """Put stubs in the place of torch, lightning and our modules, for the rest of this process."""
    stubs = Stubs(schema)
    sys.meta_path.insert(0, stubs)
    del sys.modules["lightning_modules"]  # its stub knows all names in it
    from jsonargparse import _parameter_resolvers

    from lightning_modules.cli import parser  # noqa: F401

    stubs.by_signature = _parameter_resolvers.get_parameters_from_pydantic_or_attrs
    _parameter_resolvers.get_parameters_from_pydantic_or_attrs = stubs.parameters_of
    stubs.loading = False


def parse() -> int:
    """Parse the command line among stubs; print the answer if it is one.

    Returns:
        The exit status, or NO_ANSWER if this was a valid run or only the real parser knows.
    """
    from lightning_modules.cli.parser import LimelightParser

    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            LimelightParser(stop_after_parsing=True)
    except SystemExit as end:
        sys.stdout.write(out.getvalue())
        sys.stderr.write(err.getvalue())
        sys.stdout.flush()
        sys.stderr.flush()
        return end.code
    except (NoAnswer, Parsed):
        return NO_ANSWER
    raise AssertionError("the parser stops after parsing")


class StubClass(ABCMeta):
    """The type of all stubs: knows the subclasses of the real class, in their order."""

    stubs: "Stubs"

    def __subclasses__(cls) -> list[type]:
        subclasses = cls.stubs.schema["classes"].get(key_of(cls), {"subclasses": None})["subclasses"]
        if subclasses is None:
            raise NoAnswer
        return [cls.stubs.find(path) for path in subclasses]

    __instancecheck__ = type.__instancecheck__
    __subclasscheck__ = type.__subclasscheck__


class StubModule(ModuleType):
    """A module with the recorded classes of the real one; its other names are known but have no value."""

    stubs: "Stubs"

    def __getattr__(self, name: str) -> Any:
        entry = self.stubs.schema["modules"].get(self.__name__, {"classes": {}, "names": []})
        if name in entry["classes"]:
            setattr(self, name, self.stubs.find(entry["classes"][name]))
            return self.__dict__[name]
        if self.stubs.loading and not name.startswith("__"):
            return nothing  # imported by LightningCLI's module, but parsing never calls it
        if name in entry["names"]:
            raise NoAnswer
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        entry = self.stubs.schema["modules"][self.__name__]
        return sorted([*entry["classes"], *entry["names"]])


def nothing(*args: Any, **kwargs: Any) -> Any:
    raise NoAnswer


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports stub modules, and answers jsonargparse's question for the parameters of a class."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self.schema = schema
        self.loading = True
        self.made: dict[str, type] = {}
        StubClass.stubs = StubModule.stubs = self

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name in REAL_MODULES or name == "lightning_modules.cli":
            return importlib.machinery.PathFinder.find_spec(name, folders_of(name))
        package = name.split(".")[0]
        if is_real(name):
            return None
        if name in self.schema["modules"] or (self.loading and package in self.schema["packages"]):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        if self.loading:
            return None
        if importlib.machinery.PathFinder.find_spec(name, folders_of(name)):
            raise NoAnswer  # it exists, but nobody wrote down what is in it
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        entry = self.schema["modules"].get(module.__name__)
        if entry:
            module.__version__ = entry["version"]

    def find(self, path: str) -> Any:
        """The class written as module:qualname."""
        module, qualname = path.split(":")
        if is_real(module):
            return functools.reduce(getattr, qualname.split("."), importlib.import_module(module))
        if path not in self.schema["classes"]:
            raise NoAnswer
        if path not in self.made:
            self.made[path] = self.make(module, qualname, self.schema["classes"][path])
        return self.made[path]

    def make(self, module: str, qualname: str, entry: dict[str, Any]) -> type:
        name = qualname.rsplit(".", 1)[-1]
        if entry["members"] is not None:
            return Enum(name, entry["members"], module=module, qualname=qualname)
        namespace: dict[str, Any] = {"__module__": module, "__qualname__": qualname, "__doc__": entry["doc"]}
        namespace["__init__"] = lambda self: None  # without a docstring, so that the base's is not looked for
        namespace["__class_getitem__"] = classmethod(typing._GenericAlias)
        for method, doc in entry["methods"].items():
            namespace[method] = FunctionType(nothing.__code__, {}, method)
            namespace[method].__doc__ = doc
        if entry["dataclass"]:
            namespace["__dataclass_fields__"] = {}
        stub = StubClass(name, tuple(map(self.find, entry["bases"])), namespace)
        stub.__abstractmethods__ = frozenset(entry["abstract"])
        return stub

    def parameters_of(self, function_or_class: Any, method: str | None, logger: Any) -> Any:
        """In place of jsonargparse's first way to find parameters; None means that the next way is tried."""
        key = key_of(function_or_class, method)
        if key in self.schema["parameters"]:
            unpickler = pickle.Unpickler(io.BytesIO(self.schema["parameters"][key]))
            unpickler.persistent_load = self.find
            return unpickler.load()
        if isinstance(function_or_class, StubClass):
            raise NoAnswer
        return self.by_signature(function_or_class, method, logger)


def folders_of(module: str) -> list[str] | None:
    """Where the file of a module would be, without importing its package; None means everywhere."""
    package, *between = module.split(".")[:-1] or [""]
    if not package:
        return None
    if package in ROOMS:
        folders = [str(ROOT / package)]
    else:
        spec = importlib.machinery.PathFinder.find_spec(package)
        folders = (spec and spec.submodule_search_locations) or []
    return [os.path.join(folder, *between) for folder in folders]


def key_of(function_or_class: Any, method: str | None = None) -> str:
    module, qualname = (getattr(function_or_class, name, "") for name in ("__module__", "__qualname__"))
    return f"{module}:{qualname}" + (f".{method}" if method not in (None, "__init__") else "")
