"""What the tests of small engines share."""

from collections.abc import Iterator

import pytest
import torch

from tests.engine.factories import TinyModel


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads only cost with a model this small, above all on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(tmp_path_factory.mktemp("tiny-llama"))
