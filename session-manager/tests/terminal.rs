//! The program `mayfly`, run as a script runs it: without a terminal.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test")]

mod world;

use mayfly_api::SessionPhase;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::process::{Output, Stdio};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use world::{FakeClient, Making, Orchestrator, PATIENCE};

struct Desk {
    dir: tempfile::TempDir,
    client: FakeClient,
    orchestrator: Orchestrator,
}

impl Drop for Desk {
    fn drop(&mut self) {
        world::remove(self.dir.path());
    }
}

impl Desk {
    async fn new(making: Making) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            client: FakeClient::new(),
            orchestrator: Orchestrator::start(making).await,
        }
    }

    fn mayfly(&self, args: &[&str]) -> Child {
        self.command(args).spawn().unwrap()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mayfly"));
        command
            .args(args)
            .env("MAYFLY_CONFIG_DIR", self.dir.path().join("config"))
            .env("MAYFLY_DATA_DIR", self.dir.path().join("data"))
            .env("LC_ALL", "en_GB.UTF-8")
            // No keyring of whoever runs the tests.
            .env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    fn connect(&self, more: &[&str]) -> Child {
        let client = self.client.path().display().to_string();
        let address = &self.orchestrator.address;
        let mut args = vec!["connect", "--orchestrator", address, "--client", &client];
        args.extend(more);
        self.mayfly(&args)
    }
}

async fn end(child: Child) -> (i32, String, String) {
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await;
    let Output {
        status,
        stdout,
        stderr,
    } = output.expect("it ends").unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap_or(-1), text(stdout), text(stderr))
}

fn signal(child: &Child, signal: Signal) {
    let pid = i32::try_from(child.id().unwrap()).unwrap();
    kill(Pid::from_raw(pid), signal).unwrap();
}

#[tokio::test]
async fn connect_opens_waits_counts_down_and_destroys() {
    let desk = Desk::new(Making::Ready).await;
    let child = desk.connect(&["--user", "ada"]);
    desk.client.runs().await;
    desk.client.ends(0);
    let (code, _, words) = end(child).await;
    assert_eq!(code, 0, "{words}");
    for line in [
        "desktop-0000007 is open",
        "You closed your desktop",
        "Your desktop was destroyed.",
    ] {
        assert!(words.contains(line), "{line} not in:\n{words}");
    }
    assert_eq!(desk.orchestrator.destroys(), 1);
    let mut log = String::new();
    for file in std::fs::read_dir(desk.dir.path().join("data/log")).unwrap() {
        log += &std::fs::read_to_string(file.unwrap().path()).unwrap();
    }
    assert!(log.contains("RDP client ended: closed"), "{log}");
    assert!(!log.contains("secret-of-"), "{log}");
}

#[tokio::test]
async fn ctrl_c_destroys_while_preparing_and_in_use() {
    for making in [Making::Stuck, Making::Ready] {
        let desk = Desk::new(making).await;
        let child = desk.connect(&["--countdown", "never"]);
        if making == Making::Ready {
            desk.client.runs().await;
        } else {
            desk.orchestrator
                .until("it is asked", |made| made.len() == 1)
                .await;
        }
        signal(&child, Signal::SIGINT);
        let (code, _, words) = end(child).await;
        assert_eq!(code, 130, "{making:?}: {words}");
        assert_eq!(desk.orchestrator.destroys(), 1, "{making:?}: {words}");
    }
}

#[tokio::test]
async fn what_a_step_is_at_is_told_with_it() {
    let desk = Desk::new(Making::Stuck).await;
    let mut child = desk.connect(&[]);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let told = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if line == "Starting the machine · Waiting for its network address" {
                return;
            }
        }
        panic!("it ended");
    };
    let in_time = tokio::time::timeout(PATIENCE, told).await;
    assert!(in_time.is_ok(), "it was not told");
    signal(&child, Signal::SIGINT);
    let last = async { while lines.next_line().await.unwrap().is_some() {} };
    last.await;
    assert_eq!(child.wait().await.unwrap().code(), Some(130));
}

