"""The built distributions install and work elsewhere; setup.py decides about CUDA as it says."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import fastlens
from tests.test_architecture import ROOT, tracked_files

pytestmark = pytest.mark.slow

NAME = f"fastlens_interp-{fastlens.__version__}"

# Run by the installed package, far from the repository.
SMOKE = """
import pathlib, sys
import torch
import fastlens

inside = pathlib.Path(fastlens.__file__).resolve()
assert inside.is_relative_to(pathlib.Path(sys.prefix).resolve()), inside
cfg = fastlens.HookedTransformerConfig(
    n_layers=1, d_model=16, d_head=8, n_ctx=8, d_vocab=11, act_fn="gelu", device="cpu", seed=0
)
logits, cache = fastlens.HookedTransformer(cfg).run_with_cache(torch.arange(8)[None])
assert logits.shape == (1, 8, 11) and cache["pattern", 0].shape == (1, 2, 8, 8)
toy = fastlens.HookedTransformer.from_pretrained("toy-induction", device="cpu")
assert toy("abcabc").isfinite().all()
"""


def run(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A subprocess that sees nothing of the repository."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**env, **variables},
        capture_output=True,
        text=True,
    )


def succeed(*command: object, cwd: Path, **variables: str) -> str:
    result = run(*command, cwd=cwd, **variables)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def copy_sources(to: Path) -> Path:
    """What a commit would hold, so that a forgotten file shows as a broken package."""
    for path in tracked_files():
        target = to / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return to


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from that sdist."""
    sources = copy_sources(tmp_path_factory.mktemp("sources"))
    out = tmp_path_factory.mktemp("dist")
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", out)
    # Where there is nvcc and a torch with CUDA the wheel would hold the compiled module as well.
    succeed(*command, cwd=sources, FASTLENS_CUDA="0")
    return out


def package_files() -> set[str]:
    names = {path.relative_to(ROOT).as_posix() for path in tracked_files()}
    return {name for name in names if name.startswith("fastlens/")}


