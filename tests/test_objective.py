"""L_simple, its weightings and L_hybrid, compared with the papers' formulas and with high-precision arithmetic."""

import inspect

import numpy as np
import pytest
import reference
import torch
from batches import batch, make

from custom_ddpm.likelihood import vlb_term
from custom_ddpm.objective import diffusion_loss, loss_weights, simple_loss, training_target
from custom_ddpm.scheduler import PREDICTION_TYPES

# ---- L_simple ----


def test_training_target_follows_the_prediction_type():
    t = torch.tensor([0, 400, 999])
    for prediction_type in PREDICTION_TYPES:
        scheduler = make(prediction_type=prediction_type)
        x_0, noise, x_t = batch(scheduler, t)
        target = training_target(scheduler, x_0, noise, t)
        assert target.shape == x_0.shape
        # The exact target determines x_0.
        torch.testing.assert_close(scheduler.predict_original_sample(target, t, x_t), x_0, rtol=1e-9, atol=1e-10)
        assert simple_loss(scheduler, target, x_0, noise, t).tolist() == [0, 0, 0]


def test_uniform_simple_loss_is_the_mean_squared_error():
    scheduler = make()
    t = torch.tensor([0, 400, 999])
    x_0, noise, _ = batch(scheduler, t)
    prediction = noise + torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)[:, None, None, None]
    assert simple_loss(scheduler, prediction, x_0, noise, t).tolist() == pytest.approx([0.25, 1.0, 4.0])


@pytest.mark.parametrize("loss_weighting", ["min_snr", "p2"])
def test_a_weighting_gives_the_same_loss_for_every_prediction_type(loss_weighting):
    """The same x̂_0 with an error, as each of the three prediction types."""
    t = torch.tensor([0, 20, 150, 400, 800, 999])
    losses = []
    for prediction_type in PREDICTION_TYPES:
        scheduler = make(prediction_type=prediction_type)
        x_0, noise, x_t = batch(scheduler, t)
        wrong = (x_0 + 0.1 * noise.flip(0), t, x_t, "sample")
        prediction = {
            "sample": wrong[0],
            "epsilon": scheduler.predict_epsilon(*wrong),
            "v_prediction": scheduler.predict_velocity(*wrong),
        }[prediction_type]
        losses.append(simple_loss(scheduler, prediction, x_0, noise, t, loss_weighting=loss_weighting).numpy())
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)


def test_weights_are_those_of_the_papers():
    products = reference.alphas_cumprod(reference.betas("linear"))
    snr = reference.floats(a / (1 - a) for a in products)
    t = torch.arange(1000)
    on_epsilon = {
        ("uniform", 5.0): np.ones(1000),
        ("min_snr", 5.0): np.minimum(snr, 5.0) / snr,  # Hang et al. 2023, section 3.4
        ("min_snr", 1.0): np.minimum(snr, 1.0) / snr,
        ("p2", 5.0): 1.0 / (1.0 + snr),  # Choi et al. 2022, eq. 8, k = γ = 1
    }
    for (loss_weighting, gamma), expected in on_epsilon.items():
        weights = loss_weights(make(), t, loss_weighting, gamma)
        assert weights.dtype == torch.float32 and weights.shape == (1000,)
        np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(
        loss_weights(make(prediction_type="v_prediction"), t, "min_snr").numpy(),
        np.minimum(snr, 5) / (snr + 1),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        loss_weights(make(prediction_type="sample"), t, "min_snr").numpy(), np.minimum(snr, 5), rtol=1e-6
    )
    assert (loss_weights(make(prediction_type="v_prediction"), t) == 1).all()


def test_the_default_gamma_is_that_of_the_paper():
    for function in (loss_weights, simple_loss, diffusion_loss):
        assert inspect.signature(function).parameters["snr_gamma"].default == 5.0  # Hang et al. 2023, section 4


def test_weights_at_zero_terminal_snr_are_finite():
    for prediction_type in ("sample", "v_prediction"):
        scheduler = make(prediction_type=prediction_type, rescale_betas_zero_snr=True)
        for loss_weighting in ("uniform", "min_snr", "p2"):
            assert loss_weights(scheduler, torch.tensor([999]), loss_weighting).isfinite().all()


# ---- diffusion_loss ----


def random_output(x_0, seed=1, dtype=torch.float64, learned=True):
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    if learned:
        output = torch.cat([output, torch.rand(x_0.shape, generator=generator, dtype=torch.float64)], dim=1)
    return output.to(dtype).requires_grad_()


