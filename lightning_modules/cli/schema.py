"""Writes down the signatures of every class that a config can name, so that `quick.py` answers without torch.

Importing torch and lightning takes most of ten seconds; a misspelt key should not wait for that. After a slow start
the classes that are reachable from the command line (models, data modules, callbacks, and everything in the types of
their arguments) are saved as names, bases, documentation and arguments, in one file below ~/.cache/limelight whose
name is a hash of our sources and of the installed packages.
"""

import functools
import importlib
import io
import os
import pickle
import pkgutil
import sys
import tempfile
import typing
import warnings
from collections.abc import Iterator
from enum import Enum
from typing import Any

from jsonargparse import _parameter_resolvers
from jsonargparse._optionals import get_doc_short_description, is_attrs_class, is_pydantic_model
from lightning.pytorch import Callback, LightningDataModule, LightningModule

from lightning_modules.cli.caching import CachingTrainer
from lightning_modules.cli.quick import REAL_MODULES, ROOMS, cache_file, is_real, key_of

LARGEST_FAMILY = 300  # nn.Module has thousands of subclasses: they may be named, but only the real parser lists them
KEPT_FILES = 10  # of earlier versions of the sources
COMMAND_METHODS = ("fit", "validate", "test", "predict", "cache")
# Classes that recipes name and that nothing of ours imports at its top.
NAMED_IN_RECIPES = ("transformers.Adafactor",)


class NotRecordableError(Exception):
    """A class or a default value that a stub cannot stand for: who needs it takes the slow way."""


def import_rooms() -> bool:
    """Import all our modules, so that help lists their classes and short class names work.

    Returns:
        Whether all could be imported.
    """
    complete = True
    for room in ROOMS:
        for module in pkgutil.walk_packages(importlib.import_module(room).__path__, f"{room}."):
            if module.name.startswith("lightning_modules.cli") or module.name.endswith("__main__"):
                continue
            try:
                importlib.import_module(module.name)
            except ImportError as error:
                complete = False
                warnings.warn(f"{module.name} cannot be imported, its classes are not listed: {error}", stacklevel=2)
    return complete


def save_schema() -> None:
    """Write the schema of the present sources, unless it is there."""
    file = cache_file()
    if file.exists():
        return
    for module, name in (path.rsplit(".", 1) for path in NAMED_IN_RECIPES):
        getattr(importlib.import_module(module), name)
    schema = pickle.dumps(Recorder().record())
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
            part.write(schema)
        os.replace(part.name, file)
        for old in sorted(file.parent.glob("*.pickle"), key=os.path.getmtime)[:-KEPT_FILES]:
            old.unlink()
    except OSError:  # a home that cannot be written: help stays slow
        return


