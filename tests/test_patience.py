"""Where a test hangs is seen: in its own process, and in its ranks."""

from pathlib import Path

import pytest

from letheon.engine.distributed import Ranks
from tests.patience import STDERR, showing_stacks, wait_for
from tests.pool import on_ranks


def hang(ranks: Ranks, file: Path) -> None:
    """Wait for what is written twice while this waits: the place where it does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STDERR, str(file))
        with showing_stacks(0.05):
            wait_for(lambda: file.read_text().count(" in hang") > 1, "stacks")


@pytest.mark.parametrize("world", [1, 2])
def test_a_hang_shows_its_stacks_again_and_again(world: int, tmp_path: Path) -> None:
    file = tmp_path / "stderr"
    file.touch()
    on_ranks(world, hang, file)
    text = file.read_text()
    assert "Timeout (" in text and __file__ in text


def test_without_a_place_for_them_nothing_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(STDERR, str(tmp_path / "none" / "such"))
    with showing_stacks(0.01):
        pass
    assert not list(tmp_path.iterdir())
