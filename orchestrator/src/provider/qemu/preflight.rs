//! Can desktops be made on this host? Each line says what was found and, unless all is well, what to do.
//! Cheap: nothing runs but QEMU's `--version`, once, and the trial boot, once for each boot of the host.

use super::super::{Check, CheckStatus};
use super::image::Image;
use super::machine::Processor;
use super::{Qemu, uplink};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use tokio::process::Command;

/// A desktop's own disk grows to a few hundred MiB in ordinary use.
const DISK_MIB: u64 = 2048;

pub(super) async fn checks(qemu: &Qemu) -> Vec<Check> {
    let config = &qemu.config;
    let mut checks = Vec::new();
    let mut say = |name: &str, found: Result<(CheckStatus, String), String>| {
        let (status, detail) = found.unwrap_or_else(|detail| (CheckStatus::Error, detail));
        checks.push(Check {
            name: name.to_owned(),
            status,
            detail,
        });
    };

    let program = which::which(&config.binary)
        .map_err(|_| missing(&config.binary, "qemu-system-x86", "provider.qemu.binary"));
    say(
        "QEMU",
        match &program {
            Ok(program) => version(qemu, program).await.map(well),
            Err(missing) => Err(missing.clone()),
        },
    );
    say(
        "qemu-img",
        which::which(&config.qemu_img)
            .map(|path| well(path.display().to_string()))
            .map_err(|_| missing(&config.qemu_img, "qemu-utils", "provider.qemu.qemu_img")),
    );
    let image = Image::open(&config.image);
    say(
        "image",
        match &image {
            Ok(image) => Ok(well(format!(
                "{} in {}",
                image.name,
                config.image.display()
            ))),
            Err(error) => Err(error.to_string()),
        },
    );
    let mut needed_mib = image.as_ref().map_or(0, |image| image.memory_mib);
    if let (Ok(program), Ok(image)) = (&program, &image) {
        let (processor, words) = qemu.processor(program, &image.kernel).await;
        if let Ok(processor) = &processor {
            needed_mib += processor.overhead_mib();
        }
        say(
            "acceleration",
            processor.map(|processor| match processor {
                Processor::Kvm => (CheckStatus::Ok, words),
                Processor::Tcg => (CheckStatus::Warning, words),
            }),
        );
    }
    say("room", room(&qemu.state, needed_mib).map(well));
    say("network", Ok(network(&config.passt)));
    say(
        "addresses",
        addresses(config.address_prefix.0, config.rdp_port).map(well),
    );
    if nix::unistd::geteuid().is_root() {
        say(
            "user",
            Ok((
                CheckStatus::Warning,
                "the orchestrator runs as root, and so do the machines; any ordinary user will do"
                    .to_owned(),
            )),
        );
    }
    checks
}

fn well(detail: String) -> (CheckStatus, String) {
    (CheckStatus::Ok, detail)
}

fn missing(program: &Path, package: &str, setting: &str) -> String {
    format!(
        "{} was not found; install it (`sudo apt install {package}`) or set {setting}",
        program.display()
    )
}

async fn version(qemu: &Qemu, program: &Path) -> Result<String, String> {
    let ask = || async {
        let output = Command::new(program)
            .arg("--version")
            .kill_on_drop(true)
            .output();
        let fail = |why: String| format!("{} --version: {why}", program.display());
        let output = tokio::time::timeout(std::time::Duration::from_secs(5), output)
            .await
            .map_err(|_| fail("it hangs".to_owned()))?
            .map_err(|error| fail(error.to_string()))?;
        match String::from_utf8_lossy(&output.stdout).lines().next() {
            Some(line) if output.status.success() => Ok(line.to_owned()),
            _ => Err(fail(
                String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            )),
        }
    };
    qemu.version.get_or_try_init(ask).await.cloned()
}

