//! The conformance suite on the provider `qemu`, with real machines: the micro guest, whose image folder
//! `MAYFLY_MICRO_GUEST` names (`cargo xtask test` sets it).

#![allow(clippy::unwrap_used, reason = "all of it is a test")]

use async_trait::async_trait;
use mayfly_api::DesktopName;
use mayfly_orchestrator::provider::conformance::{self, World};
use mayfly_orchestrator::provider::qemu::{Qemu, QemuConfig, STEPS};
use mayfly_orchestrator::provider::{DesktopSpec, MachineState, Provider, Steps};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// A state folder and a range of addresses that no other test uses.
struct Here {
    state: PathBuf,
    prefix: u8,
    /// Removed at the end; absent in a process that is to crash.
    _folder: Option<tempfile::TempDir>,
}

impl Here {
    fn new() -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(0);
        let folder = tempfile::tempdir().unwrap();
        let place =
            std::process::id() as usize * 16 + usize::from(NEXT.fetch_add(1, Ordering::SeqCst));
        Self {
            state: folder.path().to_owned(),
            prefix: u8::try_from(80 + place % 160).unwrap(),
            _folder: Some(folder),
        }
    }

    fn qemu(&self) -> Qemu {
        let image = std::env::var_os("MAYFLY_MICRO_GUEST").expect(
            "MAYFLY_MICRO_GUEST must name the micro guest's image folder; run `cargo xtask test`, which makes it",
        );
        let config: QemuConfig =
            toml::from_str(&format!("address_prefix = \"127.{}\"", self.prefix)).unwrap();
        let config = QemuConfig {
            image: image.into(),
            ..config
        };
        Qemu::new(
            config,
            &self.state,
            env!("CARGO_BIN_EXE_mayfly-orchestrator").into(),
        )
        .unwrap()
    }
}

/// Nothing of a test outlives it, even if it fails.
impl Drop for Here {
    fn drop(&mut self) {
        // Until they are gone: one that still writes would keep the folder from being removed.
        loop {
            let left = processes(&self.state);
            if left.is_empty() {
                return;
            }
            for (pid, _) in left {
                Command::new("kill")
                    .args(["-KILL", &pid.to_string()])
                    .status()
                    .ok();
            }
        }
    }
}

/// Live processes that name the folder.
fn processes(folder: &Path) -> Vec<(u32, String)> {
    let needle = folder.as_os_str().as_bytes();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if line.windows(needle.len()).any(|part| part == needle) {
            found.push((pid, String::from_utf8_lossy(&line).replace('\0', " ")));
        }
    }
    found
}

#[async_trait]
impl World for Here {
    fn provider(&self, steps: Steps) -> Arc<dyn Provider> {
        Arc::new(self.qemu().with_steps(steps))
    }

    fn create_steps(&self) -> Vec<&'static str> {
        STEPS
            .into_iter()
            .filter(|step| step.starts_with("create"))
            .collect()
    }

    fn destroy_steps(&self) -> Vec<&'static str> {
        STEPS
            .into_iter()
            .filter(|step| step.starts_with("destroy"))
            .collect()
    }

    fn size(&self) -> (u32, u32) {
        (1, 256)
    }

    fn leftovers(&self) -> Vec<String> {
        let mut left: Vec<_> = processes(&self.state)
            .into_iter()
            .map(|(pid, line)| format!("process {pid}: {line}"))
            .collect();
        for folder in ["desktops", "run"] {
            let entries = std::fs::read_dir(self.state.join(folder))
                .into_iter()
                .flatten();
            left.extend(
                entries
                    .flatten()
                    .map(|entry| entry.path().display().to_string()),
            );
        }
        let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
        let folder = self.state.display().to_string();
        left.extend(
            sockets
                .lines()
                .filter(|line| line.contains(&folder))
                .map(str::to_owned),
        );
        // Listening (0A) on an address of ours, which /proc/net/tcp writes backwards in hex.
        let ours = format!("{:02X}7F:", self.prefix);
        left.extend(
            std::fs::read_to_string("/proc/net/tcp")
                .unwrap()
                .lines()
                .filter(|line| {
                    let fields: Vec<_> = line.split_whitespace().collect();
                    fields.get(1).is_some_and(|local| local.contains(&ours))
                        && fields.get(3) == Some(&"0A")
                })
                .map(str::to_owned),
        );
        left
    }
}

#[tokio::test]
async fn a_desktop_lives_and_dies() {
    conformance::a_desktop_lives_and_dies(&Here::new()).await;
}

#[tokio::test]
async fn nothing_is_destroyed_without_complaint() {
    conformance::nothing_is_destroyed_without_complaint(&Here::new()).await;
}

#[tokio::test]
async fn a_crash_between_any_two_steps_leaves_nothing() {
    conformance::a_crash_between_any_two_steps_leaves_nothing(&Here::new()).await;
}

#[tokio::test]
async fn many_at_once() {
    conformance::many_at_once(&Here::new()).await;
}

