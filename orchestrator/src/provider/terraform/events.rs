//! What Terraform and OpenTofu say with `-json`: one JSON object a line. Pure.

use crate::run::one_line;
use mayfly_api::StageProgress;
use serde::Deserialize;

/// One line, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// Something goes on: words for a log.
    Progress(String),
    /// Something is wrong, and the run fails.
    Error {
        /// In a few words.
        summary: String,
        /// The rest; may be empty.
        detail: String,
    },
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "type")]
    kind: String,
    #[serde(rename = "@message", default)]
    message: String,
    diagnostic: Option<Diagnostic>,
}

#[derive(Deserialize)]
struct Diagnostic {
    severity: String,
    summary: String,
    #[serde(default)]
    detail: String,
}

/// Reads a line; `None` if it does not matter or is no event.
pub(super) fn read(line: &str) -> Option<Said> {
    let line: Line = serde_json::from_str(line).ok()?;
    match line.kind.as_str() {
        "apply_start" | "apply_progress" | "apply_complete" => Some(Said::Progress(line.message)),
        "diagnostic" => {
            let said = line.diagnostic.filter(|d| d.severity == "error")?;
            Some(Said::Error {
                summary: said.summary,
                detail: said.detail,
            })
        }
        _ => None,
    }
}

/// What a line says for a log.
pub(super) fn progress(line: &str) -> Option<String> {
    match read(line)? {
        Said::Progress(words) => Some(words),
        Said::Error { .. } => None,
    }
}

/// What a line says of how far the machine is: a module makes one and nothing else, and clones the template first.
pub(super) fn stage(line: &str) -> Option<StageProgress> {
    let line: Line = serde_json::from_str(line).ok()?;
    (line.kind == "apply_start").then_some(StageProgress::Cloning)
}

/// Why a run failed, from all that it said: its errors, or else its last words.
pub(super) fn failure(output: &str) -> String {
    let errors: Vec<String> = output
        .lines()
        .filter_map(read)
        .filter_map(|said| match said {
            Said::Error { summary, detail } if detail.is_empty() => Some(summary),
            Said::Error { summary, detail } => Some(format!("{summary}: {detail}")),
            Said::Progress(_) => None,
        })
        .collect();
    if !errors.is_empty() {
        return one_line(&errors.join("; "));
    }
    let last: Vec<&str> = output
        .lines()
        .filter(|line| !line.trim().is_empty() && !line.starts_with('{'))
        .collect();
    let last = one_line(&last[last.len().saturating_sub(5)..].join(" "));
    if last.is_empty() {
        "it said nothing".to_owned()
    } else {
        last
    }
}

/// All that a run said, for people: the words of each event, and what is none as it is.
pub(super) fn words(output: &str) -> String {
    output
        .lines()
        .map(|line| match serde_json::from_str::<Line>(line) {
            Ok(Line {
                message,
                diagnostic: Some(Diagnostic { detail, .. }),
                ..
            }) if !detail.is_empty() => format!("{message}: {detail}\n"),
            Ok(Line { message, .. }) => message + "\n",
            Err(_) => format!("{line}\n"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    // As Terraform 1.11.4 and OpenTofu 1.12.6 say it, shortened.
    const START: &str = r#"{"@level":"info","@message":"proxmox_virtual_environment_vm.desktop: Creating...","@module":"terraform.ui","hook":{"action":"create"},"type":"apply_start"}"#;
    const GOES_ON: &str = r#"{"@level":"info","@message":"proxmox_virtual_environment_vm.desktop: Still creating... [10s elapsed]","@module":"terraform.ui","hook":{"action":"create","elapsed_seconds":10},"type":"apply_progress"}"#;
    const ERROR: &str = r#"{"@level":"error","@message":"Error: VM clone","@module":"terraform.ui","diagnostic":{"severity":"error","summary":"VM clone","detail":"All attempts fail:\n#1: error cloning VM","address":"proxmox_virtual_environment_vm.desktop"},"type":"diagnostic"}"#;
    const WARNING: &str = r#"{"@level":"warn","@message":"Warning: x","diagnostic":{"severity":"warning","summary":"x","detail":""},"type":"diagnostic"}"#;
    const MADE: &str = r#"{"@level":"info","@message":"Apply complete! Resources: 1 added","changes":{"add":1,"change":0,"remove":0,"operation":"apply"},"type":"change_summary"}"#;

    #[test]
    fn what_matters_is_read_and_the_rest_passed_over() {
        assert!(matches!(read(START), Some(Said::Progress(words)) if words.contains("Creating")));
        for nothing in [WARNING, MADE, "{", "text", ""] {
            assert_eq!(read(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn the_machine_is_cloned_from_the_start_of_its_resource_on() {
        assert_eq!(stage(START), Some(StageProgress::Cloning));
        for nothing in [GOES_ON, ERROR, WARNING, MADE, "{", "text", ""] {
            assert_eq!(stage(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn all_that_was_said_is_readable() {
        let output = [START, "panic: oh", ERROR].join("\n");
        let words = words(&output);
        assert_eq!(
            words.lines().collect::<Vec<_>>(),
            [
                "proxmox_virtual_environment_vm.desktop: Creating...",
                "panic: oh",
                "Error: VM clone: All attempts fail:",
                "#1: error cloning VM",
            ]
        );
    }

    #[test]
    fn a_failure_is_told_by_its_errors_or_by_the_last_words() {
        let output = [START, WARNING, ERROR].join("\n");
        assert_eq!(
            failure(&output),
            "VM clone: All attempts fail: #1: error cloning VM"
        );
        assert_eq!(
            failure("panic: oh\n\ngoroutine 1\n"),
            "panic: oh goroutine 1"
        );
        assert_eq!(failure(START), "it said nothing");
    }
}
