"""`make gpu-check`: build, test and measure on a machine with an NVIDIA GPU, stage by stage."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, by an interpreter that does not have this package on its path.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from benchmarks.targets.gpu.check import main

    sys.exit(main(sys.argv[1:]))
