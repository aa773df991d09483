"""Similarity of sentences: the vectors, the ranks, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

from jaxq.evaluate import embed, pad, read_sts, sts

TABLE = np.random.default_rng(0).standard_normal((27, 5)).astype(np.float32)


class Letters:
    """A tokenizer of lower-case letters: a = 1, b = 2, ...; 0 is padding."""

    pad_token_id = 0

    def __len__(self):
        return 27

    def __call__(self, texts, truncation, max_length, verbose):
        assert truncation
        return {"input_ids": [[ord(c) - 96 for c in text][:max_length] for text in texts]}


def hidden(params, tokens, mask):
    """The letters' vectors, and nonsense where there is no letter."""
    return jnp.where(mask[..., None], params[tokens], jnp.float32(1e6))


def mean(text):
    vector = TABLE[[ord(c) - 96 for c in text]].mean(0)
    return vector / np.linalg.norm(vector)


class TestPad:
    def test_rows(self):
        tokens, mask = pad(["abc", "z"], Letters(), 8)
        np.testing.assert_array_equal(tokens, [[1, 2, 3], [26, 0, 0]])
        np.testing.assert_array_equal(mask, [[True, True, True], [True, False, False]])
        assert tokens.dtype == np.int32 and mask.dtype == np.bool_

    def test_long_sentences_are_cut(self):
        assert pad(["abcdef", "a"], Letters(), 4)[0].shape == (2, 4)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="text.txt: no sentences"):
            pad([], Letters(), 4, source="text.txt")
        with pytest.raises(ValueError, match="token 26 for a vocabulary of 20"):
            pad(["z"], Letters(), 4, vocab_size=20)


class TestEmbed:
    SENTENCES = ("b", "hello", "a" * 15 + "b", "a" * 16 + "b", "ab" * 30, "abc" * 10, "")

    @pytest.mark.parametrize("batch_size", (1, 2, 64))
    def test_means_of_real_tokens_in_the_order_given(self, batch_size):
        found = embed(hidden, TABLE, Letters(), self.SENTENCES, batch_size)
        assert found.shape == (7, 5) and found.dtype == np.float32
        for sentence, vector in zip(self.SENTENCES[:-1], found):
            np.testing.assert_allclose(vector, mean(sentence), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found[-1], 0)

    def test_a_forward_that_pools_by_itself(self):
        found = embed(lambda p, tokens, mask: p[tokens[:, 0]], TABLE, Letters(), ["ab", "z"])
        np.testing.assert_allclose(found, np.stack([mean("a"), mean("z")]), rtol=1e-5, atol=1e-6)

    def test_few_shapes(self):
        seen = set()

        def noting(params, tokens, mask):
            seen.add(tokens.shape)
            return hidden(params, tokens, mask)

        embed(noting, TABLE, Letters(), ["a" * n for n in range(1, 100)], 8, length=40)
        assert seen == {(8, 16), (8, 32), (8, 40)}

    def test_not_finite(self):
        with pytest.raises(ValueError, match="not finite"):
            embed(hidden, TABLE * np.float32(np.nan), Letters(), ["a"])


class TestSTS:
    ROWS = ("abc", "abd", 5.0), ("xyz", "a", 0.0), ("hello", "yellow", 3.5), ("abc", "hello", 1.0), ("zz", "abd", 0.5)

    def test_spearman_of_cosines(self):
        found = sts(hidden, TABLE, Letters(), self.ROWS, batch_size=2)
        cosines = [mean(first) @ mean(second) for first, second, _ in self.ROWS]
        assert found.spearman == pytest.approx(spearmanr(cosines, [s for *_, s in self.ROWS]).statistic)
        assert found.pairs == 5 and found.seconds > 0

    @pytest.mark.parametrize(
        "rows, words",
        [
            ([("a", "b", 1.0)], "1 pairs"),
            ([("a", "b", 1.0), ("c", "d", 1.0)], "scores of all pairs are 1.0"),
            ([("a", "b", 1.0), ("b", "a", 2.0)], "similarities of all pairs"),
        ],
    )
    def test_what_cannot_be_ranked(self, rows, words):
        with pytest.raises(ValueError, match=words):
            sts(hidden, TABLE, Letters(), rows)


class TestRead:
    def test_quotes_and_blank_lines(self, tmp_path):
        file = tmp_path / "pairs.csv"
        file.write_text('"One, two.",Drei ä.,4.5\n\na,b,0\n', "utf-8")
        assert read_sts(file) == [("One, two.", "Drei ä.", 4.5), ("a", "b", 0.0)]

    @pytest.mark.parametrize("line", ("s1,s2,score", "a,b", "a,b,1,2"))
    def test_other_lines(self, line, tmp_path):
        file = tmp_path / "pairs.csv"
        file.write_text(f"a,b,1\n{line}\n", "utf-8")
        with pytest.raises(ValueError, match=r"pairs.csv: row 2 is \['.*sentence,sentence,score"):
            read_sts(file)

    def test_not_text(self, tmp_path):
        file = tmp_path / "pairs.csv"
        file.write_bytes(bytes(range(256)))
        with pytest.raises(ValueError, match="not UTF-8"):
            read_sts(file)
