//! Whether machines run on KVM or under software emulation.
//!
//! `/dev/kvm` may open, answer every ioctl, and still not run a guest (nested virtualisation that is half there).
//! So `auto` does not ask it: it boots the image's own kernel on it, without a root file system, and believes only
//! the kernel's own complaint about that. A few instructions of real mode would not do: on such a host they run.
//!
//! The verdict is kept on disk for this boot of the host, this QEMU, this kernel and this device.

use crate::process::boot_id;
use serde::{Deserialize, Serialize};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

/// A kernel on working KVM is there in well under a second.
const TRIAL: Duration = Duration::from_secs(4);
/// The kernel's last words when it has no root file system.
const PROOF: &str = "Kernel panic - not syncing: VFS";
/// QEMU stops the guest but not itself after this.
const INTERNAL_ERROR: &str = "KVM internal error";
const DEVICE: &str = "/dev/kvm";

/// What the administrator wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// KVM if a trial boot on it works, else software emulation.
    #[default]
    Auto,
    /// KVM, or no machine.
    Kvm,
    /// Software emulation.
    Tcg,
}

/// Whether KVM runs guests here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Kvm {
    /// A kernel ran on it.
    Works,
    /// It cannot be used; why, and what to do if something can be done.
    Broken(String),
}

/// A verdict with everything it depends on.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    boot_id: String,
    qemu: Identity,
    kernel: Identity,
    device: Identity,
    verdict: Kvm,
}

/// A file that changes when it is replaced, written, or gets other permissions.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    path: PathBuf,
    inode: u64,
    mode: u32,
    modified: i64,
}

impl Identity {
    fn of(path: &Path) -> Option<Self> {
        let found = std::fs::metadata(path).ok()?;
        Some(Self {
            path: path.to_owned(),
            inode: found.ino(),
            mode: found.mode(),
            // A device's times change with its use.
            modified: if found.is_file() { found.mtime() } else { 0 },
        })
    }
}

/// Whether KVM runs guests here; a trial boot of at most [`TRIAL`] when nobody has looked yet.
pub(super) async fn kvm(qemu: &Path, kernel: &Path, memory_file: &Path) -> Kvm {
    if let Err(error) = std::fs::File::options().read(true).write(true).open(DEVICE) {
        return Kvm::Broken(match error.kind() {
            std::io::ErrorKind::NotFound => format!(
                "{DEVICE} is missing: virtualisation is off in the firmware, or this machine is itself virtual"
            ),
            std::io::ErrorKind::PermissionDenied => format!(
                "{DEVICE} may not be opened; `sudo usermod -aG kvm $USER`, then log in again"
            ),
            _ => format!("{DEVICE} cannot be opened: {error}"),
        });
    }
    let (Some(qemu_file), Some(kernel_file), Some(device)) = (
        Identity::of(qemu),
        Identity::of(kernel),
        Identity::of(Path::new(DEVICE)),
    ) else {
        return Kvm::Broken("QEMU or the image's kernel cannot be read".to_owned());
    };
    let mut now = Remembered {
        boot_id: boot_id(),
        qemu: qemu_file,
        kernel: kernel_file,
        device,
        verdict: Kvm::Works,
    };
    let remembered = std::fs::read(memory_file)
        .ok()
        .and_then(|text| serde_json::from_slice::<Remembered>(&text).ok());
    if let Some(remembered) = remembered {
        now.verdict = remembered.verdict.clone();
        if now == remembered {
            return now.verdict;
        }
    }
    now.verdict = trial(qemu, kernel).await;
    let remember = serde_json::to_vec(&now).map(|text| std::fs::write(memory_file, text));
    if !matches!(remember, Ok(Ok(()))) {
        tracing::warn!(file = %memory_file.display(), "the verdict on KVM cannot be remembered");
    }
    now.verdict
}

