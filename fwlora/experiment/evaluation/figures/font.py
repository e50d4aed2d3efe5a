"""The font of all figures, cut down to the characters that they use.

Every PDF embeds the part of the font that it needs. To cut that out of the whole of DejaVu Sans takes most of the time
that a PDF takes; out of a copy with a tenth of its characters, next to nothing.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import matplotlib
from fontTools import subset
from matplotlib.font_manager import fontManager

WHOLE_FAMILY = "DejaVu Sans"
SMALL_FAMILY = "DejaVu Sans fwlora"
_FAMILY_NAME_IDS = (1, 4, 16)
_POSTSCRIPT_NAME_ID = 6
# Latin, Greek, and the punctuation, arrows and operators of labels; what is missing comes from the whole font.
_CHARACTERS = (
    *range(0x20, 0x180),
    *range(0x370, 0x400),
    *range(0x2010, 0x2045),
    *range(0x2190, 0x2194),
    *range(0x2200, 0x2266),
)


@functools.cache
def font_families() -> list[str]:
    """Families to draw with, in order of preference; the first is made for this process at its first call."""
    folder = tempfile.TemporaryDirectory(prefix="fwlora-font-")
    _folders.append(folder)
    options = subset.Options(layout_features=[], hinting=True, glyph_names=True, notdef_outline=True, name_IDs=["*"])
    options.drop_tables += ["FFTM"]
    whole = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    path = Path(folder.name) / "DejaVuSans.ttf"
    with subset.load_font(str(whole), options) as font:
        small = subset.Subsetter(options)
        small.populate(unicodes=_CHARACTERS)
        small.subset(font)
        for record in font["name"].names:
            if record.nameID in _FAMILY_NAME_IDS:
                record.string = SMALL_FAMILY
            elif record.nameID == _POSTSCRIPT_NAME_ID:
                record.string = SMALL_FAMILY.replace(" ", "")
        font.save(path)
    fontManager.addfont(path)
    return [SMALL_FAMILY, WHOLE_FAMILY]


_folders: list[tempfile.TemporaryDirectory[str]] = []  # kept until the process ends, which removes them
