"""Our own metrics beside Triton Server's, on the same page (`mosear_*`). Runs inside the Python backend's stub."""

import threading
from typing import Any

import triton_python_backend_utils as pb_utils

from mosear.config import ModelConfig
from mosear.runtime.decode import Prefilled

MS_BUCKETS = [50.0, 100.0, 200.0, 300.0, 500.0, 750.0, 1000.0, 1500.0, 2000.0, 3000.0, 5000.0, 10000.0, 30000.0]
SHARE_BUCKETS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
TOKENS_AT_ONCE = 64
Metric = Any  # of the Python backend, which has no types
_LOCK = threading.Lock()  # around every change: from two threads at once, these end the server with SIGSEGV


def _family(name: str, about: str, kind: str) -> Metric:
    return pb_utils.MetricFamily(name=f"mosear_{name}", description=about, kind=getattr(pb_utils.MetricFamily, kind))


class AnswerMetrics:
    """Of the models `mosear` and `mosear_unary`: time from a request's arrival to the first words of its answer."""

    def __init__(self, model: str) -> None:
        self.family = _family("time_to_first_token_ms", "From a request's arrival to its first words, ms", "HISTOGRAM")
        self.first = self.family.Metric(labels={"model": model}, buckets=MS_BUCKETS)
        self.running_family = _family("running", "Requests under way", "GAUGE")
        self.now = self.running_family.Metric(labels={"model": model})

    def running(self, count: int) -> None:
        with _LOCK:
            self.now.set(count)

    def first_token(self, ms: float) -> None:
        with _LOCK:
            self.first.observe(ms)


class DecoderMetrics:
    """Of the model `decoder`: slots, queue, tokens, attention masses and expert use."""

    def __init__(self, config: ModelConfig, slots: int) -> None:
        gauges = {"slots": "Rows of the decoder's cache", "slots_in_use": "Rows that hold a request's cache",
                  "queue_length": "Requests that wait for a slot"}  # fmt: skip
        self.families = {name: _family(name, about, "GAUGE") for name, about in gauges.items()}
        self.families["tokens"] = _family("tokens_total", "Tokens written", "COUNTER")
        self.plain = {name: family.Metric(labels={}) for name, family in self.families.items()}
        self.plain["slots"].set(slots)
        self.tokens = 0  # written and not yet counted
        self.mass_family = _family(
            "modality_mass", "Attention mass of a modality, mean of layers and heads", "HISTOGRAM"
        )
        self.mass = {
            (moment, index): self.mass_family.Metric(labels={"group": group, "moment": moment}, buckets=SHARE_BUCKETS)
            for moment in ("before", "after")
            for index, group in enumerate(config.groups)
        }
        self.expert_family = _family("expert_weight", "Weight of an expert, mean of layers and positions", "HISTOGRAM")
        self.expert = {
            (g, e): self.expert_family.Metric(labels={"group": group, "expert": str(e)}, buckets=SHARE_BUCKETS)
            for g, group in enumerate(config.groups)
            for e in range(config.mose.experts)
        }

    def load(self, *, slots_in_use: int, queue_length: int) -> None:
        with _LOCK:
            self.plain["slots_in_use"].set(slots_in_use)
            self.plain["queue_length"].set(queue_length)
            self._count_tokens()

    def token(self) -> None:
        """Counted with the next `load`, or once for many: a change of a metric waits for the server's process."""
        with _LOCK:
            self.tokens += 1
            if self.tokens == TOKENS_AT_ONCE:
                self._count_tokens()

    def _count_tokens(self) -> None:
        self.plain["tokens"].increment(self.tokens)
        self.tokens = 0

    def prefilled(self, event: Prefilled) -> None:
        mean = event.mass.mean(0)  # [2, G]
        with _LOCK:
            for row, moment in enumerate(("before", "after")):
                for group, value in enumerate(mean[row]):
                    self.mass[moment, group].observe(float(value))
            for (group, expert), metric in self.expert.items():
                if event.experts[group].any():  # a modality that is not there uses none
                    metric.observe(float(event.experts[group, expert]))
