"""``python -m trainkit``."""

import sys

from trainkit.tools.commands import main

if __name__ == "__main__":
    sys.exit(main())