/// Whether disk and memory have room for one more machine that takes `memory_mib` of the host.
pub(super) fn room(state: &Path, memory_mib: u32) -> Result<String, String> {
    let disk = nix::sys::statvfs::statvfs(state)
        .map(|found| found.blocks_available() * found.fragment_size() / (1 << 20))
        .map_err(|error| format!("{} cannot be asked for its space: {error}", state.display()))?;
    if disk < DISK_MIB {
        return Err(format!(
            "{} has {disk} MiB left, and a desktop may need {DISK_MIB}; free some space or move state_dir",
            state.display()
        ));
    }
    let memory = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| available_mib(&text))
        .ok_or("/proc/meminfo cannot be read")?;
    if memory < u64::from(memory_mib) {
        return Err(format!(
            "{memory} MiB of memory are available, and one more desktop takes {memory_mib}; end others or give \
             the template less"
        ));
    }
    Ok(format!("{disk} MiB of disk, {memory} MiB of memory"))
}

fn available_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

fn network(passt: &Path) -> (CheckStatus, String) {
    let Ok(path) = which::which(passt) else {
        return (
            CheckStatus::Warning,
            format!(
                "desktops can be reached by RDP but reach nothing themselves: {}",
                missing(passt, "passt", "provider.qemu.passt")
            ),
        );
    };
    let resolvers = uplink::resolvers();
    if resolvers.is_empty() {
        return (
            CheckStatus::Warning,
            "desktops cannot look up names: every DNS server in /etc/resolv.conf is this host itself, which they \
             may not reach"
                .to_owned(),
        );
    }
    let names: Vec<_> = resolvers.iter().map(ToString::to_string).collect();
    well(format!("{}, names by {}", path.display(), names.join(", ")))
}

/// Tries an address that no desktop gets.
fn addresses([first, second]: [u8; 2], port: u16) -> Result<String, String> {
    let address = SocketAddr::from((Ipv4Addr::new(first, second, 0, 255), port));
    match TcpListener::bind(address) {
        Ok(_) => Ok(format!("{first}.{second}.0.0/16, port {port}")),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Err(format!(
            "port {port} is taken on every address, probably by an RDP server of this host; set \
             provider.qemu.rdp_port to another port, or bind that server to one address"
        )),
        Err(error) => Err(format!("{address} cannot be listened on: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::Provider;
    use crate::provider::qemu::QemuConfig;

    #[test]
    fn a_server_on_every_address_is_named() {
        let everywhere = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = everywhere.local_addr().unwrap().port();
        let error = addresses([127, 78], port).unwrap_err();
        assert!(error.contains("rdp_port"), "{error}");
        drop(everywhere);
        addresses([127, 78], port).unwrap();
    }

    #[test]
    fn too_little_room_says_what_is_missing() {
        let here = std::env::temp_dir();
        assert!(room(&here, 1).is_ok());
        assert!(room(&here, u32::MAX).unwrap_err().contains("memory"));
        assert_eq!(
            available_mib("MemFree: 1 kB\nMemAvailable:   2048 kB\n"),
            Some(2)
        );
    }

    #[tokio::test]
    async fn everything_that_is_missing_is_said_at_once() {
        let state = tempfile::tempdir().unwrap();
        let config = QemuConfig {
            binary: "/nowhere/qemu".into(),
            qemu_img: "/nowhere/qemu-img".into(),
            passt: "/nowhere/passt".into(),
            ..QemuConfig::default()
        };
        let qemu = Qemu::new(config, state.path(), "x".into()).unwrap();
        let checks = qemu.preflight().await;
        let status = |name: &str| checks.iter().find(|c| c.name == name).unwrap().status;
        assert_eq!(status("QEMU"), CheckStatus::Error);
        assert_eq!(status("qemu-img"), CheckStatus::Error);
        assert_eq!(status("image"), CheckStatus::Error);
        assert_eq!(status("network"), CheckStatus::Warning);
        assert_eq!(status("room"), CheckStatus::Ok);
    }
}