@pytest.mark.parametrize("variance_type", ["learned_range", "learned"])
def test_hybrid_trains_the_mean_by_L_simple_and_the_variance_by_L_vlb(variance_type):
    scheduler = make(variance_type=variance_type)
    t = torch.tensor([0, 1, 300, 999])
    x_0, noise, x_t = batch(scheduler, t)
    output = random_output(x_0)
    arguments = (scheduler, output, x_0, noise, x_t, t)
    losses = {kind: diffusion_loss(*arguments, loss_type=kind) for kind in ("simple", "vlb", "hybrid")}
    gradients = {
        kind: torch.autograd.grad(loss.sum(), output, retain_graph=True)[0].chunk(2, dim=1)
        for kind, loss in losses.items()
    }
    assert all(loss.shape == (4,) for loss in losses.values())
    torch.testing.assert_close(losses["hybrid"], losses["simple"] + 0.001 * losses["vlb"])
    torch.testing.assert_close(losses["vlb"], 1000 * vlb_term(scheduler, output, x_0, x_t, t))
    torch.testing.assert_close(gradients["hybrid"][0], gradients["simple"][0])
    torch.testing.assert_close(gradients["hybrid"][1], 0.001 * gradients["vlb"][1])
    assert (gradients["simple"][1] == 0).all()
    assert (gradients["vlb"][0] != 0).any() and (gradients["vlb"][1] != 0).any()


def test_the_weighting_applies_to_L_simple_in_every_loss_that_contains_it():
    scheduler = make(variance_type="learned_range")
    t = torch.tensor([3, 300])
    x_0, noise, x_t = batch(scheduler, t)
    output = random_output(x_0)
    arguments = (scheduler, output, x_0, noise, x_t, t)
    weights = loss_weights(scheduler, t, "min_snr", 2.0)
    plain = diffusion_loss(*arguments)
    torch.testing.assert_close(
        diffusion_loss(*arguments, loss_weighting="min_snr", snr_gamma=2.0), weights * plain, rtol=1e-6, atol=0.0
    )
    torch.testing.assert_close(
        diffusion_loss(*arguments, loss_type="hybrid", loss_weighting="min_snr", snr_gamma=2.0)
        - diffusion_loss(*arguments, loss_type="hybrid"),
        (weights - 1) * plain,
    )


@pytest.mark.parametrize("loss_type", ["simple", "vlb", "hybrid"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("output_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_gradients_are_finite_in_mixed_precision(output_dtype, prediction_type, loss_type):
    scheduler = make(variance_type="learned_range", prediction_type=prediction_type, clip_sample=True)
    t = torch.tensor([0, 0, 1, 2, 500, 998, 999])
    x_0, noise, x_t = batch(scheduler, t, dtype=torch.float32)
    output = random_output(x_0, dtype=output_dtype)
    loss = diffusion_loss(scheduler, output, x_0, noise, x_t, t, loss_type=loss_type)
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    loss.mean().backward()
    if output_dtype != torch.float16:  # float16 gradients need loss scaling
        assert output.grad.isfinite().all() and (output.grad.flatten(1).abs().sum(1) > 0).all()
    exact = diffusion_loss(
        scheduler, output.detach().double(), x_0.double(), noise.double(), x_t.double(), t, loss_type=loss_type
    )
    torch.testing.assert_close(loss.double(), exact.double(), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("loss_type", ["simple", "vlb", "hybrid"])
def test_a_loss_does_not_depend_on_the_rest_of_the_batch(loss_type):
    scheduler = make(variance_type="learned_range")
    t = torch.tensor([0, 7, 999])
    x_0, noise, x_t = batch(scheduler, t)
    output = random_output(x_0).detach()
    together = diffusion_loss(scheduler, output, x_0, noise, x_t, t, loss_type=loss_type)
    for i in range(3):
        only = slice(i, i + 1)
        alone = diffusion_loss(scheduler, output[only], x_0[only], noise[only], x_t[only], t[only], loss_type=loss_type)
        torch.testing.assert_close(alone, together[only])


@pytest.mark.parametrize("loss_type", ["simple", "vlb", "hybrid"])
@pytest.mark.parametrize("loss_weighting", ["uniform", "min_snr", "p2"])
def test_no_loss_synchronises_with_the_device(loss_type, loss_weighting):
    """Tensors on the meta device have no values, so any synchronisation raises an error."""
    scheduler = make(variance_type="learned_range")
    x, t = torch.empty(3, 2, 4, 4, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    loss = diffusion_loss(
        scheduler, torch.cat([x, x], dim=1), x, x, x, t, loss_type=loss_type, loss_weighting=loss_weighting
    )
    assert loss.shape == (3,) and loss.device.type == "meta"


def test_invalid_arguments_raise():
    scheduler = make()
    t = torch.tensor([5])
    x_0, noise, x_t = batch(scheduler, t)
    arguments = (scheduler, noise, x_0, noise, x_t, t)
    with pytest.raises(ValueError, match="loss_type is 'l1'; it must be one of simple, hybrid, vlb"):
        diffusion_loss(*arguments, loss_type="l1")
    with pytest.raises(ValueError, match="loss_weighting is 'edm'; it must be one of uniform, min_snr, p2"):
        diffusion_loss(*arguments, loss_weighting="edm")
    with pytest.raises(ValueError, match="'hybrid' trains a learned variance; variance_type is 'fixed_small'"):
        diffusion_loss(*arguments, loss_type="hybrid")
    with pytest.raises(ValueError, match="model_output has shape"):
        simple_loss(make(variance_type="learned"), noise, x_0, noise, t)
