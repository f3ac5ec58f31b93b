"""Do face and voice disagree: the probability that two labels, one drawn from what each alone says, are different."""

import math

from mosear.config import ConflictConfig
from mosear.runtime.request import Judgement


def disagreement(face: Judgement, voice: Judgement, config: ConflictConfig) -> float:
    """1 - sum over labels of p_face * p_voice, from 0 to 1. Each is made softer or harder by its temperature beforehand:
    p = softmax(scores / T), Guo et al. 2017 (arXiv 1706.04599)."""
    seen, heard = _calibrated(face, config.face_temperature), _calibrated(voice, config.voice_temperature)
    return 1 - sum(share * heard[label] for label, share in seen.items())


def disagree(face: Judgement, voice: Judgement, config: ConflictConfig) -> bool:
    """What the report says: by the threshold, or whether the labels differ where there is none."""
    if config.threshold is None:
        return face.label != voice.label
    return disagreement(face, voice, config) >= config.threshold


def _calibrated(judgement: Judgement, temperature: float) -> dict[str, float]:
    top = max(judgement.scores.values())
    weights = {label: math.exp((score - top) / temperature) for label, score in judgement.scores.items()}
    return {label: weight / sum(weights.values()) for label, weight in weights.items()}