#[tokio::test]
async fn keys_keep_and_destroy_and_the_terminal_is_given_back() {
    use nix::sys::termios::{LocalFlags, tcgetattr};
    use std::io::{Read, Write};
    let desk = Desk::new(Making::Ready).await;
    let pty = nix::pty::openpty(None, None).unwrap();
    let mut person = std::fs::File::from(pty.master);
    let slave = || Stdio::from(pty.slave.try_clone().unwrap());
    let mut command = desk.command(&["connect", "--countdown", "never"]);
    command.stdin(slave()).stderr(slave()).stdout(slave());
    command.args(["--client", &desk.client.path().display().to_string()]);
    command.args(["--orchestrator", &desk.orchestrator.address]);
    let mut child = command.spawn().unwrap();
    let mut screen = person.try_clone().unwrap();
    // A terminal that nobody reads from blocks who writes to it.
    std::thread::spawn(move || while screen.read(&mut [0; 1024]).is_ok_and(|n| n > 0) {});
    desk.client.runs().await;
    desk.client.ends(0);
    world::until("the countdown holds it", || {
        desk.orchestrator.keeps() == [120]
    })
    .await;
    person.write_all(b"r").unwrap();
    desk.client.runs().await;
    world::until("the hold is given up", || {
        desk.orchestrator
            .move_on(|s| s.phase = SessionPhase::Connected);
        desk.orchestrator.keeps() == [120, 0]
    })
    .await;
    desk.client.ends(0);
    world::until("it counts down again", || {
        desk.orchestrator.keeps() == [120, 0, 120]
    })
    .await;
    person.write_all(b"d").unwrap();
    let ended = tokio::time::timeout(PATIENCE, child.wait()).await;
    assert_eq!(ended.expect("it ends").unwrap().code(), Some(0));
    assert_eq!(desk.orchestrator.destroys(), 1);
    let flags = tcgetattr(&pty.slave).unwrap().local_flags;
    assert!(flags.contains(LocalFlags::ICANON | LocalFlags::ECHO));
}

#[tokio::test]
async fn sigterm_and_a_hangup_are_quit() {
    for sign in [Signal::SIGTERM, Signal::SIGHUP] {
        let desk = Desk::new(Making::Ready).await;
        let child = desk.connect(&[]);
        desk.client.runs().await;
        signal(&child, sign);
        let (code, _, words) = end(child).await;
        assert_eq!(code, 130, "{sign}: {words}");
        assert_eq!(desk.orchestrator.destroys(), 1, "{sign}: {words}");
    }
}

#[tokio::test]
async fn the_launchers_death_leaves_the_client_alone() {
    let desk = Desk::new(Making::Ready).await;
    let mut child = desk.connect(&[]);
    let pid = desk.client.runs().await;
    child.kill().await.unwrap();
    assert!(world::alive(pid));
    assert_eq!(desk.orchestrator.destroys(), 0);
}

#[tokio::test]
async fn what_is_missing_is_said_with_what_to_do() {
    let desk = Desk::new(Making::Ready).await;
    let nobody = desk.mayfly(&[
        "connect",
        "--orchestrator",
        "http://127.0.0.1:9",
        "--client",
        &desk.client.path().display().to_string(),
    ]);
    let (code, _, words) = end(nobody).await;
    assert_eq!(code, 1);
    assert!(
        words.contains("Nothing answers at http://127.0.0.1:9"),
        "{words}"
    );

    let address = &desk.orchestrator.address;
    let child = desk.mayfly(&[
        "connect",
        "--orchestrator",
        address,
        "--client",
        "/nonexistent",
    ]);
    let (code, _, words) = end(child).await;
    assert_eq!(code, 1);
    assert!(words.contains("/nonexistent"), "{words}");
    assert!(
        desk.orchestrator.made().is_empty(),
        "it was said before anything was asked for"
    );

    let config = desk.dir.path().join("config");
    std::fs::create_dir_all(&config).unwrap();
    std::fs::write(config.join("settings.toml"), "colour = 'blue'").unwrap();
    let (code, _, words) = end(desk.connect(&[])).await;
    assert_eq!(code, 2);
    assert!(
        words.contains("colour") && words.contains("settings.toml"),
        "{words}"
    );
}

#[tokio::test]
async fn list_destroy_and_doctor_speak_json() {
    let desk = Desk::new(Making::Ready).await;
    let (code, out, _) = end(desk.mayfly(&["list", "--json"])).await;
    assert_eq!((code, out.trim()), (0, "[]"));
    let (code, _, words) =
        end(desk.mayfly(&["destroy", &mayfly_api::SessionId::new().to_string()])).await;
    assert_eq!(code, 2);
    assert!(words.contains("mayfly list"), "{words}");
    let address = &desk.orchestrator.address;
    let (_, out, _) = end(desk.mayfly(&["doctor", "--json", "--orchestrator", address])).await;
    let checks: serde_json::Value = serde_json::from_str(&out).unwrap();
    let verdict = |name| {
        let checks = checks.as_array().unwrap();
        let check = checks.iter().find(|c| c["name"] == name).unwrap();
        check["verdict"].as_str().unwrap().to_owned()
    };
    assert_eq!(verdict("orchestrator"), "ok");
    assert_eq!(verdict("settings"), "ok");
    assert_eq!(verdict("keyring"), "warning");
}
