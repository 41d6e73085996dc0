"""How good samples were found to be, and how that was measured."""

from pydantic import BaseModel, ConfigDict


class Quality(BaseModel):
    """How good samples are; what cannot be said without more of a reference is None.

    Attributes:
        frechet_distance: to the reference. A FID in Inception's features, and only there.
        kernel_distance, kernel_distance_std: squared MMD of a cubic kernel (KID in Inception's
            features), and its standard deviation over subsets.
        inception_score: in Inception's classes only.
        precision, recall: share of samples within the reference's manifold, and the reverse.
        class_shares: of the samples, by the classifier, (num_classes,).
        least_class, least_class_ratio: class with the smallest part of its share in the
            reference, and that part; 0 where a class is lost.
        class_distances: of a class-conditional network's samples of each class to the reference
            images of that class, (num_classes,); None for a class with too few of either.
        class_coverages: share of a class's reference images near which there is such a sample.
    """

    model_config = ConfigDict(ser_json_inf_nan="constants")

    frechet_distance: float | None = None
    kernel_distance: float | None = None
    kernel_distance_std: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    class_shares: tuple[float, ...] | None = None
    least_class: int | None = None
    least_class_ratio: float | None = None
    class_distances: tuple[float | None, ...] | None = None
    class_coverages: tuple[float | None, ...] | None = None


class Protocol(BaseModel):
    """What a number needs beside it to be compared with another.

    Attributes:
        features: which features, such as ``classifier(digits)``; ``none`` without a reference.
        num_samples: generated images, of ``seed``'s noise.
        num_reference_images, reference_sha256: images in the reference statistics, and the hash
            of the statistics' count, mean and covariance.
        neighbours: of precision and recall.
        manifold_images: samples, and reference images, in precision and recall.
        guidance: of samples whose classes the network was told, spread as the target is.
    """

    features: str
    num_samples: int
    sampler: str
    sampling_steps: int
    seed: int
    num_reference_images: int = 0
    reference_sha256: str | None = None
    neighbours: int | None = None
    manifold_images: int | None = None
    guidance: float | None = None


class Anchors(BaseModel):
    """Frechet distances of real images to the reference that they are from, for a scale.

    As many images as a network's samples, or as there are.

    Attributes:
        real: drawn from all of them: the least that can be hoped for.
        one_class_missing: drawn from all but the first class.
        half_of_the_classes: drawn from the first half of the classes.
    """

    real: float
    one_class_missing: float | None = None
    half_of_the_classes: float | None = None


class EvaluationRecord(Quality, Protocol):
    """One evaluation, of the weights of ``interval`` (0: before training).

    Its own numbers are the averaged weights'; ``raw`` has the raw weights' from the same noise.
    """

    interval: int | None = None
    raw: Quality | None = None
    anchors: Anchors | None = None
    seconds: float
