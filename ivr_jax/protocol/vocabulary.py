"""Which token id means what.

One layout serves every model size: text ids first, then special ids, then one id per image-tokenizer code.
`emu35()` is the released table; `micro()` puts the same parts at the front of a small vocabulary.
"""

from __future__ import annotations

import dataclasses

EXTRAS = 205  # Emu3.5's `<|extra_i|>` ids


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
        """All ids: text, special and visual."""
        return self.visual_start + self.visual_size


def emu35(text_size: int = 151_643, visual_size: int = 131_072) -> Vocabulary:
    """Emu3.5's table, by default the released one of 282,926 ids; see `emu_text` for every id."""
    extra = text_size + 3  # after <|endoftext|>, <|im_start|>, <|im_end|>
    img = extra + EXTRAS
    return Vocabulary(
        text_size=text_size,
        pad=text_size,
        bos=extra + 203,
        eos=extra + 204,
        bss=extra + 100,
        boi=img + 1,
        img=img,
        eoi=img + 2,
        eol=extra + 200,
        visual_start=img + 3,
        visual_size=visual_size,
    )


def micro(text_size: int, markers: int, visual_size: int) -> Vocabulary:
    """A small table: `text_size` text ids, ids of their own for `markers` fixed strings, specials, then the codes."""
    first = text_size + markers
    pad, bos, eos, bss, boi, img, eoi, eol = range(first, first + 8)
    return Vocabulary(
        text_size, pad, bos, eos, bss, boi, img, eoi, eol, visual_start=first + 8, visual_size=visual_size
    )
