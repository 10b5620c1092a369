//! A [`Run`] of Terraform or OpenTofu.
//!
//! # Guarantees
//! * A module is initialised once, whole or not at all, and never written by a run: each run has a folder of links to it, so that
//!   whatever Terraform leaves behind (`errored.tfstate`) ends with the desktop.
//! * What is secret in a run's environment is in no argument, file or message.

use super::events;
use crate::failpoints::around;
use crate::run::{Language, Order, Run, redacted};
use data_encoding::HEXLOWER;
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// Loading a provider from a mirror takes a moment, from a registry a minute.
const INIT: Duration = Duration::from_secs(300);

/// A variable of a run's environment.
pub(super) type Variable = (&'static str, SecretString);

/// How both talk.
pub(super) const LANGUAGE: Language = Language {
    progress: events::progress,
    stage: events::stage,
    failure: events::failure,
    words: events::words,
};

/// A module that is initialised: nothing in it is written any more.
pub(super) struct Module(PathBuf);

impl Module {
    /// Copies and initialises the module in `source`, unless that was done before with the same files, program and plugins.
    pub(super) async fn prepare(
        source: &Path,
        program: &Path,
        plugins: Option<&Path>,
        cache: &Path,
        environment: &[Variable],
    ) -> Result<Self, String> {
        let failed = |what: &Path, error: io::Error| format!("{}: {error}", what.display());
        let files = files_of(source).map_err(|e| failed(source, e))?;
        let mut digest = Sha256::new();
        for part in [program, plugins.unwrap_or(Path::new(""))] {
            digest.update(part.as_os_str().as_encoded_bytes());
            digest.update([0]);
        }
        for file in &files {
            digest.update(file.as_encoded_bytes());
            let content = std::fs::read(source.join(file)).map_err(|e| failed(source, e))?;
            digest.update(Sha256::digest(content));
        }
        let key = &HEXLOWER.encode(&digest.finalize())[..16];
        let module = cache.join(format!("module-{key}"));
        if module.exists() {
            return Ok(Self(module));
        }
        // Made beside it: one that was interrupted may still be written by its child.
        let part = tempfile::Builder::new()
            .prefix(&format!("part-{key}-"))
            .tempdir_in(cache)
            .map_err(|e| failed(cache, e))?;
        let made = || -> io::Result<()> {
            for file in &files {
                std::fs::copy(source.join(file), part.path().join(file))?;
            }
            if let Some(plugins) = plugins {
                let text = format!(
                    "provider_installation {{\n  filesystem_mirror {{\n    path = {}\n  }}\n}}\n",
                    Value::from(plugins.to_string_lossy())
                );
                std::fs::write(part.path().join("cli.tfrc"), text)?;
            }
            Ok(())
        };
        made().map_err(|e| failed(part.path(), e))?;
        let mut init = tokio::process::Command::new(program);
        init.arg(format!("-chdir={}", part.path().display()))
            .args(["init", "-input=false", "-no-color"])
            .env_clear()
            .envs(plain(part.path(), environment))
            .env("HOME", part.path())
            .stdin(Stdio::null())
            .kill_on_drop(true);
        // Starts when it is first waited for.
        let output = async { tokio::time::timeout(INIT, init.output()).await };
        let output = around("init", output)
            .await
            .map_err(|_| format!("{} init hangs", program.display()))?
            .map_err(|e| failed(program, e))?;
        if !output.status.success() {
            let words = [output.stdout, output.stderr].concat();
            let secrets: Vec<SecretString> = environment
                .iter()
                .filter(|(name, _)| name.ends_with("TOKEN") || name.ends_with("PASSWORD"))
                .map(|(_, value)| value.clone())
                .collect();
            return Err(format!(
                "{} init of the module {}: {}",
                program.display(),
                source.display(),
                redacted(&events::failure(&String::from_utf8_lossy(&words)), &secrets)
            ));
        }
        std::fs::rename(part.keep(), &module).map_err(|e| failed(&module, e))?;
        Ok(Self(module))
    }
}

/// Removes what an earlier process was initialising when it was killed.
pub(super) fn forget_parts(cache: &Path) {
    for entry in std::fs::read_dir(cache).into_iter().flatten().flatten() {
        // What its child still writes is removed the next time.
        if entry.file_name().to_string_lossy().starts_with("part-") {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// The files that make a module: not hidden ones, not folders (tests among them).
fn files_of(source: &Path) -> io::Result<Vec<OsString>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(source)? {
        let entry = entry?;
        let name = entry.file_name();
        let is_module = Path::new(&name).extension().is_some_and(|e| e == "tf");
        if is_module && entry.path().is_file() {
            files.push(name);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(io::Error::other("there is no .tf file in this folder"));
    }
    Ok(files)
}

/// A whole environment: the variables, and what every run has.
fn plain(module: &Path, environment: &[Variable]) -> Vec<(OsString, OsString)> {
    let mut all: Vec<(OsString, OsString)> = [
        ("TF_IN_AUTOMATION", "1"),
        ("CHECKPOINT_DISABLE", "1"),
        ("PATH", "/usr/bin:/bin"),
    ]
    .into_iter()
    .map(|(name, value)| (name.into(), value.into()))
    .collect();
    let settings = module.join("cli.tfrc");
    if settings.exists() {
        all.push(("TF_CLI_CONFIG_FILE".into(), settings.into()));
    }
    all.extend(
        environment
            .iter()
            .map(|(name, value)| (name.into(), value.expose_secret().into())),
    );
    all
}

/// Makes the run's folder: links to the module, the variables in a file of mode 0600.
pub(super) fn make(run: &Run, module: &Module, variables: &Value) -> io::Result<()> {
    let work = work(run);
    std::fs::DirBuilder::new().mode(0o700).create(&work)?;
    for entry in std::fs::read_dir(&module.0)? {
        let entry = entry?;
        symlink(entry.path(), work.join(entry.file_name()))?;
    }
    let file = std::fs::File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(self::variables(run))?;
    serde_json::to_writer_pretty(file, variables)?;
    Ok(())
}

/// Starts `apply`. It goes on whatever becomes of this process, until `deadline`.
pub(super) fn apply(
    run: &Run,
    orchestrator: &Path,
    program: &Path,
    environment: &[Variable],
    deadline: Duration,
) -> io::Result<()> {
    let work = work(run);
    let mut environment = plain(&work, environment);
    environment.push(("HOME".into(), work.clone().into()));
    environment.push(("TMPDIR".into(), work.clone().into()));
    let mut chdir = OsString::from("-chdir=");
    chdir.push(&work);
    let mut file = OsString::from("-var-file=");
    file.push(variables(run));
    let mut command: Vec<OsString> = vec![program.into(), chdir];
    let apply = "apply -json -auto-approve -input=false -no-color";
    command.extend(apply.split(' ').map(OsString::from));
    command.push(file);
    run.start(
        orchestrator,
        Order {
            command,
            environment,
            deadline,
        },
    )
}

fn work(run: &Run) -> PathBuf {
    run.folder().join("work")
}

fn variables(run: &Run) -> PathBuf {
    run.folder().join("desktop.tfvars.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_its_tf_files() {
        let folder = tempfile::tempdir().unwrap();
        assert!(files_of(folder.path()).is_err());
        for file in ["b.tf", "a.tf", "README.md", ".terraform.lock.hcl"] {
            std::fs::write(folder.path().join(file), "").unwrap();
        }
        std::fs::create_dir(folder.path().join("tests.tf")).unwrap();
        assert_eq!(files_of(folder.path()).unwrap(), ["a.tf", "b.tf"]);
    }
}
