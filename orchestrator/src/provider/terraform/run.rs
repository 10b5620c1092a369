//! One run of Terraform or OpenTofu: a folder, a supervised child, and what it said.
//!
//! # Guarantees
//! * A module is initialised once, whole or not at all, and never written by a run: each run has a folder of links to it, so that
//!   whatever Terraform leaves behind (`errored.tfstate`) ends with the desktop.
//! * A run has nothing of our environment. What is secret in its own is in no argument, file or message.
//! * A run outlives this process, is found again by its folder, and is gone when [`Run::end`] returns, its provider's process
//!   included: that one names the folder nowhere but carries a mark in its environment.

use super::super::Section;
use super::events;
use crate::process;
use crate::supervise::{Cause, Exit, Program, Status, Supervised, Terms};
use data_encoding::HEXLOWER;
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Between two looks at a run.
const LOOK: Duration = Duration::from_millis(100);
/// After SIGINT Terraform ends what it is at; then it is killed.
const PATIENCE: Duration = Duration::from_secs(10);
/// A killed process is gone in milliseconds.
const KILL: Duration = Duration::from_secs(15);
/// Loading a provider from a mirror takes a moment, from a registry a minute.
const INIT: Duration = Duration::from_secs(300);
/// How much of a run's output is kept, in bytes.
const OUTPUT: u64 = 4 << 20;
/// Names the run's folder in the environment of all of its processes.
const MARK: &str = "MAYFLY_RUN";

