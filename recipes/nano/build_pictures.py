"""Render the icon packages that nano is trained on.

    python recipes/nano/build_pictures.py DIR data/nano/icons.npz

DIR has the packages that README.md beside this file names.
"""

import sys

from controlkit.errors import UserError
from controlkit.nano.icons import render_sets

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        for style, count in render_sets(sys.argv[1], sys.argv[2]).items():
            print(f"{style}: {count} icons")
    except UserError as error:
        sys.exit(str(error))
