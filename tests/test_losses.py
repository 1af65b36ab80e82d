"""Losses equal their definitions, written out; gradients are right; half precision and empty classes do no harm."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score, roc_auc_score
from torch import Tensor, nn
from torch.autograd import gradcheck

from pipeline.errors import UsageError
from pipeline.learn.losses import (
    AUCM,
    CrossEntropy,
    DeferredCrossEntropy,
    Focal,
    Kappa,
    PairwiseAUC,
    balanced_softmax,
    kappa_loss,
    log_odds,
)
from pipeline.plan.manifest import log_q, weights

SIZES = [(1, 1), (1, 3), (5, 1), (9, 4), (64, 12)]
COUNTS = np.array([400, 0, 30, 7, 1])  # class 1 has no image

Loss = Callable[[Tensor, Tensor], Tensor]


def batch(seed: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(size, generator=rng, dtype=torch.float64)
    return logits, torch.randint(0, size[1], size[:1], generator=rng)


def drawn(seed: int, num: int) -> tuple[Tensor, Tensor]:
    """Logits over COUNTS, labels of classes that have images."""
    rng = torch.Generator().manual_seed(seed)
    choice = torch.randint(0, 4, (num,), generator=rng)
    return torch.randn((num, 5), generator=rng, dtype=torch.float64), torch.tensor([0, 2, 3, 4])[choice]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_weighted_cross_entropy_is_its_definition(seed: int, size: tuple[int, int]) -> None:
    logits, labels = batch(seed, size)
    w = np.random.default_rng(seed).uniform(0.1, 9, size[1])
    p = logits.softmax(1).numpy()
    own = labels.numpy()
    expected = sum(-w[c] * np.log(p[i, c]) for i, c in enumerate(own)) / w[own].sum()
    assert float(CrossEntropy(w)(logits, labels)) == pytest.approx(expected)
    assert float(CrossEntropy(100 * w)(logits, labels)) == pytest.approx(expected)
    assert float(CrossEntropy()(logits, labels)) == pytest.approx(float(nn.CrossEntropyLoss()(logits, labels)))


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_balanced_softmax_is_its_definition(seed: int, tau: float) -> None:
    """-log(n_y^tau e^z_y / sum_c n_c^tau e^z_c); a class without images has no term."""
    logits, labels = drawn(seed, 20)
    lifted = np.where(COUNTS > 0, COUNTS.astype(float) ** tau, 0) * np.exp(logits.numpy())
    expected = -np.log(lifted[np.arange(20), labels] / lifted.sum(1)).mean()
    assert float(balanced_softmax(log_q(COUNTS), tau)(logits, labels)) == pytest.approx(expected)


def test_deferred_weights_come_at_their_time() -> None:
    logits, labels = drawn(0, 30)
    w = weights("balanced", COUNTS, COUNTS)
    loss = DeferredCrossEntropy(w, start=0.8)
    plain, weighted = float(CrossEntropy()(logits, labels)), float(CrossEntropy(w)(logits, labels))
    assert plain != pytest.approx(weighted)
    told = [float(loss(logits, labels))]
    for done in (0.79, 0.8, 1.0, 0.5):
        loss.set_progress(done)
        told.append(float(loss(logits, labels)))
    assert told == pytest.approx([plain, plain, weighted, weighted, plain])
    with pytest.raises(UsageError, match="share of training"):
        loss.set_progress(80)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("alpha", [-1.0, 0.25])
def test_focal_is_its_definition(size: tuple[int, int], alpha: float) -> None:
    logits, labels = batch(1, size)
    total = 0.0
    for row, own in zip(logits.sigmoid().tolist(), labels.tolist(), strict=True):
        for c, p in enumerate(row):
            right, weight = (p, alpha) if c == own else (1 - p, 1 - alpha)
            total += -(weight if alpha >= 0 else 1) * (1 - right) ** 2 * np.log(right)
    assert float(Focal(2, alpha)(logits, labels)) == pytest.approx(total / size[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_pairwise_auc_is_its_definition(seed: int, size: tuple[int, int]) -> None:
    logits, labels = batch(seed, size)
    named = list(range(min(size[1], 3)))
    each: list[float] = []
    for c in named:
        p = logits.softmax(1)[:, c].numpy()
        h = np.log(p / np.maximum(1 - p, 1e-300))
        yes, no = h[labels.numpy() == c], h[labels.numpy() != c]
        if len(yes) and len(no):
            each.append(np.mean([max(0, 1.5 - (i - j)) ** 2 for i in yes for j in no]))
    expected = np.mean(each) if each else 0.0
    assert float(PairwiseAUC(named, margin=1.5)(logits, labels)) == pytest.approx(expected, rel=1e-6)


def test_log_odds_are_exact_where_a_probability_rounds_to_one() -> None:
    logits = torch.tensor([[200.0, 0.0, -200.0], [7.0, 7.0, -300.0], [40.0, 1.0, 1.0]], requires_grad=True)
    told = log_odds(logits, torch.tensor([2, 0, 1]))
    expected = [[-400.0, 200.0, -200.0], [-307.0 - np.log(2), 0.0, 0.0], [-39.0, 39.0 - np.log(2), -39.0]]
    np.testing.assert_allclose(told.detach().numpy(), expected, rtol=1e-6, atol=1e-6)
    told.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_pairs_of_many_classes_need_no_more_memory_than_their_images() -> None:
    """40 classes by 12 images by 12 images would be 5,760 numbers, 40 by 12 by 50 classes four times that."""
    logits, labels = batch(4, (12, 50))
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        PairwiseAUC(list(range(40)))(logits.requires_grad_(), labels)
    assert max(kept) == 12 * 50


def test_less_pairwise_loss_is_more_auc() -> None:
    logits, labels = batch(3, (80, 4))
    logits.requires_grad_()
    loss, optimizer = PairwiseAUC([2]), torch.optim.SGD([logits], lr=20)

    def auc() -> float:
        return float(roc_auc_score(labels == 2, log_odds(logits.detach(), torch.tensor([2]))[:, 0]))

    before = auc()
    for _ in range(30):
        optimizer.zero_grad()
        loss(logits, labels).backward()
        optimizer.step()
    assert before < 0.7
    assert auc() > 0.95


@pytest.mark.parametrize("seed", range(3))
def test_aucm_at_its_saddle_is_the_pairwise_square(seed: int) -> None:
    """With a, b the means and alpha = m + b - a: p (1 - p) times the mean of (m - h_i + h_j)^2; Yuan et al."""
    logits, labels = batch(seed, (50, 3))
    yes = labels == 1
    p = float(yes.double().mean())
    h = logits.softmax(1)[:, 1]
    loss = AUCM([1], [p], margin=1.0)
    with torch.no_grad():
        loss.a[0], loss.b[0] = h[yes].mean(), h[~yes].mean()
        loss.alpha[0] = 1 + loss.b[0] - loss.a[0]
    pairs = (1 - h[yes][:, None] + h[~yes][None]).square().mean()
    value = loss(logits, labels)
    assert float(value.detach()) == pytest.approx(p * (1 - p) * float(pairs))
    value.backward()
    for parameter in (loss.a, loss.b, loss.alpha):
        assert parameter.grad is not None
        assert float(parameter.grad) == pytest.approx(0, abs=1e-12)


def test_one_optimizer_finds_the_saddle_of_aucm() -> None:
    """alpha climbs although the optimizer descends, and stays at 0 or above."""
    logits, labels = batch(5, (60, 3))
    p = float((labels == 0).double().mean())
    h = logits.softmax(1)[:, 0]
    loss = AUCM([0], [p])
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    for _ in range(400):
        optimizer.zero_grad()
        loss(logits, labels).backward()
        optimizer.step()
        loss.project()
    gap = float(1 + h[labels != 0].mean() - h[labels == 0].mean())
    assert float(loss.alpha.detach()) == pytest.approx(gap, rel=1e-3)
    with torch.no_grad():
        loss.alpha.fill_(-1.0)
    loss.project()
    assert float(loss.alpha.detach()) == 0


@pytest.mark.parametrize(("kind", "scheme"), [("nominal", None), ("quadratic", "quadratic")])
@pytest.mark.parametrize("seed", range(4))
def test_kappa_of_certain_predictions_is_cohens(kind: str, scheme: str | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, 5, 60), rng.integers(0, 5, 60)
    labels[:30] = predicted[:30]
    certain = torch.full((60, 5), -1e4, dtype=torch.float64)
    certain[torch.arange(60), torch.from_numpy(predicted)] = 0
    value = float(kappa_loss(certain, torch.from_numpy(labels), kind))  # type: ignore[arg-type]
    assert 1 - value == pytest.approx(cohen_kappa_score(labels, predicted, weights=scheme))


@pytest.mark.parametrize("kind", ["nominal", "quadratic"])
def test_soft_kappa_is_its_definition(kind: str) -> None:
    logits, labels = batch(2, (17, 4))
    p, k = logits.softmax(1).numpy(), np.arange(4)
    w = (k[:, None] != k).astype(float) if kind == "nominal" else (k[:, None] - k) ** 2.0
    found = sum(w[i, j] * p[n, j] for n, i in enumerate(labels.tolist()) for j in k)
    chance = sum(w[i, j] * (labels == int(i)).sum().item() * p[:, j].sum() / 17 for i in k for j in k)
    assert float(kappa_loss(logits, labels, kind)) == pytest.approx(found / chance)  # type: ignore[arg-type]


def losses(num_classes: int) -> dict[str, Loss]:
    counts = np.maximum(COUNTS[np.arange(num_classes) % 5], 0) if num_classes > 1 else np.array([7])
    some = [0] if num_classes == 1 else [0, 2]
    return {
        "weighted": CrossEntropy(weights("balanced", counts, counts)),
        "balanced softmax": balanced_softmax(log_q(counts)),
        "both": CrossEntropy(weights("square_root", counts, counts), log_q(counts)),
        "even weights": CrossEntropy(np.full(num_classes, 2.0), log_q(counts)),
        "deferred": DeferredCrossEntropy(weights("balanced", counts, counts), start=0),
        "focal": Focal(),
        "pairwise": PairwiseAUC(some),
        "aucm": AUCM(some, [0.3] * len(some)),
        "kappa": kappa_loss,
        "quadratic kappa": Kappa("quadratic"),
    }


NAMES = list(losses(5))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_value(name: str) -> None:
    logits, labels = drawn(4, 12)
    assert gradcheck(losses(5)[name], (logits.requires_grad_(), labels))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_classes", [1, 5])
@pytest.mark.parametrize("own", ["drawn", "never drawn", "mixed", "one image"])
def test_nothing_is_poisoned(name: str, num_classes: int, own: str) -> None:
    """By classes without images, by images of such classes, by batches of one class or one image."""
    logits, labels = drawn(6, 1 if own == "one image" else 8)
    if own in ("never drawn", "mixed"):
        labels[: 8 if own == "never drawn" else 3] = 1
    logits, labels = logits[:, :num_classes].clone().requires_grad_(), labels % num_classes
    value = losses(num_classes)[name](logits, labels)
    value.backward()
    assert value.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", ["weighted", "balanced softmax", "both", "even weights"])
def test_an_image_of_a_class_without_images_counts_for_nothing(name: str) -> None:
    logits, labels = drawn(7, 9)
    loss = losses(5)[name]
    with_it = torch.cat([logits, logits[:1]]), torch.cat([labels, torch.tensor([1])])
    assert float(loss(*with_it)) == pytest.approx(float(loss(logits, labels)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_as_good_as_rounded_ones(name: str, dtype: torch.dtype) -> None:
    logits, labels = drawn(8, 40)
    half = (8 * logits).to(dtype)
    loss = losses(5)[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(half, labels)
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(loss(half.double(), labels).detach()), rel=1e-4)


def test_what_makes_no_sense_is_refused() -> None:
    for make, told in (
        (lambda: CrossEntropy([1.0, -1.0]), "negative"),
        (lambda: CrossEntropy([1.0, np.inf]), "finite number"),
        (lambda: CrossEntropy(offset=[0.0, np.nan]), "number or -inf"),
        (lambda: balanced_softmax([0.0], tau=-1), "tau"),
        (lambda: DeferredCrossEntropy([1.0], start=80), "start is a share"),
        (lambda: PairwiseAUC([]), "ids of some classes"),
        (lambda: PairwiseAUC([1, 1]), "each once"),
        (lambda: AUCM([0], [0.0]), "above 0"),
        (lambda: kappa_loss(torch.zeros(1, 2), torch.tensor([0]), "ordinal"), "nominal or quadratic"),  # type: ignore
    ):
        with pytest.raises(UsageError, match=told):
            make()
