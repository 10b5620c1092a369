//! The supervisor: what it holds when everybody else dies.

#![allow(clippy::unwrap_used, reason = "all of it is a test")]

use mayfly_orchestrator::process::{self, Process};
use mayfly_orchestrator::supervise::{Cause, Exit, Program, Status, Supervised, Terms};
use rustix::process::Signal;
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const TERMS: Terms = Terms {
    deadline: Duration::from_secs(60),
    patience: Duration::from_secs(1),
    max_output: 1 << 20,
};

fn plain(command: &[OsString]) -> Program<'_> {
    Program {
        command,
        environment: None,
    }
}

/// A record folder; what runs on its behalf ends with it, even if the test fails.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn supervised(&self) -> Supervised<'_> {
        Supervised::at(self.path())
    }

    /// Starts a shell script that is found by the folder in its command line.
    fn start(&self, terms: Terms, script: &str) -> tokio::process::Child {
        let command = ["sh", "-c", script, self.path().to_str().unwrap()].map(OsString::from);
        self.supervised()
            .start(
                Path::new(env!("CARGO_BIN_EXE_mayfly-orchestrator")),
                terms,
                plain(&command),
            )
            .unwrap()
    }

    fn output(&self) -> String {
        std::fs::read_to_string(self.path().join("output.log")).unwrap_or_default()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Until they are gone: one that still writes would keep the folder from being removed.
        loop {
            let left = process::naming(self.path()).unwrap();
            if left.is_empty() {
                return;
            }
            for process in left {
                process.signal(Signal::KILL).ok();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

async fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            begin.elapsed() < Duration::from_secs(30),
            "not seen: {what}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn exit(folder: &Folder) -> Exit {
    wait_for("an exit record", || match folder.supervised().status() {
        Status::Exited(exit) => Some(exit),
        _ => None,
    })
    .await
}

/// The orchestrator that is killed: does nothing unless the next test runs it.
#[tokio::test]
async fn an_orchestrator_that_starts_a_child() {
    let Ok(folder) = std::env::var("MAYFLY_SUPERVISE_FOLDER") else {
        return;
    };
    let script =
        "n=0; until [ -e \"$0/enough\" ]; do n=$((n+1)); echo line $n; done; echo last; exit 7";
    let command = ["sh", "-c", script, &folder].map(OsString::from);
    Supervised::at(Path::new(&folder))
        .start(
            Path::new(env!("CARGO_BIN_EXE_mayfly-orchestrator")),
            Terms {
                max_output: 1 << 30,
                ..TERMS
            },
            plain(&command),
        )
        .unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn an_orchestrator_that_is_killed_stops_nothing_and_loses_no_line() {
    let folder = Folder::new();
    let mut orchestrator = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "an_orchestrator_that_starts_a_child"])
        .env("MAYFLY_SUPERVISE_FOLDER", folder.path())
        .spawn()
        .unwrap();
    wait_for("output", || {
        folder.output().contains("line 100\n").then_some(())
    })
    .await;
    orchestrator.kill().unwrap();
    assert_eq!(orchestrator.wait().unwrap().signal(), Some(9));
    let before = folder.output().len();
    wait_for("more output", || {
        (folder.output().len() > before + 1000).then_some(())
    })
    .await;
    assert_eq!(folder.supervised().status(), Status::Running);
    std::fs::write(folder.path().join("enough"), "").unwrap();
    let exit = exit(&folder).await;
    assert_eq!((exit.cause, exit.code), (Cause::Itself, Some(7)));
    let output = folder.output();
    let (lines, last) = output.trim_end().rsplit_once('\n').unwrap();
    assert_eq!(last, "last");
    for (index, line) in lines.lines().enumerate() {
        assert_eq!(line, format!("line {}", index + 1));
    }
}

#[tokio::test]
async fn a_child_that_does_not_heed_its_deadline_is_killed_with_its_children() {
    let folder = Folder::new();
    let terms = Terms {
        deadline: Duration::from_secs(1),
        ..TERMS
    };
    let script = "trap 'echo asked' INT; sh -c 'trap \"\" INT; while :; do sleep 1; done' $0 & while :; do sleep 0.05; done";
    let _child = folder.start(terms, script);
    let exit = exit(&folder).await;
    assert_eq!(
        (exit.cause, exit.signal.as_deref()),
        (Cause::Deadline, Some("SIGKILL"))
    );
    assert_eq!(folder.output(), "asked\n", "asked once, then killed");
    wait_for("an empty group", || {
        process::naming(folder.path())
            .unwrap()
            .is_empty()
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_child_is_asked_to_stop_once_and_may_finish() {
    let folder = Folder::new();
    let script = "trap 'echo asked; sleep 0.3; echo finished; exit 0' INT; echo up; while :; do sleep 0.05; done";
    let _child = folder.start(
        Terms {
            patience: Duration::from_secs(20),
            ..TERMS
        },
        script,
    );
    wait_for("the child", || folder.output().contains("up").then_some(())).await;
    folder.supervised().stop().unwrap();
    folder.supervised().stop().unwrap();
    let exit = exit(&folder).await;
    assert_eq!((exit.cause, exit.code), (Cause::Stopped, Some(0)));
    assert_eq!(folder.output(), "up\nasked\nfinished\n");
}

#[tokio::test]
async fn output_keeps_the_newest_within_its_bound() {
    let folder = Folder::new();
    let _child = folder.start(
        TERMS,
        "yes 0123456789012345678901234567890 | head -c 9000000; echo the end",
    );
    assert_eq!(exit(&folder).await.code, Some(0));
    let size = |file: &str| std::fs::metadata(folder.path().join(file)).unwrap().len();
    let kept = size("output.log") + size("output.old.log");
    assert!(
        (TERMS.max_output / 2..TERMS.max_output + (256 << 10)).contains(&kept),
        "{kept}"
    );
    assert!(folder.supervised().last_words(100).ends_with("the end"));
}

#[tokio::test]
async fn without_a_record_there_is_no_child() {
    let folder = Folder::new();
    let mark = folder.path().join("mark");
    let status = Command::new(env!("CARGO_BIN_EXE_mayfly-orchestrator"))
        .arg("supervise")
        .arg("--record")
        .arg(folder.path().join("missing"))
        .args(["--deadline-s", "60", "--", "touch"])
        .arg(&mark)
        .output()
        .unwrap();
    assert!(!status.status.success());
    assert!(String::from_utf8_lossy(&status.stderr).contains("record.json"));
    assert!(!mark.exists());
}

#[tokio::test]
async fn a_child_that_cannot_be_started_says_so() {
    let folder = Folder::new();
    let command = [OsString::from("/nowhere/terraform")];
    let mut supervisor = folder
        .supervised()
        .start(
            Path::new(env!("CARGO_BIN_EXE_mayfly-orchestrator")),
            TERMS,
            plain(&command),
        )
        .unwrap();
    supervisor.wait().await.unwrap();
    assert_eq!(folder.supervised().status(), Status::Lost);
    let words = folder.supervised().last_words(1000);
    assert!(
        words.contains("/nowhere/terraform cannot be started"),
        "{words}"
    );
}

#[tokio::test]
async fn a_pid_that_another_process_has_now_is_not_taken_for_ours() {
    let folder = Folder::new();
    let _child = folder.start(TERMS, "while :; do sleep 0.1; done");
    wait_for("the child", || {
        (folder.supervised().status() == Status::Running).then_some(())
    })
    .await;
    let mut stranger = Command::new("sleep").arg("60").spawn().unwrap();
    let stranger_process = Process::of(stranger.id().try_into().unwrap()).unwrap();
    // As if the supervisor had ended and its number been given to the stranger.
    let path = folder.path().join("record.json");
    let mut record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    record["supervisor"]["pid"] = stranger_process.pid.into();
    record["supervisor"]["start_time"] = (stranger_process.start_time - 1).into();
    std::fs::write(&path, record.to_string()).unwrap();
    assert_eq!(folder.supervised().status(), Status::Lost);
    folder.supervised().stop().unwrap();
    let is_alive = stranger_process.is_alive();
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    assert!(is_alive);
    // And a record of another boot means nothing, whatever runs.
    record["supervisor"]["start_time"] = stranger_process.start_time.into();
    record["boot_id"] = "another".into();
    std::fs::write(&path, record.to_string()).unwrap();
    assert_eq!(folder.supervised().status(), Status::Lost);
}
