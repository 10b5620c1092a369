//! The bootstrap file, and what the agent remembers of it until the machine ends.
//!
//! The file is written by the QEMU guest agent, not atomically: it is read again until it is whole, and then removed. What it
//! said goes to [`PROGRESS_FILE`] first (tmpfs, mode 0600), with the steps already done, so that an agent restarted at any
//! moment goes on where it was. The password is forgotten as soon as the person's account has it.

use crate::system::System;
use anyhow::{Context as _, bail};
use mayfly_api::agent::{BOOTSTRAP_FILE, Bootstrap};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Where the progress is kept.
const PROGRESS_FILE: &str = "/run/mayfly/agent.json";
/// Between two looks for the file.
const LOOK: Duration = Duration::from_millis(100);
/// A file that is whole and still not a bootstrap after this never becomes one.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the agent remembers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Progress {
    pub(crate) bootstrap: Bootstrap,
    /// Time since boot when `bootstrap.now` was true.
    pub(crate) as_of: Duration,
    /// The steps that are done, with their milliseconds.
    pub(crate) done: Vec<(String, u64)>,
}

impl Progress {
    /// Waits for the bootstrap, or goes on with the one that an earlier run of the agent took.
    pub(crate) fn take(root: &Path, system: &dyn System) -> anyhow::Result<Self> {
        let file = below(root, BOOTSTRAP_FILE);
        if let Some(folder) = file.parent() {
            // The image makes it before the guest agent starts; whoever makes it, only root may look in.
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)
                .with_context(|| format!("making {}", folder.display()))?;
            fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
                .with_context(|| format!("closing {}", folder.display()))?;
        }
        let kept = below(root, PROGRESS_FILE);
        match fs::read(&kept) {
            Ok(bytes) => match serde_json::from_slice(&bytes) {
                Ok(progress) => {
                    forget(root);
                    return Ok(progress);
                }
                Err(_) => bail!(
                    "{} is damaged; this machine must be replaced",
                    kept.display()
                ),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("reading {}", kept.display())),
        }
        let (bootstrap, age) = wait(&file, system)?;
        let progress = Self {
            bootstrap,
            as_of: system.uptime().saturating_sub(age),
            done: vec![],
        };
        progress.save(root)?;
        forget(root);
        Ok(progress)
    }

    /// Remembers it, atomically.
    pub(crate) fn save(&self, root: &Path) -> anyhow::Result<()> {
        let kept = below(root, PROGRESS_FILE);
        let text = serde_json::to_vec(self).context("writing the progress")?;
        replace(&kept, &text, 0o600)
    }
}

/// Waits until the file is whole. Also returns how long ago it was written, by the guest's own clock.
fn wait(file: &Path, system: &dyn System) -> anyhow::Result<(Bootstrap, Duration)> {
    let mut first_seen = None;
    loop {
        match fs::read(file) {
            Ok(bytes) => match serde_json::from_slice(&bytes) {
                Ok(bootstrap) => return Ok((bootstrap, age(file, system))),
                // Half-written: whoever writes it goes on, or begins again.
                Err(error) if error.is_eof() => first_seen = None,
                Err(error) if first_seen.get_or_insert_with(Instant::now).elapsed() > PATIENCE => {
                    // serde's own words would repeat the value it did not like: that may be a secret.
                    bail!(
                        "{} is not a bootstrap (line {}, column {})",
                        file.display(),
                        error.line(),
                        error.column()
                    );
                }
                Err(_) => {}
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => first_seen = None,
            Err(error) => return Err(error).with_context(|| format!("reading {}", file.display())),
        }
        thread::sleep(LOOK);
    }
}

fn age(file: &Path, system: &dyn System) -> Duration {
    let modified = fs::metadata(file).and_then(|meta| meta.modified());
    let age = modified
        .ok()
        .and_then(|at| jiff::Timestamp::try_from(at).ok())
        .and_then(|at| Duration::try_from(system.now().duration_since(at)).ok());
    // An agent that was not running yet explains minutes, not more: then the clock was set meanwhile.
    age.filter(|age| *age < Duration::from_secs(600))
        .unwrap_or_default()
}

/// Removes the bootstrap file. An orchestrator that was restarted may write it again: it is never needed twice.
pub(crate) fn forget(root: &Path) {
    let file = below(root, BOOTSTRAP_FILE);
    if let Err(error) = fs::remove_file(&file)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::error!(file = %file.display(), %error, "the bootstrap cannot be removed");
    }
}

/// An absolute path of the machine below `root`.
pub(crate) fn below(root: &Path, path: impl AsRef<Path>) -> PathBuf {
    let path = path.as_ref();
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// Writes a file whole or not at all, never readable by more than `mode` allows.
pub(crate) fn replace(path: &Path, content: &[u8], mode: u32) -> anyhow::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    let write = || -> io::Result<()> {
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&new)?;
        file.write_all(content)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        fs::rename(&new, path)
    };
    write().with_context(|| format!("writing {}", path.display()))
}
