"""A text tokenizer of a given vocabulary whose texts are made up: a plan needs shapes, no words."""

from __future__ import annotations

from ivr_jax.protocol import vocabulary
from ivr_jax.protocol.text import PhraseTokenizer
from ivr_jax.world.language import PHRASES


class Spelling(PhraseTokenizer):
    """The grammar's tables get about the size that they have with the real tokenizer; no ranks file is asked for."""

    def __init__(self, model_vocabulary: vocabulary.Vocabulary):
        super().__init__(PHRASES, model_vocabulary.visual_size)
        self.vocab = model_vocabulary

    def is_blank(self, token: int) -> bool:
        return token < len(self._bytes) + 256 and super().is_blank(token)
