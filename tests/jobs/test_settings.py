"""Settings come from the environment alone, and a typo in a variable is an error."""

from pathlib import Path

import pytest

from jobs.settings import PREFIX, Settings, load
from peft_service.errors import InvalidRequest


def test_a_typo_is_an_error_that_names_the_right_variable() -> None:
    with pytest.raises(InvalidRequest) as caught:
        load({"PEFT_SERVICE_STOR_URL": "file:///x"})
    assert "PEFT_SERVICE_STORE_URL" in caught.value.message
    assert caught.value.param == "PEFT_SERVICE_STOR_URL"


def test_database_and_store_live_in_the_data_directory_unless_told(tmp_path: Path) -> None:
    settings = load({"PEFT_SERVICE_DATA_DIR": str(tmp_path)})
    assert settings.database_url == f"sqlite:///{tmp_path}/service.db"
    assert settings.store_url == f"file://{tmp_path}/store"
    assert load({}).data_dir == Path.home() / ".peft-service"


def test_the_real_environment_gives_the_same_as_a_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "PEFT_SERVICE_PORT": "8123",
        "PEFT_SERVICE_STORE_URL": "s3://bucket/prefix",
        "PEFT_SERVICE_BASE_MODELS_ALLOW": "hf://Qwen/, file:///models",
        "RAY_ADDRESS": "http://10.0.0.1:8265",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = load()
    assert settings.model_dump() == load(given).model_dump()
    assert settings.base_models_allow == ("hf://Qwen/", "file:///models")
    assert settings.ray_address == "http://10.0.0.1:8265"


def test_a_child_with_our_environment_has_our_settings(tmp_path: Path) -> None:
    settings = load(
        {
            "PEFT_SERVICE_DATA_DIR": str(tmp_path),
            "PEFT_SERVICE_BASE_MODELS_ALLOW": "a,b",
            "PEFT_SERVICE_CLUSTER_MAX": '[{"cpus": 4}]',
            "RAY_AUTH_TOKEN": "t",
        }
    )
    assert load(settings.environment()).model_dump() == settings.model_dump()
    assert set(settings.environment()) <= {PREFIX + name.upper() for name in Settings.model_fields}


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PORT", "70000"),
        ("PORT", "http"),
        ("LEASE_SECONDS", "0"),
        ("CLUSTER_MAX", "{}"),
        ("DATA_DIR", "/a?b"),
    ],
)
def test_an_impossible_value_names_its_variable(variable: str, value: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        load({PREFIX + variable: value})
    assert caught.value.param == PREFIX + variable
    assert value in caught.value.message or "JSON" in caught.value.message


def test_a_secret_is_not_printed() -> None:
    assert "hunter2" not in repr(load({"RAY_AUTH_TOKEN": "hunter2"}))


def test_the_token_is_read_when_asked_for(tmp_path: Path) -> None:
    token = tmp_path / "token"
    settings = load({"RAY_AUTH_TOKEN_PATH": str(token)})
    assert settings.ray_token is None
    token.write_text("first\n")
    assert settings.ray_token == "first"
    assert settings.train_ray_token == "first"
