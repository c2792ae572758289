# SPDX-License-Identifier: MIT
"""What a user can put right: one sentence, no traceback, exit status 2."""

from __future__ import annotations

import importlib
import stat
from pathlib import Path
from types import ModuleType

import torch

PACKAGES = {"PIL": "Pillow", "skimage": "scikit-image"}


class UserError(Exception):
    """The message says what is wrong and what to do about it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, which PyTorch's allocator for the CPU reports as a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def require(module: str) -> ModuleType:
    """Imports a module of the extras `fit` and `shape`; UserError with the install command if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = PACKAGES.get(module.split(".")[0], module.split(".")[0])
        raise UserError(f"{package} is needed here ({error}); install it with: pip install {package}") from error


def check_file(path: Path, what: str) -> None:
    """UserError unless there is a file, `what` names which is meant, that this user may read."""
    try:
        if stat.S_ISFIFO(path.stat().st_mode):  # opening it would wait for a writer
            raise UserError(f"{path} is a pipe; give the path of {what}")
        path.open("rb").close()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give the path of {what}") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; give the path of {what} in it") from error
    except PermissionError as error:
        raise UserError(
            f"{path} may not be read by you: {error.strerror}; change its rights or its folder's"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give the path of {what}") from error
