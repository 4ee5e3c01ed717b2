import warnings

import numpy as np
import pytest

from nets import SCHEDULES, generate_cosine_schedule, generate_linear_schedule, generate_sigmoid_schedule
from nets.errors import SettingError
from nets.schedules import find_schedule, make_betas


def alpha_bar(betas):
    return np.cumprod(1 - betas)


def test_linear_is_evenly_spaced_and_exact_in_float64():
    betas = generate_linear_schedule(5, 0.1, 0.5)
    assert betas.dtype == np.float64
    np.testing.assert_allclose(betas, [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-15)


def test_cosine_follows_its_alpha_bar_where_it_is_not_capped():
    T, s = 200, 0.008
    betas = generate_cosine_schedule(T)
    f = [np.cos((t / T + s) / (1 + s) * np.pi / 2) ** 2 for t in range(T + 1)]
    np.testing.assert_allclose(alpha_bar(betas)[:-1], np.array(f[1:-1]) / f[0], rtol=1e-10)
    assert betas[-1] == 0.999


def test_sigmoid_follows_the_papers_gamma():
    """Jabri et al. 2022, algorithm 1, written out: gamma(t) with start -3, end 3, tau 1."""
    T = 100
    betas = generate_sigmoid_schedule(T)

    def sigmoid(u):
        return 1 / (1 + np.exp(-u))

    gamma = [(sigmoid(3) - sigmoid(t / T * 6 - 3)) / (sigmoid(3) - sigmoid(-3)) for t in range(T + 1)]
    np.testing.assert_allclose(alpha_bar(betas)[:-1], gamma[1:-1], rtol=1e-9)
    assert betas[-1] == 0.999


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("T", [1, 2, 3, 10, 20, 21, 1000, 4000])
def test_betas_are_valid_for_any_T(name, T):
    """The scaled linear schedule passes 1 for T <= 20; it has to be capped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # very short linear schedules do not reach noise, and say so
        betas = make_betas(name, T)
    assert betas.shape == (T,) and betas.dtype == np.float64
    assert (betas > 0).all() and (betas <= 0.999).all()
    assert (np.diff(alpha_bar(betas)) < 0).all()


def test_linear_keeps_its_end_for_any_T():
    """alpha_bar_T is about exp(-sum of betas), and the scaling by 1000/T keeps that sum."""
    reference = np.log(alpha_bar(make_betas("linear", 1000))[-1])
    for T in (100, 250, 4000):
        assert np.log(alpha_bar(make_betas("linear", T))[-1]) == pytest.approx(reference, rel=0.1)
    np.testing.assert_array_equal(make_betas("linear", 1000), generate_linear_schedule(1000, 1e-4, 0.02))


def test_a_schedule_that_leaves_the_image_visible_is_warned_about():
    with pytest.warns(UserWarning, match="alpha_bar_T = 0.3"):
        make_betas("linear", 1000, 1e-4, 0.002)


def test_a_schedule_that_underflows_is_warned_about_and_refused_where_nothing_can_sample():
    with pytest.warns(UserWarning, match="alpha_bar_T = 2.09e-47 is too small for float32: lower schedule_high"):
        assert (make_betas("linear", 1000, 1e-4, 0.2) > 0).all()
    with pytest.raises(SettingError, match="alpha_bar_T = 0 is too small .* lower schedule_high"):
        make_betas("linear", 1000, 1e-4, 0.95)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_defaults_are_not_warned_about(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_betas(name, 1000)


def test_an_unknown_schedule_names_the_known_ones():
    with pytest.raises(ValueError, match="'quadratic'; known: linear, cosine, sigmoid"):
        make_betas("quadratic", 1000)


@pytest.mark.parametrize("low, high", [(0.0, 0.02), (-1e-4, 0.02)])
def test_betas_outside_0_and_1_are_refused(low, high):
    with pytest.raises(ValueError, match="between 0 and 1"):
        make_betas("linear", 1000, low, high)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("T", [10, 50, 1000])
def test_a_schedule_is_found_by_its_betas(name, T):
    made = make_betas(name, T, 2e-4, 0.03)
    found = find_schedule(made.astype(np.float32))
    assert found["schedule"] == name
    np.testing.assert_allclose(make_betas(**found), made, rtol=1e-5)
    with pytest.raises(ValueError, match="no schedule of ours"):
        find_schedule(made**1.1)


def lambdas(betas):
    """Half the log of alpha_bar / (1 - alpha_bar)."""
    return 0.5 * np.log(alpha_bar(betas) / (1 - alpha_bar(betas)))


SHIFTED = ("cosine", "sigmoid")


@pytest.mark.filterwarnings("ignore:.*x_T is not pure noise")
@pytest.mark.parametrize("name", SHIFTED)
@pytest.mark.parametrize("shift", [0.5, -0.7, 5, -5])
@pytest.mark.parametrize("T", [50, 1000, 4000])
def test_a_shift_is_added_to_lambda(name, shift, T):
    made, shifted = make_betas(name, T), make_betas(name, T, schedule_shift=shift)
    free = np.cumprod(shifted < 0.999).astype(bool)  # before the first capped one
    assert free[: T // 4].all()
    np.testing.assert_allclose(lambdas(shifted)[free], lambdas(made)[free] + shift, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(make_betas(name, T, schedule_shift=0.0), made)


@pytest.mark.parametrize("name", SHIFTED)
@pytest.mark.parametrize("shift", [0.5, -0.7, 1.25])
@pytest.mark.parametrize("T", [10, 1000])
def test_a_shifted_schedule_is_found_by_its_betas(name, shift, T):
    found = find_schedule(make_betas(name, T, schedule_shift=shift).astype(np.float32))
    assert found == {"schedule": name, "num_timesteps": T, "schedule_shift": shift}


def test_betas_close_to_a_schedule_but_not_of_it_have_no_shift():
    for betas in (make_betas("cosine", 1000) * (1 + 5e-5 * np.arange(1000) / 1000), [0.9] * 500 + [0.5] * 500):
        with pytest.raises(ValueError, match="no schedule of ours"):
            find_schedule(betas)


def test_the_linear_schedule_has_limits_instead_of_a_shift():
    with pytest.raises(ValueError, match="schedule_low and schedule_high"):
        make_betas("linear", 1000, schedule_shift=0.5)


def test_a_single_beta_is_a_schedule_too():
    for beta in (0.5, 0.999):
        limit = pytest.approx(beta / 1000)
        assert find_schedule([beta]) == {
            "schedule": "linear",
            "num_timesteps": 1,
            "schedule_low": limit,
            "schedule_high": limit,
        }
