from __future__ import annotations

import json
from pathlib import Path

import pytest

from hcna_ray.client import Client, StrangerListens, discovery, find_endpoint


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "keys").mkdir()
    card = {"url": "http://127.0.0.1:9000/"}
    (tmp_path / "run" / "cluster.json").write_text(json.dumps(card))
    (tmp_path / "keys" / "client.key").write_text("from-file\n")
    return tmp_path


def test_what_hcna_up_left_is_found(home: Path) -> None:
    found = find_endpoint(None, None, env={"HCNA_HOME": str(home)})
    assert (found.url, found.api_key) == ("http://127.0.0.1:9000", "from-file")


def test_environment_wins_over_files_and_arguments_over_both(home: Path) -> None:
    env = {"HCNA_HOME": str(home), "HCNA_URL": "http://env", "HCNA_API_KEY": "env-key"}
    assert find_endpoint(None, None, env=env).url == "http://env"
    found = find_endpoint("http://arg/", "arg-key", env=env)
    assert (found.url, found.api_key) == ("http://arg", "arg-key")


def test_the_owners_key_is_not_sent_to_a_host_merely_named(home: Path) -> None:
    env = {"HCNA_HOME": str(home), "HCNA_URL": "http://elsewhere:8080"}
    assert find_endpoint(None, None, env=env).api_key is None


class TestAnotherUserListensThere:
    @pytest.fixture(autouse=True)
    def squatted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        where = {("127.0.0.1", 9000): 4711, ("127.0.0.1", 8080): 4711}
        monkeypatch.setattr(
            discovery, "stranger_at", lambda host, port, trusted: where.get((host, port))
        )

    def test_the_owners_key_is_not_sent_to_him(self, home: Path) -> None:
        with pytest.raises(StrangerListens, match=r"user id 4711 listens at http://127.0.0.1:9000"):
            find_endpoint(None, None, env={"HCNA_HOME": str(home)})
        (home / "run" / "cluster.json").unlink()
        with pytest.raises(StrangerListens, match=r"http://127.0.0.1:8080"):
            find_endpoint(None, None, env={"HCNA_HOME": str(home)})

    def test_a_key_that_was_named_is_for_whoever_was_meant(self, home: Path) -> None:
        assert find_endpoint(None, "k", env={"HCNA_HOME": str(home)}).api_key == "k"

    def test_a_certificate_says_who_it_is(self, home: Path) -> None:
        card = {"url": "https://127.0.0.1:9000"}
        (home / "run" / "cluster.json").write_text(json.dumps(card))
        assert find_endpoint(None, None, env={"HCNA_HOME": str(home)}).api_key == "from-file"


def test_without_anything_there_is_a_default(tmp_path: Path) -> None:
    found = find_endpoint(None, None, env={"HCNA_HOME": str(tmp_path)})
    assert (found.url, found.api_key) == ("http://127.0.0.1:8080", None)


def test_a_damaged_card_is_ignored(home: Path) -> None:
    (home / "run" / "cluster.json").write_text("[")
    assert find_endpoint(None, None, env={"HCNA_HOME": str(home)}).url == "http://127.0.0.1:8080"


def test_a_key_never_shows(home: Path) -> None:
    assert "from-file" not in repr(find_endpoint(None, None, env={"HCNA_HOME": str(home)}))
    assert "secret" not in repr(Client("http://x", "secret"))
