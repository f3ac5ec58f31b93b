"""Linear classifiers of frozen features, and projectors that start from them: a token begins as its label's own word."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mosear_export.model.face import LABELS as FACE_LABELS
from mosear_export.model.projector import Projector

FACE_DECAY, LOGIT_DECAY = 0.3, 1e-3  # the best of 15 pairs on 60 training photos of each label
REST = 0.1  # size of the random part of a projector, beside its classifier's


def fit(
    values: Tensor, labels: Sequence[str], emotion: Sequence[str], *, decay: Tensor | float, steps: int = 60
) -> Tensor:
    """Multinomial logistic regression with an L2 penalty (decay: one factor, or one for each feature [F]): weights [K, F + 1]
    (bias last) over standardised values [n, F]."""
    classes = torch.tensor([labels.index(str(e)) for e in emotion])
    inputs = F.pad(values, (0, 1), value=1.0)
    weights = torch.zeros(len(labels), inputs.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(inputs @ weights.T, classes) + (decay * weights[:, :-1].square()).sum()
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call, unused-ignore]
    return weights.detach()


def face_decay(features: int) -> Tensor:
    """Decay [F] of a face's classifier: the face net's own logits, the last of its features, are nearly free and the rest is
    held short, so that it corrects the net's judgement and does not learn photos by heart."""
    decay = torch.full((features,), FACE_DECAY)
    decay[-len(FACE_LABELS) :] = LOGIT_DECAY
    return decay


def words(labels: Mapping[str, int], embedding: Tensor) -> Tensor:
    """Directions [K, d] of the labels' first tokens: embedding rows without what they share, each of length 1 (0 where all
    labels begin with the same token)."""
    rows = embedding[list(labels.values())]
    return F.normalize(rows - rows.mean(0), dim=-1)


def start_from(projector: Projector, classifier: Tensor, directions: Tensor, values: Tensor) -> None:
    """Let tokens be sums of the labels' directions, weighted by the classifier's logits, and a little of all else.

    classifier [K, F + 1] over standardised values [n, F]; directions [K, d].
    """
    weight, bias = directions.T @ classifier[:, :-1], directions.T @ classifier[:, -1]
    size = (values @ weight.T + bias).square().mean().sqrt().clamp(min=torch.finfo(values.dtype).tiny)
    projector.linear.weight.mul_(REST).add_(weight / size)
    projector.linear.bias.mul_(REST).add_(bias / size)


def reread(projector: Projector, classifier: Tensor, values: Tensor) -> None:
    """Let a trained face projector read a better classifier where it read the face net's own logits, as large as these.

    classifier [7, F + 1], rows in the order of the net's labels, over standardised values [n, F].
    """
    said = F.pad(values, (0, 1), value=1.0) @ classifier.T
    rows = classifier / said.std(0)[:, None]
    rows[:, -1] -= said.mean(0) / said.std(0)
    weight, count = projector.linear.weight, len(classifier)
    reading = weight[:, -count:].clone()  # [d, 7]
    weight[:, -count:] = 0
    weight.add_(reading @ rows[:, :-1])
    projector.linear.bias.add_(reading @ rows[:, -1])