/// Boots `kernel` on KVM.
async fn trial(qemu: &Path, kernel: &Path) -> Kvm {
    let mut command = Command::new(qemu);
    command
        .args(
            "-accel kvm -machine q35 -cpu max -m 256 -nodefaults -no-user-config -display none"
                .split(' '),
        )
        .args("-no-reboot -serial stdio -append".split(' '))
        .arg("console=ttyS0 panic=-1")
        .arg("-kernel")
        .arg(kernel)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            return Kvm::Broken(format!("{} cannot be started: {error}", qemu.display()));
        }
    };
    let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return Kvm::Broken("QEMU has no output".to_owned());
    };
    let mut console = String::new();
    let mut complaints = String::new();
    let watch = async {
        tokio::select! {
            true = until(stdout, &mut console, PROOF) => {}
            true = until(stderr, &mut complaints, INTERNAL_ERROR) => {}
            // Both have ended, so it has.
            else => {}
        }
    };
    let in_time = tokio::time::timeout(TRIAL, watch).await.is_ok();
    child.start_kill().ok();
    // One that cannot even be killed is left to the runtime.
    tokio::time::timeout(Duration::from_secs(1), child.wait())
        .await
        .ok();
    if console.contains(PROOF) {
        return Kvm::Works;
    }
    let words = complaints.lines().rfind(|line| !line.trim().is_empty());
    Kvm::Broken(match (words, in_time) {
        (Some(words), _) => format!("a trial boot on KVM failed: {}", words.trim()),
        (None, false) => format!("a trial boot on KVM hung for {} s", TRIAL.as_secs()),
        (None, true) => "a trial boot on KVM ended without running the kernel".to_owned(),
    })
}

/// Reads until `mark` was seen (true) or the stream ends (false).
async fn until(
    mut stream: impl tokio::io::AsyncRead + Unpin,
    seen: &mut String,
    mark: &str,
) -> bool {
    let mut buffer = [0; 4096];
    while !seen.contains(mark) {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return false,
            Ok(length) => seen.push_str(&String::from_utf8_lossy(&buffer[..length])),
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A QEMU that is a shell script.
    async fn trial_with(script: &str) -> Kvm {
        let folder = tempfile::tempdir().unwrap();
        let qemu = folder.path().join("qemu");
        // Written by a child: a file that this process holds open for writing cannot be run, and another test's
        // fork may hold it for us.
        let text = format!("#!/bin/sh\n{script}\n");
        let written = Command::new("sh")
            .args(["-c", "printf %s \"$1\" > \"$2\"", "sh", &text])
            .arg(&qemu)
            .status()
            .await
            .unwrap();
        assert!(written.success());
        std::fs::set_permissions(&qemu, PermissionsExt::from_mode(0o755)).unwrap();
        trial(&qemu, Path::new("/kernel")).await
    }

    fn reason(verdict: Kvm) -> String {
        match verdict {
            Kvm::Broken(reason) => reason,
            Kvm::Works => panic!("it must not be believed"),
        }
    }

    #[tokio::test]
    async fn a_kernel_that_complains_about_its_root_is_believed() {
        let script = format!("echo 'Linux version 6'; echo '[ 0.5] {PROOF}: x'; exec sleep 60");
        assert_eq!(trial_with(&script).await, Kvm::Works);
    }

    #[tokio::test]
    async fn a_qemu_that_hangs_is_not() {
        let begin = std::time::Instant::now();
        assert!(reason(trial_with("echo 'Linux version 6'; exec sleep 60").await).contains("hung"));
        assert!(begin.elapsed() < TRIAL + Duration::from_secs(3));
    }

    #[tokio::test]
    async fn a_qemu_that_exits_is_not_whatever_its_code() {
        assert!(reason(trial_with("exit 0").await).contains("without running"));
        let abort = trial_with("echo 'failed to set MSR 0x10a' >&2; kill -ABRT $$").await;
        assert!(reason(abort).contains("MSR 0x10a"));
    }

    #[tokio::test]
    async fn a_qemu_that_reports_an_internal_error_is_not() {
        let begin = std::time::Instant::now();
        let stopped = format!("echo '{INTERNAL_ERROR}. Suberror: 1' >&2; exec sleep 60");
        assert!(reason(trial_with(&stopped).await).contains("Suberror"));
        assert!(begin.elapsed() < TRIAL, "noticed at once");
    }

    #[tokio::test]
    async fn a_missing_qemu_is_not() {
        let verdict = trial(Path::new("/nowhere/qemu"), Path::new("/kernel")).await;
        assert!(reason(verdict).contains("cannot be started"));
    }
}
