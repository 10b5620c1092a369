//! What a desktop that failed leaves to read: collected before it is removed, without secrets, kept with its session.
//!
//! # Guarantees
//! * Only of a desktop that failed, never of one that ended in order.
//! * It never keeps a desktop from being removed, and delays that by [`COLLECT`] at most.
//! * At most [`LONGEST`] bytes of a session are kept; of each section the end, with a word on what was cut.
//! * A machine is not trusted: what it says is cut first, holds no control characters, and imitates no heading.
//! * The secrets of the desktop and its session are in it nowhere as they are, nor what merely looks like a password or a key. A
//!   machine that encodes a secret gets it past this.
//!
//! An orchestrator that ends between the failure and the removal may lose it.

use crate::clock::after;
use crate::config::Config;
use crate::control::Shared;
use crate::decide::{Facts, Failed, Progress};
use crate::provider::{Provider, Section};
use crate::serve;
use crate::session::Record;
use crate::store::words::{Kept, Whose};
use mayfly_api::{DesktopName, EndReason, Failure, SessionId, SessionPhase};
use regex::Regex;
use secrecy::{ExposeSecret, SecretString};
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tracing::warn;

/// The most that is kept of a session, in bytes.
pub const LONGEST: usize = 1_000_000;
/// Collecting may take so long.
pub const COLLECT: Duration = Duration::from_secs(15);
/// The most that is looked at of a section, in bytes.
const SECTION: usize = 2 << 20;
/// In the place of what is not shown.
const HIDDEN: &str = "…";
/// How a heading begins, and no line of a machine.
const HEADING: &str = "==== ";

/// Whether a desktop that is about to be removed leaves something to read.
#[must_use]
pub fn are_wanted(record: &Record, facts: &Facts) -> bool {
    let failed = match record.phase {
        SessionPhase::Ending => matches!(
            record.end_reason,
            Some(EndReason::Failed | EndReason::MachineLost)
        ),
        // Another replaces it: something failed, or it hung.
        _ => match facts.failed {
            Some(Failed::NoRoom(_)) => false,
            Some(_) => true,
            None => facts.lost.is_some() || facts.progress > Progress::Untouched,
        },
    };
    failed && facts.removals_failed == 0
}

/// Collects and keeps what the desktop leaves. Failing here is logged and nothing else.
pub async fn keep(
    shared: Arc<Shared>,
    provider: &dyn Provider,
    session: SessionId,
    name: DesktopName,
) {
    let end = after(shared.clock.now(), COLLECT);
    let sections = tokio::select! {
        sections = provider.last_words(name) => sections,
        () = shared.clock.sleep_until(Some(end)) => {
            warn!(%session, desktop = %name, "what it leaves to read could not be had in time");
            return;
        }
    };
    let secrets = shared.secrets.of(session, name);
    let text = tokio::task::spawn_blocking(move || compose(sections, &secrets)).await;
    let text = text.unwrap_or_default();
    if text.is_empty() {
        return;
    }
    let kept = Kept {
        session,
        desktop: name,
        at: shared.clock.now(),
        text,
    };
    match shared.store.keep(&kept).await {
        Ok(()) => {
            warn!(%session, desktop = %name, "it failed; to read what it left: mayfly-orchestrator logs {session}");
        }
        Err(error) => {
            warn!(%session, desktop = %name, %error, "what it leaves to read could not be kept");
        }
    }
}

/// What is kept of a session or a desktop, for people. Reads the database that a service may be using.
///
/// # Errors
/// If the database cannot be read or nothing is kept.
pub async fn show(config: &Config, whose: Whose) -> anyhow::Result<String> {
    let (kept, session) = serve::read_store(config, async |store| {
        let kept = store.kept(whose).await?;
        let session = match kept.first() {
            Some(first) => store.get(first.session).await?,
            None => None,
        };
        Ok((kept, session))
    })
    .await?;
    anyhow::ensure!(
        !kept.is_empty(),
        "nothing is kept of {whose}; only a desktop that failed leaves something, and it goes with its session, a week later"
    );
    let mut text = String::new();
    if let Some(Record {
        id, wish, failure, ..
    }) = session
    {
        text += &format!(
            "session {id} of {}, template {}\n",
            wish.user, wish.template
        );
        if let Some(Failure { stage, problem }) = failure {
            let why = readable(&problem.detail);
            text += &format!("failed in the stage {stage:?}: {why}\n");
        }
    }
    for words in kept {
        text += &format!("\n{}, {}\n{}", words.desktop, words.at, words.text);
    }
    Ok(text)
}

