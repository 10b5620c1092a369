//! The commands of `mayfly`.

pub(crate) mod connect;
pub(crate) mod destroy;
pub(crate) mod doctor;
pub(crate) mod list;
mod mine;
mod terminal;

/// All went well; with `connect`: the desktop is destroyed.
pub(crate) const DONE: i32 = 0;
/// Something failed: no desktop, no client, a check.
pub(crate) const FAILED: i32 = 1;
/// Arguments or settings cannot be used.
pub(crate) const USAGE: i32 = 2;
/// A session may be left; the orchestrator ends it by its own rules.
pub(crate) const LEFT_BEHIND: i32 = 4;
/// Ctrl-C: what was made is destroyed.
pub(crate) const INTERRUPTED: i32 = 130;

pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0    done; with `connect`: the desktop is destroyed
  1    something failed, and was said
  2    arguments or settings cannot be used
  4    a session may be left; the orchestrator ends it by its own rules
  130  Ctrl-C; what was made is destroyed";

/// Writes a line of the result. A reader that has gone away (`mayfly list | head`) is no failure.
pub(crate) fn print(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{line}");
}
