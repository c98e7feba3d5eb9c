"""Prediction types and the DDIM step, in the S/C form that divides by neither alpha nor sigma where it can be avoided.

With alpha_t = cos(phi_t) and sigma_t = sin(phi_t), v = alpha eps − sigma x, x = alpha z − sigma v and
eps = sigma z + alpha v. A DDIM step from t to s (Meng et al. eq. 2) is then z_s = C z_t − S v with
C = cos(phi_t − phi_s) = alpha_s alpha_t + sigma_s sigma_t and
S = sin(phi_t − phi_s) = alpha_s sigma_t − alpha_t sigma_s.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from fewstep.errors import ModelError

PredictionType = Literal["epsilon", "v_prediction", "sample"]


def check_prediction_type(name: str) -> PredictionType:
    """Return `name` when it is a prediction type of diffusers.

    Raises:
        ModelError: it is none.
    """
    if name not in get_args(PredictionType):
        raise ModelError(
            f"prediction_type={name!r} is unknown; it must be one of {', '.join(get_args(PredictionType))}"
        )
    return name  # type: ignore[return-value]


def to_velocity(output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """Return v from a network output at z_t, all (B, …); alpha and sigma broadcast.

    An epsilon output has no v at alpha = 0 and a sample output none at sigma = 0: the division then gives infinities.
    """
    if prediction_type == "v_prediction":
        return output
    if prediction_type == "epsilon":
        return (output - sigma * z) / alpha
    return (alpha * z - output) / sigma


def to_sample(output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """Return x̂ from a network output at z_t, all (B, …)."""
    if prediction_type == "sample":
        return output
    if prediction_type == "epsilon":
        return (z - sigma * output) / alpha
    return alpha * z - sigma * output


def to_epsilon(output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """Return eps-hat from a network output at z_t, all (B, …)."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "sample":
        return (z - alpha * output) / sigma
    return sigma * z + alpha * output


def from_velocity(v: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """Return what a network of the given prediction type outputs when its velocity is v, all (B, …)."""
    if prediction_type == "v_prediction":
        return v
    if prediction_type == "epsilon":
        return sigma * z + alpha * v
    return alpha * z - sigma * v


def from_sample(x: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """Return what a network of the given prediction type outputs when its x̂ is x, all (B, …); needs sigma > 0."""
    if prediction_type == "sample":
        return x
    if prediction_type == "epsilon":
        return (z - alpha * x) / sigma
    return (alpha * z - x) / sigma


def convert_output(
    output: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor, *, source: PredictionType, target: PredictionType
) -> Tensor:
    """Return an output of one prediction type as one of another, all (B, …).

    Infinite where the two have nothing in common: an epsilon output at alpha = 0, a sample output at sigma = 0.
    """
    if source == target:
        return output
    return from_velocity(to_velocity(output, z, alpha, sigma, source), z, alpha, sigma, target)


def ddim_step(
    output: Tensor,
    z: Tensor,
    alpha_t: Tensor,
    sigma_t: Tensor,
    alpha_s: Tensor,
    sigma_s: Tensor,
    prediction_type: PredictionType,
) -> Tensor:
    """Return z_s, one deterministic DDIM step from time t to s (Meng et al. eq. 2; eta = 0), (B, …).

    Each prediction type has a form of its own, so that nothing is divided by a sigma or alpha that may be zero; only
    an epsilon output needs 1/alpha_t, and has no meaning at alpha_t = 0.
    """
    c = alpha_s * alpha_t + sigma_s * sigma_t
    s = alpha_s * sigma_t - alpha_t * sigma_s
    if prediction_type == "v_prediction":
        return c * z - s * output
    if prediction_type == "sample":
        # x̂ weighs alpha_s − alpha_t sigma_s/sigma_t = S/sigma_t; sigma_t > 0 at every step's start.
        return (sigma_s * z + s * output) / sigma_t
    return (alpha_s * z - s * output) / alpha_t
