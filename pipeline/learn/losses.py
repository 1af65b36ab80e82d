"""Losses for long tails, fed by the class vectors of a manifest.

In: logits ``[B, K]`` and int64 labels ``[B]`` of one rank; per-class float64 ``[K]`` vectors of a manifest (``log_q``,
``weights(...)``, or columns of ``per_class()``). Out: a scalar to call ``backward`` on. Guarantees: computed in float32
or wider, under autocast too; a class without images (log prior ``-inf``, weight 0) changes nothing for the others, and
an image of such a class, which no draw holds but validation may, is left out instead of making the loss infinite.

All are of the *global* batch. Means: each rank divides by what all ranks together count, times their number, as DDP
averages gradients over ranks. AUC over pairs and kappa are no means: each rank computes them for the images of all,
with gradients through its own. The mean of the ranks' values is the loss; one rank's value alone need not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy

from pipeline.errors import UsageError


def wide(logits: Tensor) -> Tensor:
    """Float16 and bfloat16 become float32; float32 and float64 stay."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def global_mean(values: Tensor, weight: Tensor) -> Tensor:
    """sum(weight * values) / sum(weight) over the batches of all ranks, times their number for DDP; 0 of nothing.

    ``values``, ``weight``: ``[B]``. Where a weight is 0 the value must still be finite.
    """
    count, ranks = weight.detach().sum(), 1
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(count)
        ranks = distributed.get_world_size()
    return ranks * (weight * values).sum() / torch.where(count > 0, count, torch.ones_like(count))


