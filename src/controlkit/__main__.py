"""`python -m controlkit`, which `accelerate launch -m controlkit` needs."""

import sys

from controlkit.apps.cli import main

sys.exit(main())