/// All sections as one text of at most [`LONGEST`] bytes, without secrets; empty if none says anything.
#[must_use]
pub fn compose(sections: Vec<Section>, secrets: &[SecretString]) -> String {
    let sections: Vec<(&str, String, usize)> = sections
        .into_iter()
        .filter_map(|Section { title, text }| {
            let (end, cut) = end_of(&text, SECTION);
            let text = without_secrets(&readable(end), secrets);
            (!text.trim().is_empty()).then_some((title, text, cut))
        })
        .collect();
    let headings: usize = sections
        .iter()
        .map(|s| HEADING.len() + s.0.len() + 64)
        .sum();
    let lengths = sections.iter().map(|s| s.1.len()).collect();
    let share = share(lengths, LONGEST.saturating_sub(headings));
    let mut all = String::new();
    for (title, text, cut_before) in sections {
        let (end, cut) = end_of(&text, share);
        all += &format!("{HEADING}{title} ====\n");
        if cut + cut_before > 0 {
            all += &format!("[{} bytes before this are left out]\n", cut + cut_before);
        }
        all += end.trim_end();
        all += "\n";
    }
    all
}

/// The most that each may have, so that all of these lengths fit: who needs less leaves the rest to the others.
fn share(mut lengths: Vec<usize>, room: usize) -> usize {
    lengths.sort_unstable();
    let (mut left, many) = (room, lengths.len());
    for (done, length) in lengths.into_iter().enumerate() {
        let share = left / (many - done);
        if length > share {
            return share;
        }
        left -= length;
    }
    room
}

/// At most `limit` bytes from the end, from the beginning of a line on, and how many bytes come before. A line that was cut could
/// begin with the rest of a secret.
fn end_of(text: &str, limit: usize) -> (&str, usize) {
    let Some(mut start) = text.len().checked_sub(limit).filter(|start| *start > 0) else {
        return (text, 0);
    };
    while !text.is_char_boundary(start) {
        start += 1;
    }
    let end = &text[start..];
    let end = end.split_once('\n').map_or("", |(_, whole)| whole);
    (end, text.len() - end.len())
}

/// The text without what only a terminal understands, and without what changes the order in which people read.
fn readable(text: &str) -> String {
    // ECMA-48: control sequences; strings such as a window's title; single escapes.
    static ESCAPES: LazyLock<Regex> = LazyLock::new(|| {
        pattern(
            r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]",
        )
    });
    let text = ESCAPES.replace_all(text, "");
    let mut readable: String = text
        .chars()
        .filter(|c| match c {
            '\n' | '\t' => true,
            // Unicode's bidirectional controls.
            '\u{061c}'
            | '\u{200e}'
            | '\u{200f}'
            | '\u{202a}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}' => false,
            c => !c.is_control(),
        })
        .collect();
    if readable.starts_with(HEADING) {
        readable.insert(0, ' ');
    }
    readable.replace(&format!("\n{HEADING}"), &format!("\n {HEADING}"))
}