def global_batch(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[N, K]`` and labels ``[N]`` of the batches of all ranks, in their order, which may differ in size.

    Gradients flow into this rank's own rows. What is computed of them goes through ``shared``.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return logits, labels
    sizes = torch.cat(_of_ranks(torch.tensor([len(labels)], device=labels.device))).tolist()
    joined: list[Tensor] = []
    for own in (logits, labels):
        padded = own.new_zeros((max(sizes), *own.shape[1:]))  # collectives want equal shapes
        padded[: len(own)] = own.detach()
        parts = [part[:size] for part, size in zip(_of_ranks(padded), sizes, strict=True)]
        parts[distributed.get_rank()] = own
        joined.append(torch.cat(parts))
    return joined[0], joined[1]


def _of_ranks(own: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, own)
    return parts


def shared(value: Tensor) -> Tensor:
    """``value``, a loss of the ``global_batch``, with its gradient times the number of ranks.

    Each rank has the part of the gradient that flows through its own rows: they must be summed, and DDP averages.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    return value + (distributed.get_world_size() - 1) * (value - value.detach())


def _vector(values: ArrayLike, what: str, *, finite: bool) -> Tensor:
    array = np.asarray(values, dtype=np.float64)
    low_is_bad = not np.isfinite(array).all() if finite else np.isnan(array).any() or np.isposinf(array).any()
    if array.ndim != 1 or not len(array) or low_is_bad:
        raise UsageError(f"{what} must be one {'finite number' if finite else 'number or -inf'} for each class")
    return torch.from_numpy(array.copy())


class CrossEntropy(nn.Module):
    """Cross-entropy with class weights and an offset that is added to the logits in training alone.

    -sum_i w_y log softmax(z_i + offset)_y / sum_i w_y. ``CrossEntropy()`` is the plain one. ``weight``: float64
    ``[K]``, from ``manifest.weights(kind)``; the scale cancels. ``offset``: float64 ``[K]``; see ``balanced_softmax``.
    """

    weight: Tensor | None
    offset: Tensor | None

    def __init__(self, weight: ArrayLike | None = None, offset: ArrayLike | None = None) -> None:
        super().__init__()
        made = None if weight is None else _vector(weight, "weights", finite=True)
        if made is not None and (made < 0).any():
            raise UsageError("weights must not be negative")
        self.register_buffer("weight", made)
        self.register_buffer("offset", None if offset is None else _vector(offset, "an offset", finite=False))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of ``[B, K]`` logits and int64 ``[B]`` labels."""
        with torch.autocast(logits.device.type, enabled=False):
            z = wide(logits)
            kept = torch.ones_like(labels, dtype=z.dtype)
            own = labels
            if self.offset is not None:
                offset = self.offset.to(z.dtype)
                possible = torch.isfinite(offset)[labels]
                # Any possible class will do: its value is multiplied by 0, and an infinity would not be.
                own = torch.where(possible, labels, offset.argmax())
                kept, z = possible.to(z.dtype), z + offset
            if self.weight is not None:
                kept = kept * self.weight.to(z.dtype)[labels]
            return global_mean(cross_entropy(z, own, reduction="none"), kept)


def balanced_softmax(log_prior: ArrayLike, tau: float = 1.0) -> CrossEntropy:
    """Cross-entropy of ``z + tau * log_prior``: the logits learn what is left, a uniform prior at ``tau`` 1.

    Ren et al., NeurIPS 2020 (balanced softmax, tau 1); Menon et al., ICLR 2021 (logit adjustment). ``log_prior`` is
    ``manifest.log_q``, the prior of the draws. Predict with the logits as they are.
    """
    if not tau >= 0:
        raise UsageError(f"tau must be 0 or more, not {tau}")
    prior = np.asarray(log_prior, dtype=np.float64)
    return CrossEntropy(offset=np.where(np.isfinite(prior), tau * np.where(np.isfinite(prior), prior, 0.0), prior))


class DeferredCrossEntropy(CrossEntropy):
    """Plain cross-entropy until the share ``start`` of training is done, then with ``weight``.

    Deferred re-weighting of Cao et al., NeurIPS 2019, who switch at 160 of 200 epochs. Call ``set_progress`` with the
    share done, from 0 to 1, before each epoch or step; it is part of the module's state.
    """

    _full: Tensor
    _is_on: Tensor

    def __init__(self, weight: ArrayLike, start: float = 0.8) -> None:
        if not 0 <= start <= 1:
            raise UsageError(f"start is a share of training from 0 to 1, not {start}")
        super().__init__(weight=weight)
        assert self.weight is not None
        self.start = start
        self.register_buffer("_full", self.weight.clone())
        self.set_progress(0.0)

    def set_progress(self, done: float) -> None:
        """``done``: the share of training that is behind, from 0 to 1."""
        if not 0 <= done <= 1:
            raise UsageError(f"progress is a share of training from 0 to 1, not {done}")
        self.weight = self._full.clone() if done >= self.start else (self._full > 0).to(self._full.dtype)


class Focal(nn.Module):
    """torchvision's sigmoid focal loss, one class against the rest, summed over classes; mean over images.

    Lin et al., ICCV 2017. ``alpha`` from 0 to 1 weighs the true class, negative: not at all. It learns sigmoids, not a
    softmax, so that priors of a softmax (``pipeline.learn.priors``) do not apply to it.
    """

    def __init__(self, gamma: float = 2.0, alpha: float = 0.25) -> None:
        super().__init__()
        self.gamma, self.alpha = gamma, alpha

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of ``[B, K]`` logits and int64 ``[B]`` labels."""
        from torchvision.ops import sigmoid_focal_loss

        with torch.autocast(logits.device.type, enabled=False):
            z = wide(logits)
            truth = nn.functional.one_hot(labels, z.shape[1]).to(z.dtype)
            each = sigmoid_focal_loss(z, truth, alpha=self.alpha, gamma=self.gamma, reduction="none").sum(1)
            return global_mean(each, torch.ones_like(each))


# -- one class against the rest ---------------------------------------------------------------------------------------


class _Rare(nn.Module):
    """Which classes, by id."""

    classes: Tensor

    def __init__(self, classes: Sequence[int]) -> None:
        super().__init__()
        if not len(classes) or len(set(classes)) != len(classes) or min(classes) < 0:
            raise UsageError(f"expected ids of some classes, each once, not {list(classes)[:5]}")
        self.register_buffer("classes", torch.tensor(list(classes)))

    def _positive(self, labels: Tensor) -> Tensor:
        return labels[:, None] == self.classes


class PairwiseAUC(_Rare):
    """mean over (image of c, other image) of max(0, margin - (h_i - h_j))^2, then over the named classes c.

    A surrogate of 1 - AUC (squared hinge: Gao et al., ICML 2013; LibAUC's PairwiseAUCLoss), h the log-odds of class c
    under the softmax. For fine-tuning on a few rare classes: it unlearns calibration, so that no prior can be corrected
    afterwards. Pairs are those of the global batch; a class with no pair there counts for nothing. Memory is of N x P,
    N images and P of them of named classes, however many classes are named.
    """

    def __init__(self, classes: Sequence[int], margin: float = 1.0) -> None:
        super().__init__(classes)
        self.margin = margin

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of ``[B, K]`` logits and int64 ``[B]`` labels."""
        with torch.autocast(logits.device.type, enabled=False):
            z, truth = global_batch(wide(logits), labels)
            rows = torch.isin(truth, self.classes).nonzero()[:, 0]
            own = truth[rows]  # [P]: the class of each image of a named class
            odds = log_odds(z, own)  # [N, P]: of every image, for that class
            others = truth[:, None] != own
            gap = (self.margin - (odds[rows, torch.arange(len(rows), device=rows.device)] - odds)).clamp(min=0)
            count = (own[:, None] == own).sum(0) * others.sum(0)  # pairs of the class
            each = (gap.square() * others).sum(0) / count.clamp(min=1)
            return shared(each.sum() / max(1, own[count > 0].unique().numel()))


def log_odds(logits: Tensor, classes: Tensor) -> Tensor:
    """``[B, R]``: log(p_c / (1 - p_c)) of the softmax for these classes; 0 where there is no other class."""
    if logits.shape[1] == 1:
        return logits[:, classes] * 0
    # log(1 - p) is exact from p where p is at most a half, which only the largest can exceed: that one is left out.
    top, everything = logits.argmax(1, keepdim=True), logits.logsumexp(1, keepdim=True)
    without_top = logits.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)
    own, is_top = logits[:, classes], classes == top
    log_p = (own - everything).masked_fill(is_top, -1.0)  # any p below 1: it is not used
    return own - torch.where(is_top, without_top, everything + torch.log1p(-log_p.exp()))


class _Reverse(torch.autograd.Function):
    """The identity, whose gradient has the other sign: what it leads to is maximised."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -grad


class AUCM(_Rare):
    """The min-max AUC margin loss of Yuan et al., ICCV 2021, for named classes against the rest; mean over classes.

    F = (1-p)(h-a)^2 [y] + p(h-b)^2 [not y] + 2 alpha (p(1-p)m + p h [not y] - (1-p) h [y]) - p(1-p) alpha^2, with h the
    softmax probability, p the share of positives, m the margin. Minimised over network, ``a`` and ``b``, maximised over
    ``alpha`` >= 0: give ``parameters()`` to the network's own optimizer (alpha's gradient is reversed here) and call
    ``project()`` after each step. ``shares``: p of each named class in the draws, exp(``manifest.log_q``).
    """

    shares: Tensor

    def __init__(self, classes: Sequence[int], shares: ArrayLike, margin: float = 1.0) -> None:
        super().__init__(classes)
        p = _vector(shares, "shares", finite=True)
        if len(p) != len(classes) or not ((p > 0) & (p < 1)).all():
            raise UsageError("shares must be the share of draws of each named class, above 0 and below 1")
        self.margin = margin
        self.register_buffer("shares", p)
        self.a, self.b, self.alpha = (nn.Parameter(torch.zeros(len(classes), dtype=torch.float64)) for _ in range(3))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of ``[B, K]`` logits and int64 ``[B]`` labels."""
        with torch.autocast(logits.device.type, enabled=False):
            z = wide(logits)
            h = z.softmax(1)[:, self.classes]
            yes = self._positive(labels).to(z.dtype)
            no = 1 - yes
            a, b, alpha, p = (v.to(z.dtype) for v in (self.a, self.b, _reversed(self.alpha), self.shares))
            each = (
                (1 - p) * (h - a).square() * yes
                + p * (h - b).square() * no
                + 2 * alpha * (p * (1 - p) * self.margin + p * h * no - (1 - p) * h * yes)
                - p * (1 - p) * alpha.square()
            ).mean(1)
            return global_mean(each, torch.ones_like(each))

    @torch.no_grad()
    def project(self) -> None:
        """Back to alpha >= 0, after each step of the optimizer."""
        self.alpha.clamp_(min=0)


