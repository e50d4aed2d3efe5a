"""The font of all figures, cut down to the characters that they use.

Every PDF embeds a subset of the font. Subsetting all of DejaVu Sans dominates the time of writing a PDF; subsetting a
copy that was reduced before is negligible.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from fontTools import subset
from matplotlib.font_manager import findfont, fontManager, get_font

WHOLE_FAMILY = "DejaVu Sans"
SMALL_FAMILY = "DejaVu Sans fwlora"
# Families with Chinese, Japanese and Korean characters, the first installed of which is used where a name needs it.
CJK_FAMILIES = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK KR", "Source Han Sans", "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei", "Droid Sans Fallback", "IPAGothic", "Hiragino Sans", "PingFang SC", "Arial Unicode MS",
)  # fmt: skip
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
    """Return font families in order of preference; the first call makes the reduced font of this process."""
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
    installed = {font.name for font in fontManager.ttflist}
    return [SMALL_FAMILY, WHOLE_FAMILY, *[name for name in CJK_FAMILIES if name in installed][:1]]


def find_missing_characters(texts: Iterable[str]) -> str:
    """Return the characters for which no font of the figures has a glyph, each once; figures show boxes for them."""
    fonts = [get_font(findfont(family)) for family in font_families()]
    characters = dict.fromkeys(character for text in texts for character in text if not character.isspace())
    return "".join(each for each in characters if not any(font.get_char_index(ord(each)) for font in fonts))


_folders: list[tempfile.TemporaryDirectory[str]] = []  # kept until the process ends, which removes them
