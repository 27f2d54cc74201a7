"""``python -m tetris`` is the ``tetris`` command."""

import sys

from .cli import main

sys.exit(main())
