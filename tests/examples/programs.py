"""Imports the programs in `examples/`, which are no package."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def program(name: str) -> ModuleType:
    """The module `examples/<name>.py`."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def exit_status(module: ModuleType, arguments: list[str]) -> object:
    """The status a program ends with, whether it returns it or argparse exits."""
    try:
        return module.main(arguments)
    except SystemExit as error:
        return error.code


def is_png(path: Path) -> bool:
    """Whether there is a picture."""
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
