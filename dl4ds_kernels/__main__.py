"""``python -m dl4ds_kernels {info, demo, bench, models, detect}``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
