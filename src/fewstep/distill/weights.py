"""Loss weights omega(lambda_t) of ||x − x̂||² for networks that predict x, eps or v, named as in Salimans & Ho's code.

At fixed z_t of a variance-preserving schedule ||Δeps||² = SNR ||Δx||² and ||Δv||² = (SNR + 1) ||Δx||², so a weight on
the x error is a factor on the squared error of the network's own output. The factors below are written in alpha and
sigma with the divisions cancelled: none is left for a v-network.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fewstep.diffusion.prediction import PredictionType

#: x: plain ||Δx||² (the paper's "constant"); snr: SNR ||Δx||²; truncated_snr: max(SNR, 1) ||Δx||²;
#: snr_plus_one: (SNR + 1) ||Δx||²; min_snr: min(SNR, 5) ||Δx||² (Hang et al. 2023).
LossWeight = Literal["x", "snr", "truncated_snr", "snr_plus_one", "min_snr"]

#: gamma of min_snr: the value that Hang et al. recommend (§4).
MIN_SNR_GAMMA = 5.0


def output_weight(name: LossWeight, alpha: Tensor, sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """Return the factor on the squared error of the network's output, in alpha's shape.

    Infinite where the weight has no meaning for that output: an eps network at alpha = 0, an x network at sigma = 0.
    """
    a, s, gamma = alpha.square(), sigma.square(), MIN_SNR_GAMMA
    if prediction_type == "v_prediction":
        return {
            "x": s,
            "snr": a,
            "truncated_snr": torch.maximum(a, s),
            "snr_plus_one": torch.ones_like(a),
            "min_snr": torch.minimum(a, gamma * s),
        }[name]
    if prediction_type == "epsilon":
        return {
            "x": s / a,
            "snr": torch.ones_like(a),
            "truncated_snr": (s / a).clamp_min(1),
            "snr_plus_one": 1 / a,
            "min_snr": (gamma * s / a).clamp_max(1),
        }[name]
    return {
        "x": torch.ones_like(a),
        "snr": a / s,
        "truncated_snr": (a / s).clamp_min(1),
        "snr_plus_one": 1 / s,
        "min_snr": (a / s).clamp_max(gamma),
    }[name]
