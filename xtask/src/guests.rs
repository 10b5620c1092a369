//! What runs inside virtual machines: the static agent, the micro guest, the desktop image, a plain template.
//!
//! All are cached by content: the builders compare what goes in, never times.

use crate::house::House;
use crate::packages::{self, Purpose};
use crate::run;
use crate::ui;
use anyhow::{Context, Result};
use clap::Args;
use std::path::PathBuf;

/// Options of `cargo xtask image`.
#[derive(Args)]
pub(crate) struct ImageArgs {
    /// Distribution and release, such as `bookworm`, `trixie`, `jammy` or `noble` [default: the builder's]
    #[arg(long)]
    suite: Option<String>,
    /// Build it even if the cache has it
    #[arg(long)]
    force: bool,
}

pub(crate) fn image_command(house: &House, args: &ImageArgs) -> Result<()> {
    packages::ensure(&[Purpose::Image])?;
    // The builder alone: an image needs no windows.
    run::run(&mut house.cargo(["build", "--package", "mayfly-orchestrator", "--locked"]))?;
    let mut extra = Vec::new();
    if let Some(suite) = &args.suite {
        extra.extend(["--suite", suite]);
    }
    if args.force {
        extra.push("--force");
    }
    println!("{}", image(house, &extra)?.display());
    Ok(())
}

/// The agent, linked statically against glibc so that it runs in any guest.
pub(crate) fn agent(house: &House) -> Result<PathBuf> {
    static_binary(house, &["--package", "mayfly-agent"], "mayfly-agent")
}

/// The programs a person runs, and those that demonstrate and build guests.
pub(crate) fn programs(house: &House) -> Result<()> {
    ui::build(house)?;
    // All of them, always: with fewer packages named, cargo would give shared crates other features and build them again.
    run::run(&mut house.cargo(["build", "--workspace", "--bins", "--locked"]))
}

/// The folder of the desktop image, built if the cache has none of this content. Needs the
/// orchestrator's program.
pub(crate) fn image(house: &House, extra: &[&str]) -> Result<PathBuf> {
    build(house, "ansible", extra)
}

/// The folder of a plain cloud-init template (`tests/plain-template`). Needs the orchestrator's program.
pub(crate) fn plain_template(house: &House) -> Result<PathBuf> {
    build(house, "tests/plain-template", &[])
}

fn build(house: &House, role: &str, extra: &[&str]) -> Result<PathBuf> {
    let agent = agent(house)?;
    let mut command = house.command(house.binary("mayfly-orchestrator"));
    command
        .args(["image", "build", "--agent"])
        .arg(agent)
        .arg("--role")
        .arg(house.root.join(role))
        .arg("--output")
        .arg(house.images())
        .args(extra);
    run::last_line(&mut command).map(PathBuf::from)
}

/// The folder of the micro guest's image. Needs [`programs`].
pub(crate) fn micro_guest(house: &House) -> Result<PathBuf> {
    let agent = agent(house)?;
    let rdp = static_binary(
        house,
        &["--package", "mayfly-micro-guest", "--bin", "micro-rdp"],
        "micro-rdp",
    )?;
    let mut command = house.command(house.binary("mayfly-micro-guest"));
    command
        .arg("--agent")
        .arg(agent)
        .arg("--rdp")
        .arg(rdp)
        .arg("--output")
        .arg(house.images());
    run::last_line(&mut command).map(PathBuf::from)
}

fn static_binary(house: &House, what: &[&str], name: &str) -> Result<PathBuf> {
    let host = host()?;
    let mut command = house.cargo(["build", "--release", "--target", &host]);
    command
        .args(what)
        .env("RUSTFLAGS", "-C target-feature=+crt-static");
    run::run(&mut command)?;
    Ok(house.target.join(host).join("release").join(name))
}

/// This machine's target triple, as rustc names it.
fn host() -> Result<String> {
    let text = run::output(std::process::Command::new("rustc").arg("-vV"))?;
    text.lines()
        .find_map(|line| line.strip_prefix("host: "))
        .map(str::to_owned)
        .context("`rustc -vV` names no host")
}
