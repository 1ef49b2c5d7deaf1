"""Which token id means what.

One layout serves every model size: text ids first, then special ids, then one id per image-tokenizer code.
`emu35()` is the released table; `micro()` puts the same parts at the front of a small vocabulary.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Ids of one vocabulary.  Text is [0, text_size), code c of the image tokenizer is `visual_start + c`.

    Attributes:
      pad, bos, eos: padding, begin and end of a sequence.
      bss: start of the answer.
      boi, img, eoi, eol: start of an image block, start of its grid, end of the block, end of a grid row.
    """

    text_size: int
    pad: int
    bos: int
    eos: int
    bss: int
    boi: int
    img: int
    eoi: int
    eol: int
    visual_start: int
    visual_size: int

    @property
    def size(self) -> int:
        return self.visual_start + self.visual_size


def emu35() -> Vocabulary:
    """The released Emu3.5 table: 282,926 ids."""
    extra = 151_646
    return Vocabulary(
        text_size=151_643,
        pad=151_643,
        bos=extra + 203,
        eos=extra + 204,
        bss=extra + 100,
        boi=151_852,
        img=151_851,
        eoi=151_853,
        eol=extra + 200,
        visual_start=151_854,
        visual_size=131_072,
    )


def micro(text_size: int, markers: int, visual_size: int) -> Vocabulary:
    """A small table: `text_size` text ids, ids of their own for `markers` fixed strings, specials, then the codes."""
    first = text_size + markers
    pad, bos, eos, bss, boi, img, eoi, eol = range(first, first + 8)
    return Vocabulary(
        text_size, pad, bos, eos, bss, boi, img, eoi, eol, visual_start=first + 8, visual_size=visual_size
    )
