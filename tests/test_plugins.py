"""Plugins are found by name, loaded when asked for, and broken ones harm nothing else."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from rlbridge import Backend, Capability, Environment, hookimpl, hookspecs, plugins
from rlbridge.errors import PluginError
from rlbridge.importing import install_hint, missing_module
from rlbridge.plugins import Registry, Source
from rlbridge.roles.trainer import TrainerOptions


class AcmeOptions(TrainerOptions):
    speed: int = 1


def backend(name: str = "acme", **fields: Any) -> Backend:
    return Backend(**{"name": name, "load": "acme_plugin:AcmeTrainer", "summary": "Trains.", **fields})


def hooks(**functions: Callable[..., object]) -> ModuleType:
    module = ModuleType("a_plugin")
    vars(module).update({name: hookimpl(function) for name, function in functions.items()})
    return module


def plugin(*backends: object) -> ModuleType:
    return hooks(rlbridge_trainers=lambda: backends)


def source(made: object, name: str = "acme") -> Source:
    return Source(name, f"{name}-dist", lambda: made)


@pytest.fixture(autouse=True)
def acme_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("acme_plugin")
    vars(module).update(AcmeTrainer=object, AcmeOptions=AcmeOptions, NoModel=object)
    monkeypatch.setitem(sys.modules, "acme_plugin", module)
    return module


def raises(error: BaseException) -> Callable[[], object]:
    def import_plugin() -> object:
        raise error

    return import_plugin


def test_backend_is_found_and_loaded_by_role_and_name() -> None:
    registry = Registry([source(plugin(backend()))])
    assert registry.backend("trainer", "acme") == backend()
    assert registry.load("trainer", "acme") is object
    assert registry.missing("trainer", "acme") is None


def test_unknown_backend_names_the_nearest_and_all_that_are_known() -> None:
    registry = Registry([source(plugin(backend("acme"), backend("other", extra="nixl", requires=("no_such_module",))))])
    with pytest.raises(PluginError, match=r"no trainer is named 'acmee'; did you mean 'acme'\?\n  known: acme, other"):
        registry.backend("trainer", "acmee")
    with pytest.raises(PluginError, match=r"pip install 'rlbridge\[nixl\]'"):
        registry.backend("trainer", "othr")
    with pytest.raises(PluginError, match="no generator is named 'acme'\n  known: none"):
        registry.backend("generator", "acme")


def test_unknown_backend_names_the_broken_plugins_that_may_have_brought_it() -> None:
    registry = Registry([Source("bad", "bad-dist", raises(RuntimeError("no driver")))])
    with pytest.raises(PluginError, match=r"bad \(bad-dist\): RuntimeError: no driver"):
        registry.backend("trainer", "bad")


def test_backend_whose_requirement_is_missing_says_what_to_install() -> None:
    registry = Registry([source(plugin(backend(requires=("no_such_module.inner",), extra="nixl")))])
    with pytest.raises(
        PluginError, match=r"'acme' is not installed: no module named 'no_such_module'\n  pip install 'rlbridge\[ni"
    ):
        registry.load("trainer", "acme")


@pytest.mark.parametrize(
    ("extra", "hint"),
    [("nixl", "pip install 'rlbridge[nixl]'"), ("acme>=2", "pip install 'acme>=2'"), ("", "")],
)
def test_install_hint_tells_extras_from_requirements(extra: str, hint: str) -> None:
    assert install_hint(extra) == hint


@pytest.mark.parametrize("error", [ImportError("no"), RuntimeError("no"), SystemExit("no")], ids=lambda e: type(e).__name__)
def test_plugin_that_cannot_be_imported_harms_nothing_else(error: BaseException) -> None:
    registry = Registry([Source("bad", "pytest", raises(error)), source(plugin(backend()))])
    assert registry.backend("trainer", "acme").name == "acme"
    (broken,) = registry.broken
    assert (broken.name, broken.distribution, broken.reason) == ("bad", "pytest", f"{type(error).__name__}: no")
    assert broken.version == pytest.__version__


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (hooks(rlbridge_trainer=lambda: [backend()]), "unknown hook 'rlbridge_trainer'"),
        (hooks(rlbridge_generators=lambda: [backend("leftover")], rlbridge_trainers=lambda wrong: []), "wrong"),
        (hooks(rlbridge_trainers=lambda: 1 / 0), "ZeroDivisionError"),
        (hooks(rlbridge_trainers=lambda: ["acme"]), "rlbridge_trainers returned 'acme', which is no rlbridge.Backend"),
        (
            hooks(rlbridge_trainers=lambda: [backend(load="acme")]),
            "'acme' of the backend 'acme' is not of the form module:attr",
        ),
    ],
)
def test_plugin_with_a_bad_hook_is_dropped_whole(bad: object, reason: str) -> None:
    registry = Registry([source(bad, "bad"), source(plugin(backend("good")), "good")])
    assert [row.name for row in registry.listing()] == ["good"]
    assert reason in registry.broken[0].reason
    assert [name for name, _ in registry.manager.list_name_plugin()] == ["good"]


def test_modules_that_a_variable_names_are_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "a_plugin", plugin(backend()))
    monkeypatch.setenv("RLBRIDGE_PLUGINS", "a_plugin, no_such_plugin")
    found = plugins.registry.__wrapped__()
    assert found.backend("trainer", "acme") == backend()
    assert [broken.name for broken in found.broken] == ["no_such_plugin"]


def test_second_plugin_of_one_name_is_broken_and_the_first_stays() -> None:
    registry = Registry([source(plugin(backend("first"))), source(plugin(backend("second")))])
    assert [row.name for row in registry.listing()] == ["first"]
    assert "same name" in registry.broken[0].reason


def test_name_that_two_plugins_bring_is_an_error_only_when_asked_for() -> None:
    registry = Registry([source(plugin(backend("twin"), backend("own")), "a"), source(plugin(backend("twin")), "b")])
    assert registry.backend("trainer", "own").name == "own"
    with pytest.raises(PluginError, match=r"'twin' is registered twice, by a \(a-dist\) and b \(b-dist\)"):
        registry.backend("trainer", "twin")
    assert [row.plugin for row in registry.listing() if row.name == "twin"] == ["a", "b"]


def test_strict_raises_at_the_first_broken_plugin() -> None:
    with pytest.raises(PluginError, match=r"broken plugin bad .*no driver"):
        Registry([Source("bad", "bad-dist", raises(RuntimeError("no driver")))], strict=True)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ("acme_plugin:Missing", "acme_plugin has no 'Missing'"),
        ("no_such_module:Trainer", "is not installed: no module named 'no_such_module'"),
        ("acme_raises:Trainer", "cannot be imported from acme_raises: ValueError: wrong driver"),
    ],
)
def test_backend_that_cannot_be_imported_says_why(
    load: str, message: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acme_raises.py").write_text("raise ValueError('wrong driver')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=message):
        Registry([source(plugin(backend(load=load)))]).load("trainer", "acme")


def test_options_model_is_the_backends_own_or_the_roles() -> None:
    registry = Registry([source(plugin(backend("own", options="acme_plugin:AcmeOptions"), backend("plain")))])
    assert registry.options_model("trainer", "own") is AcmeOptions
    assert registry.options_model("trainer", "plain") is TrainerOptions


def test_options_that_are_no_pydantic_model_are_refused() -> None:
    registry = Registry([source(plugin(backend(options="acme_plugin:NoModel")))])
    with pytest.raises(PluginError, match="acme_plugin:NoModel, are no pydantic model"):
        registry.options_model("trainer", "acme")


def test_reward_takes_no_options() -> None:
    registry = Registry([source(hooks(rlbridge_rewards=lambda: [backend("right")]))])
    with pytest.raises(PluginError, match="the reward 'right' takes no options"):
        registry.options_model("reward", "right")


def test_listing_tells_what_is_missing_without_importing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme_slow.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry(
        [
            source(
                plugin(backend("slow", load="acme_slow:X", capabilities=frozenset(Capability)), backend("gone", load="gone:X"))
            )
        ]
    )
    slow, gone = registry.listing()
    assert (slow.importable, slow.reason) == (True, "")
    assert slow.capabilities == tuple(sorted(Capability))
    assert (gone.importable, gone.reason) == (False, "no module named 'gone'")
    assert (slow.plugin, slow.distribution) == ("acme", "acme-dist")


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("json", None),
        ("json.decoder", None),
        ("xml.dom.minidom", None),
        ("json.nothing", "json.nothing"),
        ("json.nothing.below", "json.nothing"),
        ("nothing_here.below", "nothing_here"),
        ("sys", None),
    ],
)
def test_missing_module_names_the_outermost_that_is_absent(name: str, missing: str | None) -> None:
    assert missing_module(name) == missing


def test_missing_module_does_not_import_parents(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "acme_heavy"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    (package / "inner.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert missing_module("acme_heavy.inner") is None
    assert missing_module("acme_heavy.other") == "acme_heavy.other"


def test_a_folder_of_the_same_name_is_no_installed_module(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme_heavy" / "v1").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert missing_module("acme_heavy") == "acme_heavy"
    assert missing_module("acme_heavy.v1") == "acme_heavy.v1"
    (tmp_path / "acme_heavy" / "v1" / "inner.py").touch()
    assert missing_module("acme_heavy.v1.inner") is None
    assert missing_module("acme_heavy.v1.inner", [str(tmp_path / "acme_heavy")]) == "acme_heavy"


def test_observers_are_called_with_the_arguments_that_they_name() -> None:
    seen: list[object] = []
    registry = Registry([source(hooks(rlbridge_evaluated=lambda step, reward: seen.append((step, reward))))])
    registry.manager.hook.rlbridge_evaluated(run=None, step=3, reward=0.5)
    assert seen == [(3, 0.5)]


@pytest.mark.parametrize("name", [name for name in dir(hookspecs) if name.startswith("rlbridge_")])
def test_hook_spec_states_the_version_that_brought_it(name: str) -> None:
    assert "Since 0." in (inspect.getdoc(getattr(hookspecs, name)) or "")


def environment(name: str = "acme", **fields: Any) -> Environment:
    return Environment(**{"name": name, "summary": "", "lock": "acme:acme.lock", "requirements": ()} | fields)


def with_environments(*found: object) -> ModuleType:
    plugin = ModuleType("acme_environments")
    vars(plugin).update(rlbridge_environments=hookimpl(lambda: found))
    return plugin


def test_environments_are_found_by_name_with_the_distribution_that_brings_them() -> None:
    first, second = environment("first"), environment("second", distribution="other")
    registry = Registry([Source("acme", "acme-dist", lambda: with_environments(first, second))])
    assert not registry.broken
    assert registry.environment("first").distribution == "acme-dist"
    assert registry.environments()[1] == second


def test_unknown_environment_is_an_error_with_the_nearest_name() -> None:
    registry = Registry([Source("acme", "", lambda: with_environments(environment("first")))])
    with pytest.raises(PluginError, match="no environment is named 'fist'; did you mean 'first'") as caught:
        registry.environment("fist")
    assert caught.value.todo == "known: first"


def test_environment_that_two_plugins_bring_is_refused() -> None:
    sources = [Source(name, "", lambda: with_environments(environment())) for name in ("a", "b")]
    with pytest.raises(PluginError, match="the environment 'acme' is registered twice, by a and b"):
        Registry(sources).environment("acme")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("acme", "which is no rlbridge.Environment"),
        (environment("A cme"), "is no name for an environment"),
        (environment(lock="acme.lock"), "'acme.lock' of the environment 'acme' is not of the form package:file"),
        (environment(lock="acme:/etc/lock"), "not of the form package:file"),
        (environment(lock=""), "not of the form package:file"),
        (environment(site="folder"), "not of the form package:file"),
        (environment(requirements="torch"), "requirements of the environment 'acme' is a string"),
    ],
)
def test_environment_that_cannot_be_one_makes_its_plugin_broken(bad: object, reason: str) -> None:
    registry = Registry([Source("acme", "", lambda: with_environments(bad))])
    assert reason in registry.broken[0].reason
    assert registry.environments() == []
