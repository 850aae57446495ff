"""`install` and `uninstall`, and scripts run under ``python -m fastlens.compat``."""

import importlib
import importlib.metadata
import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import fastlens
from fastlens.compat import finder
from fastlens.compat.finder import install, is_installed, uninstall
from fastlens.compat.names import MODULES, names_of
from tests import models
from tests.close import assert_close_to

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed():
    with install():
        yield


def aliases() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "transformer_lens"]


# -- names -----------------------------------------------------------------------------------------


def test_every_module_and_name_can_be_imported(installed):
    for path in MODULES:
        name = f"transformer_lens.{path}".rstrip(".")
        module = importlib.import_module(name)
        assert module.__name__ == name and sys.modules[name] is module
        for entry in names_of(path):
            home, attribute = names_of(path)[entry]
            assert getattr(module, entry) is getattr(importlib.import_module(home), attribute)
            assert entry in dir(module)


def test_a_class_and_the_module_of_its_name(installed):
    """As in TransformerLens, the package holds the class and `sys.modules` the module."""
    import transformer_lens
    import transformer_lens.HookedTransformer as imported
    from transformer_lens import HookedTransformer
    from transformer_lens.HookedTransformer import HookedTransformer as inside
    from transformer_lens.HookedTransformer import Output

    assert HookedTransformer is fastlens.HookedTransformer is inside is imported
    assert transformer_lens.HookedTransformer is HookedTransformer
    assert Output._fields == ("logits", "loss")
    module = sys.modules["transformer_lens.HookedTransformer"]
    assert importlib.import_module("transformer_lens.HookedTransformer") is module
    assert module.HookedTransformer is HookedTransformer
    # A function called like its module.
    from transformer_lens.tools.analysis import direct_logit_attribution

    assert callable(direct_logit_attribution)


def test_names_of_version_2(installed):
    import transformer_lens
    from transformer_lens import EasyTransformer, loading, utils
    from transformer_lens.hook_points import HookedRootModule, HookPoint
    from transformer_lens.HookedTransformerConfig import HookedTransformerConfig
    from transformer_lens.past_key_value_caching import (
        HookedTransformerKeyValueCache,
        HookedTransformerKeyValueCacheEntry,
    )

    assert EasyTransformer is fastlens.HookedTransformer
    assert HookedTransformerConfig is fastlens.HookedTransformerConfig
    assert HookPoint is fastlens.HookPoint and HookedRootModule is fastlens.HookedRootModule
    assert HookedTransformerKeyValueCache is fastlens.TransformerLensKeyValueCache
    assert HookedTransformerKeyValueCacheEntry.__name__ == "TransformerLensKeyValueCacheEntry"
    assert loading is importlib.import_module("transformer_lens.loading_from_pretrained")
    assert utils.get_act_name("q", 3) == "blocks.3.attn.hook_q"
    assert transformer_lens.utils is utils


def test_star_imports(installed):
    space: dict[str, object] = {"cache": 1, "config": 2}
    exec("from transformer_lens import *\nfrom transformer_lens.utils import *", space)
    assert (space["cache"], space["config"]) == (1, 2)
    assert space["loading"] is importlib.import_module("transformer_lens.loading_from_pretrained")
    assert space["HookedTransformer"] is fastlens.HookedTransformer
    assert callable(space["to_numpy"]) and "patching" in space


def test_versions(installed):
    import transformer_lens

    assert transformer_lens.__version__ == "3.9.0"
    for name in ("transformer-lens", "transformer_lens", "Transformer.Lens"):
        assert importlib.metadata.version(name) == "3.9.0"
    assert importlib.metadata.metadata("transformer-lens")["Name"] == "transformer-lens"
    assert importlib.util.find_spec("transformer_lens").origin == "fastlens.compat"
    assert Path(transformer_lens.__file__).is_file()


