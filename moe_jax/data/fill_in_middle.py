"""Fill-in-the-middle (Bavarian et al. 2022): documents whose middle comes last.

    prefix-suffix-middle    <prefix> P <suffix> S <middle> M
    suffix-prefix-middle    <prefix> <suffix> S <middle> P M

The cuts are between tokens, anywhere. Which documents, in which form and where they are cut is a
function of the corpus and a document's place in it.
"""

import numpy as np

from moe_jax.data.corpus import Corpus


class FillInMiddle:
    """A corpus of which a share of the documents is rearranged; each of those has 3 tokens more.

    Args:
      fill: ids that begin prefix, suffix and middle.
      rate: share of the documents.
      spm_rate: share of those in suffix-prefix-middle.
    """

    def __init__(self, corpus: Corpus, fill: tuple[int, int, int], rate: float, spm_rate: float):
        self._corpus, self._fill, self._spm_rate = corpus, fill, spm_rate
        self._seed = int(corpus.fingerprint[:16], 16)
        self._chosen = np.random.default_rng(self._seed).random(len(corpus.lengths)) < rate
        self.lengths = corpus.lengths + 3 * self._chosen
        self.fingerprint, self.skipped, self.name = corpus.fingerprint, corpus.skipped, corpus.name

    def tokens(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Corpus`."""
        ids, weights = self._corpus.tokens(i)
        if not self._chosen[i]:
            return ids, weights
        rng = np.random.default_rng([self._seed, i])
        first, second = np.sort(rng.integers(0, len(ids) - 1, 2)) + 1
        before, middle, after = ids[1:first], ids[first:second], ids[second:-1]
        prefix, suffix, begin = ([token] for token in self._fill)
        if rng.random() < self._spm_rate:
            parts = [prefix, suffix, after, begin, before, middle]
        else:
            parts = [prefix, before, suffix, after, begin, middle]
        ids = np.concatenate([ids[:1], *parts, ids[-1:]], dtype=np.int32)
        return ids, np.ones(len(ids), np.float32)
