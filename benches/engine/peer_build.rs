//! Builds the peer, llama.cpp, from the source that llama-cpp-python's source package carries.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use atelier::fetch;
use atelier::service::cores;

const PACKAGE: &str = "llama-cpp-python";
const VERSION: &str = "0.3.36";
const FILE: &str = "llama_cpp_python-0.3.36.tar.gz";
const SHA256: &str = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e";
const SOURCE: &str = "llama_cpp_python-0.3.36/vendor/llama.cpp";
/// The build's only tool that may be missing.
const CMAKE: &str = "cmake>=3.28,<5";
/// GCC 12 believes that `ldtilecfg` reads 8 bytes and drops the stores to the other 56, so that a native build crashes on
/// CPUs with AMX. Without this optimisation the stores stay.
const TILE_CONFIG: &str = "-DCMAKE_CXX_FLAGS=-fno-tree-dse -fno-dse";
/// What is kept of the build.
const PROGRAMS: [&str; 3] = ["llama-bench", "llama-server", "llama-quantize"];

/// The folder with llama.cpp's programs, built if need be (minutes).
pub(crate) fn programs(cache: &Path) -> anyhow::Result<PathBuf> {
    let folder = cache.join(format!("llama.cpp-{VERSION}"));
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let lock = File::create(folder.join("lock")).context("cannot create a lock file")?;
    lock.lock().context("cannot lock the peer's folder")?;
    if PROGRAMS.iter().all(|program| folder.join(program).is_file()) {
        return Ok(folder);
    }
    let work = tempfile::tempdir().context("cannot create a folder to build in")?;
    let source = source(work.path())?;
    let build = work.path().join("build");
    build_programs(&cmake(work.path())?, &source, &build)?;
    for program in PROGRAMS {
        let partial = folder.join(format!("{program}.partial"));
        std::fs::copy(build.join("bin").join(program), &partial)
            .with_context(|| format!("the build brought no {program}"))?;
        std::fs::rename(&partial, folder.join(program)).context("cannot move a program into place")?;
    }
    Ok(folder)
}

fn source(work: &Path) -> anyhow::Result<PathBuf> {
    // Only this package from source: pip builds its metadata, and should get the tools for that ready made.
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--no-binary", PACKAGE]);
    pip.arg("--dest").arg(work).arg(format!("{PACKAGE}=={VERSION}"));
    run(&mut pip, "cannot download the source of llama.cpp with pip")?;
    let file = work.join(FILE);
    let found = fetch::sha256(&file)?;
    ensure!(found == SHA256, "{FILE} has the sha256 {found}, expected {SHA256}");
    let unpack = ["-m", "tarfile", "-e"];
    run(Command::new("python3").args(unpack).arg(&file).arg(work), "cannot unpack the source of llama.cpp")?;
    Ok(work.join(SOURCE))
}

/// The machine's cmake, or one in a Python environment of its own.
fn cmake(work: &Path) -> anyhow::Result<PathBuf> {
    let installed = Command::new("cmake").arg("--version").stdout(Stdio::null()).status();
    if installed.is_ok_and(|status| status.success()) {
        return Ok("cmake".into());
    }
    let tools = work.join("tools");
    run(Command::new("python3").args(["-m", "venv"]).arg(&tools), "cannot create a Python environment")?;
    let mut pip = Command::new(tools.join("bin/python"));
    pip.args(["-m", "pip", "install", "--disable-pip-version-check", CMAKE]);
    run(&mut pip, "cannot install cmake with pip")?;
    Ok(tools.join("bin/cmake"))
}

fn build_programs(cmake: &Path, source: &Path, build: &Path) -> anyhow::Result<()> {
    let mut configure = Command::new(cmake);
    configure.arg("-S").arg(source).arg("-B").arg(build).args([
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=OFF",
        "-DGGML_NATIVE=ON",
        TILE_CONFIG,
        "-DLLAMA_BUILD_COMMON=ON",
        "-DLLAMA_BUILD_TOOLS=ON",
        "-DLLAMA_BUILD_SERVER=ON",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        "-DLLAMA_BUILD_APP=OFF",
        "-DLLAMA_BUILD_UI=OFF",
        "-DLLAMA_USE_PREBUILT_UI=OFF",
        "-DLLAMA_OPENSSL=OFF",
    ]);
    run(&mut configure, "cannot configure llama.cpp")?;
    let jobs = cores().to_string();
    let mut make = Command::new(cmake);
    make.arg("--build").arg(build).args(["--config", "Release", "-j", &jobs, "--target"]).args(PROGRAMS);
    run(&mut make, "cannot build llama.cpp")
}

/// Runs a command, its output (and so its progress) on our standard error.
fn run(command: &mut Command, problem: &str) -> anyhow::Result<()> {
    let output = Stdio::from(std::io::stderr());
    let status = command.stdin(Stdio::null()).stdout(output).status().with_context(|| problem.to_owned())?;
    ensure!(status.success(), "{problem}: {status}");
    Ok(())
}
