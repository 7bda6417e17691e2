"""Trains one run from a settings file, in one process or in all that torchrun has started.

torchrun --nproc-per-node 2 -m hybridlab.train -f FILE.yaml [--resume]
"""

import os
import sys
import warnings


def main() -> int:
    """Load the program and run it; Ctrl-C meanwhile gives one line as well."""
    try:
        from hybridlab.batch import train_file

        warnings.showwarning = train_file.warn
        return train_file.main()
    except KeyboardInterrupt:
        print("hybridlab.train: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    code = main()
    torch = sys.modules.get("torch")
    if code and torch and torch.distributed.is_initialized():
        os._exit(code)  # threads that wait for a rank that is gone would not let it end
    sys.exit(code)
