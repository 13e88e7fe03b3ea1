"""``python -m dl4ds_kernels {info, demo, bench, models, detect, segment, pose, experiment, train}``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
