"""Sentences with labels: the files' forms, the labels' names, and accuracy."""

from pathlib import Path

import numpy as np
import pytest

from jaxq.evaluate import Labelled, classify, pad_columns, read_labelled
from tests.tiny import BERT, tiny_model, tokenizer

GLUE = (Path(__file__).resolve().parents[2] / "../shared/data/glue").resolve()


def read(tmp_path, text, name="a.tsv"):
    (tmp_path / name).write_text(text, "utf-8")
    return [(row.texts, row.label) for row in read_labelled(tmp_path / name)]


class TestRead:
    @pytest.mark.parametrize(
        "text",
        [
            'A "b, c.\t1\n\nDé\t0\n',
            'sentence\tlabel\nA "b, c.\t1\nDé\t0\n',
            'idx\tLabel\tsentence\n7\t1\tA "b, c.\n8\t0\tDé\n',
            'gj04\t1\t\tA "b, c.\ngj04\t0\t*\tDé\n',
        ],
    )
    def test_sentences(self, text, tmp_path):
        assert read(tmp_path, text) == [(('A "b, c.',), "1"), (("Dé",), "0")]

    @pytest.mark.parametrize("text", ["a\tb\tyes\n", "sentence1\tsentence2\tlabel\tidx\na\tb\tyes\t0\n"])
    def test_pairs(self, text, tmp_path):
        assert read(tmp_path, text) == [(("a", "b"), "yes")]

    def test_commas(self, tmp_path):
        assert read(tmp_path, '"a, b",c,2\n', "a.csv") == [(("a, b", "c"), "2")]

    @pytest.mark.parametrize(
        "text, words",
        [
            ("", "a.tsv: no rows"),
            ("only this\n", "first row is .'only this'.*`sentence, label`"),
            ("sentence\tlabel\n", "first row is"),
            ("a\tb\tc\td\te\n", "first row is"),
            ("a\t1\nb\n", "a.tsv: row 2 has 1 cells, the first one 2"),
        ],
    )
    def test_refused(self, text, words, tmp_path):
        with pytest.raises(ValueError, match=words):
            read(tmp_path, text)

    def test_not_text(self, tmp_path):
        (tmp_path / "a.tsv").write_bytes(bytes(range(256)))
        with pytest.raises(ValueError, match="not UTF-8"):
            read_labelled(tmp_path / "a.tsv")

    def test_glue(self):
        if not GLUE.is_dir():
            pytest.skip(f"{GLUE} is not there")
        rte, cola = read_labelled(GLUE / "rte-dev.tsv"), read_labelled(GLUE / "cola-in_domain_dev.tsv")
        assert len(rte) == 277 and {len(row.texts) for row in rte} == {2} and {row.label for row in rte} == {"0", "1"}
        assert len(cola) == 527 and cola[0].texts == ("The sailors rode the breeze clear of the rocks.",)
        assert {row.label for row in cola} == {"0", "1"}


def test_pairs_make_rows_with_types():
    class Pairs:
        pad_token_id = 0

        def __len__(self):
            return 10

        def __call__(self, first, second, truncation, max_length, verbose):
            rows = [[1, len(a), 2, len(b)][:max_length] for a, b in zip(first, second)]
            rows[0] = rows[0][:2]
            return {"input_ids": rows, "token_type_ids": [[0, 0, 1, 1][: len(row)] for row in rows]}

    tokens, mask, types = pad_columns([("a", "bb"), ("ccc", "d")], Pairs(), 8)
    np.testing.assert_array_equal(tokens, [[1, 1, 0, 0], [1, 2, 2, 1]])
    np.testing.assert_array_equal(mask, [[1, 1, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(types, [[0, 0, 0, 0], [0, 0, 1, 1]])
    assert tokens.dtype == types.dtype == np.int32 and mask.dtype == np.bool_


@pytest.fixture(scope="module")
def model():
    names = {"0": "no", "1": "yes", "2": "perhaps"}
    return tiny_model(BERT, architectures=["BertForSequenceClassification"], id2label=names)


class TestClassify:
    TEXTS = ("def add", "class Thing:\n    name = 'x'" * 3, "return a", "for i in range(10)", "x")

    @pytest.mark.slow
    def test_accuracy(self, model):
        expected = []
        for text in self.TEXTS:
            tokens = np.array([tokenizer()(text, truncation=True, max_length=32)["input_ids"]], np.int32)
            expected.append(int(np.asarray(model.forward(model.params, tokens)).argmax()))
        rows = [Labelled((text,), str(label), "") for text, label in zip(self.TEXTS, expected)]
        assert classify(model.forward, model.params, model, rows, 2, 32).accuracy == 1.0
        names = ["no", "yes", "perhaps"]
        named = [Labelled(row.texts, names[int(row.label)], "") for row in rows[1:]]
        wrong = Labelled(rows[0].texts, names[int(rows[0].label) - 1], "")
        assert classify(model.forward, model.params, model, [wrong, *named], 2, 32).accuracy == 0.8

    def test_labels_that_the_model_has_not(self, model):
        with pytest.raises(ValueError, match="a.tsv: row 3: label 'maybe' is no number.*no, yes, perhaps"):
            classify(model.forward, model.params, model, [Labelled(("a",), "maybe", "a.tsv: row 3")])
        with pytest.raises(ValueError, match="tells 3 apart"):
            classify(model.forward, model.params, model, [Labelled(("a",), "3", "")], length=32)
