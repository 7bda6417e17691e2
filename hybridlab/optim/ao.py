"""The optimizers of torchao, imported when they are wanted and not before."""

from __future__ import annotations

import logging
import warnings
from functools import lru_cache
from types import ModuleType

from hybridlab.base.errors import UserError

CHATTY = ("torchao", "torch.utils._pytree")
"""Loggers that, on import, list the kernels that a machine cannot use; no optimizer needs them."""


@lru_cache
def torchao_optim(wanted_by: str) -> ModuleType:
    """The package `torchao.optim`.

    wanted_by: the setting that needs it, for the message

    Raises UserError where torchao is not installed.
    """
    levels = {name: logging.getLogger(name).level for name in CHATTY}
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            import torchao.optim
    except ImportError as error:
        raise UserError(f"{wanted_by} needs torchao: .venv/bin/pip install torchao") from error
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    return torchao.optim
