"""How surely face and voice disagree, and what a conflict report makes of it."""

import math

import pytest

from mosear.config import ConflictConfig
from mosear.errors import ConfigError
from mosear.runtime.disagreement import disagree, disagreement
from mosear.runtime.request import Judgement


def judgement(**shares: float) -> Judgement:
    """Scores that lie below their logarithms, as those of a whole vocabulary do."""
    scores = {label: math.log(share) - 3 for label, share in shares.items()}
    return Judgement(label=max(scores, key=scores.__getitem__), scores=scores)


def test_the_score_is_the_chance_that_two_draws_differ() -> None:
    face, voice = judgement(happy=0.8, sad=0.2), judgement(happy=0.4, sad=0.6)
    assert disagreement(face, voice, ConflictConfig()) == pytest.approx(0.8 * 0.6 + 0.2 * 0.4)
    assert disagreement(face, voice, ConflictConfig(face_temperature=1e6)) == pytest.approx(0.5, abs=1e-5)
    soft = [math.sqrt(0.4), math.sqrt(0.6)]
    heard = [x / sum(soft) for x in soft]
    assert disagreement(face, voice, ConflictConfig(voice_temperature=2.0)) == pytest.approx(
        0.8 * heard[1] + 0.2 * heard[0]
    )


def test_a_threshold_decides_else_the_labels() -> None:
    face, voice = judgement(happy=0.8, sad=0.2), judgement(happy=0.4, sad=0.6)
    assert disagree(face, voice, ConflictConfig()) and not disagree(face, face, ConflictConfig())
    assert disagree(face, voice, ConflictConfig(threshold=0.5)) and not disagree(
        face, voice, ConflictConfig(threshold=0.6)
    )


@pytest.mark.parametrize(
    ("wrong", "message"), [({"threshold": 1.5}, "threshold is 1.5"), ({"face_temperature": 0.0}, "above 0")]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConflictConfig(**wrong)
