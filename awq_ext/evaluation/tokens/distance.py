"""How far a model's next-token distributions are from a reference's: the figures of llama.cpp's ``--kl-divergence``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bootstrap import Bootstrap, Measure

# share of the tokens -> what the divergence that they stay below is called
_QUANTILES = {0.5: "kl_median", 0.99: "kl_99", 0.999: "kl_99_9", 1.0: "kl_max"}
# of window_scores: the rows that the measures here are made of
ROWS = ("reference_nll", "change", "square")


@dataclass(frozen=True, eq=False)
class Distance:
    """What two models' predictions of the same tokens have to do with each other. ``print`` shows it as llama.cpp does.

    kl: fp32 [tokens], the KL divergence of the reference's next-token distribution from the model's, in nats, of each token that
    was scored. measures: what is a mean over tokens, with an interval over windows: "perplexity", "reference_perplexity",
    "perplexity_ratio" (exp of the mean difference of -log p), "kl", "top1" (share of tokens with the same likeliest next one),
    "mean_dp" and "rms_dp": mean and root mean square of how the probability of the text's own next token changed, from -1 to 1.

    Definitions: llama.cpp, tools/perplexity/perplexity.cpp. Quantiles interpolate between tokens, as there. Other than there, every
    token of a window but the first counts (there: those of a window's second half), the reference's probabilities are neither
    rounded to 16 bits nor left out below exp(-16), and a divergence below zero, which is rounding, counts as zero.
    """

    kl: Tensor
    measures: Mapping[str, Measure]

    @classmethod
    def of(cls, kl: Sequence[Tensor], sums: Mapping[str, Tensor], counts: Tensor) -> Distance:
        """Collect it. kl: parts of it; sums, counts fp64 [windows]: of ROWS, "nll", "kl" and "top1" over a window's tokens."""
        change = sums["nll"] - sums["reference_nll"]
        found = {
            "perplexity": Measure(sums["nll"], counts, torch.exp),
            "reference_perplexity": Measure(sums["reference_nll"], counts, torch.exp),
            "perplexity_ratio": Measure(change, counts, torch.exp),
            "kl": Measure(sums["kl"], counts),
            "mean_dp": Measure(sums["change"], counts),
            "rms_dp": Measure(sums["square"], counts, torch.sqrt),
            "top1": Measure(sums["top1"], counts, better="higher"),
        }
        return cls(torch.cat([part.float().cpu() for part in kl]), found)

    def quantile(self, share: float) -> float:
        """Compute the divergence that this share of the tokens, from 0 to 1, does not exceed; NaN where one is not finite.

        Sorted and interpolated here: torch.quantile takes no more than 16 million values.
        """
        if not bool(self.kl.isfinite().all()):
            return math.nan
        values = self.kl.sort().values
        place = share * (len(values) - 1)
        low = int(place)
        high = min(low + 1, len(values) - 1)
        return float(values[low].double().lerp(values[high].double(), place - low))

    def to_dict(self, bootstrap: Bootstrap) -> dict[str, Any]:
        """Plain values, ready for JSON: what :class:`Evaluation` does not have under names of its own."""
        quantiles = {name: self.quantile(share) for share, name in _QUANTILES.items()}
        own = ("reference_perplexity", "perplexity_ratio", "mean_dp", "rms_dp")
        estimates = {name: bootstrap.estimate(self.measures[name]).to_dict() for name in own}
        return {name: value if math.isfinite(value) else None for name, value in quantiles.items()} | estimates

    def lines(self) -> list[tuple[str, str]]:
        """Say the figures under the names that llama.cpp has for them, probabilities in percent."""
        value = {name: measure.value for name, measure in self.measures.items()}
        return [
            ("Mean PPL(Q)", f"{value['perplexity']:.6f}"),
            ("Mean PPL(base)", f"{value['reference_perplexity']:.6f}"),
            ("Mean PPL(Q)/PPL(base)", f"{value['perplexity_ratio']:.6f}"),
            ("Mean KLD", f"{value['kl']:.6f}"),
            ("Maximum KLD", f"{self.quantile(1.0):.6f}"),
            ("99.9% KLD", f"{self.quantile(0.999):.6f}"),
            ("99.0% KLD", f"{self.quantile(0.99):.6f}"),
            ("Median KLD", f"{self.quantile(0.5):.6f}"),
            ("Mean Δp", f"{100 * value['mean_dp']:.3f} %"),
            ("RMS Δp", f"{100 * value['rms_dp']:.3f} %"),
            ("Same top p", f"{100 * value['top1']:.3f} %"),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{name:22} {shown:>14}" for name, shown in self.lines())
