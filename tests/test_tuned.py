"""What a tuned scheduler takes for a number of steps, and what the pipeline says of it."""

import copy

import diffusers
import pytest
import torch
from conftest import make_pipeline
from custom_ddpm.pipelines import pipeline_custom_ddpm
from test_timesteps import exact_errors

from custom_ddpm.sample_command import build_sampler
from custom_ddpm.scheduler import CustomDDPMScheduler

ERRORS = exact_errors("linear", [0.2]).tolist()
TUNED = ["3 2c 0 trailing", "5 3 0 optimal", "10 2 1 trailing", "40 2 0.5 leading"]


def make(**kwargs):
    return CustomDDPMScheduler(**{"clip_sample": False, "prediction_errors": ERRORS, "tuned": TUNED, **kwargs})


def images(scheduler, n, **options):
    """A run with x̂_0 = 0.3 x_t."""
    scheduler.set_timesteps(n)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(0.3 * x, t, x, generator=generator, **options).prev_sample
    return x


def by_hand(n, order, eta, spacing):
    errors = ERRORS if spacing == "optimal" else None
    spacing = "leading" if spacing == "optimal" else spacing
    options = {"solver_order": int(str(order)[0]), "corrector": order == "2c", "timestep_spacing": spacing}
    plain = make(tuned=None, prediction_errors=errors, **options)
    return images(plain, n, eta=eta)


@pytest.mark.parametrize(
    ("n", "how"),
    [
        (5, (3, 0.0, "optimal")),
        (10, (2, 1.0, "trailing")),
        (40, (2, 0.5, "leading")),
        (1, ("2c", 0.0, "trailing")),  # the nearest, in the ratio
        (3, ("2c", 0.0, "trailing")),
        (7, (3, 0.0, "optimal")),
        (8, (2, 1.0, "trailing")),
        (19, (2, 1.0, "trailing")),
        (21, (2, 0.5, "leading")),
        (80, (2, 0.5, "leading")),
        (81, (1, 1.0, "optimal")),  # more than twice as many
    ],
)
def test_the_nearest_entry_is_taken(n, how):
    assert torch.equal(images(make(), n), by_hand(n, *how))


def test_an_eta_that_is_given_is_taken():
    assert torch.equal(images(make(), 10, eta=0.0), by_hand(10, 2, 0.0, "trailing"))


def test_all_steps_are_algorithm_2():
    tuned = make(num_train_timesteps=20, prediction_errors=ERRORS[:20], solver_order=2)
    plain = CustomDDPMScheduler(20, clip_sample=False)
    assert torch.equal(images(tuned, 20), images(plain, 20))
    assert tuned.tuned_for(20) is None and tuned.tuned_for(None) is None
    assert tuned.tuned_for(10) == "steps of order 2, eta 1, trailing timesteps, as tuned for this model"


def test_a_number_of_steps_leaves_nothing_for_the_next():
    scheduler = make()
    first = images(scheduler, 10)
    images(scheduler, 5)
    assert torch.equal(images(scheduler, 10), first)
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    x = torch.ones(1, 2)
    one = make(tuned=None)
    one.set_timesteps(timesteps=[900, 500, 100])
    for t in (900, 500):
        ours, theirs = (each.step(x, t, x, variance_noise=x).prev_sample for each in (scheduler, one))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "entry", ["10 2 0", "0 2 0 trailing", "10 4 0 trailing", "10 2 2 trailing", "10 2 0 best", "a"]
)
def test_entries_that_are_none_are_refused(entry):
    with pytest.raises(ValueError, match=r"tuned has '.*'; an entry is STEPS SOLVER_ORDER ETA SPACING"):
        make(tuned=[entry])


@pytest.mark.parametrize("tuned", [10, "10 2 0 trailing", {10: "2 0 trailing"}])
def test_what_is_no_list_of_entries_is_refused(tuned):
    with pytest.raises(ValueError, match=r"tuned is .*; it must be a list of entries, such as \['10 2 0 trailing'\]"):
        make(tuned=tuned)


def test_optimal_timesteps_need_their_table():
    with pytest.raises(ValueError, match="tuned has '5 3 0 optimal'"):
        make(prediction_errors=None)


def test_a_tuned_model_loads_with_and_without_this_class(tmp_path):
    pipeline = make_pipeline()
    steps = len(pipeline.scheduler)
    pipeline.scheduler = CustomDDPMScheduler.from_config(
        pipeline.scheduler.config, prediction_errors=ERRORS[:steps], tuned=["5 2 0 optimal"]
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)

    def draw(each):
        each.set_progress_bar_config(disable=True)
        return each(num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="latent").images

    expected = draw(pipeline)
    torch.testing.assert_close(draw(type(pipeline).from_pretrained(tmp_path)), expected, rtol=1e-4, atol=1e-4)
    remote = diffusers.DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(remote.scheduler).__module__.startswith("diffusers_modules")
    torch.testing.assert_close(draw(remote), expected, rtol=1e-4, atol=1e-4)
    for stock in (diffusers.DDPMScheduler, diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler):
        assert stock.from_pretrained(tmp_path, subfolder="scheduler").config.num_train_timesteps == steps


