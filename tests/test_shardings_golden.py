"""Where every array of the published recipe lies on v5e-256, held against the golden file: a rule that moves is seen in review."""

from tests import shardings
from tests.test_config import GOLDEN, load

FILE = GOLDEN / "conan_v2.shardings.txt"


def test_the_layout_of_the_full_recipe_matches_the_golden_file():
    """To accept a change: python -m tests.update_golden."""
    assert shardings.render(load("conan_v2.py"), "v5e-256") == FILE.read_text(encoding="utf-8")
