//! Where things are: the repository, the cache outside it, the folder of reports; and who may use the cache now.
//!
//! # Guarantees
//! * What is cached lives in `$XDG_CACHE_HOME/mayfly` (default `~/.cache/mayfly`), so that a fresh clone is warm.
//! * One `cargo xtask` at a time uses the shared build folder.
//! * A build folder that another clone used is never trusted: cargo compares times, not contents, and the other
//!   clone's build may be younger than this one's files. All files of this clone are then made younger still.

use anyhow::{Context, Result};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

/// The places.
pub(crate) struct House {
    /// The repository.
    pub(crate) root: PathBuf,
    /// What outlives a clone: `images/`, `tools/`, `target/`.
    pub(crate) cache: PathBuf,
    /// Cargo's build folder: `$CARGO_TARGET_DIR`, or `target/` in the cache. That of another compiler lies in it
    /// (`cross`), under the same lock and the same distrust.
    pub(crate) target: PathBuf,
    /// Held as long as this process lives.
    _lock: File,
}

impl House {
    pub(crate) fn open() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("xtask lies in no repository")?
            .to_owned();
        let cache = directories::BaseDirs::new()
            .context("no home folder: set HOME")?
            .cache_dir()
            .join("mayfly");
        let target = std::env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| cache.join("target"), |dir| root.join(dir));
        fs::create_dir_all(&target).with_context(|| format!("making {}", target.display()))?;
        let lock = lock(&target)?;
        let house = Self {
            root,
            cache,
            target,
            _lock: lock,
        };
        house.distrust_other_clones()?;
        Ok(house)
    }

    /// Where reports and screenshots of this clone go.
    pub(crate) fn reports(&self) -> Result<PathBuf> {
        let dir = self.root.join("target/reports");
        fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        Ok(dir)
    }

    /// Where desktop images are cached by content.
    pub(crate) fn images(&self) -> PathBuf {
        self.cache.join("images")
    }

    /// A cargo of this toolchain in this repository, with the shared build folder.
    pub(crate) fn cargo<I: AsRef<str>>(&self, args: impl IntoIterator<Item = I>) -> Command {
        let mut command = self.command(std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()));
        for arg in args {
            command.arg(arg.as_ref());
        }
        command.env("CARGO_TARGET_DIR", &self.target);
        command
    }

    /// Any program, run in this repository.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.root);
        command
    }

    /// A program of ours as `cargo build` leaves it.
    pub(crate) fn binary(&self, name: &str) -> PathBuf {
        self.target.join("debug").join(name)
    }

    fn distrust_other_clones(&self) -> Result<()> {
        let stamp = self.target.join(".mayfly-clone");
        let ours = self.root.to_string_lossy();
        if fs::read_to_string(&stamp).is_ok_and(|theirs| theirs == ours) {
            return Ok(());
        }
        let now = SystemTime::now();
        for file in self.tracked_files()? {
            // A link or a file deleted in the work tree has no time to set.
            if let Ok(file) = File::options().append(true).open(self.root.join(file)) {
                file.set_modified(now)?;
            }
        }
        fs::write(&stamp, ours.as_bytes()).with_context(|| format!("writing {}", stamp.display()))
    }

    fn tracked_files(&self) -> Result<Vec<String>> {
        let list = crate::run::output(self.command("git").args(["ls-files", "-z"]))?;
        Ok(list
            .split_terminator('\0')
            .filter(|name| !name.starts_with(".git/"))
            .map(str::to_owned)
            .collect())
    }
}

fn lock(target: &Path) -> Result<File> {
    let path = target.join(".mayfly-lock");
    let file = File::create(&path).with_context(|| format!("opening {}", path.display()))?;
    if file.try_lock().is_err() {
        eprintln!(
            "waiting for another `cargo xtask` that uses {} …",
            target.display()
        );
        file.lock()
            .with_context(|| format!("locking {}", path.display()))?;
    }
    Ok(file)
}
