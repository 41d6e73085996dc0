"""``fedphd pseudo-labels``: labels for images that have none, by clustering."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from numpy.typing import NDArray
from typer import Option

from fedphd.common.config.data import DataConfig
from fedphd.common.config.roles import validate
from fedphd.common.data.labels import write_labels
from fedphd.common.errors import ConfigError
from fedphd.deploy.cli.bars import bar
from fedphd.deploy.cli.flags import Set, check_out, overrides, say

if TYPE_CHECKING:
    from torch import Tensor

RESTARTS = 10


def cluster(
    images: "Tensor", *, num_classes: int, num_components: int, seed: int
) -> NDArray[np.int64]:
    """Cluster images by k-means on the principal components of their pixels.

    Clusters are numbered by size, the largest is 0, so their numbers do not depend on chance.

    Args:
        images: (N, C, H, W), uint8.
        num_components: principal components that are kept, at most what the images have.

    Returns:
        A cluster per image, (N,), int64, 0 to num_classes - 1.

    Raises ConfigError if there are fewer different images than classes.
    """
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]
    from sklearn.decomposition import PCA  # type: ignore[import-untyped]

    pixels = images.flatten(1).numpy().astype(np.float32) / 255
    different = len(np.unique(pixels, axis=0))
    if different < num_classes:
        raise ConfigError(
            f"--classes = {num_classes}, but there are only {different} different images; "
            "use fewer classes"
        )
    kept = min(num_components, *pixels.shape)
    reduced = PCA(n_components=kept, random_state=seed).fit_transform(pixels)
    found = KMeans(n_clusters=num_classes, n_init=RESTARTS, random_state=seed).fit_predict(reduced)
    by_size = np.argsort(-np.bincount(found, minlength=num_classes), kind="stable")
    numbered: NDArray[np.int64] = np.argsort(by_size)[found]
    return numbered


def pseudo_labels(
    data: Annotated[str, Option(help="images: a Hugging Face name, a local path or digits")],
    num_classes: Annotated[int, Option("--classes", metavar="N", min=1, help="clusters to make")],
    out: Annotated[Path, Option(help="the file of labels, for data.label_file")],
    image_size: Annotated[
        int,
        Option(metavar="N", min=4, help="height and width at which images are compared, in pixels"),
    ] = 32,
    channels: Annotated[
        int, Option(metavar="N", min=1, max=4, help="channels; 1 is grey, 3 RGB")
    ] = 3,
    components: Annotated[
        int, Option(metavar="N", min=1, help="principal components that are kept")
    ] = 50,
    seed: Annotated[int, Option(metavar="N", min=0, help="seed of the clustering")] = 0,
    settings: Set = None,
) -> None:
    """Cluster images without labels by k-means, and write the clusters as labels.

    --set gives the data's other settings, such as split=test. Name the result in
    data.label_file. The labels are for cutting one data set into unlike parts: clients
    that each cluster data of their own would number their clusters differently.
    """
    check_out(out)
    config = validate(DataConfig, overrides({"source": data}, settings), source="command line")
    # torch and datasets take seconds to import, which other commands should not pay for.
    from fedphd.common.data.images import stack_pictures
    from fedphd.common.data.sources import open_pictures

    with bar("reading data"):
        pictures = open_pictures(config)
        read = pictures.read(np.arange(pictures.num))
        images = stack_pictures(read, pictures.num, image_size, channels, config.source)
    with bar("clustering"):
        labels = cluster(images, num_classes=num_classes, num_components=components, seed=seed)
    write_labels(out, labels.tolist(), pictures.names())
    counts = ", ".join(map(str, np.bincount(labels)))
    say(f"wrote     {out}: {len(labels)} labels; images per class {counts}")
