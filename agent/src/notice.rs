//! What the person is told inside the desktop: a notification in their XFCE session before it ends, or when something
//! of theirs is missing, in French or English.
//!
//! `notify-send` runs as the person, on every xrdp display of theirs, with the message bus of that session. Who has no session has
//! nobody to tell.

use crate::presence::Presence;
use crate::system::System;
use crate::talk::{Notice, Person};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// Shows notices, one after another, on a thread of its own: a session bus may hang.
#[derive(Default)]
pub(crate) struct Notices {
    queue: Mutex<Option<Sender<Notice>>>,
}

impl Notices {
    /// From now on notices are for this person.
    pub(crate) fn start(&self, system: &Arc<dyn System>, presence: &Presence, person: &Person) {
        let (queue, notices) = mpsc::channel();
        *self.queue.lock().unwrap_or_else(PoisonError::into_inner) = Some(queue);
        let (system, presence, person) = (Arc::clone(system), presence.clone(), person.clone());
        thread::spawn(move || {
            while let Ok(notice) = notices.recv() {
                let displays: Vec<u32> = presence.displays().into_keys().collect();
                for session in sessions(&person.user, &displays) {
                    let command = command(&person, &session, &notice);
                    let arguments: Vec<&str> = command.iter().map(String::as_str).collect();
                    if let Err(error) = system.run("runuser", &arguments, "") {
                        tracing::warn!(%error, "the person could not be told");
                    }
                }
            }
        });
    }

    /// Shows it soon.
    pub(crate) fn show(&self, notice: Notice) {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = &*queue {
            let _ = queue.send(notice);
        }
    }
}

/// A graphical session: what a program needs to reach it.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Session {
    display: String,
    bus: String,
}

/// The arguments of `runuser` that show a notice in a session.
fn command(person: &Person, session: &Session, notice: &Notice) -> Vec<String> {
    let french = person
        .language
        .as_deref()
        .is_some_and(|tag| tag.split('-').next() == Some("fr"));
    let (urgency, title, body) = match (notice, french) {
        (Notice::EndsIn(seconds), true) => (
            "critical",
            format!(
                "Ce bureau se ferme dans {}",
                span(*seconds, "secondes", "minutes")
            ),
            "Rien de ce qu’il contient n’est gardé : enregistrez votre travail ailleurs.",
        ),
        (Notice::EndsIn(seconds), false) => (
            "critical",
            format!(
                "This desktop ends in {}",
                span(*seconds, "seconds", "minutes")
            ),
            "Nothing on it is kept: save your work elsewhere.",
        ),
        (Notice::CalledOff, true) => (
            "normal",
            "Ce bureau reste ouvert".to_owned(),
            "Vous pouvez continuer.",
        ),
        (Notice::CalledOff, false) => ("normal", "This desktop stays".to_owned(), "You can go on."),
        (Notice::SharesMissing(places), true) => (
            "critical",
            format!("Dossier réseau absent : {}", places.join(", ")),
            "Il n’a pas pu être connecté. Ce que vous y enregistrez maintenant disparaît avec ce bureau.",
        ),
        (Notice::SharesMissing(places), false) => (
            "critical",
            format!("Network folder missing: {}", places.join(", ")),
            "It could not be connected. What you save there now is lost with this desktop.",
        ),
    };
    let mut command = vec![
        "-u".to_owned(),
        person.user.clone(),
        "--".into(),
        "env".into(),
    ];
    command.push(format!("DISPLAY={}", session.display));
    command.push(format!("DBUS_SESSION_BUS_ADDRESS={}", session.bus));
    // A session bus that hangs must not hold back the next notice.
    command.extend(["timeout", "20"].map(str::to_owned));
    // The hint makes a notice take the place of the one before it (xfce4-notifyd and others).
    command.extend(
        [
            "notify-send",
            "--app-name=Mayfly",
            "--icon=dialog-information",
            "--hint=string:x-canonical-private-synchronous:mayfly",
            "--urgency",
            urgency,
        ]
        .map(str::to_owned),
    );
    command.extend([title, body.to_owned()]);
    command
}

fn span(seconds: u32, some_seconds: &str, some_minutes: &str) -> String {
    if seconds < 120 {
        format!("{seconds} {some_seconds}")
    } else {
        format!("{} {some_minutes}", (seconds + 30) / 60)
    }
}

/// The sessions of a user on these displays, from the environments of their processes.
fn sessions(user: &str, displays: &[u32]) -> Vec<Session> {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let uid: Option<u32> = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields[0] == user)
        .and_then(|fields| fields.get(2)?.parse().ok());
    let Some(uid) = uid else { return vec![] };
    let mut found: Vec<Session> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.metadata().is_ok_and(|meta| meta.uid() == uid))
        .filter_map(|entry| fs::read(entry.path().join("environ")).ok())
        .filter_map(|environ| session(&environ, displays))
        .collect();
    found.sort();
    found.dedup_by(|one, other| one.display == other.display);
    found
}

/// The session in the environment of a process (man proc: `NAME=value`, each ended by a zero byte).
fn session(environ: &[u8], displays: &[u32]) -> Option<Session> {
    let value = |name: &str| {
        environ
            .split(|byte| *byte == 0)
            .filter_map(|entry| std::str::from_utf8(entry).ok())
            .find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='))
    };
    let (display, bus) = (value("DISPLAY")?, value("DBUS_SESSION_BUS_ADDRESS")?);
    let number: u32 = display.strip_prefix(':')?.split('.').next()?.parse().ok()?;
    displays.contains(&number).then(|| Session {
        display: format!(":{number}"),
        bus: bus.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn person(language: Option<&str>) -> Person {
        Person {
            user: "ada".into(),
            language: language.map(str::to_owned),
            in_domain: false,
            shares: vec![],
            silence_limit: Duration::ZERO,
        }
    }

    #[test]
    fn a_session_is_found_in_the_environment_of_its_processes() {
        let environ = b"HOME=/home/ada\0DISPLAY=:10.0\0DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/1000/bus\0";
        let found = session(environ, &[10]).unwrap();
        assert_eq!(found.display, ":10");
        assert_eq!(found.bus, "unix:path=/run/user/1000/bus");
        assert_eq!(session(environ, &[11]), None, "another display");
        assert_eq!(session(b"DISPLAY=:10\0", &[10]), None, "no bus");
        assert_eq!(session(b"\xff\0\0", &[10]), None);
    }

    #[test]
    fn the_person_is_told_as_themselves_and_in_their_language() {
        let session = Session {
            display: ":10".into(),
            bus: "unix:path=/run/user/1000/bus".into(),
        };
        let french = command(&person(Some("fr-CA")), &session, &Notice::EndsIn(300)).join(" ");
        assert!(french.starts_with(
            "-u ada -- env DISPLAY=:10 DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/1000/bus timeout 20 notify-send "
        ));
        assert!(french.contains("Ce bureau se ferme dans 5 minutes"));
        let english = command(&person(Some("pt-BR")), &session, &Notice::EndsIn(60)).join(" ");
        assert!(english.contains("This desktop ends in 60 seconds"));
        let stays = command(&person(None), &session, &Notice::CalledOff).join(" ");
        assert!(stays.contains("This desktop stays"));
        let absent = Notice::SharesMissing(vec!["/home/ada/Partage".into()]);
        let absent = command(&person(Some("fr")), &session, &absent).join(" ");
        assert!(absent.contains("Dossier réseau absent : /home/ada/Partage"));
    }
}
