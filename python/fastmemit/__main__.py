"""``python -m fastmemit``: the same as the command ``fastmemit``."""

import sys

from fastmemit.cli import main

sys.exit(main())
