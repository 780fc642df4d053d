"""setup.py: how it finds torch and reads environment variables, and that a failed build costs one sentence."""

import importlib.util
import json
import sys
import sysconfig
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]
BUILD_INFO = ROOT / "lmfusion_kernels" / "_build.json"
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a checkout")


@pytest.fixture
def build(monkeypatch, tmp_path):
    """setup.py as a module, without running setup(), building into tmp_path."""
    asked = {}
    monkeypatch.setattr(setuptools, "setup", asked.update)
    for name in ("LMFUSION_CUDA", "LMFUSION_CUDA_ARCHITECTURES", "LMFUSION_BUILD_JOBS"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("lmfusion_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.asked = asked
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def make_torch(folder, version):
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").touch()
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\ncuda = None\n")
    return folder / "torch"


def install(build, folder, inplace=False):
    """Run build_ext; returns what it wrote about itself."""
    command = build.CMakeBuild(setuptools.Distribution({"name": "lmfusion", **build.asked, "setup_requires": []}))
    command.build_lib, command.inplace = str(folder / "lib"), inplace
    command.ensure_finalized()
    command.run()
    return json.loads((command.package_folder / "_build.json").read_text())


def test_no_second_torch_is_asked_for(build):
    assert build.asked["setup_requires"] == []


def test_torch_of_the_environment_is_found_under_isolation(build, monkeypatch, tmp_path):
    """pip's isolated build: torch is not importable, but lies where sysconfig says this environment's packages are."""
    torch = make_torch(tmp_path / "site-packages", "2.13.0+cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name, **_: str(tmp_path / "site-packages"))
    assert build.find_torch() == torch
    assert build.torch_version(torch) == (2, 13)


def test_a_torch_that_is_new_enough_is_preferred(build, monkeypatch, tmp_path):
    old, new = make_torch(tmp_path / "old", "2.8.0"), make_torch(tmp_path / "new", "2.10.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    folders = {"purelib": tmp_path / "old", "platlib": tmp_path / "new"}
    monkeypatch.setattr(sysconfig, "get_path", lambda name, **_: str(folders[name]))
    assert build.find_torch() == new
    folders["platlib"] = tmp_path / "none"
    assert build.find_torch() == old


def test_no_compiler(build, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    unavailable_reason = install(build, tmp_path)["unavailable_reason"]
    assert unavailable_reason.startswith("no C++ compiler was found; install one")
    assert unavailable_reason.endswith("and install lmfusion again")


def test_no_cmake(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "find_program", lambda name: None)
    monkeypatch.setattr(build.shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    assert "`pip install cmake ninja pybind11`" in install(build, tmp_path)["unavailable_reason"]


@pytest.fixture
def with_tools(build, monkeypatch):
    """Simulates a compiler and CMake; every command fails with one line of error."""

    def fail(command, log):
        log += ["-- configuring\n", "x.cpp:3:1: error: no member named 'y'\n", "ninja: build stopped\n"]
        return False

    monkeypatch.setattr(build.shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    monkeypatch.setattr(build, "run_logged", fail)


@pytest.mark.usefixtures("with_tools")
def test_a_build_that_fails(build, tmp_path, capsys):
    stale = tmp_path / "lib" / "lmfusion_kernels" / "_C.so"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier build")
    unavailable_reason = install(build, tmp_path)["unavailable_reason"]
    assert unavailable_reason.startswith("compiling failed (x.cpp:3:1: error: no member named 'y'); see ")
    log = Path(unavailable_reason.split("see ")[1].split(", fix it")[0])
    assert "build stopped" in log.read_text()
    assert not stale.exists()
    assert "native code left out, plain PyTorch takes its place" in capsys.readouterr().out


@pytest.mark.usefixtures("with_tools")
def test_a_build_in_the_checkout_stops_at_an_error(build, tmp_path):
    with pytest.raises(SystemExit, match="lmfusion: compiling failed"):
        install(build, tmp_path, inplace=True)


@pytest.mark.usefixtures("with_tools")
@pytest.mark.parametrize(
    ("version", "message"), [("2.9.1", "torch is older than 2.10"), (None, "there was no torch to build against")]
)
def test_torch_is_too_old_or_absent(build, monkeypatch, tmp_path, version, message):
    torch = make_torch(tmp_path / "site", version) if version else None
    monkeypatch.setattr(build, "find_torch", lambda: torch)
    assert (
        install(build, tmp_path)["unavailable_reason"]
        == f"{message}; `pip install 'torch>=2.10'` and install lmfusion again"
    )


def test_architectures(build, monkeypatch):
    assert build.cuda_architectures() == ["80-real", "90a-real", "90-virtual"]
    monkeypatch.setenv("LMFUSION_CUDA_ARCHITECTURES", "90a")
    assert build.cuda_architectures() == ["90a-real", "90-virtual"]
    monkeypatch.setenv("LMFUSION_CUDA_ARCHITECTURES", "sm_90")
    with pytest.raises(SystemExit, match=r"LMFUSION_CUDA_ARCHITECTURES must be .*, got 'sm_90'"):
        build.cuda_architectures()


def test_cuda_on_off_and_auto(build, monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: "/cuda/bin/nvcc")
    assert build.choose_nvcc() == ("/cuda/bin/nvcc", "")
    monkeypatch.setenv("LMFUSION_CUDA", "0")
    assert build.choose_nvcc() == (None, "LMFUSION_CUDA=0 was set when it was built")
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setenv("LMFUSION_CUDA", "auto")
    assert build.choose_nvcc()[1].startswith("there was no nvcc when it was built")
    monkeypatch.setenv("LMFUSION_CUDA", "1")
    with pytest.raises(SystemExit, match="LMFUSION_CUDA=1 needs nvcc"):
        build.choose_nvcc()
    monkeypatch.setenv("LMFUSION_CUDA", "yes")
    with pytest.raises(SystemExit, match="LMFUSION_CUDA must be auto, 0 or 1, got 'yes'"):
        build.choose_nvcc()


@pytest.fixture
def cmake(build, monkeypatch, tmp_path):
    """Simulates all tools, including nvcc. Returns CMake's command lines; with `fails` set, nvcc finds an error."""

    class Commands(list):
        fails = False

        def definitions(self):
            return dict(word[2:].split("=", 1) for word in self[-2] if word.startswith("-D"))

    commands = Commands()

    def run(command, log):
        commands.append(command)
        if "--build" not in command:
            Path(command[command.index("-B") + 1]).mkdir(parents=True, exist_ok=True)
            return True
        if commands.fails and commands.definitions()["LMFUSION_CUDA"] == "ON":
            log.append("nvcc fatal : error: Unsupported gpu architecture\n")
            return False
        folder = Path(commands.definitions()["LMFUSION_OUTPUT_DIRECTORY"])
        folder.mkdir(parents=True, exist_ok=True)
        for name in build.LIBRARIES.values():
            (folder / name).write_bytes(b"compiled")
        return True

    monkeypatch.setattr(build.shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    monkeypatch.setattr(build, "find_nvcc", lambda: "/cuda/bin/nvcc")
    monkeypatch.setattr(build, "find_torch", lambda: make_torch(tmp_path / "site", "2.13.0"))
    monkeypatch.setattr(build, "run_logged", run)
    return commands


def test_architectures_are_recorded(build, cmake, tmp_path):
    info = install(build, tmp_path)
    assert (info["cuda_architectures"], info["cuda_unavailable_reason"]) == (["80-real", "90a-real", "90-virtual"], "")
    definitions = cmake.definitions()
    assert definitions["LMFUSION_CUDA"] == "ON"
    assert definitions["CMAKE_CUDA_COMPILER"] == "/cuda/bin/nvcc"
    assert definitions["LMFUSION_CUDA_ARCHITECTURES"] == "80-real;90a-real;90-virtual"


def test_cuda_can_be_left_out(build, cmake, monkeypatch, tmp_path):
    monkeypatch.setenv("LMFUSION_CUDA", "0")
    info = install(build, tmp_path)
    assert info["unavailable_reason"] == ""
    assert (info["cuda_architectures"], info["cuda_unavailable_reason"]) == (
        [],
        "LMFUSION_CUDA=0 was set when it was built",
    )
    assert cmake.definitions()["LMFUSION_CUDA"] == "OFF"
    assert "CMAKE_CUDA_COMPILER" not in cmake.definitions()


def test_an_nvcc_that_fails_costs_cuda_alone(build, cmake, tmp_path):
    cmake.fails = True
    info = install(build, tmp_path)
    assert info["unavailable_reason"] == ""
    assert info["cuda_architectures"] == []
    assert info["cuda_unavailable_reason"] == "nvcc failed: nvcc fatal : error: Unsupported gpu architecture"


def test_an_nvcc_that_fails_is_an_error_where_cuda_was_asked_for(build, cmake, monkeypatch, tmp_path):
    cmake.fails = True
    monkeypatch.setenv("LMFUSION_CUDA", "1")
    info = install(build, tmp_path)
    assert info["unavailable_reason"].startswith("compiling failed (nvcc fatal : error: Unsupported gpu architecture)")


def test_every_source_of_csrc_cuda_is_compiled():
    """CMake finds them by itself: the library's build has an object for each."""
    info = json.loads(BUILD_INFO.read_text()) if BUILD_INFO.exists() else {}
    if not info.get("cuda_architectures"):
        pytest.skip(f"built without CUDA: {info.get('cuda_unavailable_reason', 'not built')}")
    sources = {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    commands = [json.loads(path.read_text()) for path in ROOT.glob("build/native-*/compile_commands.json")]
    assert any(sources <= {Path(command["file"]).name for command in build} for build in commands)


@pytest.mark.skipif(sys.platform != "linux", reason="readelf is Linux's")
def test_the_ops_need_torch_but_no_path_to_it():
    """One binary for every torch from 2.10 on: it names torch's libraries, and no folder of this machine."""
    libraries = list((ROOT / "lmfusion_kernels").glob("_C*.so"))
    if not libraries:
        pytest.skip("the ops were not compiled")
    content = libraries[0].read_bytes()
    for name in (b"libtorch.so", b"libtorch_cpu.so", b"libc10.so"):
        assert name in content
    assert b"site-packages/torch/lib" not in content
    assert b"_ZN2at6Tensor" not in content, "a symbol of torch's unstable C++ interface"
