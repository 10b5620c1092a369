//! The words: both languages are whole, nothing is unused, plurals are right.
#![allow(clippy::unwrap_used, reason = "a test")]

use fluent_bundle::FluentResource;
use mayfly_session_manager::text::Catalogue;
use mayfly_session_manager::view::Message;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn source(language: &str) -> String {
    let path = root().join(format!("session-manager/locales/{language}/mayfly.ftl"));
    std::fs::read_to_string(path).unwrap()
}

/// Message ids with the arguments that their text uses.
fn entries(language: &str) -> BTreeMap<String, BTreeSet<String>> {
    let text = source(language);
    let whole = FluentResource::try_new(text.clone());
    assert!(whole.is_ok(), "{language}: {:?}", whole.err().map(|e| e.1));
    let mut entries: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut current = String::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if let Some((id, _)) = line.split_once(" =")
            && !line.starts_with(' ')
        {
            id.clone_into(&mut current);
            assert!(
                entries.insert(current.clone(), BTreeSet::new()).is_none(),
                "{language}: {id} twice"
            );
        }
        for part in line.split('$').skip(1) {
            let name: String = part
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect();
            entries.get_mut(&current).unwrap().insert(name);
        }
    }
    entries
}

fn code(folder: &Path, into: &mut String) {
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if !["node_modules", "dist", "target", "bindings", "gen"].contains(&name.as_str()) {
                code(&path, into);
            }
        } else if [".rs", ".ts", ".svelte"].iter().any(|e| name.ends_with(e)) {
            into.push_str(&std::fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn both_languages_have_the_same_messages_with_the_same_arguments() {
    assert_eq!(entries("en"), entries("fr"));
}

#[test]
fn every_message_is_used_and_every_used_message_exists() {
    let mut all = String::new();
    for folder in ["session-manager/src", "src-tauri/src", "ui/src"] {
        code(&root().join(folder), &mut all);
    }
    let known = entries("en");
    // A whole id in quotes, or the beginning of one that is completed from a name: `stage-${name}`.
    let used = |id: &str| {
        let quoted = ["\"", "'", "`"]
            .iter()
            .any(|q| all.contains(&format!("{q}{id}{q}")));
        let completed = id
            .match_indices('-')
            .any(|(i, _)| all.contains(&format!("`{}${{", &id[..=i])));
        quoted || completed
    };
    let unused: Vec<_> = known.keys().filter(|id| !used(id)).collect();
    assert!(unused.is_empty(), "never used: {unused:?}");
    let made = all.split("Message::new(\"").skip(1);
    let unknown: Vec<_> = made
        .filter_map(|rest| rest.split('"').next())
        .filter(|id| !known.contains_key(*id))
        .collect();
    assert!(unknown.is_empty(), "not in the catalogue: {unknown:?}");
}

#[test]
fn one_second_is_singular_and_zero_is_as_each_language_wants_it() {
    let say = |language: &str, seconds| {
        let message = Message::new("cli-countdown").number("seconds", seconds);
        Catalogue::new(language).text(&message)
    };
    assert_eq!(say("en", 1), "destroyed in 1 second");
    assert_eq!(say("en", 0), "destroyed in 0 seconds");
    assert_eq!(say("en", 10), "destroyed in 10 seconds");
    assert_eq!(say("fr", 1), "détruit dans 1 seconde");
    assert_eq!(say("fr", 0), "détruit dans 0 seconde");
    assert_eq!(say("fr", 10), "détruit dans 10 secondes");
}

#[test]
fn a_desktop_is_destroyed_never_terminated() {
    for language in ["en", "fr"] {
        assert!(
            !source(language).to_lowercase().contains("terminat"),
            "{language}"
        );
    }
}
