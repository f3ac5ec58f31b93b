"""The policies of `policy.py` inside a kernel, on one mass per row and group.

Policies and statistics are enums in Python and constexpr integers here: `POLICY_CODE` and `STATISTIC_CODE` translate.
A group counts as visible by its visible keys, never by its mass.
"""

import triton
import triton.language as tl

from mosear.config import Policy, Statistic
from mosear.contract import AR_PARAMS

POLICY_CODE = {Policy.OFF: 0, Policy.BALANCE: 1, Policy.TARGET: 2}
STATISTIC_CODE = {Statistic.SUM: 0, Statistic.MEAN: 1}

OFF = tl.constexpr(POLICY_CODE[Policy.OFF])
BALANCE = tl.constexpr(POLICY_CODE[Policy.BALANCE])
MEAN = tl.constexpr(STATISTIC_CODE[Statistic.MEAN])
VIDEO = tl.constexpr(1)
AUDIO = tl.constexpr(2)
LOG2E = tl.constexpr(1.4426950408889634)

N_PARAMS = tl.constexpr(len(AR_PARAMS))
TAU_VIDEO = tl.constexpr(AR_PARAMS.index("tau_video"))
TAU_AUDIO = tl.constexpr(AR_PARAMS.index("tau_audio"))
RAMP_VIDEO = tl.constexpr(AR_PARAMS.index("ramp_video"))
RAMP_AUDIO = tl.constexpr(AR_PARAMS.index("ramp_audio"))
MOVE_VIDEO = tl.constexpr(AR_PARAMS.index("move_video"))
MOVE_AUDIO = tl.constexpr(AR_PARAMS.index("move_audio"))
SIGMA = tl.constexpr(AR_PARAMS.index("sigma"))
AUDIO_SHARE = tl.constexpr(AR_PARAMS.index("audio_share"))


@triton.jit
def audio_to_video(
    video, audio, video_keys, audio_keys, params_ptr, head, strength, POLICY: tl.constexpr, STATISTIC: tl.constexpr
):
    """Mass that goes from audio to video: strength * (pi(m) - m)_video.

    video, audio f32: their masses; video_keys, audio_keys: their visible keys (exact counts for the statistic `mean`,
    else any number above 0 says "visible"); params_ptr f32 [H, P], head its row(s); strength in 0..1. All broadcast, so
    rows, heads, or both may vary. For `off` it is 0. `m'` = m with this added to video and taken from audio.
    """
    if POLICY == OFF:
        flow = video * 0.0
    else:
        row_ptr = params_ptr + head * N_PARAMS
        total = video + audio
        if POLICY == BALANCE:
            if STATISTIC == MEAN:
                video_value = video / tl.maximum(video_keys, 1).to(tl.float32)
                audio_value = audio / tl.maximum(audio_keys, 1).to(tl.float32)
            else:
                video_value, audio_value = video, audio
            both = video_value + audio_value
            both = tl.where(both > 0.0, both, 1.0)
            over = (audio_value / both - tl.load(row_ptr + TAU_AUDIO)) / tl.load(row_ptr + RAMP_AUDIO)
            flow = audio * tl.load(row_ptr + MOVE_AUDIO) * tl.minimum(tl.maximum(over, 0.0), 1.0)
            over = (video_value / both - tl.load(row_ptr + TAU_VIDEO)) / tl.load(row_ptr + RAMP_VIDEO)
            flow -= video * tl.load(row_ptr + MOVE_VIDEO) * tl.minimum(tl.maximum(over, 0.0), 1.0)
            flow = tl.where(total >= tl.load(row_ptr + SIGMA), flow, 0.0)
        else:
            flow = tl.load(row_ptr + MOVE_AUDIO) * (audio - tl.load(row_ptr + AUDIO_SHARE) * total)
        flow = tl.where((video_keys > 0) & (audio_keys > 0), strength * flow, 0.0)
    return flow


@triton.jit
def reallocate_block(
    masses,
    keys,
    params_ptr,
    head,
    strength,
    changes,
    GROUPS_POW2: tl.constexpr,
    POLICY: tl.constexpr,
    STATISTIC: tl.constexpr,
):
    """Masses after, f32 [ROWS, GROUPS_POW2], from masses before and visible keys of the same shape.

    head, changes [ROWS] or scalars: the head of each row, and whether the row lies at or after first_row. The caller
    weighs each group's own softmax average with the result: no quotient m'_g / m_g is ever formed, so that a group
    whose mass underflows can be raised.
    """
    group = tl.arange(0, GROUPS_POW2)[None, :]
    video = tl.sum(tl.where(group == VIDEO, masses, 0.0), 1)
    audio = tl.sum(tl.where(group == AUDIO, masses, 0.0), 1)
    video_keys = tl.sum(tl.where(group == VIDEO, keys, 0), 1)
    audio_keys = tl.sum(tl.where(group == AUDIO, keys, 0), 1)
    flow = audio_to_video(video, audio, video_keys, audio_keys, params_ptr, head, strength, POLICY, STATISTIC)
    flow = tl.where(changes, flow, 0.0)[:, None]
    return masses + tl.where(group == VIDEO, flow, 0.0) - tl.where(group == AUDIO, flow, 0.0)
