//! The guard: a process that outlives a killed test program and clears up after it.
//!
//! It reads what to watch from a pipe. The pipe closes when the test program ends in any way; then the guard ends the process
//! groups and everything that carries a lab's folder, and removes the folders. In an orderly end nothing is left to do.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Mutex, OnceLock};

const SCRIPT: &str = r#"
groups=; folders=
without() { for word in $2; do [ "$word" = "$1" ] || printf '%s ' "$word"; done; }
while read -r verb what; do
    case $verb in
        group) groups="$groups $what" ;;
        ended) groups=$(without "$what" "$groups") ;;
        folder) folders="$folders $what" ;;
        removed) folders=$(without "$what" "$folders") ;;
    esac
done
[ -n "$groups$folders" ] || exit 0
for group in $groups; do kill -TERM -- "-$group" 2>/dev/null; done
sleep 1
for group in $groups; do kill -KILL -- "-$group" 2>/dev/null; done
for folder in $folders; do
    for process in /proc/[0-9]*; do
        if cat "$process/cmdline" "$process/environ" 2>/dev/null | grep -qF "$folder"; then
            kill -KILL "${process#/proc/}" 2>/dev/null
        fi
    done
    rm -rf "$folder"
done
"#;

static GUARD: OnceLock<Option<Mutex<ChildStdin>>> = OnceLock::new();

fn tell(verb: &str, what: &str) {
    let guard = GUARD.get_or_init(|| {
        let child = Command::new("/bin/sh")
            .args(["-c", SCRIPT])
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A Ctrl-C for the test program must not reach it.
            .process_group(0)
            .spawn();
        Some(Mutex::new(child.ok()?.stdin.take()?))
    });
    if let Some(guard) = guard
        && let Ok(mut pipe) = guard.lock()
    {
        let _ = writeln!(pipe, "{verb} {what}");
    }
}

pub(super) fn watch_group(group: i32) {
    tell("group", &group.to_string());
}

/// Called before the group's leader is reaped, so that the number cannot belong to anybody else yet.
pub(super) fn forget_group(group: i32) {
    tell("ended", &group.to_string());
}

pub(super) fn watch_folder(folder: &Path) {
    tell("folder", &folder.to_string_lossy());
}

pub(super) fn forget_folder(folder: &Path) {
    tell("removed", &folder.to_string_lossy());
}
