"""What a student's output must be for one DDIM step from t to s to land on a given z_s."""

from __future__ import annotations

from torch import Tensor

from fewstep.diffusion.prediction import PredictionType


def step_target(
    z_t: Tensor,
    z_s: Tensor,
    alpha_t: Tensor,
    sigma_t: Tensor,
    alpha_s: Tensor,
    sigma_s: Tensor,
    prediction_type: PredictionType,
) -> Tensor:
    """Return the output at z_t that a DDIM step takes to z_s, (B, …), float32.

    The S/C form, with S = alpha_s sigma_t − alpha_t sigma_s and C = alpha_s alpha_t + sigma_s sigma_t:
    x̃ = (sigma_t z_s − sigma_s z_t)/S, eps̃ = (alpha_s z_t − alpha_t z_s)/S, ṽ = (C z_t − z_s)/S. It equals
    Salimans & Ho's x target (z_s − (sigma_s/sigma_t) z_t)/(alpha_s − (sigma_s/sigma_t) alpha_t) and, unlike it, divides
    by neither sigma_t nor alpha_t. With s clean (alpha_s = 1, sigma_s = 0) x̃ = z_s.
    """
    s = alpha_s * sigma_t - alpha_t * sigma_s
    if prediction_type == "v_prediction":
        return ((alpha_s * alpha_t + sigma_s * sigma_t) * z_t - z_s) / s
    if prediction_type == "sample":
        return (sigma_t * z_s - sigma_s * z_t) / s
    return (alpha_s * z_t - alpha_t * z_s) / s
