//! Shows how far a build is: a bar on a terminal, plain lines otherwise; always on stderr. The estimate is what the
//! stages took the last time on this machine.

use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The stages of a build, in order, with the seconds they are thought to take until they were measured.
pub(super) type Stages = &'static [(&'static str, u64)];

/// One build's progress.
pub(super) struct Progress {
    stages: Stages,
    at: usize,
    since: Instant,
    expected: BTreeMap<String, u64>,
    record: PathBuf,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// `record` is the file that keeps the durations for the next time; a missing or damaged one is no error.
    pub(super) fn new(stages: Stages, record: PathBuf) -> Self {
        let mut expected: BTreeMap<String, u64> = std::fs::read(&record)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        for (stage, seconds) in stages {
            expected.entry((*stage).to_owned()).or_insert(*seconds);
        }
        let total = stages.iter().map(|(stage, _)| expected[*stage]).sum();
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template(
                "{spinner} {elapsed:>4} {bar:30} {prefix} {wide_msg:.dim}",
            );
            let bar = ProgressBar::new(total)
                .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        if bar.is_none() {
            eprintln!("building the desktop image, about {total} s");
        }
        Self {
            stages,
            at: 0,
            since: Instant::now(),
            expected,
            record,
            bar,
        }
    }

    /// The next stage begins.
    pub(super) fn begin(&mut self, stage: &'static str) {
        self.end();
        self.at = self
            .stages
            .iter()
            .position(|(name, _)| *name == stage)
            .unwrap_or(self.at);
        self.since = Instant::now();
        let (number, of) = (self.at + 1, self.stages.len());
        let left: u64 = self.stages[self.at..]
            .iter()
            .map(|(name, _)| self.expected[*name])
            .sum();
        match &self.bar {
            Some(bar) => {
                bar.set_position(bar.length().unwrap_or(left).saturating_sub(left));
                bar.set_prefix(format!("[{number}/{of}] {stage}, about {left} s left"));
                bar.set_message("");
            }
            None => eprintln!("[{number}/{of}] {stage}, about {left} s left"),
        }
    }

    /// The last stage ended well; its duration is the next build's estimate.
    pub(super) fn end(&mut self) {
        let (stage, _) = self.stages[self.at];
        let took = self.since.elapsed();
        if took > Duration::from_millis(50) {
            self.expected
                .insert(stage.to_owned(), took.as_secs().max(1));
        }
    }

    /// What a tool says while it works.
    pub(super) fn detail(&self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(text.to_owned());
        }
    }

    /// The build ended well.
    pub(super) fn finish(mut self) {
        self.end();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        // Only an estimate is lost if this fails.
        if let Ok(json) = serde_json::to_vec_pretty(&self.expected) {
            let _ = std::fs::write(&self.record, json);
        }
    }
}
