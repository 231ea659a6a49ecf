"""`python -m llmos.cli`, for where the command is not on PATH."""

import sys

from llmos.cli import main

sys.exit(main())
