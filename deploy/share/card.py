"""A model card: what a shared network is, how it was trained and measured, and what it cannot do.

It says of the federation only what cannot lead to its members: numbers, never names or paths.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from jinja2 import Environment, StrictUndefined

from fedphd.common.config.run import INCEPTION, FederationConfig
from fedphd.common.history.evaluation import EvaluationRecord, Quality
from fedphd.common.history.progress import Progress
from fedphd.common.robust import can_trim
from fedphd.common.unet.costs import FLOPS_CONVENTION, Costs
from fedphd.deploy.launch.render import distance_name, human_bytes, human_seconds, scale

WeightsName = Literal["averaged", "raw"]

# What the estimate of emissions assumes; the card says so.
FLOP_PER_JOULE: Final = 1e9
GRAMS_PER_KWH: Final = 500.0
_JOULES_PER_KWH: Final = 3.6e6

_TASK: Final = "unconditional-image-generation"
_COLOURS: Final = {1: "grey", 3: "RGB", 4: "RGBA"}
_UNNAMED: Final = "a data set that is not named"
# Data sets that anybody may know of, as `data.source` has them, and their names for people.
KNOWN_DATA: Final = {"digits": "scikit-learn's digits", "uoft-cs/cifar10": "CIFAR-10"}
# Choices of an edge that do not look at labels.
_BLIND: Final = ("random", "static")
# A classifier's features are named after the last part of its data set's name.
_CLASSIFIER: Final = re.compile(r"classifier\((.*)\)")


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Data:
    """What may be said of the clients' images.

    Attributes:
        name: of the data set, if it is one that anybody may know of, or as the user says.
        split: the split's name without its data set, such as ``pathological-2x6-seed0-87bf136a``.
        sizes: images of each client; () where the cloud does not know.
    """

    name: str | None = None
    split: str | None = None
    sizes: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """The data set's name for people."""
        return _UNNAMED if self.name is None else KNOWN_DATA.get(self.name, self.name)

    @property
    def on_hub(self) -> list[str]:
        """Its name on the Hugging Face hub, if it is there."""
        if not self.name or "/" not in self.name or Path(self.name).exists():
            return []
        with suppress(HFValidationError):
            validate_repo_id(self.name)
            return [self.name]
        return []


