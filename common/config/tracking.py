"""Which trackers follow a run: a section of the cloud's configuration."""

from typing import Literal, Self

from pydantic import model_validator

from fedphd.common.config.data import Section, setting
from fedphd.common.extras import require_extra

BackendName = Literal["tensorboard", "mlflow", "wandb"]


class TrackingConfig(Section):
    """Trackers that get the cloud's numbers while it runs."""

    backends: tuple[BackendName, ...] = setting(
        ("tensorboard",),
        "tensorboard: files in the run's folder; mlflow, wandb (Weights & Biases): need the extra "
        "of that name; []: none",
    )
    project: str = setting("fedphd", "MLflow's experiment, and the project of W&B", min_length=1)
    mlflow_uri: str | None = setting(
        None,
        "MLflow's server or store, such as http://127.0.0.1:5000 or sqlite:///mlflow.db; absent: "
        "MLFLOW_TRACKING_URI, or else mlflow.db in out_dir",
        min_length=1,
    )

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        if len(set(self.backends)) < len(self.backends):
            raise ValueError(f"backends = {list(self.backends)} names one twice; keep one of them")
        if self.mlflow_uri is not None and "mlflow" not in self.backends:
            raise ValueError(
                f"mlflow_uri = {self.mlflow_uri!r}, but backends = {list(self.backends)}; add "
                "'mlflow' to backends, or unset mlflow_uri"
            )
        return self

    def check_installed(self) -> None:
        """Raise ConfigError, with the command that installs it, where a tracker is missing."""
        for name in self.backends:
            if name != "tensorboard":
                require_extra(f"tracking.backends = {list(self.backends)}", name, name)