def test_the_wheel_holds_the_package_and_nothing_else(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(f"{NAME}.dist-info/METADATA").decode()
        entry_points = wheel.read(f"{NAME}.dist-info/entry_points.txt").decode()
    assert {name for name in names if not name.startswith(f"{NAME}.dist-info/")} == package_files()
    assert "fastlens/py.typed" in names
    assert any(name.startswith("fastlens/assets/") for name in names)
    assert f"{NAME}.dist-info/licenses/LICENSE" in names
    assert "Requires-Python: >=3.10" in metadata
    assert "fastlens = fastlens.cli:main" in entry_points


def test_the_sdist_can_be_built_from_and_has_no_tests(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files() <= names
    assert {"pyproject.toml", "setup.py", "LICENSE", "README.md", "csrc/README.md"} <= names
    assert not {name for name in names if name.split("/")[0] in ("tests", "benchmarks", ".ci")}


@pytest.mark.parametrize("pattern", ["*.whl", pytest.param("*.tar.gz", marks=pytest.mark.full)])
def test_it_installs_into_an_empty_environment(dist, tmp_path, pattern):
    """Dependencies are borrowed from the test environment; fastlens itself is not."""
    prefix = tmp_path / "env"
    succeed(sys.executable, "-m", "venv", "--without-pip", prefix, cwd=tmp_path)
    python = prefix / "bin" / "python"
    find_site = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(succeed(python, "-c", find_site, cwd=tmp_path).strip())
    # A folder named in a .pth file is put on the path, but its own .pth files are not read: the
    # editable fastlens of the test environment stays out of sight.
    borrowed = succeed(sys.executable, "-c", find_site, cwd=tmp_path)
    (site / "borrowed.pth").write_text(borrowed, encoding="utf-8")
    install = ("-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation")
    forced = ("--ignore-installed", next(dist.glob(pattern)))
    succeed(python, *install, *forced, cwd=tmp_path)
    succeed(python, "-c", SMOKE, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert "sweep" in succeed(prefix / "bin" / "fastlens", "--help", cwd=tmp_path)


class Setup:
    """setup.py in a folder of its own, with a stand-in for nvcc and for torch."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "bin"
        (folder / "csrc").mkdir(parents=True)
        self.path.mkdir()
        shutil.copy2(ROOT / "setup.py", folder)
        name = "[project]\nname = 'stand-in'\nversion = '1'\n[tool.setuptools]\npackages = []\n"
        (folder / "pyproject.toml").write_text(name, encoding="utf-8")

    def add_source(self) -> None:
        (self.folder / "csrc" / "patch.cu").write_text("", encoding="utf-8")

    def add_nvcc(self, exit_code: int = 0) -> None:
        nvcc = self.path / "nvcc"
        # Writes its arguments to what follows -o, the last argument.
        script = f'#!/bin/sh\nfor last; do :; done\necho "$@" > "$last"\nexit {exit_code}\n'
        nvcc.write_text(script, encoding="utf-8")
        nvcc.chmod(0o755)

    def add_torch(self, cuda: str | None, gpus: Sequence[tuple[int, int]] = ()) -> None:
        text = (
            f"class version:\n    cuda = {cuda!r}\n__version__ = '9.9'\n"
            f"class cuda:\n    gpus = {list(gpus)!r}\n"
            "    device_count = staticmethod(lambda: len(cuda.gpus))\n"
            "    get_device_capability = staticmethod(lambda index: cuda.gpus[index])\n"
        )
        (self.path / "torch.py").write_text(text, encoding="utf-8")

    def build(self, wanted: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = (sys.executable, "setup.py", "build_ext", "--build-lib", "built")
        system = f"{self.path}{os.pathsep}/usr/bin{os.pathsep}/bin"
        variables = {"PATH": system, "PYTHONPATH": str(self.path), "FASTLENS_CUDA": wanted}
        if not (self.path / "nvcc").exists():
            variables["PATH"] = str(self.path)
        # What the machine itself sets is not part of the case.
        unset = dict.fromkeys(("TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"), "")
        return run(*command, cwd=self.folder, **{**unset, **variables, **more})

    def flags(self, **more: str) -> list[str]:
        """What nvcc is told about architectures."""
        built = self.build("1", **more)
        assert built.returncode == 0, built.stderr
        (library,) = (self.folder / "built" / "fastlens" / "kernels").glob("_cuda*")
        said = library.read_text(encoding="utf-8").split()
        return [flag for flag in said if flag.startswith(("-arch", "-gencode"))]


@pytest.fixture
def setup_folder(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def test_missing_pieces_are_named_one_after_the_other(setup_folder):
    def refused(reason: str) -> None:
        forced = setup_folder.build("1")
        assert forced.returncode != 0
        assert f"FASTLENS_CUDA=1 asks for the CUDA module, but {reason}" in forced.stderr
        silent = setup_folder.build("")
        assert silent.returncode == 0, silent.stderr
        said = [line for line in silent.stdout.splitlines() if line.startswith("fastlens:")]
        assert said == [f"fastlens: installing without the CUDA module: {reason}"]

    refused("csrc/ has no CUDA sources yet")
    setup_folder.add_source()
    refused("nvcc is not on PATH")
    setup_folder.add_nvcc()
    setup_folder.add_torch(cuda=None)
    refused("torch 9.9 is built without CUDA")


def test_with_everything_there_nvcc_is_called_unless_switched_off(setup_folder):
    setup_folder.add_source()
    setup_folder.add_nvcc()
    setup_folder.add_torch(cuda="13.0")
    off = setup_folder.build("0")
    assert "installing without the CUDA module: FASTLENS_CUDA=0" in off.stdout
    assert not (setup_folder.folder / "built").exists()
    on = setup_folder.build("")
    assert on.returncode == 0, on.stderr
    (library,) = (setup_folder.folder / "built" / "fastlens" / "kernels").glob("_cuda*")
    called = library.read_text(encoding="utf-8")
    assert "csrc/patch.cu" in called and "-shared" in called and "pybind11" in called


def test_a_failed_compilation_is_fatal_only_if_the_module_was_asked_for(setup_folder):
    setup_folder.add_source()
    setup_folder.add_nvcc(exit_code=1)
    setup_folder.add_torch(cuda="13.0")
    assert setup_folder.build("").returncode == 0
    forced = setup_folder.build("1")
    assert forced.returncode != 0 and "nvcc could not build" in forced.stderr


def test_it_is_built_for_the_gpus_that_are_named_else_those_present_else_all(setup_folder):
    def gencode(architecture: str, code: str) -> str:
        return f"-gencode=arch=compute_{architecture},code={code}"

    setup_folder.add_source()
    setup_folder.add_nvcc()
    setup_folder.add_torch(cuda="13.0")
    assert setup_folder.flags() == ["-arch=all-major"]
    setup_folder.add_torch(cuda="13.0", gpus=[(9, 0), (8, 0), (9, 0)])
    present = [gencode("80", "sm_80"), gencode("90", "sm_90"), gencode("90", "compute_90")]
    assert setup_folder.flags() == present
    named = setup_folder.flags(TORCH_CUDA_ARCH_LIST="8.6;9.0a 10.0+PTX")
    wanted = [("86", "sm_86"), ("90a", "sm_90a"), ("100", "sm_100"), ("100", "compute_100")]
    assert named == [gencode(*one) for one in wanted]


def test_a_gpu_that_is_not_named_by_number_is_refused(setup_folder):
    setup_folder.add_source()
    setup_folder.add_nvcc()
    setup_folder.add_torch(cuda="13.0")
    forced = setup_folder.build("1", TORCH_CUDA_ARCH_LIST="8.0;Ampere")
    assert forced.returncode != 0 and "names 'Ampere', which is not like 9.0" in forced.stderr
    assert setup_folder.build("", TORCH_CUDA_ARCH_LIST="Ampere").returncode == 0


def test_nvcc_is_found_under_cuda_home(setup_folder):
    setup_folder.add_source()
    setup_folder.add_torch(cuda="13.0")
    setup_folder.add_nvcc()
    home = setup_folder.folder / "cuda"
    (home / "bin").mkdir(parents=True)
    (setup_folder.path / "nvcc").rename(home / "bin" / "nvcc")
    system = os.pathsep.join([str(setup_folder.path), "/usr/bin", "/bin"])
    built = setup_folder.build("1", CUDA_HOME=str(home), PATH=system)
    assert built.returncode == 0, built.stderr
