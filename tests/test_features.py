"""Ready features in place of a clip: taken as the encoders' own, refused where they are not."""

import numpy as np
import pytest
from toy import toy_config

from mosear.errors import RequestError
from mosear.runtime.features import check_features, feature_schema
from mosear.runtime.request import Request

CONFIG = toy_config()
FACE = np.zeros((2, CONFIG.face.feature_size), np.float32)
VOICE = np.zeros((CONFIG.voice.tokens, CONFIG.voice.feature_size), np.float32)


def test_right_features_pass() -> None:
    check_features(Request(features={"face": FACE, "voice": VOICE}, feature_schema="abc"), CONFIG, "abc")


BAD = {
    "of other encoders": (
        Request(features={"face": FACE}, feature_schema="xyz"),
        "'xyz', this engine's encoders are 'abc'",
    ),
    "without a schema": (Request(features={"face": FACE}), "feature_schema is ''"),
    "beside a clip": (Request(features={"face": FACE}, feature_schema="abc", video=b"x"), "one or the other"),
    "of another width": (Request(features={"face": FACE[:, 1:]}, feature_schema="abc"), "face_features is float32"),
    "of too many faces": (Request(features={"face": np.tile(FACE, (9, 1))}, feature_schema="abc"), "from 1 to 3"),
    "of no face": (Request(features={"face": FACE[:0]}, feature_schema="abc"), "from 1 to 3"),
    "of doubles": (Request(features={"voice": VOICE.astype(np.float64)}, feature_schema="abc"), "float64"),
    "with NaN": (Request(features={"voice": VOICE + np.nan}, feature_schema="abc"), "finite"),
    "of something else": (
        Request(features={"smell": VOICE}, feature_schema="abc"),
        "'smell': known are face, scene, voice",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_features_are_named(case: str) -> None:
    request, said = BAD[case]
    with pytest.raises(RequestError) as caught:
        check_features(request, CONFIG, "abc")
    assert said in str(caught.value)


def test_a_schema_follows_the_encoders_alone() -> None:
    files = {"voice.onnx.data": "1", "face.onnx.data": "2", "decoder.onnx.data": "3"}
    assert feature_schema(files) == feature_schema({**files, "decoder.onnx.data": "4"})
    assert feature_schema(files) != feature_schema({**files, "face.onnx.data": "4"})