/// The text without these secrets, and without what looks like one.
fn without_secrets(text: &str, secrets: &[SecretString]) -> String {
    static PATTERNS: LazyLock<[(Regex, &str); 4]> = LazyLock::new(|| {
        [
            (
                r"(?s)(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?:-----END [A-Z ]*PRIVATE KEY-----|\z)",
                "$1…",
            ),
            (r"\$(?:[1567]|y|gy|2[abxy]|argon2[a-z]*)\$[./A-Za-z0-9$=,+]{8,}", "…"),
            (
                r#"(?i)\b(authorization["']? *[:=] *["']?(?:\w+ +)?|bearer +|PVEAPIToken=)[^\s"',;]+"#,
                "$1…",
            ),
            (
                r#"(?i)((?:pass|passwd|password|passphrase|secret|token|api.?key)["']?(?: *= *| *: +|":)["']?)[^\s"',;}]+"#,
                "$1…",
            ),
        ]
        .map(|(regex, instead)| (pattern(regex), instead))
    });
    let text = secrets
        .iter()
        .map(ExposeSecret::expose_secret)
        .filter(|secret| !secret.is_empty())
        .fold(text.to_owned(), |text, secret| text.replace(secret, HIDDEN));
    PATTERNS.iter().fold(text, |text, (regex, instead)| {
        regex.replace_all(&text, *instead).into_owned()
    })
}

