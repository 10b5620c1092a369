//! Runs programs, shows what they say, and counts the tests in it.

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// Silence after a program's end that ends the reading of its output.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Tests that ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
}

impl Tally {
    /// Adds what a test runner's closing line says: cargo's `test result: ok. 3 passed; 0 failed; …`,
    /// vitest's `Tests  1 failed | 12 passed (13)`, or Terraform's `Success! 4 passed, 0 failed.`. Any other line counts
    /// nothing.
    pub(crate) fn read(&mut self, line: &str) {
        let line = plain(line);
        let line = line.trim();
        let Some(rest) = line
            .strip_prefix("test result:")
            .or_else(|| line.strip_prefix("Tests "))
            .or_else(|| line.strip_prefix("Success! "))
            .or_else(|| line.strip_prefix("Failure! "))
        else {
            return;
        };
        let words: Vec<&str> = rest
            .split(|c: char| c.is_whitespace() || matches!(c, ';' | '|' | '.' | ','))
            .filter(|word| !word.is_empty())
            .collect();
        for pair in words.windows(2) {
            if let Ok(count) = pair[0].parse::<u32>() {
                match pair[1] {
                    "passed" => self.passed += count,
                    "failed" => self.failed += count,
                    _ => {}
                }
            }
        }
    }
}

/// A line without terminal colours (`ESC [ … m`).
fn plain(line: &str) -> String {
    let mut parts = line.split("\u{1b}[");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        text.push_str(part.split_once('m').map_or("", |(_, rest)| rest));
    }
    text
}

/// Runs a program without standard input; its output goes on ours.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let what = describe(command);
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("starting {what}"))?;
    if !status.success() {
        bail!("{what}: {status}");
    }
    Ok(())
}

/// As [`run`], and counts the tests in the output.
pub(crate) fn run_tests(command: &mut Command, tally: &mut Tally) -> Result<()> {
    run_read(command, |line| {
        tally.read(&String::from_utf8_lossy(line));
        Ok(())
    })
}

/// As [`run`], and writes the output to a file as well.
pub(crate) fn run_logged(command: &mut Command, log: &Path) -> Result<()> {
    let mut file = File::create(log).with_context(|| format!("writing {}", log.display()))?;
    run_read(command, |line| Ok(file.write_all(line)?))
}

fn run_read(command: &mut Command, mut read: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let what = describe(command);
    let (reader, writer) = std::io::pipe()?;
    command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer);
    let mut child = command
        .spawn()
        .with_context(|| format!("starting {what}"))?;
    // The command keeps the pipe's write ends, and the loop below would never see its end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            if sender.send(std::mem::take(&mut line)).is_err() {
                break;
            }
        }
    });
    let mut out = std::io::stdout();
    loop {
        match lines.recv_timeout(LAST_WORDS) {
            Ok(line) => {
                out.write_all(&line)?;
                read(&line)?;
            }
            // A process that the program left behind may hold the pipe open for ever.
            Err(RecvTimeoutError::Timeout) if child.try_wait()?.is_some() => break,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("{what}: {status}");
    }
    Ok(())
}

/// What a program says on its standard output; its errors go on ours.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let what = describe(command);
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {what}"))?;
    if !output.status.success() {
        bail!("{what}: {}", output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("{what} did not print text"))
}

/// The last line of [`output`]: tools of ours print the path of what they made there.
pub(crate) fn last_line(command: &mut Command) -> Result<String> {
    let what = describe(command);
    let text = output(command)?;
    match text.trim_end().lines().last() {
        Some(line) if !line.is_empty() => Ok(line.to_owned()),
        _ => bail!("{what} printed nothing"),
    }
}

fn describe(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(
        command
            .get_args()
            .map(|arg| arg.to_string_lossy().into_owned()),
    );
    let words = words.join(" ");
    // A script is an argument too.
    match words.char_indices().nth(160) {
        Some((end, _)) => format!("`{} …`", &words[..end]),
        None => format!("`{words}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(lines: &[&str]) -> Tally {
        let mut tally = Tally::default();
        for line in lines {
            tally.read(line);
        }
        tally
    }

    #[test]
    fn closing_lines_of_cargo_and_vitest_are_summed() {
        assert_eq!(
            tally(&[
                "running 2 tests",
                "test a ... ok",
                "test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.00s",
                "Success! 5 passed, 0 failed.",
                "Failure! 1 passed, 2 failed.",
                "test result: \u{1b}[31mFAILED\u{1b}[0m. 4 passed; 1 failed; 0 ignored",
                "\u{1b}[2m      Tests \u{1b}[22m \u{1b}[1m\u{1b}[31m3 failed\u{1b}[39m\u{1b}[22m | \u{1b}[32m12 passed\u{1b}[39m (15)",
            ]),
            Tally {
                passed: 24,
                failed: 6
            }
        );
    }

    #[test]
    fn a_line_that_only_looks_like_a_result_counts_nothing() {
        assert_eq!(
            tally(&[
                "Test Files  3 passed (3)",
                "5 passed, 0 failed",
                "logged: 7 passed",
                "Success! The configuration is valid.",
            ]),
            Tally::default()
        );
    }
}