@dataclass(frozen=True)
class Card:
    """A run as far as it is, which of its weights are shared, and how they were sampled.

    Attributes:
        own_class: the network needs this package's class.
        name: the model's name on the hub, if it is known.
        license: of the weights, as the hub names it.
        num_samples, steps, seed: of ``samples.png``.
        onnx: whether an ONNX file lies beside the weights.
        trained_by: version of this package that did the run; None: nobody knows.
    """

    config: FederationConfig
    progress: Progress
    data: Data
    weights: WeightsName
    own_class: bool
    name: str | None
    license: str | None
    num_samples: int
    steps: int
    seed: int
    onnx: bool
    trained_by: str | None = None

    def text(self) -> str:
        """The whole ``README.md``, with the hub's metadata in front."""
        template = resources.files("fedphd.deploy.share") / "card.md.j2"
        # Markdown, not HTML, so nothing is escaped.
        environment = Environment(
            undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
        )
        return environment.from_string(template.read_text("utf-8")).render(self._values())

    def _values(self) -> dict[str, Any]:
        """What the template names."""
        model, measured, record = self.config.model, self._measured, self._record
        is_current = self.is_measured
        return {
            "metadata": self._metadata().to_yaml(),
            "title": self._title,
            "version": version("fedphd"),
            "trained_by": self.trained_by,
            "size": model.image_size,
            "channels": model.channels,
            "colour": _COLOURS.get(model.channels, f"{model.channels}-channel"),
            "of_what": self.data.title,
            "progress": self.progress,
            "costs": self._costs(),
            "told_classes": self.config.num_classes if model.class_conditional else 0,
            "averaged": self.weights == "averaged",
            "ema": self._ema(),
            "pruned": self.progress.reported.pruning is not None,
            "own_class": self.own_class,
            "place": self.name or ".",
            "num_samples": self.num_samples,
            "steps": self.steps,
            "seed": self.seed,
            "onnx": self.onnx,
            "data": list(self._data()),
            "method": list(self._method()),
            "quality": list(self._quality(record, measured)) if record and measured else [],
            "protocol": self._protocol(record) if record else "",
            "measured_after": record.interval if record else 0,
            "not_fid": bool(measured) and not self._is_fid(record),
            "least_class": measured.least_class if measured else None,
            "least_class_ratio": measured.least_class_ratio if measured and is_current else None,
            "cost": list(self._cost()),
            "licensed": self.license is not None,
        }

    @property
    def _title(self) -> str:
        if self.name:
            return self.name.rpartition("/")[2]
        of = "" if self.data.name is None else f" of {self.data.title}"
        return f"FedPhD model{of}"

    def _metadata(self) -> ModelCardData:
        tags = ["diffusion", "ddpm", "federated-learning", "flower", "fedphd"]
        measured, record = self._measured, self._record
        results = []
        # The hub takes a number for one of the model's as it is shared.
        if record and measured and self.is_measured:
            fid = self._is_fid(record)
            results = [
                EvalResult(
                    task_type=_TASK,
                    dataset_type=self.data.name or "not-named",
                    dataset_name=self.data.title,
                    metric_type="fid" if fid else "frechet_distance",
                    metric_name="FID" if fid else f"Frechet distance, {self._features(record)}",
                    metric_value=round(measured.frechet_distance or 0.0, 2),
                )
            ]
        return ModelCardData(
            # By this the hub shows how a model is opened.
            library_name="fedphd" if self.own_class else "diffusers",
            pipeline_tag=_TASK,
            license=self.license,
            tags=[
                *tags,
                *(["pruning"] if self.progress.reported.pruning else []),
                *(["onnx"] if self.onnx else []),
                # What the pipeline draws is of no class in particular, so the task stays.
                *(["class-conditional"] if self.config.model.class_conditional else []),
            ],
            datasets=self.data.on_hub or None,
            eval_results=results or None,
            model_name=self._title if results else None,
        )

    @property
    def is_measured(self) -> bool:
        """Whether the numbers are those of the shared weights."""
        record, done = self._record, self.progress.interval
        return record is not None and self._measured is not None and record.interval == done

    @property
    def _record(self) -> EvaluationRecord | None:
        """The last evaluation."""
        records = self.progress.reported.evaluations
        return records[-1] if records else None

    @property
    def _measured(self) -> Quality | None:
        """What it found of the shared weights, if they have a distance.

        Of an early version, what was found of an earlier one; not of the untrained network.
        """
        record = self._record
        if record and not record.interval and self.progress.interval:
            return None
        found = record if record is None or self.weights == "averaged" else record.raw
        return found if found and found.frechet_distance is not None else None

    def _costs(self) -> dict[str, Costs]:
        reported = self.progress.reported
        return {"before": reported.dense, "after": reported.costs}

    def _ema(self) -> str:
        reported = self.progress.reported
        return f"the last {reported.ema_span:.0f} of {reported.ema_steps:.0f}"

    def _data(self) -> Iterator[str]:
        """Lines on the images and how clients share them."""
        clients, sizes, config = self.config.schedule.min_clients, self.data.sizes, self.config
        told = config.model.class_conditional
        labels = "the network was told each image's class" if told else "labels were not trained on"
        yield f"Images: {self.data.title}, {config.num_classes} classes; {labels}"
        if sizes:
            per_client = f"{min(sizes)} to {max(sizes)} images each"
            yield f"{len(sizes)} clients of {per_client}, {sum(sizes)} in all"
        else:
            yield f"At least {clients} clients; what each holds is not known here"
        if self.data.split:
            yield f"Split: `{self.data.split}` (kind, clients, seed, hash of all positions)"
        uses = [*self._uses_of_labels()]
        used = f"its labels {_listed(uses)}" if uses else "its labels had no part in the training"
        yield f"Each client's images stayed with it; {used}"
        yield f"What left a client: {_listed([*self._what_left()])}"

    def _uses_of_labels(self) -> Iterator[str]:
        """What a client's labels were for."""
        config = self.config
        aggregation, selection = config.aggregation, config.selection
        if config.model.class_conditional:
            yield "told the network what it sees"
        if config.topology == "flat":
            return
        # A factor of 0 makes the scores of the others worth nothing.
        if selection.policy == "min_kl" or (selection.policy not in _BLIND and selection.factor):
            yield "steered its choice of an edge"
        trims = aggregation.method == "trimmed_mean"
        if aggregation.factor and not (
            trims and can_trim(config.schedule.num_edges, aggregation.trim)
        ):
            yield "had a part in the cloud's weights of its edges (Eq. 10)"

    def _what_left(self) -> Iterator[str]:
        """What a client sent."""
        yield "weights"
        if self.config.objective.method == "scaffold":
            yield "SCAFFOLD's control variates"
        yield "how many images of each label it has"
        if self.config.evaluation.reference_clients:
            yield "sums over the features of its images, for the reference"
        yield "figures of its training, such as the loss"

    def _method(self) -> Iterator[str]:
        """Lines on the training."""
        config = self.config
        schedule, training, pruning = config.schedule, config.training, config.pruning
        if config.topology == "flat":
            yield f"Flat: the cloud averages its clients (`{config.objective.method}`)"
        else:
            yield (
                f"Hierarchical, with {_count(schedule.num_edges, 'edge')} between clients and "
                f"cloud (`{config.objective.method}`); edge choice `{config.selection.policy}`"
            )
        yield (
            f"{_count(self.progress.interval, 'cloud round')} of "
            f"{_count(schedule.edge_rounds, 'edge round')}, in each {schedule.participation:.0%} "
            f"of the clients, {training.local_amount} local {training.local_unit}"
        )
        yield (
            f"{training.optimizer}, learning rate {training.learning_rate:g}, batches of "
            f"{training.batch_size}, gradients clipped to norm {training.max_grad_norm:g}; seed "
            f"{config.seed}"
        )
        report = self.progress.reported.pruning
        if report:
            when = "before the first round"
            if pruning.mode == "scheduled":
                when = f"after {pruning.sparse_rounds} edge rounds of sparse training"
            yield f"Pruned once, {when}: to {1 - report.achieved_ratio:.0%} of its widths"
        else:
            yield "Not pruned"
        yield (
            f"Forward process: DDPM, {config.diffusion.num_train_timesteps} steps, "
            f"{config.diffusion.beta_schedule} betas; the network predicts the noise"
        )
        if config.exchange.parts != "full":
            yield f"Only parts of the network travelled (`{config.exchange.parts}`)"
        codecs = config.codecs.model_dump().items()
        if coded := [f"`{link}` {codec}" for link, codec in codecs if codec != "fp32"]:
            yield f"Weights travelled in few bits: {', '.join(coded)}"

    @staticmethod
    def _is_fid(record: EvaluationRecord | None) -> bool:
        return record is not None and record.features == INCEPTION

    def _features(self, record: EvaluationRecord) -> str:
        """What images were compared in; a classifier's name tells a file's or folder's name."""
        named = _CLASSIFIER.fullmatch(record.features)
        if named is None:
            return record.features
        known = {name.rpartition("/")[2] for name in (*KNOWN_DATA, self.data.name or "")}
        return f"features of a small classifier{f' of {named[1]}' if named[1] in known else ''}"

    def _quality(self, record: EvaluationRecord, found: Quality) -> Iterator[tuple[str, str]]:
        """Rows of the table of numbers."""
        yield distance_name(record), f"{found.frechet_distance:.1f}"
        if record.anchors:
            yield "for scale", scale(record.anchors)
        rows = (
            ("KID" if self._is_fid(record) else "kernel distance", found.kernel_distance, ".3g"),
            ("Inception score", found.inception_score, ".2f"),
            ("precision", found.precision, ".2f"),
            ("recall", found.recall, ".2f"),
            ("least class, of its share", found.least_class_ratio, ".0%"),
        )
        yield from ((name, format(value, form)) for name, value, form in rows if value is not None)

    def _protocol(self, record: EvaluationRecord) -> str:
        """How the numbers were measured, in sentences."""
        when = f"After cloud round {record.interval}" if record.interval else "Before training"
        digest = f" (SHA-256 of their statistics {record.reference_sha256})"
        return (
            f"{when}: {record.num_samples} samples, {record.sampler}, {record.sampling_steps} "
            f"steps, noise of seed {record.seed}; {self._features(record)}; "
            f"{record.num_reference_images} reference images"
            f"{digest if record.reference_sha256 else ''}.{self._told(record)}"
        )

    @staticmethod
    def _told(record: EvaluationRecord) -> str:
        """That samples were told their classes, which whoever uses the plain pipeline misses."""
        if record.guidance is None:
            return ""
        return (
            " The network was told the samples' classes, spread as the target is, with guidance "
            f"{record.guidance:g}; the plain pipeline, which tells it none, draws other images, "
            "which were not measured."
        )

    def _cost(self) -> Iterator[str]:
        """Lines on arithmetic, traffic, time and emissions."""
        reported = self.progress.reported
        flops = float(sum(row.training_flops for row in reported.rounds))
        grams = flops / FLOP_PER_JOULE / _JOULES_PER_KWH * GRAMS_PER_KWH
        # What follows concerns MOON alone.
        convention = FLOPS_CONVENTION.partition(";")[0]
        yield f"Training, all clients together: {flops:.2e} FLOPs ({convention})"
        to_cloud = human_bytes(reported.cloud.total_bytes)
        if self.config.topology == "flat":
            yield f"Over links between clients and cloud: {to_cloud}"
        else:
            to_edges = human_bytes(reported.client_edge.total_bytes)
            yield f"Over links: {to_edges} between clients and edges, {to_cloud} to the cloud"
        yield f"Wall time of the run until its last round: {human_seconds(self.progress.elapsed_s)}"
        yield (
            "Carbon: not measured. An estimate on two assumptions, "
            f"{FLOP_PER_JOULE / 1e9:g} GFLOP per joule (a CPU; a GPU does many times as many) and "
            f"{GRAMS_PER_KWH:g} g of CO2eq per kWh: about {grams:.2g} g of CO2eq for the "
            "training's FLOPs. Idle time, traffic, evaluation and the machines are not in it"
        )
