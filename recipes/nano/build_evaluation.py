r"""Write the evaluation images of nano into the package, from rendered icons.

python recipes/nano/build_evaluation.py data/nano/icons.npz recipes/nano/concepts.txt \
    src/controlkit/assets/evaluation/nano.npz
"""

import sys

from controlkit.errors import UserError
from controlkit.nano.evaluation_sets import build_evaluation_sets

if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        for name, count in build_evaluation_sets(*sys.argv[1:]).items():
            print(f"{name}: {count} images")
    except UserError as error:
        sys.exit(str(error))