/// A variable of a run's environment.
pub(super) type Variable = (&'static str, SecretString);

/// A run's folder.
#[derive(Clone, Debug)]
pub(super) struct Run {
    folder: PathBuf,
}

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
        let output = tokio::process::Command::new(program)
            .arg(format!("-chdir={}", part.path().display()))
            .args(["init", "-input=false", "-no-color"])
            .env_clear()
            .envs(plain(part.path(), environment))
            .env("HOME", part.path())
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(INIT, output)
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

/// The text without the secrets.
fn redacted(text: &str, secrets: &[SecretString]) -> String {
    secrets
        .iter()
        .map(SecretString::expose_secret)
        .filter(|secret| !secret.is_empty())
        .fold(text.to_owned(), |text, secret| text.replace(secret, "…"))
}

impl Run {
    /// The run whose files are, or will be, in `folder`.
    pub(super) fn at(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Makes its folder: links to the module, the variables in a file of mode 0600.
    pub(super) fn make(&self, module: &Module, variables: &Value) -> io::Result<()> {
        let work = self.work();
        std::fs::DirBuilder::new().mode(0o700).create(&work)?;
        for entry in std::fs::read_dir(&module.0)? {
            let entry = entry?;
            symlink(entry.path(), work.join(entry.file_name()))?;
        }
        let file = std::fs::File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(self.variables())?;
        serde_json::to_writer_pretty(file, variables)?;
        Ok(())
    }

    /// Starts `apply`. It goes on whatever becomes of this process, until `deadline`.
    pub(super) fn apply(
        &self,
        orchestrator: &Path,
        program: &Path,
        environment: &[Variable],
        deadline: Duration,
    ) -> io::Result<()> {
        let work = self.work();
        let mut environment = plain(&work, environment);
        environment.push((MARK.into(), self.folder.clone().into()));
        environment.push(("HOME".into(), work.clone().into()));
        environment.push(("TMPDIR".into(), work.clone().into()));
        let mut chdir = OsString::from("-chdir=");
        chdir.push(&work);
        let mut variables = OsString::from("-var-file=");
        variables.push(self.variables());
        let mut command: Vec<OsString> = vec![program.into(), chdir];
        let apply = "apply -json -auto-approve -input=false -no-color";
        command.extend(apply.split(' ').map(OsString::from));
        command.push(variables);
        let terms = Terms {
            deadline,
            patience: PATIENCE,
            max_output: OUTPUT,
        };
        let program = Program {
            command: &command,
            environment: Some(&environment),
        };
        let mut supervisor = Supervised::at(&self.folder).start(orchestrator, terms, program)?;
        // Somebody has to take note of its end, or it stays as a zombie.
        tokio::spawn(async move { supervisor.wait().await });
        Ok(())
    }

    /// Whether it was started and its end can be waited for or is known.
    pub(super) fn is_followed(&self) -> bool {
        matches!(
            Supervised::at(&self.folder).status(),
            Status::Running | Status::Exited(_)
        )
    }

    /// Waits for its end, and says why it failed if it did, without these secrets.
    pub(super) async fn wait(&self, secrets: &[SecretString]) -> Result<(), String> {
        let supervised = Supervised::at(&self.folder);
        let begin = Instant::now();
        let mut told = 0;
        let exit = loop {
            match supervised.status() {
                Status::Exited(exit) => break exit,
                // Its record is the first thing that a supervisor writes.
                Status::Unknown if begin.elapsed() < KILL => {}
                Status::Unknown => {
                    return Err(format!("it did not start: {}", supervised.last_words(600)));
                }
                Status::Lost => return Err("its supervisor was killed".to_owned()),
                Status::Running => {}
            }
            self.tell(&supervised.output(), &mut told);
            tokio::time::sleep(LOOK).await;
        };
        let output = supervised.output();
        self.tell(&output, &mut told);
        let words = || redacted(&events::failure(&output), secrets);
        match exit {
            Exit {
                cause: Cause::Itself,
                code: Some(0),
                ..
            } => Ok(()),
            Exit {
                cause: Cause::Deadline,
                ..
            } => Err(format!("it did not end in time ({})", words())),
            Exit {
                cause: Cause::Stopped,
                ..
            } => Err("it was stopped".to_owned()),
            Exit {
                signal: Some(signal),
                ..
            } => Err(format!("{signal} ended it ({})", words())),
            Exit { .. } => Err(words()),
        }
    }

    /// All that it said so far, without these secrets.
    pub(super) fn said(&self, secrets: &[SecretString]) -> Section {
        // Its older half begins anywhere.
        let half = usize::try_from(OUTPUT / 2).unwrap_or(usize::MAX);
        let output = Supervised::at(&self.folder).output();
        let mut said = Section::last("terraform", output, half);
        said.text = redacted(&events::words(&said.text), secrets);
        said
    }

    /// Logs what is new.
    fn tell(&self, output: &str, told: &mut usize) {
        for line in output.lines().skip(*told) {
            if let Some(events::Said::Progress(words)) = events::read(line) {
                tracing::info!(run = %self.folder.display(), "{words}");
            }
        }
        // The last line may be half of one.
        *told = output.matches('\n').count().max(*told);
    }

    /// Ends it, if it runs: one SIGINT to its group, patience, then every process of it is killed. `true` if there was one.
    pub(super) async fn end(&self) -> Result<bool, String> {
        let supervised = Supervised::at(&self.folder);
        let session = supervised.session();
        let mut there_was = false;
        if supervised.status() == Status::Running {
            there_was = true;
            supervised
                .stop()
                .map_err(|e| format!("the run cannot be stopped: {e}"))?;
            let begin = Instant::now();
            while supervised.status() == Status::Running && begin.elapsed() < PATIENCE + KILL {
                tokio::time::sleep(LOOK).await;
            }
        }
        let begin = Instant::now();
        let mut named: BTreeSet<process::Process> = BTreeSet::new();
        loop {
            let mut mark = OsString::from(format!("{MARK}="));
            mark.push(&self.folder);
            let folder = self.folder.clone();
            let (found, ending) = tokio::task::spawn_blocking(move || -> io::Result<_> {
                let mut found = process::naming(&folder)?;
                found.extend(process::marked(&mark)?);
                let ending = session.map(process::nameless).transpose()?;
                Ok((found, ending.unwrap_or_default()))
            })
            .await
            .map_err(|e| e.to_string())?
            .map_err(|e| format!("/proc: {e}"))?;
            named.retain(|process| process.is_alive());
            named.extend(found);
            if named.is_empty() && ending.is_empty() {
                return Ok(there_was);
            }
            there_was = true;
            for process in &named {
                let _ = process.signal(rustix::process::Signal::KILL);
            }
            if begin.elapsed() > KILL {
                let pids: Vec<_> = named.iter().map(|p| p.pid.to_string()).collect();
                return Err(format!("its processes do not end: {}", pids.join(", ")));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn work(&self) -> PathBuf {
        self.folder.join("work")
    }

    fn variables(&self) -> PathBuf {
        self.folder.join("desktop.tfvars.json")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_of_the_environment_are_in_no_words() {
        let secrets = [SecretString::from("0123456789"), SecretString::default()];
        let words = redacted("401 for a@pve!b=0123456789, 12 times", &secrets);
        assert_eq!(words, "401 for a@pve!b=…, 12 times");
    }

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