#[tokio::test]
async fn a_lifetime_ends_by_itself() {
    conformance::a_lifetime_ends_by_itself(&Here::new()).await;
}

fn spec() -> DesktopSpec {
    DesktopSpec {
        name: DesktopName::from_number(40).unwrap(),
        session: mayfly_api::SessionId::new(),
        in_domain: false,
        playbook: None,
        cpus: 1,
        memory_mib: 256,
        lifetime: Duration::from_secs(600),
    }
}

/// The part of an orchestrator that is killed: does nothing unless the next test runs it.
#[tokio::test]
async fn process_that_aborts_at_a_step() {
    let (Ok(state), Ok(step)) = (
        std::env::var("MAYFLY_CRASH_STATE"),
        std::env::var("MAYFLY_CRASH_STEP"),
    ) else {
        return;
    };
    let here = Here {
        state: state.into(),
        prefix: std::env::var("MAYFLY_CRASH_PREFIX")
            .unwrap()
            .parse()
            .unwrap(),
        _folder: None,
    };
    let provider = here.provider(Arc::new(move |reached| {
        if reached == step {
            std::process::abort();
        }
        Ok(())
    }));
    provider.create(&spec()).await.unwrap();
    provider.destroy(spec().name).await.unwrap();
}

#[tokio::test]
async fn an_orchestrator_that_dies_at_any_step_leaves_nothing() {
    let here = Here::new();
    for step in STEPS {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "process_that_aborts_at_a_step"])
            .env("MAYFLY_CRASH_STATE", &here.state)
            .env("MAYFLY_CRASH_STEP", step)
            .env("MAYFLY_CRASH_PREFIX", here.prefix.to_string())
            .output()
            .unwrap()
            .status;
        assert_eq!(status.signal(), Some(6), "it dies at {step:?}");
        conformance::recover(&here, spec().name, step).await;
    }
}

#[tokio::test]
async fn a_machine_that_is_killed_is_dead_with_its_last_words_until_it_is_destroyed() {
    let here = Here::new();
    let qemu = here.qemu();
    for victim in ["-accel", " uplink ", "supervise"] {
        qemu.create(&spec()).await.unwrap();
        let (pid, _) = processes(&here.state)
            .into_iter()
            // A supervisor's and an uplink's command line hold the machine's, so the shortest match is meant.
            .filter(|(_, line)| line.contains(victim))
            .min_by_key(|(_, line)| line.len())
            .unwrap();
        kill(pid);
        let begin = Instant::now();
        let reason = loop {
            match qemu.state(spec().name).await.unwrap() {
                MachineState::Dead { reason } => break reason,
                state => assert!(
                    begin.elapsed() < Duration::from_secs(20),
                    "{victim}: {state:?}"
                ),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        assert!(!reason.is_empty());
        qemu.destroy(spec().name).await.unwrap();
        assert_eq!(here.leftovers(), Vec::<String>::new(), "{victim}");
    }
}

/// The micro guest has no journal: its shell says so, and that comes back.
#[tokio::test]
async fn a_journal_is_asked_for_in_the_machine_and_its_console_is_told_whether_it_answers_or_not() {
    let here = Here::new();
    let qemu = here.qemu();
    qemu.create(&spec()).await.unwrap();
    let begin = Instant::now();
    loop {
        let words = qemu.last_words(spec().name).await;
        let text = |title| {
            let section = words.iter().find(|section| section.title == title);
            &*section.unwrap().text
        };
        let journal = text("journal");
        if journal.contains("journalctl: not found") {
            assert!(!text("console").is_empty(), "{words:?}");
            break;
        }
        assert!(journal.starts_with("It cannot be read: "), "{journal}");
        assert!(begin.elapsed() < Duration::from_secs(180), "{journal}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    qemu.destroy(spec().name).await.unwrap();
    assert_eq!(here.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn a_passt_that_is_killed_is_replaced_a_few_times_before_the_machine_ends() {
    let here = Here::new();
    let qemu = here.qemu();
    qemu.create(&spec()).await.unwrap();
    let mut killed = Vec::new();
    let begin = Instant::now();
    loop {
        match qemu.state(spec().name).await.unwrap() {
            MachineState::Dead { .. } => break,
            state => assert!(
                begin.elapsed() < Duration::from_secs(60),
                "{state:?} after {killed:?}"
            ),
        }
        let passt = processes(&here.state)
            .into_iter()
            .find(|(pid, line)| line.contains("/passt --foreground") && !killed.contains(pid));
        if let Some((pid, _)) = passt {
            kill(pid);
            killed.push(pid);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(killed.len(), 6, "the first and five more");
    qemu.destroy(spec().name).await.unwrap();
    assert_eq!(here.leftovers(), Vec::<String>::new());
}

fn kill(pid: u32) {
    let killed = Command::new("kill")
        .args(["-KILL", &pid.to_string()])
        .status();
    assert!(killed.unwrap().success(), "{pid} could not be killed");
}
