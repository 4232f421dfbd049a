"""Raw records out of a TFDS dataset: `tfds:NAME[/CONFIG][/VERSION]:SPLIT`, or `tfds:DIRECTORY:SPLIT`."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader

from conan_jax.data.readers import Item
from conan_jax.errors import DataError
from conan_jax.versions import install_command

_SWEEPING = threading.Lock()
_RETRIES = 4  # of a download, 3 s in all; TFDS itself takes over three minutes to say that there is no network


def read(source: str, before: int = 0, *, data_dir: str | None = None) -> Iterator[Item]:
    """The examples of a split, in order, as Python values; class labels as their names.

    A dataset that is not yet in `data_dir` (default `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`) is downloaded
    and prepared by TFDS. An absolute path instead of a name opens that folder as it is.

    Raises:
        DataError: no such dataset or split, it cannot be prepared, or it is stored as TFRecord.
    """
    name, split = split_source(source)
    try:
        builder = open_builder(name, data_dir)
        if not builder.is_prepared():
            with _patient_and_quiet(), contextlib.redirect_stdout(sys.stderr):  # TFDS prints; our stdout may be read by a program
                builder.download_and_prepare(file_format="array_record")
        examples = builder.as_data_source(split)
    except NotImplementedError as error:
        raise DataError(f"{source} is stored in a format without random access ({error}); prepare it in another TFDS_DATA_DIR: "
                        f"`tfds build {name} --file_format=array_record`") from None
    except ImportError as error:
        raise DataError(f"TFDS needs the package {error.name} to prepare {source}, once; install it ({install_command(str(error.name))}) "
                        "and run the same command again") from None
    except Exception as error:  # TFDS raises many unrelated types: not found, no network, checksum
        said = (str(error).strip().splitlines() or [""])[0]
        raise DataError(f"{source} cannot be opened by TFDS ({type(error).__name__}: {said}); "
                        "check the name, the split and the network") from None
    convert = _converter(builder.info.features)
    for i in range(len(examples)):
        yield Item(f"{source}[{i}]", convert(examples[i]), before + i + 1)


def open_builder(name: str, data_dir: str | None = None) -> tfds.core.DatasetBuilder:
    """The TFDS builder of a name, or of a folder given by its absolute path. Nothing is downloaded yet."""
    if os.path.isabs(name):
        return tfds.builder_from_directory(name)
    for room in ("text", "question_answering", "summarization", "translate"):
        # TFDS imports all of its rooms in one go and stops at the first (audio) that wants tensorflow.
        with contextlib.suppress(ImportError):
            importlib.import_module(f"tensorflow_datasets.{room}")
    with _swept_temporary_folder():
        return tfds.builder(name, data_dir=data_dir, try_gcs=False)


@contextlib.contextmanager
def _patient_and_quiet() -> Iterator[None]:
    """Download with `_RETRIES`, each of them unmentioned: the error that ends them says what was wrong."""
    loggers = [logging.getLogger(name) for name in ("urllib3", "absl")]
    before = downloader.MAX_RETRIES, [logger.level for logger in loggers]
    downloader.MAX_RETRIES = _RETRIES
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        downloader.MAX_RETRIES = before[0]
        for logger, level in zip(loggers, before[1]):
            logger.setLevel(level)


@contextlib.contextmanager
def _swept_temporary_folder() -> Iterator[None]:
    """A builder of a dataset that is not yet prepared makes a temporary folder and forgets it: here it goes.

    `tempfile.tempdir` is of the whole process, so only what is empty goes: files that another thread makes meanwhile stay.
    """
    with _SWEEPING:
        folder, before = tempfile.mkdtemp(), tempfile.tempdir
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before
            for path in (*Path(folder).glob("tmp*tfds"), folder):
                with contextlib.suppress(OSError):
                    os.rmdir(path)


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