class Recorder:
    """Collects classes from a few roots on, until no argument's type names a new one."""

    def __init__(self) -> None:
        self.classes: dict[str, dict[str, Any]] = {}
        self.parameters: dict[str, bytes] = {}

    def record(self) -> dict[str, Any]:
        self.add_parameters(CachingTrainer)
        for method in COMMAND_METHODS:
            self.add_parameters(CachingTrainer, method)
        for root in (LightningModule, LightningDataModule, Callback):
            self.add_family(root)
        modules = {prefix for path in self.classes for prefix in prefixes(path.split(":")[0])}
        modules |= {name for name in sys.modules if name.split(".")[0] in ROOMS}
        modules = {name for name in modules if name in sys.modules and name not in REAL_MODULES}
        return {
            "classes": self.classes,
            "parameters": self.parameters,
            "modules": {name: self.names_of(name) for name in modules},
            "packages": {name.split(".")[0] for name in modules},
        }

    def add_family(self, cls: type) -> None:
        """Record a class and all its subclasses: each may be named where the class is expected."""
        entry = self.classes.setdefault(key_of(cls), {"subclasses": None}) if is_real(cls.__module__) else self.add(cls)
        if entry["subclasses"] is not None or len(list(descendants(cls))) > LARGEST_FAMILY:
            return
        entry["subclasses"] = [key_of(subclass) for subclass in cls.__subclasses__() if is_global(subclass)]
        self.add_parameters(cls)
        for subclass in filter(is_global, cls.__subclasses__()):
            try:
                self.add_family(subclass)
            except NotRecordableError:
                entry["subclasses"] = None  # then only the real parser lists them

    def add(self, cls: type) -> dict[str, Any]:
        """Record what a stub class needs, but not its parameters."""
        path = key_of(cls)
        if path not in self.classes:
            bases = [base for base in cls.__bases__ if base is not typing.Generic]
            other_kind = typing.is_typeddict(cls) or hasattr(cls, "_fields") or getattr(cls, "_is_protocol", False)
            members = (
                {name: member.value for name, member in cls.__members__.items()} if issubclass(cls, Enum) else None
            )
            plain = all(type(value).__module__ == "builtins" for value in (members or {}).values())
            if other_kind or not plain or not is_global(cls):
                raise NotRecordableError(path)
            if is_attrs_class(cls) or is_pydantic_model(cls):
                bases = []  # named in types (wandb's Settings), but its fields are known to the real parser only
            for base in bases:
                if not is_real(base.__module__):
                    self.add(base)
            self.classes[path] = {
                "bases": [key_of(base) for base in bases],
                "doc": get_doc_short_description(cls),
                "abstract": list(getattr(cls, "__abstractmethods__", ())),
                "dataclass": "__dataclass_fields__" in vars(cls),
                "members": members,
                "methods": {},
                "subclasses": None,
            }
        return self.classes[path]

    def add_parameters(self, cls: type, method: str | None = None) -> None:
        """Record the parameters of a class or method as jsonargparse finds them, and the classes in their types."""
        key = key_of(cls, method)
        if key in self.parameters or is_attrs_class(cls) or is_pydantic_model(cls):
            return
        self.parameters[key] = b""  # its types may lead back here
        if method:
            self.add(cls)["methods"][method] = get_doc_short_description(cls, method)
        parameters = _parameter_resolvers.get_signature_parameters(cls, method, logger=False)
        for parameter in parameters:
            if type(parameter.default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
                parameter.default = parameter.parent.__dataclass_fields__[parameter.name].default_factory()
            parameter.component, parameter.parent = object, None
        file, families = io.BytesIO(), []
        pickler = pickle.Pickler(file)
        pickler.persistent_id = lambda value: self.reference(value, families)
        try:
            pickler.dump(parameters)
            self.parameters[key] = file.getvalue()
        except (NotRecordableError, pickle.PicklingError, TypeError, AttributeError):
            del self.parameters[key]
        for family in families:
            self.add_family(family)

    def reference(self, value: Any, families: list[type]) -> str | None:
        """How a class is written in the pickle; None for everything that needs no stub."""
        if isinstance(value, type) and not is_real(value.__module__):
            self.add(value)
            families.append(value)
            return key_of(value)
        if callable(value) and not is_real(getattr(value, "__module__", None) or "unknown"):
            raise NotRecordableError(str(value))
        return None

    def names_of(self, name: str) -> dict[str, Any]:
        """The names of a module, and which of them are recorded classes."""
        module = sys.modules[name]
        classes = {}
        for attribute, value in vars(module).items():
            if issubclass(type(value), type) and key_of(value) in self.classes:
                classes[attribute] = key_of(value)
        names = [attribute for attribute in dir(module) if attribute not in classes and not attribute.startswith("__")]
        return {"classes": classes, "names": names, "version": str(getattr(module, "__version__", ""))}


def is_global(cls: type) -> bool:
    """Whether the class is found under its own name."""
    try:
        return functools.reduce(getattr, cls.__qualname__.split("."), sys.modules[cls.__module__]) is cls
    except (AttributeError, KeyError):
        return False


def descendants(cls: type) -> Iterator[type]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from descendants(subclass)


def prefixes(module: str) -> Iterator[str]:
    parts = module.split(".")
    return (".".join(parts[: end + 1]) for end in range(len(parts)))
