"""Installing: sdist → wheel with the extension, `pip install .` and `-e .` without it, each in a fresh environment.

A fresh environment is a venv of its own whose dependencies (torch above all) are those of the environment that runs the suite.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# In each folder, each time in a child, so that torch is imported once: a layer through the op, the ops' namespace, the kernels'
# package, and what another package called `kernels` sees; then the command `adaptlora.cli doctor`.
CHECK = """
import os, runpy, sys
import torch
for folder in sys.argv[1:]:
    os.chdir(folder)
    child = os.fork()
    if not child:
        break
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit("failed in " + folder)
else:
    sys.exit()
import adaptlora
from adaptlora.ops import _backend
layer = adaptlora.nn.LoraLinear(torch.nn.Linear(5, 4), 2)
layer(torch.ones(3, 5)).sum().backward()
assert layer.lora_A.grad.shape == (2, 5)
import adaptlora.kernels, importlib.util
assert importlib.util.find_spec("adaptlora.kernels.lora_linear") is not None
from adaptlora.finetune import recipes
assert "glue-mrpc-deberta-v3-base" in recipes.names(), recipes.folder()
import kernels
assert kernels.OTHER == "another package", kernels
print("package:", os.path.dirname(adaptlora.__file__), _backend.choose(torch.ones(1)), "triton" in sys.modules, flush=True)
sys.argv[1:] = ["doctor"]
runpy.run_module("adaptlora.cli", run_name="__main__")
"""


def test_every_package_is_declared():
    """They are listed by hand (kernels/ lies elsewhere), and one that is forgotten is missing from every wheel."""
    with open(ROOT / "pyproject.toml", "rb") as stream:
        declared = tomllib.load(stream)["tool"]["setuptools"]["packages"]
    folders = [ROOT / "adaptlora", *(path.parent for path in (ROOT / "adaptlora").rglob("__init__.py"))]
    code = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert sorted(declared) == sorted(code | {"adaptlora.recipes"})  # recipes are data, and lie elsewhere too


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """The files of a fresh clone, without built or fetched ones."""
    target = tmp_path_factory.mktemp("checkout") / "adaptlora"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", ".data", "*.so", "build", "dist", "runs", "__pycache__", "*.egg-info", ".*_cache"
    )
    shutil.copytree(ROOT, target, ignore=ignored)
    return target


class Environment:
    def __init__(self, folder: Path):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / "bin" / "python"
        site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        # Dependencies only: the suite's own editable install of adaptlora stays invisible, since .pth files are not followed.
        outer = sysconfig.get_path("purelib")
        (site / "_outer.pth").write_text(f"import sys; sys.path.append({outer!r})\n")
        other = site / "kernels"
        other.mkdir()
        (other / "__init__.py").write_text('OTHER = "another package"\n')

    def run(self, *arguments, cwd, **variables):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("ADAPTLORA", "PYTHON", "TRITON"))}
        process = subprocess.run(
            [self.python, *arguments], cwd=cwd, env=environment | variables, capture_output=True, text=True, check=False
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout + process.stderr

    def install(self, *arguments, cwd, **variables):
        options = ("--disable-pip-version-check", "--no-build-isolation", "--no-deps", "--no-index")
        return self.run("-m", "pip", "install", *options, *arguments, cwd=cwd, **variables)

    def check(self, *folders):
        """[where the package is, its backend, whether triton was imported, what doctor says] in each of the folders."""
        said = self.run("-c", CHECK, *folders, cwd=folders[0]).split("package: ")[1:]
        assert len(said) == len(folders)
        return [[*line.split(), doctor] for line, _, doctor in (part.partition("\n") for part in said)]


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "env")


@pytest.mark.slow
def test_sdist_to_wheel_with_the_extension(checkout, environment, tmp_path):
    build = ("-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"))
    environment.run(*build, "--sdist", ".", cwd=checkout)
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    environment.run(
        "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", "dist", str(sdist), cwd=tmp_path
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("adaptlora/_C.") for name in names) and "adaptlora/kernels/lora_linear.py" in names
    assert {f"adaptlora/inspection/page.{kind}" for kind in ("html", "css", "js")} <= set(names)
    recipes = {f"adaptlora/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert recipes and recipes <= set(names)
    assert {name.split("/")[0] for name in names} == {"adaptlora", names[-1].split("/")[0]}
    environment.install(str(wheel), cwd=tmp_path)
    ((folder, backend, triton, doctor),) = environment.check(tmp_path)
    assert "site-packages" in folder and (backend, triton) == ("cpp", "False")
    assert "cpp" in doctor


@pytest.mark.slow
def test_plain_install_without_a_compiler(checkout, environment, tmp_path):
    environment.install(".", cwd=checkout, ADAPTLORA_NO_EXT="1")
    ((folder, backend, _, doctor),) = environment.check(tmp_path)
    assert "site-packages" in folder and backend == "reference"
    assert "the C++ extension is not built" in doctor


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["compat", "strict"])
def test_editable_install(mode, checkout, environment, tmp_path):
    environment.install("-e", ".", "--config-settings", f"editable_mode={mode}", cwd=checkout, ADAPTLORA_NO_EXT="1")
    # From the checkout itself its folder kernels/ must not hide the other package either.
    assert [found[1] for found in environment.check(tmp_path, checkout)] == ["reference"] * 2
    shutil.rmtree(checkout / "build", ignore_errors=True)
