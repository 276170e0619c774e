//! The kernels for aarch64, which the CPU at hand may not be: compiled, and their tests run in an emulator, as far as what that
//! takes is installed (`.ci/aarch64` installs it on CI).

use std::path::Path;

use crate::ci::check;
use crate::workspace;

const TARGET: &str = "aarch64-unknown-linux-gnu";
const LINKER: &str = "aarch64-linux-gnu-gcc";
const EMULATOR: &str = "qemu-aarch64";

pub(crate) fn run() -> anyhow::Result<()> {
    // The toolchain's own, or the system's.
    let compilers = ["rustc", "/usr/bin/rustc"];
    let Some(compiler) = compilers.into_iter().find(|compiler| has_library(compiler)) else {
        println!(
            "skipped: no standard library for {TARGET} (`rustup target add {TARGET}`, or see .ci/aarch64)"
        );
        return Ok(());
    };
    println!("{}", workspace::output(compiler, &["--version"])?.trim());
    let environment = [
        ("RUSTC", compiler),
        // What different compilers have made does not go together.
        ("CARGO_TARGET_DIR", "target/aarch64"),
        ("CARGO_PROFILE_RELEASE_DEBUG", "false"),
        ("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", LINKER),
        ("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER", EMULATOR),
    ];
    if let Some(missing) = [LINKER, EMULATOR].into_iter().find(|program| !starts(program)) {
        println!("compiled only, no test is run: there is no {missing} (see .ci/aarch64)");
        let args = ["check", "--release", "-p", "kernels", "--lib", "--target", TARGET];
        return check("cargo", &args, &environment);
    }
    // Not the examples in documentation: another compiler's rustdoc has no library for the target.
    check(
        "cargo",
        &["test", "--release", "-p", "kernels", "--lib", "--tests", "--target", TARGET],
        &environment,
    )
}

fn has_library(compiler: &str) -> bool {
    let printed = workspace::output(compiler, &["--print", "target-libdir", "--target", TARGET]);
    printed.is_ok_and(|folder| Path::new(folder.trim()).is_dir())
}

fn starts(program: &str) -> bool {
    workspace::output(program, &["--version"]).is_ok()
}