def test_what_is_missing_says_why(installed):
    import transformer_lens

    with pytest.raises(ModuleNotFoundError, match=r"no transformer_lens\.model_bridge: .*Bridge"):
        importlib.import_module("transformer_lens.model_bridge")
    with pytest.raises(ImportError):
        from transformer_lens import HookedAudioEncoder  # noqa: F401
    with pytest.raises(AttributeError, match="audio"):
        _ = transformer_lens.HookedAudioEncoder
    with pytest.raises(AttributeError, match=r"'HookedTransfomer'.*Nearest: 'HookedTransformer'"):
        _ = transformer_lens.HookedTransfomer
    with pytest.raises(ModuleNotFoundError, match="Nearest: 'patching'"):
        importlib.import_module("transformer_lens.patchin")
    assert not hasattr(transformer_lens, "__wrapped__")
    assert importlib.util.find_spec("transformer_lens.patching") is not None
    assert importlib.util.find_spec("no_such_package_at_all") is None


def test_replacing_a_name_reaches_the_library(installed):
    """As with a module of one's own: what it uses itself is replaced, and put back."""
    import transformer_lens.patching

    before = fastlens.patching.make_df_from_ranges
    with mock.patch("transformer_lens.patching.make_df_from_ranges", return_value="mocked"):
        assert fastlens.patching.make_df_from_ranges([1], ["layer"]) == "mocked"
        assert transformer_lens.patching.make_df_from_ranges([1], ["layer"]) == "mocked"
    assert fastlens.patching.make_df_from_ranges is before
    assert transformer_lens.patching.make_df_from_ranges is before
    transformer_lens.patching.of_my_own = 1
    assert transformer_lens.patching.of_my_own == 1
    del transformer_lens.patching.of_my_own
    assert not hasattr(transformer_lens.patching, "of_my_own")


# -- coming and going ------------------------------------------------------------------------------


def test_install_and_uninstall_leave_nothing():
    before = {name: sys.modules[name] for name in aliases()}
    path = list(sys.meta_path)
    assert not is_installed()
    first, second = install(), install()
    assert first.was_new and not second.was_new and is_installed()
    assert sys.meta_path.count(finder._FINDER) == 1
    importlib.import_module("transformer_lens.components.mlps.mlp")
    assert "transformer_lens.components.mlps" in sys.modules
    uninstall()
    uninstall()
    assert not is_installed() and sys.meta_path == path
    assert {name: sys.modules[name] for name in aliases()} == before


def test_as_a_context_manager():
    with install():
        with install():
            assert is_installed()
        assert is_installed(), "the inner one was not the one that installed it"
        with pytest.raises(ZeroDivisionError), install():
            raise ZeroDivisionError
        assert is_installed()
    assert not is_installed()
    with pytest.raises(ZeroDivisionError), install():
        raise ZeroDivisionError
    assert not is_installed()


@pytest.mark.tl
def test_the_real_package_comes_back():
    real = pytest.importorskip("transformer_lens")
    patching = importlib.import_module("transformer_lens.patching")
    with install():
        import transformer_lens

        assert transformer_lens is not real
        assert transformer_lens.HookedTransformer is fastlens.HookedTransformer
        assert importlib.import_module("transformer_lens.patching") is not patching
    assert sys.modules["transformer_lens"] is real
    assert importlib.import_module("transformer_lens.patching") is patching
    assert real.HookedTransformer is not fastlens.HookedTransformer
    assert importlib.metadata.version("transformer-lens") == "3.9.0"


@pytest.mark.tl
def test_side_by_side():
    """Both libraries in one process, and pickles of one read by the other."""
    real = pytest.importorskip("transformer_lens")
    fields = {"d_model": 8, "d_head": 4, "n_layers": 1, "n_ctx": 5, "d_vocab": 7, "act_fn": "relu"}
    cfg = real.HookedTransformerConfig(**fields, device="cpu")
    matrix = real.FactoredMatrix(torch.ones(2, 3), torch.ones(3, 4))
    past = real.TransformerLensKeyValueCache.init_cache(cfg, "cpu", 2)
    written = pickle.dumps([cfg, matrix, past])
    with install():
        cfg, matrix, past = pickle.loads(written)
        assert type(cfg) is fastlens.HookedTransformerConfig and cfg.n_heads == 2
        assert cfg.to_dict() == fastlens.HookedTransformerConfig(**fields, device="cpu").to_dict()
        assert type(matrix) is fastlens.FactoredMatrix and matrix.AB.shape == (2, 4)
        assert type(past) is fastlens.TransformerLensKeyValueCache
        assert past[0].past_keys.shape == (2, 0, 2, 4)
    assert type(pickle.loads(written)[0]) is real.HookedTransformerConfig


