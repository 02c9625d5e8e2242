"""Which servers are refused at the start, and with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pydantic import ValidationError

from rlbridge.config import load_config
from rlbridge.errors import ConfigError
from rlbridge.plugins import registry
from rlbridge_openai.options import OpenAIGeneratorOptions
from rlbridge_openai.secret import Secret, check_door, on_loopback
from rlbridge_openai.start import START, START_SGLANG, check_guarded
from tests.openai.server_process import CONTROL, generator_of
from tests.openai.stand_in import FACTS, StandIn

_NO_CONTROL = "/v1/rlbridge/facts"


def _told(server: StandIn, **options: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        generator_of(server.url, **options)
    assert server.url in str(raised.value)
    assert "generator[0]" in str(raised.value)
    return str(raised.value)


def test_a_server_of_an_unknown_kind_is_refused_with_what_it_answered(server: StandIn) -> None:
    server.routes[_NO_CONTROL] = lambda request: (404, {"detail": "no such page"})
    told = _told(server)
    assert "its weights cannot be changed (it answered 404 to rlbridge's control: " in told
    assert "no such page" in told
    assert START in told


def test_a_plain_vllm_is_told_how_to_start(server: StandIn) -> None:
    server.routes[_NO_CONTROL] = lambda request: (405, {})
    server.routes["/version"] = lambda request: (200, {"version": "0.31.0"})
    told = _told(server)
    assert "it is vLLM 0.31.0 without rlbridge's control in it" in told
    assert START in told


def test_a_plain_sglang_is_told_how_to_start(server: StandIn) -> None:
    server.routes[_NO_CONTROL] = lambda request: (404, {})
    server.routes["/get_model_info"] = lambda request: (200, {"model_path": "somewhere"})
    told = _told(server)
    assert "it is an SGLang server without rlbridge's control in it" in told
    assert START_SGLANG in told
    assert "use generator.backend=sglang" in told


def test_an_sglang_has_one_api_and_writes_its_parameters_in_place(server: StandIn) -> None:
    server.facts = msgspec.structs.replace(FACTS, server="SGLang", apis=["tokens"])
    assert generator_of(server.url)._api.path == "/generate"
    assert "generator.api is completions, and SGLang has not that one" in _told(server, api="completions")
    assert "SGLang's parameters are written in place" in _told(server, install="streamed")
    assert "it is SGLang, and generator.control is vllm" in _told(server, control="vllm")


def test_a_server_without_its_arguments_is_told_which(server: StandIn) -> None:
    server.facts = msgspec.structs.replace(FACTS, missing=["--logprobs-mode processed_logits", "--api-server-count 1"])
    assert "was started without --logprobs-mode processed_logits, --api-server-count 1" in _told(server)
    server.facts = FACTS
    assert "generator.api is tokens, and it was started without --enable-scale-out" in _told(server, api="tokens")
    assert generator_of(server.url)._api.path == "/v1/completions"
    server.facts = msgspec.structs.replace(FACTS, apis=["completions", "tokens"])
    assert generator_of(server.url)._api.path == "/inference/v1/generate"


def test_what_is_no_api_of_openai_is_refused(server: StandIn) -> None:
    server.routes["/v1/models"] = lambda request: (404, {})
    assert "it has no /v1/models" in _told(server)
    server.routes["/v1/models"] = lambda request: (200, {"data": []})
    assert "it serves no model" in _told(server)
    server.routes["/v1/models"] = lambda request: (200, b"<html>a page</html>")
    with pytest.raises(Exception, match="it is no list of models: <html>a page"):
        generator_of(server.url)


def test_the_start_line_has_the_arguments_that_the_tests_start_servers_with() -> None:
    assert " ".join(CONTROL).replace('{"backend": "rlbridge"}', """'{"backend": "rlbridge"}'""") in START


@pytest.mark.parametrize(
    ("url", "inside"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://localhost", True),
        ("http://[::1]:80", True),
        ("http://10.0.0.2:8000", False),
        ("http://localhost.example.org", False),
        ("https://127.0.0.1.example.org", False),
    ],
)
def test_a_server_on_another_host_needs_a_key(url: str, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("A_KEY", raising=False)
    assert on_loopback(url) == inside
    if inside:
        check_door(url, Secret("A_KEY"), insecure=False)
    else:
        with pytest.raises(ConfigError, match=r"is on another host, and no key is in A_KEY"):
            check_door(url, Secret("A_KEY"), insecure=False)
    check_door(url, Secret("A_KEY"), insecure=True)
    monkeypatch.setenv("A_KEY", "sk-123")
    check_door(url, Secret("A_KEY"), insecure=False)


def test_a_server_on_another_host_has_to_ask_for_the_key(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlbridge_openai.start.on_loopback", lambda url: False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-123")
    assert "it asks for no key" in _told(server)
    generator_of(server.url, insecure=True)

    def models(request: Any) -> Any:
        return (200, {"data": [{"id": "served"}]}) if "authorization" in request.headers else (401, {"error": "Unauthorized"})

    server.routes["/v1/models"] = models
    generator = generator_of(server.url)
    check_guarded(generator._client, FACTS, generator._options)
    server.facts = msgspec.structs.replace(FACTS, dev_mode=True)
    assert "VLLM_SERVER_DEV_MODE opens vLLM's own control" in _told(server)


def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "sk-1\n2")
    with pytest.raises(ConfigError, match="characters that no header may have") as raised:
        Secret("A_KEY")
    assert "sk-1" not in str(raised.value)


def test_a_key_is_hidden_however_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", 'sk-1/2"3+4')
    secret = Secret("A_KEY")
    forms = ['sk-1/2"3+4', 'sk-1/2\\"3+4', 'sk-1\\/2\\"3+4', "sk-1/2%223%2B4", "sk-1%2F2%223%2B4"]
    assert secret.hide_in(" and ".join(forms)) == " and ".join(["(the key)"] * len(forms))
    assert secret.hide_in(" " * 9000 + forms[0] + "x" * 9000).startswith("(the key)xxx")
    assert len(secret.hide_in("x" * 9000)) < 700
    assert "sk-1" not in repr(secret)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"api": "chat"}, "chat cannot be used"),
        ({"url": "http://me:secret@host"}, "holds a user or a password"),
        ({"url": "ftp://host"}, "is no http:// or https:// address"),
        ({"url": "http://host?key=secret"}, "with a query or a fragment"),
        ({"workers": 2}, "workers is 2, and url names 1 servers"),
        ({"workers": 2, "url": ["http://a", "http://a/v1/"]}, "url names 1 servers"),
        ({"api_key": "sk-123"}, "Extra inputs are not permitted"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        OpenAIGeneratorOptions(**options)


@pytest.mark.parametrize("url", ["http://me:secret@host", "http://host?key=secret"])
def test_a_key_in_a_url_is_not_told(url: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"model": {"path": "m"}, "data": {"path": "p"}, "generator": {"backend": "openai", "url": url}}))
    with pytest.raises(ConfigError, match=r"generator\.url: ") as raised:
        load_config(file)
    assert "secret" not in str(raised.value)


def test_a_server_an_engine() -> None:
    options = OpenAIGeneratorOptions(workers=2, url=["http://a:1/v1/", "https://b/api"])
    assert options.urls == ["http://a:1", "https://b/api"]


def test_the_backend_is_listed_and_its_options_are_its_own() -> None:
    assert registry().backend("generator", "openai").extra == "openai"
    assert registry().options_model("generator", "openai") is OpenAIGeneratorOptions
