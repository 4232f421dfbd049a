"""Raw records out of a TFDS dataset: `tfds:NAME[/CONFIG][/VERSION]:SPLIT`, or `tfds:DIRECTORY:SPLIT`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from conan_jax.data.readers import Item
from conan_jax.errors import DataError


def read(source: str, before: int = 0, *, data_dir: str | None = None) -> Iterator[Item]:
    """The examples of a split, in order, as Python values; class labels as their names.

    A dataset that is not yet in `data_dir` (default `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`) is downloaded
    and prepared by TFDS. An absolute path instead of a name opens that folder as it is.

    Raises:
        DataError: no such dataset or split, it cannot be prepared, or it is stored as TFRecord.
    """
    name, split = split_source(source)
    try:
        if os.path.isabs(name):
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
            builder.download_and_prepare(file_format="array_record")
        examples = builder.as_data_source(split)
    except NotImplementedError as error:
        raise DataError(f"{source} is stored in a format without random access; prepare it again with "
                        f"tfds.builder({name!r}).download_and_prepare(file_format='array_record') in another data_dir ({error})") from None
    except Exception as error:  # TFDS raises many unrelated types: not found, no network, checksum, missing dependency
        raise DataError(f"{source} cannot be opened by TFDS ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}); "
                        "check the name, the split and the network") from None
    convert = _converter(builder.info.features)
    for i in range(len(examples)):
        yield Item(f"{source}[{i}]", convert(examples[i]), before + i + 1)


def split_source(source: str) -> tuple[str, str]:
    """("NAME[/CONFIG]", "SPLIT") of `tfds:NAME[/CONFIG]:SPLIT`; raises `DataError` when it has another form."""
    name, colon, split = source.removeprefix("tfds:").partition(":")
    if not (name and colon and split):
        raise DataError(f"{source!r} must be tfds:NAME[/CONFIG]:SPLIT, for instance tfds:glue/stsb:train")
    return name, split


def _converter(feature: Any) -> Callable[[Any], Any]:
    """NumPy values -> Python values after the feature they belong to."""
    if isinstance(feature, tfds.features.ClassLabel):
        return lambda value: feature.int2str(int(value)) if 0 <= int(value) < feature.num_classes else None
    if isinstance(feature, tfds.features.FeaturesDict):
        inner = {name: _converter(f) for name, f in feature.items()}
        return lambda value: {name: inner[name](v) for name, v in value.items()}
    if isinstance(feature, tfds.features.Sequence):
        if isinstance(feature.feature, tfds.features.FeaturesDict):  # TFDS gives a dict of lists, not a list of dicts
            columns = {name: _converter(f) for name, f in feature.feature.items()}
            return lambda value: {name: [columns[name](x) for x in v] for name, v in value.items()}
        item = _converter(feature.feature)
        return lambda value: [item(x) for x in value]
    return lambda value: value.tolist() if isinstance(value, np.ndarray | np.generic) else value