@pytest.mark.tl
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_whole_models_and_caches_that_transformerlens_saved(name, tmp_path):
    pytest.importorskip("transformer_lens")
    theirs, tokens = models.theirs(name), models.prompts()
    want, cache = theirs.run_with_cache(tokens)
    torch.save([theirs, cache], tmp_path / "saved.pt")
    with install():
        model, cache = torch.load(tmp_path / "saved.pt", weights_only=False)
    assert type(model) is fastlens.HookedTransformer and type(cache) is fastlens.ActivationCache
    assert_close_to(model(tokens), want)
    got, own = model.run_with_cache(tokens)
    assert_close_to(got, want)
    assert_close_to(cache["z", 0], own["z", 0])
    doubled = model.run_with_hooks(
        tokens, fwd_hooks=[("blocks.0.hook_mlp_out", lambda x, hook: x * 2)]
    )
    assert (doubled - want).abs().max() > 0.1


def test_the_package_itself_has_the_names():
    import fastlens.compat as transformer_lens

    assert transformer_lens.HookedTransformer is fastlens.HookedTransformer
    assert transformer_lens.utils.get_act_name("k", 1) == "blocks.1.attn.hook_k"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = transformer_lens.nothing


# -- scripts ---------------------------------------------------------------------------------------

SCRIPT = """
import sys
import transformer_lens
from transformer_lens import HookedTransformer
from transformer_lens.HookedTransformer import Output
import beside

class Mine(HookedTransformer):
    pass

print(sys.argv, __name__, __file__, HookedTransformer.__module__, beside.NAME)
import pickle
print(type(pickle.loads(pickle.dumps(Mine.__new__(Mine)))).__name__ if "pickle" in sys.argv else "")

def fail():
    raise RuntimeError("on purpose")

if "fail" in sys.argv:
    fail()
if "leave" in sys.argv:
    sys.exit(7)
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", *arguments],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts") / "inner"
    folder.mkdir()
    (folder / "program.py").write_text(SCRIPT, encoding="utf-8")
    (folder / "beside.py").write_text("NAME = 'beside'\n", encoding="utf-8")
    return folder


def test_a_script_runs_as_with_python(folder):
    path = str(Path("inner") / "program.py")
    done = run(folder, "-m", "fastlens.compat", path, "a", "-b", "--c=d")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines()[0] == (
        f"['{path}', 'a', '-b', '--c=d'] __main__ {path} fastlens.model.hooked_transformer beside"
    )


def test_exit_codes_and_tracebacks(folder):
    path = str(Path("inner") / "program.py")
    assert run(folder, "-m", "fastlens.compat", path, "leave").returncode == 7
    failed = run(folder, "-m", "fastlens.compat", path, "fail")
    assert failed.returncode == 1
    lines = failed.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].strip().startswith('File "') and "program.py" in lines[1]
    assert lines[-1] == "RuntimeError: on purpose"
    assert "runpy" not in failed.stderr and "compat" not in failed.stderr


def test_a_module_runs_too(folder):
    done = subprocess.run(
        [sys.executable, "-m", "fastlens.compat", "-m", "program", "x"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "'x'] __main__" in done.stdout and "beside" in done.stdout


def test_wrong_command_lines(folder):
    for arguments in ([], ["-m"], ["--help"]):
        done = run(folder, "-m", "fastlens.compat", *arguments)
        assert done.returncode != 0 and "usage: python -m fastlens.compat" in done.stderr
    done = run(folder, "-m", "fastlens.compat", "nowhere.py")
    assert done.returncode != 0 and "no file 'nowhere.py'" in done.stderr
