"""The dual-label loss: exact reductions, closed forms, and sums over ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpl_core.errors import ContractError
from gpl_core.prerank.loss import RowMass, dual_label_loss, exposed_only_loss, row_mass


def _batch(seed: int, rows: int = 9) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, generator=g, requires_grad=True)
    exposed = torch.rand(rows, generator=g) < 0.5
    target = torch.where(exposed, (torch.rand(rows, generator=g) < 0.3).float(), torch.rand(rows, generator=g))
    weight = torch.where(exposed, torch.ones(rows), 2 * torch.rand(rows, generator=g))
    return logits, target, exposed, weight, 0.05 + 0.95 * torch.rand(rows, generator=g)


def _loop(logits, target, exposed, weight, lambda_, probability=None) -> float:
    """The formula, row by row in float64."""
    seen, unseen, mass = [], 0.0, 0.0
    for n in range(len(logits)):
        f, y = float(logits[n]), float(target[n])
        bce = np.log1p(np.exp(-abs(f))) + max(f, 0) - y * f
        if exposed[n]:
            seen.append(bce)
        else:
            say = 1.0 if probability is None else 1 / float(probability[n])
            unseen += say * float(weight[n]) * bce
            mass += say
    return (np.mean(seen) if seen else 0.0) + (lambda_ * unseen / mass if mass else 0.0)


@given(st.integers(0, 2**31), st.integers(1, 12), st.sampled_from([0.0, 0.5, 2.0]), st.booleans())
def test_equals_the_formula_row_by_row(seed: int, rows: int, lambda_: float, by_probability: bool) -> None:
    logits, target, exposed, weight, probability = _batch(seed, rows)
    given_probability = probability if by_probability else None
    loss = dual_label_loss(logits, target, exposed, weight, lambda_, given_probability)
    expected = _loop(logits.detach(), target, exposed, weight, lambda_, given_probability)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@given(st.integers(0, 2**31), st.integers(2, 40))
def test_lambda_zero_and_zero_weights_are_exposed_only_bit_for_bit(seed: int, rows: int) -> None:
    logits, target, exposed, weight, _ = _batch(seed, rows)

    def value_and_gradient(loss: torch.Tensor) -> tuple[float, list[float]]:
        (gradient,) = torch.autograd.grad(loss, logits)
        return loss.item(), gradient.tolist()

    plain = value_and_gradient(exposed_only_loss(logits, target, exposed))
    assert value_and_gradient(dual_label_loss(logits, target, exposed, weight, 0.0)) == plain
    assert value_and_gradient(dual_label_loss(logits, target, exposed, weight * 0, 3.0)) == plain


def test_the_mean_divides_by_rows_not_by_weights() -> None:
    logits, target = torch.zeros(3), torch.tensor([1.0, 0.0, 0.0])
    exposed = torch.tensor([True, False, False])
    half = dual_label_loss(logits, target, exposed, torch.tensor([1.0, 0.5, 0.5]), 1.0)
    full = dual_label_loss(logits, target, exposed, torch.tensor([1.0, 1.0, 1.0]), 1.0)
    log2 = np.log(2)
    assert half.item() == pytest.approx(1.5 * log2)
    assert full.item() == pytest.approx(2.0 * log2)


@pytest.mark.parametrize("kind", [True, False])
def test_a_batch_of_one_kind_is_finite(kind: bool) -> None:
    logits, target, _, weight, probability = _batch(1)
    exposed = torch.full_like(logits, kind, dtype=torch.bool)
    loss = dual_label_loss(logits, target, exposed, weight, 2.0, probability)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).any()
    assert exposed_only_loss(logits, target, ~exposed).item() == (0.0 if kind else pytest.approx(_loop(
        logits.detach(), target, ~exposed, weight, 0.0), rel=1e-5))  # fmt: skip


@pytest.mark.parametrize("by_probability", [False, True])
def test_gradients_averaged_over_uneven_ranks_are_the_whole_batchs(by_probability: bool) -> None:
    logits, target, exposed, weight, probability = _batch(7, 20)
    pi = probability if by_probability else None
    (whole,) = torch.autograd.grad(dual_label_loss(logits, target, exposed, weight, 2.0, pi), logits)
    parts = [slice(0, 13), slice(13, 20)]
    masses = [row_mass(exposed[p], None if pi is None else pi[p]) for p in parts]
    shared = RowMass(*(torch.stack(values).mean() for values in zip(*masses)))
    total = sum(
        dual_label_loss(logits[p], target[p], exposed[p], weight[p], 2.0, None if pi is None else pi[p], mass=shared)
        for p in parts
    )
    (split,) = torch.autograd.grad(total / 2, logits)
    torch.testing.assert_close(split, whole)


def test_the_optimum_of_a_logistic_regression_is_the_closed_form() -> None:
    """One logit per group g: p_g = (sum_E y / |E| + lambda sum_U w y~ / M) / (|E_g| / |E| + lambda sum_U w / M).

    The sums run over the group's rows; M is the number of unexposed rows, or the sum of their 1 / pi.
    """
    _, target, exposed, weight, probability = _batch(11, 40)
    group = torch.arange(40) % 2
    for pi in (None, probability.double()):
        bias = torch.zeros(2, requires_grad=True, dtype=torch.float64)
        optimizer = torch.optim.LBFGS(
            [bias], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure(pi=pi, bias=bias, optimizer=optimizer):
            optimizer.zero_grad()
            loss = dual_label_loss(bias[group], target.double(), exposed, weight.double(), 2.0, pi)
            loss.backward()
            return loss

        optimizer.step(closure)
        seen, y = exposed.numpy(), target.numpy().astype(float)
        say = np.where(seen, 0.0, 1.0 if pi is None else 1 / pi.numpy())
        share = np.where(seen, 1 / seen.sum(), 2.0 * weight.numpy() * say / say.sum())
        for g in (0, 1):
            mine = group.numpy() == g
            assert torch.sigmoid(bias[g]).item() == pytest.approx(share[mine] @ y[mine] / share[mine].sum(), abs=1e-6)


def test_wrong_arguments_are_named() -> None:
    logits, target, exposed, weight, _ = _batch(1)
    with pytest.raises(ContractError, match="lambda is -1"):
        dual_label_loss(logits, target, exposed, weight, -1.0)
    with pytest.raises(ContractError, match="target has shape"):
        dual_label_loss(logits, target[:-1], exposed, weight, 1.0)
    for kind in (torch.uint8, torch.int64):
        with pytest.raises(ContractError, match=r"is_exposed has type torch\.\w+; expected torch\.bool"):
            dual_label_loss(logits, target, exposed.to(kind), weight, 1.0)
