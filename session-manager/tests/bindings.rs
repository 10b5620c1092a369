//! The TypeScript types of the windows are generated from `view.rs` and committed.
#![allow(clippy::unwrap_used, reason = "a test")]

use mayfly_session_manager::view::{MenuEntry, Settings, TrayIcon, View};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use ts_rs::{Config, TS};

fn files(dir: &Path) -> BTreeMap<PathBuf, String> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return BTreeMap::new();
    };
    entries
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            let name = path.file_name().unwrap().into();
            (name, std::fs::read_to_string(&path).unwrap())
        })
        .collect()
}

fn generate(into: &Path) {
    let config = Config::new().with_out_dir(into);
    View::export_all(&config).unwrap();
    Settings::export_all(&config).unwrap();
    MenuEntry::export_all(&config).unwrap();
    TrayIcon::export_all(&config).unwrap();
}

/// With `MAYFLY_UPDATE=1` the committed files are written anew instead.
#[test]
fn the_committed_bindings_are_the_generated_ones() {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ui/src/bindings");
    if std::env::var_os("MAYFLY_UPDATE").is_some() {
        let _ = std::fs::remove_dir_all(&committed);
        generate(&committed);
    }
    let fresh = tempfile::tempdir().unwrap();
    generate(fresh.path());
    assert!(
        files(&committed) == files(fresh.path()),
        "ui/src/bindings is out of date; run MAYFLY_UPDATE=1 cargo test -p mayfly-session-manager --test bindings"
    );
}
