"""Which words the people who describe one picture agree on.

Axes:  caption   of the training split      piece   of the vocabulary

Somebody who writes "dog" saw one, and so did the others; "with" stands in whatever sentence. That
tells words of the picture from words of the sentence, for which neither frequency nor a list of
function words is needed: "with" is as frequent as "dog" in many a data set.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int64

from cpfean.data.tokens import Tokens

# A piece that has been seen in few captions is taken to be agreed on so much, as if these were
# captions more: most rare words name things.
_BEFORE, _CAPTIONS = 0.3, 5


def word_consensus(
    tokens: Tokens, image_of: Int64[np.ndarray, "caption"], *, num_pieces: int
) -> Float[np.ndarray, "piece"]:
    """For each piece, how far captions of an image agree on it beyond chance, in [0, 1].

        p = share of all captions that have it
        q = of two captions of an image, one of which has it: how often the other has it too
        consensus = (q - p) / (1 - p), 0 at least

    q is that of all images with two captions or more, and 0.3 in five captions besides. Without
    such images there is nothing to agree on, and what is left is that frequent pieces count less.

    Args:
        tokens: of the captions; pieces of no word are not counted.
        image_of: the image of each caption.
        num_pieces: of the vocabulary.

    Source: Fleiss' kappa of one category (Psychological Bulletin, 1971), smoothed.
    """
    caption = np.repeat(np.arange(tokens.num_captions), np.diff(tokens.offsets))
    of_word = tokens.word_index >= 0
    # Each piece once a caption.
    seen = np.unique(caption[of_word] * np.int64(num_pieces) + tokens.pieces[of_word])
    caption, piece = np.divmod(seen, num_pieces)
    image = np.asarray(image_of)[caption]
    captions_of = np.bincount(image_of)
    share = np.bincount(piece, minlength=num_pieces) / tokens.num_captions

    groups, counts = np.unique(image * np.int64(num_pieces) + piece, return_counts=True)
    image, piece = np.divmod(groups, num_pieces)
    others = captions_of[image] - 1
    pairs = others > 0
    having = np.bincount(piece[pairs], weights=counts[pairs], minlength=num_pieces)
    shared = counts[pairs] * (counts[pairs] - 1) / others[pairs]
    agreed = np.bincount(piece[pairs], weights=shared, minlength=num_pieces)

    agreement = (agreed + _BEFORE * _CAPTIONS) / (having + _CAPTIONS)
    everywhere = share >= 1
    beyond = np.where(everywhere, 0.0, agreement - share) / np.where(everywhere, 1.0, 1 - share)
    return beyond.clip(0, 1)
