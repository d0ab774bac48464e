"""A small backbone in the place of ResNet50."""

import pytest


@pytest.fixture
def tiny(monkeypatch):
    """Like the real ones: a batch-normalised convolution, max pooling, no top."""
    keras = pytest.importorskip("keras")
    from mura_course.keras_tools import backbones

    def build(weights, input_shape, pooling, name):
        x = inputs = keras.Input(input_shape)
        x = keras.layers.Conv2D(6, 3, strides=2, use_bias=False, name="conv")(x)
        x = keras.layers.BatchNormalization()(x)
        return keras.Model(inputs, keras.layers.GlobalMaxPooling2D()(keras.layers.ReLU()(x)), name=name)

    monkeypatch.setitem(backbones.BACKBONES, "ResNet50", backbones.Backbone(build, "tf", 32))
