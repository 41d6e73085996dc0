"""How the cloud and the edges average: two sections of ``common/config/run.py``."""

from typing import Literal, Self

from pydantic import model_validator

from fedphd.common.config.data import Section, setting


class AggregationConfig(Section):
    """The cloud's weights of the edges (Eq. 10 of arXiv:2507.06449), and what protects averages."""

    factor: float = setting(20.0, "a, in mean samples per client", ge=0)
    offset: float = setting(0.0, "b, in mean samples per client")
    step_size: float = setting(
        1.0,
        "eta_g, how far the global weights move to the average of the edges (flat: of the "
        "clients); 1: onto it; SCAFFOLD's global step size (arXiv:1910.06378)",
        gt=0,
        le=10,
    )
    method: Literal["mean", "trimmed_mean"] = setting(
        "mean",
        "mean: by images at an edge, by Eq. 10 at the cloud; trimmed_mean: coordinate-wise, "
        "without the extremes and all replies alike (arXiv:1803.01498), where one is left; "
        "an edge then keeps all replies of a round in memory",
    )
    trim: float = setting(
        0.1, "share of the replies left out at each end, rounded up (trimmed_mean)", gt=0, lt=0.5
    )
    max_update_ratio: float = setting(
        10.0,
        "a reply is dropped whose change of the weights per optimiser step has a 2-norm above this "
        "many times the median of its round, where at least 3 replied; 0: none is",
        ge=0,
    )

    @model_validator(mode="after")
    def _the_median_itself_passes(self) -> Self:
        if 0 < self.max_update_ratio <= 1:
            raise ValueError(
                f"max_update_ratio = {self.max_update_ratio:g} would drop half of all replies; use "
                "more than 1, or 0 for no bound"
            )
        return self


class EmaConfig(Section):
    """Exponential moving average of the global weights, kept at the cloud."""

    decay: float = setting(
        0.995,
        "decay per client optimiser step, once warmed up: after (warmup * decay - 1) / (1 - decay) "
        "steps of a client, 1,790 at 0.995 and 89,990 at 0.9999, which a shorter run never reaches",
        ge=0,
        lt=1,
    )
    warmup: int = setting(
        10,
        "until decay is reached, step n decays by (1 + n) / (warmup + n), so that the average "
        "spans about the last 1 / (warmup - 1) of the training; 10: as diffusers; 1: no warm-up",
        ge=1,
        le=1000,
    )
