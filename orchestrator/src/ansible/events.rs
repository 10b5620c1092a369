//! What a playbook says through our callback plugin (`ansible/plugins/callback/mayfly.py`): one JSON object a line. Pure.

use crate::run::one_line;
use mayfly_api::StageProgress;
use serde::Deserialize;

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "mayfly", rename_all = "snake_case")]
enum Said {
    /// A task starts.
    Task {
        /// Its name.
        name: String,
        /// How many there were, with it.
        number: u32,
    },
    /// A task failed.
    Failed {
        /// Its name.
        task: String,
        /// Why.
        reason: String,
    },
    /// The end.
    Done {
        /// The machines that something was done to.
        hosts: Vec<String>,
    },
}

/// `None` if it is no event: Ansible's own warnings and errors stand between them.
fn read(line: &str) -> Option<Said> {
    serde_json::from_str(line).ok()
}

/// What a line says for a log.
pub(super) fn progress(line: &str) -> Option<String> {
    match read(line)? {
        Said::Task { name, number } => Some(format!("task {number}: {name}")),
        Said::Failed { task, reason } => Some(failed(&task, &reason)),
        Said::Done { .. } => None,
    }
}

/// What a line says for the person who waits.
pub(super) fn stage(line: &str) -> Option<StageProgress> {
    let Said::Task { name, number } = read(line)? else {
        return None;
    };
    Some(StageProgress::Task {
        number,
        name: one_line(&name),
    })
}

/// Why a run failed, from all that it said: the task that failed last, or Ansible's own error, and the task that was begun since.
pub(super) fn failure(output: &str) -> String {
    let mut words = None;
    let mut at = None;
    for said in output.lines().filter_map(read) {
        match said {
            Said::Task { name, .. } => at = Some(name),
            Said::Failed { task, reason } => {
                words = Some(failed(&task, &reason));
                at = None;
            }
            Said::Done { .. } => {}
        }
    }
    let words = words.or_else(|| {
        // `ERROR!` up to ansible-core 2.18. What comes after it belongs to it.
        let own = output
            .lines()
            .skip_while(|line| !line.starts_with("ERROR") && !line.starts_with("[ERROR]"))
            .filter(|line| read(line).is_none());
        Some(one_line(&own.take(8).collect::<Vec<_>>().join(" "))).filter(|own| !own.is_empty())
    });
    match (words, at) {
        (Some(words), None) => words,
        (Some(words), Some(task)) => format!("{words}; at the task {task}"),
        (None, Some(task)) => format!("at the task {task}"),
        (None, None) => "it said nothing".to_owned(),
    }
}

/// Whether a run that succeeded did anything to that machine: a playbook whose `hosts` match none succeeds as well.
pub(super) fn reached(output: &str, host: &str) -> bool {
    let done =
        |line| matches!(read(line), Some(Said::Done { hosts }) if hosts.iter().any(|h| h == host));
    output.lines().any(done)
}

fn failed(task: &str, reason: &str) -> String {
    one_line(&format!("task {task}: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    // As ansible-core 2.14 and 2.19 say it.
    const TASK: &str = r#"{"mayfly": "task", "name": "Install packages", "number": 4}"#;
    const FAILED: &str = r#"{"mayfly": "failed", "task": "Install packages", "reason": "non-zero return code: E: Unable to\n locate package"}"#;
    const NEXT: &str = r#"{"mayfly": "task", "name": "Leave the stamp", "number": 5}"#;
    const DONE: &str = r#"{"mayfly": "done", "hosts": ["desktop-0000001"]}"#;
    const WARNING: &str = "[WARNING]: Could not match supplied host pattern, ignoring: nobody";

    #[test]
    fn progress_is_told_and_the_rest_passed_over() {
        assert_eq!(progress(TASK).unwrap(), "task 4: Install packages");
        for nothing in [DONE, WARNING, "{", "", r#"{"mayfly":"other"}"#] {
            assert_eq!(progress(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn a_task_is_told_in_one_line() {
        let task = |number, name: &str| {
            let name = name.to_owned();
            Some(StageProgress::Task { number, name })
        };
        assert_eq!(stage(TASK), task(4, "Install packages"));
        let lines = NEXT.replace("the", r"\n  the");
        assert_eq!(stage(&lines), task(5, "Leave the stamp"));
        for nothing in [FAILED, DONE, WARNING, ""] {
            assert_eq!(stage(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn a_failure_names_its_task_and_reason() {
        let words = "task Install packages: non-zero return code: E: Unable to locate package";
        assert_eq!(failure(&[TASK, FAILED, DONE].join("\n")), words);
        // Taken up by a `rescue`, and then the time was up.
        let later = format!("{words}; at the task Leave the stamp");
        assert_eq!(failure(&[TASK, FAILED, NEXT].join("\n")), later);
        assert_eq!(failure(TASK), "at the task Install packages");
    }

    #[test]
    fn an_error_before_the_first_task_is_told_in_ansible_s_words() {
        let missing = "ERROR! the playbook: x.yml could not be found";
        assert_eq!(failure(&format!("{WARNING}\n{missing}\n")), missing);
        let newer = "[ERROR]: YAML parsing failed: no end.\nOrigin: /x.yml:2:1\n";
        assert_eq!(
            failure(newer),
            "[ERROR]: YAML parsing failed: no end. Origin: /x.yml:2:1"
        );
        assert_eq!(failure(WARNING), "it said nothing");
    }

    #[test]
    fn a_playbook_that_matches_no_machine_has_reached_none() {
        assert!(reached(&[TASK, DONE].join("\n"), "desktop-0000001"));
        assert!(!reached(DONE, "desktop-0000002"));
        assert!(!reached(
            r#"{"mayfly": "done", "hosts": []}"#,
            "desktop-0000001"
        ));
        assert!(!reached("", "desktop-0000001"));
    }
}
