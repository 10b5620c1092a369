//! One run of a program that makes something of a desktop: a folder, a supervised child, and what it said.
//!
//! # Guarantees
//! * A run has nothing of our environment. Secrets that its starter names are in no message.
//! * A run outlives this process, is found again by its folder, and is gone when [`Run::end`] returns, also those of its processes
//!   that name the folder nowhere: they carry a mark in their environment.

use crate::process;
use crate::provider::Section;
use crate::supervise::{Cause, Exit, Program, Status, Supervised, Terms};
use mayfly_api::StageProgress;
use secrecy::{ExposeSecret, SecretString};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Between two looks at a run.
const LOOK: Duration = Duration::from_millis(100);
/// After SIGINT a program ends what it is at; then it is killed.
const PATIENCE: Duration = Duration::from_secs(10);
/// A killed process is gone in milliseconds.
const KILL: Duration = Duration::from_secs(15);
/// How much of a run's output is kept, in bytes.
const OUTPUT: u64 = 4 << 20;
/// Characters of a task's name that a person is shown.
const NAME: usize = 100;
/// Names the run's folder in the environment of all of its processes.
const MARK: &str = "MAYFLY_RUN";

/// How a program talks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Language {
    /// What a line says for a log, if anything.
    pub(crate) progress: fn(&str) -> Option<String>,
    /// What a line says for the person who waits, if anything.
    pub(crate) stage: fn(&str) -> Option<StageProgress>,
    /// Why it failed, from all that it said.
    pub(crate) failure: fn(&str) -> String,
    /// All that it said, for people.
    pub(crate) words: fn(&str) -> String,
}

/// What is run: the program and its arguments, its whole environment, and for how long at most.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    pub(crate) command: Vec<OsString>,
    pub(crate) environment: Vec<(OsString, OsString)>,
    pub(crate) deadline: Duration,
}

/// The text without the secrets.
pub(crate) fn redacted(text: &str, secrets: &[SecretString]) -> String {
    secrets
        .iter()
        .map(SecretString::expose_secret)
        .filter(|secret| !secret.is_empty())
        .fold(text.to_owned(), |text, secret| text.replace(secret, "…"))
}

/// The text in one line.
pub(crate) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A run, by its folder.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    folder: PathBuf,
}

impl Run {
    /// The run whose record is, or will be, in `folder`.
    pub(crate) fn at(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Its folder.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Starts it. It goes on whatever becomes of this process, until its deadline.
    pub(crate) fn start(&self, orchestrator: &Path, mut order: Order) -> io::Result<()> {
        let mark = (MARK.into(), self.folder.clone().into());
        order.environment.push(mark);
        let terms = Terms {
            deadline: order.deadline,
            patience: PATIENCE,
            max_output: OUTPUT,
        };
        let program = Program {
            command: &order.command,
            environment: Some(&order.environment),
        };
        let mut supervisor = Supervised::at(&self.folder).start(orchestrator, terms, program)?;
        // Somebody has to take note of its end, or it stays as a zombie.
        tokio::spawn(async move { supervisor.wait().await });
        Ok(())
    }

    /// Whether it was started and its end can be waited for or is known.
    pub(crate) fn is_followed(&self) -> bool {
        matches!(
            Supervised::at(&self.folder).status(),
            Status::Running | Status::Exited(_)
        )
    }

    /// All that it said so far, without these secrets.
    pub(crate) fn said(
        &self,
        title: &'static str,
        language: Language,
        secrets: &[SecretString],
    ) -> Section {
        // Its older half begins anywhere.
        let half = usize::try_from(OUTPUT / 2).unwrap_or(usize::MAX);
        let output = Supervised::at(&self.folder).output();
        let mut said = Section::last(title, output, half);
        said.text = redacted(&(language.words)(&said.text), secrets);
        said
    }

    /// Waits for its end. All that it said if it succeeded, or why it failed, without these secrets. What it is at is told on the
    /// way, from its first line on.
    pub(crate) async fn wait(
        &self,
        language: Language,
        secrets: &[SecretString],
        told: impl Fn(StageProgress) + Sync,
    ) -> Result<String, String> {
        let supervised = Supervised::at(&self.folder);
        let begin = Instant::now();
        let mut read = 0;
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
            self.tell(language, secrets, &supervised.output(), &mut read, &told);
            tokio::time::sleep(LOOK).await;
        };
        let output = supervised.output();
        self.tell(language, secrets, &output, &mut read, &told);
        let words = || redacted(&(language.failure)(&output), secrets);
        match exit {
            Exit {
                cause: Cause::Itself,
                code: Some(0),
                ..
            } => Ok(output),
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

    /// Logs and tells what is new.
    fn tell(
        &self,
        language: Language,
        secrets: &[SecretString],
        output: &str,
        read: &mut usize,
        told: &(impl Fn(StageProgress) + Sync),
    ) {
        for line in output.lines().skip(*read) {
            if let Some(words) = (language.progress)(line) {
                let words = redacted(&words, secrets);
                tracing::info!(run = %self.folder.display(), "{words}");
            }
            match (language.stage)(line) {
                Some(StageProgress::Task { number, name }) => {
                    let name = redacted(&name, secrets).chars().take(NAME).collect();
                    told(StageProgress::Task { number, name });
                }
                Some(progress) => told(progress),
                None => {}
            }
        }
        // The last line may be half of one.
        *read = output.matches('\n').count().max(*read);
    }

    /// Ends it, if it runs: one SIGINT to its group, patience, then every process of it is killed. `true` if there was one.
    pub(crate) async fn end(&self) -> Result<bool, String> {
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_in_no_words() {
        let secrets = [SecretString::from("0123456789"), SecretString::default()];
        let words = redacted("401 for a@pve!b=0123456789, 12 times", &secrets);
        assert_eq!(words, "401 for a@pve!b=…, 12 times");
    }
}
