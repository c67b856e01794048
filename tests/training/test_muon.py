"""custom_ddpm/training/muon.py, against the singular value decomposition and the iteration as it is published."""

import copy

import pytest
import torch

from custom_ddpm.training.muon import COEFFICIENTS, MOMENTUM, ROUNDS, Muon, orthogonaliser
from custom_ddpm.unet import CustomUNet2DModel


def published(matrix):
    """The iteration on the matrix itself, in float64."""
    a, b, c = COEFFICIENTS
    x = matrix.double() / matrix.double().norm()
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def test_the_orthogonaliser_is_the_published_iteration():
    matrices = torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True)
    found = orthogonaliser(x @ x.mT) @ x
    for one, matrix in zip(found, matrices, strict=True):
        torch.testing.assert_close(one, published(matrix), rtol=1e-10, atol=1e-12)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        values = torch.linalg.svdvals(one)
        assert values.min() > 0.68 and values.max() < 1.21
        # Same singular vectors: U Vᵀ but for the values.
        torch.testing.assert_close(u.mT @ one @ v.mT, torch.diag((u.mT @ one @ v.mT).diagonal()), atol=1e-9, rtol=0)


def weights(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(f"w{i}", torch.nn.Parameter(torch.randn(shape, generator=generator))) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (24, 2, 3, 3), (6, 6), (5, 7)])
def test_updates_are_orthogonalised_momentum(shape):
    rate, decay = 0.1, 0.3
    ((_, weight),) = named = weights([shape])
    optimizer = Muon(named, lr=rate, weight_decay=decay, fused=True)
    expected, momentum = weight.detach().double(), torch.zeros(shape, dtype=torch.float64)
    for step in range(3):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step + 1))
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient.double()
        nesterov = MOMENTUM * momentum + (1 - MOMENTUM) * gradient.double()
        matrix = nesterov.flatten(1)
        update = published(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T)
        update = update if matrix.shape[0] <= matrix.shape[1] else update.T
        scale = 0.2 * max(matrix.shape) ** 0.5
        expected = expected - rate * (scale * update.reshape(shape) + decay * expected)
        weight.grad = gradient
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_size_of_updates_is_that_of_adamw():
    ((_, weight),) = named = weights([(32, 16, 3, 3)])
    before = weight.detach().clone()
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    Muon(named, lr=0.01, fused=True, weight_decay=0.0).step()
    assert (weight - before).square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.2)


def test_first_last_and_embedding_layers_are_adamws():
    unet = CustomUNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=3,
    )
    other = copy.deepcopy(unet)
    muon = Muon(unet.named_parameters(), lr=1e-3, fused=True)
    adamw = torch.optim.AdamW(other.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(0)
    for one, two in zip(unet.parameters(), other.parameters(), strict=True):
        one.grad = torch.randn(one.shape, generator=generator)
        two.grad = one.grad.clone()
    before = {name: weight.detach().clone() for name, weight in unet.named_parameters()}
    muon.step()
    adamw.step()
    for (name, one), two in zip(unet.named_parameters(), other.parameters(), strict=True):
        assert not torch.equal(one, before[name]), name
        hidden = name.endswith("weight") and one.ndim > 1 and name.split(".")[0].endswith(("blocks", "block"))
        assert torch.equal(one, two) != (hidden and "time_emb_proj" not in name), name
    assert {frozenset(state) for state in muon.state.values()} == {
        frozenset({"momentum", "step"}),
        frozenset({"exp_avg", "exp_avg_sq", "step"}),
    }


def test_a_step_that_is_skipped_changes_nothing():
    named = weights([(8, 4, 3, 3), (8,)])
    optimizer = Muon(named, lr=0.1, weight_decay=0.5, fused=True)
    for _, weight in named:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = copy.deepcopy([weight.detach() for _, weight in named])
    momentum = optimizer.state[named[0][1]]["momentum"].clone()
    for _, weight in named:
        weight.grad = torch.full_like(weight, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(weight, old) for (_, weight), old in zip(named, before, strict=True))
    assert torch.equal(optimizer.state[named[0][1]]["momentum"], momentum)
    optimizer.found_inf = torch.zeros(())
    for _, weight in named:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not torch.equal(named[0][1], before[0])


def test_a_copy_goes_on_as_the_optimiser_itself():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.Conv2d(4, 2, 1))

    def steps(model, optimizer, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for weight in model.parameters():
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()

    optimizer = Muon(model.named_parameters(), lr=0.1, fused=True)
    steps(model, optimizer, 0, 2)
    model_2, optimizer_2 = copy.deepcopy((model, optimizer))
    model_3 = copy.deepcopy(model)
    optimizer_3 = Muon(model_3.named_parameters(), lr=0.1, fused=True)
    optimizer_3.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in ((model, optimizer), (model_2, optimizer_2), (model_3, optimizer_3)):
        steps(*each, 2, 4)
    for one, two, three in zip(*(each.parameters() for each in (model, model_2, model_3)), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