def _reversed(alpha: Tensor) -> Tensor:
    made: Any = _Reverse.apply(alpha)
    return made


# -- agreement --------------------------------------------------------------------------------------------------------

KappaKind = Literal["nominal", "quadratic"]


def kappa_loss(logits: Tensor, labels: Tensor, kind: KappaKind = "nominal") -> Tensor:
    """1 - soft Cohen's kappa of the global batch, = sum w_ij O_ij / sum w_ij E_ij; from 0, at chance 1.

    de la Torre et al., Pattern Recognition Letters 2018: O_ij is the probability that the model puts on j for images
    of class i, E_ij = n_i P_j / B what independence would give. ``nominal``: w = [i != j]. ``quadratic``: w =
    (i - j)^2, for classes in an order, as grades are; wrong for kinds of products. Kappa depends on prevalence: it
    rewards head classes. 0 where chance alone cannot be wrong (one class).
    """
    if kind not in ("nominal", "quadratic"):
        raise UsageError(f"kind must be nominal or quadratic, not {kind!r}")
    with torch.autocast(logits.device.type, enabled=False):
        z, labels = global_batch(wide(logits), labels)
        p = z.softmax(1)
        batch, num_classes = p.shape
        mass = p.sum(0)
        support = torch.bincount(labels, minlength=num_classes).to(p.dtype)
        if kind == "nominal":
            found = batch - p.gather(1, labels[:, None]).sum()
            chance = batch - (support * mass).sum() / batch
        else:
            grade = torch.arange(num_classes, dtype=p.dtype, device=p.device)
            found = (p * (labels[:, None] - grade).square()).sum()
            chance = (grade.square() * support).sum() + (grade.square() * mass).sum()
            chance = chance - 2 * (grade * support).sum() * (grade * mass).sum() / batch
        defined = chance > 1e-6 * batch
        return shared(torch.where(defined, found / torch.where(defined, chance, torch.ones_like(chance)), found * 0))


class Kappa(nn.Module):
    """``kappa_loss`` of one kind."""

    def __init__(self, kind: KappaKind = "nominal") -> None:
        super().__init__()
        self.kind: KappaKind = kind

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of ``[B, K]`` logits and int64 ``[B]`` labels."""
        return kappa_loss(logits, labels, self.kind)
