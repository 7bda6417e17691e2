"""Who looks: a person in JupyterLab, or nobody, in batch.

Two environment variables say where a kernel was started, and nothing else is asked:

HYBRIDLAB_PROGRESS: set by `hybridlab run`: the file that progress is written to, for the terminal that started the run
JPY_SESSION_NAME: set by a Jupyter server, such as JupyterLab's, for the kernels of its notebooks
"""

from __future__ import annotations

import os

PROGRESS_FILE = "HYBRIDLAB_PROGRESS"


def in_jupyterlab() -> bool:
    """Whether this is the kernel of a notebook that a person has open, and no batch run."""
    if "JPY_SESSION_NAME" not in os.environ or PROGRESS_FILE in os.environ:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")  # a script that the kernel starts has none
