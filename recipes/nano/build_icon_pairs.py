"""Write a thousand pairs of each of some conditions from the icons, for `controlkit adapt` and `controlkit train`.

python recipes/nano/build_icon_pairs.py data/nano/icons.npz data/icon-pairs raindrop low_light
"""

import sys
from pathlib import Path

from controlkit import conditions
from controlkit.data.pairs import write_pairs
from controlkit.errors import UserError
from controlkit.nano.icons import IconSets
from controlkit.studies.new_condition import icon_pairs

COUNT = 1000

if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    try:
        icons, out = IconSets(sys.argv[1]), Path(sys.argv[2])
        for condition in map(conditions.find, sys.argv[3:]):
            folder = out / condition.name
            print(f"{write_pairs(folder, icon_pairs(icons, condition, COUNT))} pairs in {folder}")
    except UserError as error:
        sys.exit(str(error))