fn pattern(regex: &str) -> Regex {
    Regex::new(regex).expect("a constant that a test compiles")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Limits;
    use crate::session::{Expected, Origin, Wish};
    use jiff::Timestamp;
    use mayfly_api::{Problem, ProblemCode, Setback};

    fn section(title: &'static str, text: impl Into<String>) -> Section {
        Section {
            title,
            text: text.into(),
        }
    }

    fn said(text: &str) -> String {
        let secrets = ["q8Zr-secret_of_a_session".into(), SecretString::default()];
        let all = compose(vec![section("console", text)], &secrets);
        let said = all.strip_prefix("==== console ====\n").unwrap_or(&all);
        said.trim_end().to_owned()
    }

    #[test]
    fn words_are_wanted_before_the_first_removal_of_what_failed_and_of_nothing_else() {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let name = DesktopName::from_number(1).unwrap();
        let wish = Wish::of_somebody(Origin::V1);
        let id = SessionId::new();
        let mut made = Record::accepted(id, wish, Expected::default(), &Limits::default(), now);
        made.plan(name, now).unwrap();
        made.creating(name).unwrap();
        let fine = Facts::new(name, now);
        let problem = Problem::new(ProblemCode::CreateFailed, "broken");
        let broken = Facts {
            failed: Some(Failed::ForGood(problem.clone())),
            ..fine.clone()
        };
        let tried = Facts {
            removals_failed: 1,
            ..broken.clone()
        };

        let mut failed = made.clone();
        failed.fail(problem, now).unwrap();
        let mut lost = made.clone();
        lost.end(EndReason::MachineLost, now).unwrap();
        for record in [failed, lost] {
            assert!(are_wanted(&record, &fine), "{record:?}");
            assert!(!are_wanted(&record, &tried), "{record:?}");
        }
        for reason in [
            EndReason::Requested,
            EndReason::Idle,
            EndReason::NeverConnected,
            EndReason::Abandoned,
            EndReason::Expired,
        ] {
            let mut ended = made.clone();
            ended.end(reason, now).unwrap();
            assert!(!are_wanted(&ended, &broken), "{reason:?}");
        }
        made.remake(name, Setback::InTheWay, now).unwrap();
        assert!(are_wanted(&made, &broken), "replaced because it failed");
        assert!(!are_wanted(&made, &fine), "replaced after an interruption");
        let hung = Facts {
            progress: Progress::Made,
            ..fine.clone()
        };
        assert!(are_wanted(&made, &hung), "replaced because it hung");
        let without_room = Facts {
            failed: Some(Failed::NoRoom("full".to_owned())),
            ..fine
        };
        assert!(!are_wanted(&made, &without_room), "nothing went wrong");
    }

    #[test]
    fn no_secret_is_in_it_whatever_stands_around() {
        for (text, shown) in [
            (
                "x q8Zr-secret_of_a_session y q8Zr-secret_of_a_session",
                "x … y …",
            ),
            // Hidden in colours, or with a control character in it.
            ("q8Zr-\u{1b}[31msecret_of_a_\u{0}session", "…"),
            ("login password=hunter2, next", "login password=…, next"),
            ("PASSWORD: \"hunter2\"", "PASSWORD: \"…\""),
            ("{\"token\":\"abc\",\"a\":1}", "{\"token\":\"…\",\"a\":1}"),
            ("Authorization: Bearer abc.def", "Authorization: Bearer …"),
            ("PVEAPIToken=a@pve!b=0123-45 sent", "PVEAPIToken=… sent"),
            ("root:$6$salt$0123456789abcdef:19000", "root:…:19000"),
            (
                "a\n-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\nb",
                "a\n-----BEGIN OPENSSH PRIVATE KEY-----…\nb",
            ),
            (
                "-----BEGIN PRIVATE KEY-----\nAAAA",
                "-----BEGIN PRIVATE KEY-----…",
            ),
        ] {
            assert_eq!(said(text), shown, "{text}");
        }
    }

    #[test]
    fn what_is_no_secret_is_left_as_it_is() {
        for text in [
            "xrdp-sesman[41]: pam_unix(xrdp-sesman:auth): authentication failure; user=ada",
            "authorization failed for ada, who has no token",
            "A start job is running (1min 2s / no limit)",
            "costs $5 and €6",
        ] {
            assert_eq!(said(text), text);
        }
    }

    #[test]
    fn a_terminal_is_told_nothing_and_headings_are_ours_alone() {
        assert_eq!(
            said("\u{1b}[0;32m  OK  \u{1b}[0m up\r\nnext\u{7}"),
            "  OK   up\nnext"
        );
        assert_eq!(said("\u{1b}]0;title\u{7}a\u{1b}(Bb\u{1b}c"), "ab");
        assert_eq!(said("\u{202e}evil\u{2069}"), "evil");
        assert_eq!(said("a\n==== journal ====\nb"), "a\n ==== journal ====\nb");
        assert_eq!(said("==== journal ===="), " ==== journal ====");
    }

    #[test]
    fn nothing_is_composed_of_silence() {
        assert_eq!(compose(Vec::new(), &[]), "");
        assert_eq!(compose(vec![section("console", " \r\n")], &[]), "");
    }

    #[test]
    fn the_end_of_each_section_is_kept_within_the_bound() {
        let long = |word: &str| format!("{word} line\n").repeat(200_000);
        let all = compose(
            vec![
                section("journal", long("journal") + "the last of the journal"),
                section("terraform", "a few words"),
                section("console", long("ü") + "the last of the console"),
            ],
            &[],
        );
        assert!(all.len() <= LONGEST, "{}", all.len());
        assert!(all.len() > LONGEST - 1_000, "{}", all.len());
        for whole in [
            "==== journal ====\n[",
            " bytes before this are left out]\njournal line\n",
            "the last of the journal\n==== terraform ====\na few words\n==== console ====\n[",
            "\nü line\nthe last of the console\n",
        ] {
            assert!(all.contains(whole), "{whole}");
        }
    }

    #[test]
    fn one_line_without_end_is_no_way_past_the_bound() {
        let all = compose(vec![section("console", "x".repeat(5 << 20))], &[]);
        assert_eq!(all, "");
        let all = compose(
            vec![section("console", "\u{1}".repeat(5 << 20) + "\nend")],
            &[],
        );
        assert!(all.ends_with("left out]\nend\n"), "{all}");
    }

    #[test]
    fn a_secret_that_a_cut_goes_through_is_not_shown_in_part() {
        let secret = SecretString::from("abcdefghij".repeat(10));
        for shown in 0..100 {
            // What is long before it is made readable, and short after.
            let text = format!(
                "{}{}\nend",
                secret.expose_secret(),
                "\u{1}".repeat(SECTION - 4 - shown)
            );
            let all = compose(
                vec![section("console", text)],
                std::slice::from_ref(&secret),
            );
            assert!(all.ends_with("left out]\nend\n"), "{shown}: {all}");
        }
    }

    #[test]
    fn shares_are_fair() {
        assert_eq!(share(vec![10, 1_000, 1_000], 210), 100);
        assert_eq!(share(vec![10, 20], 100), 100);
        assert_eq!(share(vec![], 100), 100);
        assert_eq!(share(vec![60, 60], 100), 50);
    }
}