@pytest.fixture
def saved(tmp_path):
    """The folder of a scheduler as `custom-ddpm tune` saves it."""
    tuned = make(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2", solver_order=2, corrector=True)
    tuned.save_pretrained(tmp_path)
    return tmp_path


def warnings_of(monkeypatch, load):
    """What diffusers warns of."""
    messages = []
    monkeypatch.setattr(diffusers.configuration_utils.logger, "warning", messages.append)
    return load(), " ".join(messages)


def test_what_carries_over_to_schedulers_of_diffusers(saved, monkeypatch):
    """The sentences of docs/sampling.md."""
    dpm, told = warnings_of(monkeypatch, lambda: diffusers.DPMSolverMultistepScheduler.from_pretrained(saved))
    assert "tuned" in told and "prediction_errors" in told and "corrector" in told
    assert dpm.config.solver_order == 2 and dpm.config.prediction_type == "v_prediction"
    ours = CustomDDPMScheduler.from_pretrained(saved)
    torch.testing.assert_close(dpm.alphas_cumprod, ours.alphas_cumprod)
    ours.set_timesteps(5)
    chosen = ours.timesteps.tolist()
    takes = "DDPM DPMSolverMultistep DPMSolverSinglestep HeunDiscrete EulerDiscrete LCM"
    for name in takes.split():
        other = getattr(diffusers, f"{name}Scheduler").from_pretrained(saved)
        other.set_timesteps(timesteps=chosen)
        assert list(dict.fromkeys(other.timesteps.int().tolist())) == chosen, name
    for name in ("DDIM", "DEISMultistep", "UniPCMultistep"):
        with pytest.raises(TypeError, match="timesteps"):
            getattr(diffusers, f"{name}Scheduler").from_pretrained(saved).set_timesteps(timesteps=chosen)


def test_ancestral_steps_of_diffusers_at_the_tuned_timesteps_are_ours(saved):
    theirs = diffusers.DDPMScheduler.from_pretrained(saved, clip_sample=False)
    ours = make(tuned=None, prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
    ours.set_timesteps(10)
    theirs.set_timesteps(timesteps=ours.timesteps.tolist())
    x, output = torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in ours.timesteps[:-1]:  # they add noise in the last step
        a, b = (s.step(output, t, x, generator=torch.Generator().manual_seed(1)).prev_sample for s in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_scheduler_option_of_sample_takes_nothing_tuned_and_does_not_warn(saved, monkeypatch):
    trained = CustomDDPMScheduler.from_pretrained(saved)
    plain = make(tuned=None, prediction_errors=None, prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler"):
        sampler, told = warnings_of(monkeypatch, lambda name=name: build_sampler(name, [], trained))
        assert told == ""
        expected = getattr(diffusers, name).from_config(plain.config)
        for each in (sampler, expected):
            each.set_timesteps(10)
        assert torch.equal(sampler.timesteps, expected.timesteps)
        assert sampler.config.get("solver_order") == expected.config.get("solver_order")
    assert build_sampler("CustomDDPMScheduler", [], trained).config.tuned == TUNED


def test_the_pipeline_says_once_how_it_steps(monkeypatch):
    messages = []
    monkeypatch.setattr(pipeline_custom_ddpm.logger, "warning", messages.append)
    monkeypatch.setattr(pipeline_custom_ddpm, "_SAID", set())
    pipeline = make_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    steps = len(pipeline.scheduler)
    pipeline.scheduler = CustomDDPMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", tuned=["5 2 0 trailing"]
    )
    for n in (5, 5, 4, steps):
        pipeline(num_inference_steps=n)
    assert messages == [f"{n} steps of order 2, eta 0, trailing timesteps, as tuned for this model" for n in (5, 4)]
    pipeline(num_inference_steps=5, eta=1.0)
    assert messages[2:] == ["5 steps of order 2, trailing timesteps, as tuned for this model; eta 1 as given"]


def test_what_is_given_goes_before_what_was_tuned():
    config = CustomDDPMScheduler(tuned=["10 2c 0 trailing"], prediction_errors=[0.1] * 1000).config
    given = CustomDDPMScheduler.from_config(config, solver_order=3, timestep_spacing="trailing")
    plain = CustomDDPMScheduler(solver_order=3, timestep_spacing="trailing")
    for scheduler in (given, plain):
        scheduler.set_timesteps(10)
    assert torch.equal(given.timesteps, plain.timesteps)
    x, output = torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in given.timesteps[:4]:
        results = [s.step(output, t, x, generator=torch.Generator().manual_seed(1)).prev_sample for s in (given, plain)]
        assert torch.equal(*results)


def test_a_number_of_steps_far_from_all_tuned_ones_is_not_tuned():
    scheduler = CustomDDPMScheduler(tuned=["10 2 0 trailing"])
    assert scheduler.tuned_for(20) is not None and scheduler.tuned_for(21) is None
    assert scheduler.tuned_for(1) is not None and scheduler.tuned_for(0) is None


def test_the_corrector_from_zero_signal_is_finite_and_right():
    """With a model that always predicts the same x̂_0 no correction changes anything."""
    options = {"prediction_type": "sample", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    x_0 = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    results = []
    for own in ({"solver_order": 2, "corrector": True}, {}):
        scheduler = CustomDDPMScheduler(**options, **own)
        scheduler.set_timesteps(10)
        x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps[:-1]:
            x = scheduler.step(x_0, t, x, eta=0.0).prev_sample
        results.append(x)
    torch.testing.assert_close(*results)


def test_predictions_of_earlier_steps_are_copies_and_are_not_copied():
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for changed in (False, True):
        scheduler = CustomDDPMScheduler(solver_order=2)
        scheduler.set_timesteps(10)
        sample = x.clone().requires_grad_()
        for t in scheduler.timesteps[:3]:
            step = scheduler.step(0.1 * sample, t, sample, eta=0.0)
            sample = step.prev_sample
            if changed:
                step.pred_original_sample.detach().mul_(100.0)
                copy.deepcopy(scheduler)  # which a graph of gradients would prevent
        results.append(sample.detach())
    assert torch.equal(*results)
