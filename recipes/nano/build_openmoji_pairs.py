"""Write pairs of OpenMoji's black line art and its coloured emoji, for `controlkit adapt` and `controlkit study`.

npm pack openmoji
python recipes/nano/build_openmoji_pairs.py openmoji-17.0.0.tgz data/openmoji-pairs
"""

import sys

from controlkit.data.pairs import write_pairs
from controlkit.errors import UserError
from controlkit.nano.openmoji import openmoji_pairs

COUNT = 1111
"""So that a thousand remain when a tenth is held out."""

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(f"{write_pairs(sys.argv[2], openmoji_pairs(sys.argv[1], COUNT))} pairs in {sys.argv[2]}")
    except UserError as error:
        sys.exit(str(error))
