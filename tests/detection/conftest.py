"""What the tests of the Detectron2 adapter share."""

import pytest


@pytest.fixture(scope="session")
def spec(tmp_path_factory) -> str:
    """Eight made images with squares and rings, of which nothing is changed."""
    import detectron2_tiny

    return detectron2_tiny.make_images(tmp_path_factory.mktemp("images"))
