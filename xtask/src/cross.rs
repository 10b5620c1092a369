//! The launchers elsewhere: built and linked for Windows, type-checked for macOS.
//!
//! rustup's compiler brings the standard library of this machine alone. Debian's own compiler comes with the source of
//! it, and makes it anew for other systems (`-Zbuild-std`, which needs `RUSTC_BOOTSTRAP`).
//!
//! # Guarantees
//! * A warning in a crate of ours fails, also one from a cached build.
//! * The build folder lies in the shared one: one lock and one distrust of other clones' builds for both.
//!
//! # Caveats
//! * Nothing of it is run.
//! * For macOS nothing is linked and no C is compiled: that would need Apple's SDK.

use crate::house::House;
use crate::packages::{self, Purpose};
use crate::run;
use crate::ui;
use anyhow::{Result, bail};
use std::process::Command;

/// By their whole names, since rustup's come first in `PATH`.
const CARGO: &str = "/usr/bin/cargo";
const RUSTC: &str = "/usr/bin/rustc";

const WINDOWS: &str = "x86_64-pc-windows-gnu";
const MACOS: &str = "aarch64-apple-darwin";

/// Builds and checks, or says why this system cannot.
pub(crate) fn check(house: &House) -> Result<()> {
    packages::ensure(&[Purpose::Cross])?;
    let missing = packages::missing(&[Purpose::Cross])?;
    if !missing.is_empty() {
        let why = format!(
            "this system's archive does not give these, or only in place of what is installed:\n{}",
            packages::table(&missing)
        );
        if packages::is_debian_12() {
            bail!("{why}Debian 12 has them all: is its security archive among apt's sources?");
        }
        println!("skipped, nothing is built or checked for other systems: {why}");
        return Ok(());
    }
    ui::build(house)?;
    run::run(&mut cargo(house, "build", WINDOWS))?;
    run::run(
        cargo(house, "check", MACOS)
            // Type checking needs none of the C that dependencies bring.
            .env("CC_aarch64_apple_darwin", "true")
            .env("AR_aarch64_apple_darwin", "true"),
    )
}

/// Debian's cargo on the tray app and the terminal program.
fn cargo(house: &House, verb: &str, target: &str) -> Command {
    let mut command = house.command(CARGO);
    command
        .args([verb, "--locked", "--target", target])
        .args(["--package", "mayfly-launcher"])
        .args(["--package", "mayfly-session-manager", "--bins"])
        .args(["-Zbuild-std=std,panic_unwind", "-Zwarnings"])
        .args(["--config", "build.warnings='deny'"])
        // Nobody debugs these, and both make the folder larger.
        .args(["--config", "profile.dev.debug=false"])
        .env("CARGO_INCREMENTAL", "0")
        .env("CARGO_TARGET_DIR", house.target.join("cross"))
        .env("RUSTC", RUSTC)
        .env("RUSTC_BOOTSTRAP", "1");
    // What the cargo that runs this program has set for its own compiler.
    for variable in ["CARGO", "LD_LIBRARY_PATH", "RUSTUP_TOOLCHAIN"] {
        command.env_remove(variable);
    }
    command
}
