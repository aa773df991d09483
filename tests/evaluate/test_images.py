"""Images: what is read, what transformers' own processors make of them, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from jaxq.evaluate import classify_images, preprocess, read_images
from tests.tiny import OPT, PREPROCESSOR, VIT, tiny_model

RANDOM = np.random.default_rng(0)
GREY, COLOURED = (RANDOM.integers(0, 256, shape, np.uint8) for shape in ((3, 20, 14), (3, 20, 14, 3)))
LABELS = np.array([0, 4, 2])


def model_of_pixels(side=8, channels=3, **settings):
    model = tiny_model(VIT, image_size=side, num_channels=channels)
    return replace(model, preprocessor=PREPROCESSOR | settings)


class TestRead:
    @pytest.mark.parametrize("images", (GREY, COLOURED), ids=("grey", "coloured"))
    def test_what_was_written(self, images, tmp_path):
        np.savez_compressed(tmp_path / "a.npz", images=images, labels=LABELS.astype(np.uint8))
        found, labels = read_images(tmp_path / "a.npz")
        np.testing.assert_array_equal(found, images)
        np.testing.assert_array_equal(labels, LABELS)
        assert labels.dtype == np.int64

    @pytest.mark.parametrize(
        "arrays, words",
        [
            (dict(images=GREY), "labels is not a file.*`images` and `labels`"),
            (dict(labels=LABELS), "images is not a file"),
            (dict(images=GREY.astype(np.float32), labels=LABELS), r"float32 \[3, 20, 14\].*uint8"),
            (dict(images=GREY[0], labels=LABELS), r"uint8 \[20, 14\]"),
            (dict(images=COLOURED[..., :2], labels=LABELS), r"\[3, 20, 14, 2\]"),
            (dict(images=GREY[:0], labels=LABELS[:0]), r"\[0, 20, 14\]"),
            (dict(images=GREY, labels=LABELS[:2]), r"labels are int64 \[2\]; 3 images"),
            (dict(images=GREY, labels=LABELS.astype(np.float32)), "labels are float32"),
            (dict(images=GREY, labels=np.array([0, "a", 2], object)), "plain arrays.*allow_pickle=False"),
        ],
    )
    def test_refused(self, arrays, words, tmp_path):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(ValueError, match=f"a.npz: .*{words}"):
            read_images(tmp_path / "a.npz")

    def test_other_files(self, tmp_path):
        (tmp_path / "text.npz").write_text("not one")
        np.save(tmp_path / "array.npy", GREY)
        np.savez(tmp_path / "cut.npz", images=GREY, labels=LABELS)
        (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:500])
        (tmp_path / "empty.npz").write_bytes(b"")
        for name in ("text.npz", "array.npy", "cut.npz", "empty.npz"):
            with pytest.raises(ValueError, match=f"{name}: not an npz file of plain arrays"):
                read_images(tmp_path / name)
        with pytest.raises(FileNotFoundError):
            read_images(tmp_path / "none.npz")


class TestPreprocess:
    @pytest.mark.parametrize(
        "name, settings",
        [
            ("ViT", {}),
            ("ViT", dict(resample=3, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.1])),
            ("ViT", dict(do_normalize=False, resample=0)),
            ("ViT", dict(do_rescale=False, size={"height": 24, "width": 24})),
            ("DeiT", dict(size={"height": 12, "width": 10}, crop_size={"height": 8, "width": 8})),
        ],
    )
    def test_beside_transformers(self, name, settings):
        transformers = pytest.importorskip("transformers")
        theirs = getattr(transformers, f"{name}ImageProcessorPil", None)
        if theirs is None:
            pytest.skip("this version of transformers has no processors that go by PIL alone")
        settings = dict(size={"height": 8, "width": 8}) | settings
        side = settings.get("crop_size", settings["size"])["height"]
        model = model_of_pixels(side, image_processor_type=f"{name}ImageProcessor", **settings)
        expected = np.stack(theirs(**settings)(list(COLOURED))["pixel_values"]).transpose(0, 2, 3, 1)
        found = preprocess(COLOURED, model)
        assert found.dtype == np.float32 and found.shape == (3, side, side, 3)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    def test_grey_images_have_their_channel_as_often_as_needed(self):
        single = model_of_pixels(channels=1, image_mean=[0.5], image_std=[0.5])
        three, one = preprocess(GREY, model_of_pixels()), preprocess(GREY, single)
        assert one.shape == (3, 8, 8, 1)
        np.testing.assert_array_equal(three, np.repeat(one, 3, axis=-1))
        np.testing.assert_array_equal(three, preprocess(np.repeat(GREY[..., None], 3, axis=-1), model_of_pixels()))

    def test_one_number_is_height_and_width(self):
        old = model_of_pixels()
        old = replace(old, preprocessor={"feature_extractor_type": "ViTFeatureExtractor", "size": 8})
        np.testing.assert_array_equal(preprocess(GREY, old), preprocess(GREY, model_of_pixels()))

    @pytest.mark.parametrize(
        "settings, words",
        [
            (dict(do_resize=False), r"\[20, 14, 3\], tiny reads \[8, 8, 3\]"),
            (dict(size={"height": 9, "width": 8}), r"\[9, 8, 3\]"),
            (dict(size={"shortest_edge": 8}), "size {'shortest_edge': 8} is not supported"),
            (dict(image_mean=[0.5, 0.5]), r"image_mean \[0.5, 0.5\] does not fit 3 channels"),
            (dict(image_std="a half"), "image_std 'a half' does not fit 3 channels"),
            (dict(resample=9), "resample 9 is not supported; give 0 to 5"),
            (dict(image_processor_type="CLIPImageProcessor"), "CLIPImageProcessor is not supported"),
            (dict(do_center_crop=True, crop_size=16), r"\[8, 8\] cannot be cropped to \[16, 16\]"),
        ],
    )
    def test_refused(self, settings, words):
        with pytest.raises(ValueError, match=words):
            preprocess(GREY, model_of_pixels(**settings))

    def test_models_that_read_no_images(self):
        with pytest.raises(ValueError, match="tiny reads text"):
            preprocess(GREY, tiny_model(OPT))
        with pytest.raises(ValueError, match="no preprocessor_config.json"):
            preprocess(GREY, replace(model_of_pixels(), preprocessor=None))
        with pytest.raises(ValueError, match=r"\[8, 8, 3\], tiny reads \[8, 8, 1\]"):
            preprocess(COLOURED, model_of_pixels(channels=1))


def test_accuracy_of_a_model():
    model = model_of_pixels()
    labels = np.asarray(model.forward(model.params, preprocess(COLOURED, model))).argmax(axis=1)
    assert classify_images(model.forward, model.params, model, COLOURED, labels, 2).accuracy == 1.0
    found = classify_images(model.forward, model.params, model, COLOURED, (labels + np.array([0, 1, 0])) % 5, 2)
    assert found.accuracy == pytest.approx(2 / 3) and found.examples == 3
