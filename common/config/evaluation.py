"""How the cloud samples the network and measures the samples."""

from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from fedphd.common.config.data import DataConfig, Section, setting
from fedphd.common.config.paths import UserPath
from fedphd.common.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16"]
_USUAL_STEPS = 50
_LEAST_COVERED = 0.9


def check_steps(steps: int, num_timesteps: int, name: str = "evaluation.sampling_steps") -> None:
    """Raise ConfigError if so many DDIM steps leave out the noisiest part of the diffusion.

    Errors call their setting ``name``, and say which numbers near it serve.
    """
    if _covers(steps, num_timesteps):
        return
    near = [_at_most(steps, num_timesteps)]
    near += [n for n in range(steps, num_timesteps + 1) if _covers(n, num_timesteps)][:1]
    # Steps are whole timesteps apart, which leaves a rest.
    problem = "is more than" if steps > num_timesteps else "leaves out the noisiest part of"
    raise ConfigError(
        f"{name} = {steps} {problem} diffusion.num_train_timesteps = {num_timesteps}; use "
        f"{' or '.join(map(str, near))}"
    )


def usual_steps(num_timesteps: int) -> int:
    """The DDIM steps of commands that are told no other number."""
    return _at_most(_USUAL_STEPS, num_timesteps)


def _at_most(steps: int, num_timesteps: int) -> int:
    most = min(steps, num_timesteps)
    return next(n for n in range(most, 0, -1) if _covers(n, num_timesteps))


def _covers(steps: int, num_timesteps: int) -> bool:
    # diffusers' spacing "leading", from timestep 0 up.
    return num_timesteps // steps * steps >= _LEAST_COVERED * num_timesteps


class EvaluationConfig(Section):
    """Samples and distances computed at the cloud."""

    every_intervals: int = setting(2, "intervals from one evaluation to the next", ge=1)
    num_samples: int = setting(512, "generated images per distance", ge=2)
    sampling_steps: int = setting(50, "DDIM steps (arXiv:2010.02502)", ge=1)
    batch_size: int = setting(256, "images sampled at a time", ge=1)
    precision: Precision = setting(
        "auto",
        "arithmetic in which samples that are measured are drawn; auto: bf16 on GPUs that have "
        "instructions for it, fp32 elsewhere and where reproducible = true",
    )
    grid_rows: int = setting(8, "rows and columns of samples.png", ge=1, le=32)
    guidance: float = setting(
        1.0,
        "classifier-free guidance of a class-conditional network's samples; 1: none",
        ge=0,
        le=100,
    )
    seed: int = setting(1234, "seed of the sampling noise", ge=0)
    classifier_epochs: int = setting(
        20, "epochs of the feature classifier on the reference data", ge=1
    )
    features: Literal["auto", "classifier", "inception"] = setting(
        "auto",
        "features in which images are compared, a small classifier's or Inception's; "
        "auto: Inception's if inception_weights is given",
    )
    features_file: UserPath | None = setting(
        None, "classifier written by `fedphd features train`; absent: trained on reference"
    )
    inception_weights: UserPath | None = setting(
        None, "file with torch-fidelity's Inception weights"
    )
    inception_sha256: str | None = setting(
        None, "SHA-256 that the file inception_weights must have", pattern="^[0-9a-fA-F]{64}$"
    )
    raw_too: bool = setting(False, "measure the raw weights as well as the averaged (EMA) ones")
    reference_file: UserPath | None = setting(
        None, "compare with statistics written by `fedphd statistics`"
    )
    reference_clients: bool = setting(
        False, "compare with the sum of the statistics that clients compute"
    )
    reference: DataConfig | None = setting(
        None, 'data set to compare with; absent, or "none": samples, but no distance'
    )

    @field_validator("reference", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        """TOML has no null, by which a preset's reference could be unset."""
        return None if value == "none" else value

    @property
    def wants_inception(self) -> bool:
        """Whether distances are in Inception's features."""
        auto = self.features == "auto" and self.inception_weights is not None
        return auto or self.features == "inception"

    @property
    def compares(self) -> bool:
        """Whether samples are compared with anything, so that there is a distance."""
        has_file = self.reference_file is not None
        return self.reference is not None or has_file or self.reference_clients

    @model_validator(mode="after")
    def _one_reference(self) -> Self:
        given = {
            "reference": self.reference is not None,
            "reference_file": self.reference_file is not None,
            "reference_clients": self.reference_clients,
        }
        names = [name for name, there in given.items() if there]
        if len(names) > 1:
            raise ValueError(
                f"evaluation.{' and evaluation.'.join(names)} are given together; there is only "
                "one reference, so unset the others (null, or false)"
            )
        ready = self.wants_inception or self.features_file is not None
        if names and self.reference is None and not ready:
            raise ValueError(
                f"evaluation.{names[0]} needs features that do not depend on images at the cloud: "
                "set evaluation.features_file (fedphd features train) or "
                "evaluation.inception_weights"
            )
        return self

    @model_validator(mode="after")
    def _all_of_the_reference(self) -> Self:
        if self.reference and (fraction := self.reference.validation_fraction):
            raise ValueError(
                f"evaluation.reference.validation_fraction = {fraction}: only clients hold out "
                "images (data.validation_fraction); leave it out"
            )
        if self.reference and self.reference.partition:
            raise ValueError(
                "evaluation.reference.partition: only clients hold a part (data.partition); leave "
                "it out, and bound the images by evaluation.reference.max_images"
            )
        return self

    @model_validator(mode="after")
    def _inception_is_meant(self) -> Self:
        if self.inception_sha256 is not None and self.inception_weights is None:
            raise ValueError("evaluation.inception_sha256 needs evaluation.inception_weights")
        if self.features == "classifier" and self.inception_weights is not None:
            raise ValueError(
                "evaluation.inception_weights is given, but evaluation.features = 'classifier'; "
                "set features to 'auto' or 'inception', or unset the weights"
            )
        return self
