"""``python -m superlora_tn`` is ``superlora-tn``."""

import sys

from superlora_tn.cli import main

if __name__ == "__main__":
    sys.exit(main(program="python -m superlora_tn"))
