//! One machine as QEMU sees it: its files and its command line. Nothing here acts.

use super::super::DesktopSpec;
use super::image::Image;
use mayfly_api::DesktopName;
use mayfly_api::agent::VIRTIO_PORT;
use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// Translated code that software emulation may keep, in MiB, outside the machine's own memory. QEMU's default
/// is a share of the host's memory, which several machines cannot all have.
const TRANSLATION_MIB: u32 = 256;
/// What QEMU itself needs, measured with the devices below, rounded up.
const QEMU_MIB: u32 = 96;

/// What runs the machine's processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Processor {
    Kvm,
    Tcg,
}

impl Processor {
    /// Memory of the host that a machine takes beyond its own, in MiB.
    pub(super) fn overhead_mib(self) -> u32 {
        match self {
            Self::Kvm => QEMU_MIB,
            Self::Tcg => QEMU_MIB + TRANSLATION_MIB,
        }
    }
}

/// How the machine reaches the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Network {
    /// Through standard input, where the uplink is.
    Uplink,
    /// QEMU's own user-mode network, which only forwards RDP and lets nothing out.
    Closed,
}

/// Where everything of one desktop is.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    /// Disk, records, output. Exists before anything else of the machine does.
    pub(super) folder: PathBuf,
    /// Sockets: their paths must be short (unix(7): 107 bytes).
    pub(super) sockets: PathBuf,
    /// Where its RDP server answers.
    pub(super) rdp: SocketAddr,
    name: DesktopName,
}

impl Machine {
    pub(super) fn new(name: DesktopName, folders: &Path, sockets: &Path, rdp: SocketAddr) -> Self {
        Self {
            folder: folders.join(name.to_string()),
            sockets: sockets.join(name.to_string()),
            rdp,
            name,
        }
    }

    pub(super) fn disk(&self) -> PathBuf {
        self.folder.join("disk.qcow2")
    }

    pub(super) fn qmp(&self) -> PathBuf {
        self.sockets.join("qmp.sock")
    }

    pub(super) fn guest_agent(&self) -> PathBuf {
        self.sockets.join("qga.sock")
    }

    pub(super) fn agent(&self) -> PathBuf {
        self.sockets.join("agent.sock")
    }

    /// QEMU's command line.
    pub(super) fn command(
        &self,
        qemu: &Path,
        image: &Image,
        spec: &DesktopSpec,
        processor: Processor,
        network: Network,
    ) -> Vec<OsString> {
        let accel = match processor {
            Processor::Kvm => "kvm".to_owned(),
            Processor::Tcg => format!("tcg,thread=multi,tb-size={TRANSLATION_MIB}"),
        };
        let netdev = match network {
            Network::Uplink => "socket,id=net0,fd=0".to_owned(),
            Network::Closed => {
                let SocketAddr::V4(rdp) = self.rdp else {
                    unreachable!("desktops have IPv4 addresses")
                };
                format!(
                    "user,id=net0,restrict=on,hostfwd=tcp:{}:{}-:3389",
                    rdp.ip(),
                    rdp.port()
                )
            }
        };
        let mut command = vec![qemu.as_os_str().to_owned()];
        let mut add = |option: &str, value: OsString| {
            command.push(option.into());
            command.push(value);
        };
        add("-name", self.name.to_string().into());
        add("-accel", accel.into());
        add("-machine", "q35".into());
        add("-cpu", "max".into());
        add("-smp", spec.cpus.to_string().into());
        add("-m", spec.memory_mib.to_string().into());
        add("-rtc", "base=utc".into());
        add("-display", "none".into());
        add(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into(),
        );
        add("-kernel", image.kernel.clone().into());
        add("-initrd", image.initrd.clone().into());
        let quirk = match processor {
            Processor::Kvm => "",
            // Emulated on a busy host, the timer misses the kernel's check of it, and the kernel panics
            // (kernel-parameters.txt: for virtual machines).
            Processor::Tcg => " no_timer_check",
        };
        add("-append", format!("{}{quirk}", image.command_line).into());
        // Nothing of a desktop survives a crash of its host, so nothing needs to be flushed.
        add(
            "-drive",
            joined(
                "if=none,id=disk0,format=qcow2,cache=unsafe,discard=unmap,file=",
                &self.disk(),
            ),
        );
        add("-device", "virtio-blk-pci,drive=disk0".into());
        add("-netdev", netdev.into());
        add(
            "-device",
            format!("virtio-net-pci,netdev=net0,romfile=,mac={}", self.mac()).into(),
        );
        add("-device", "virtio-rng-pci".into());
        add("-device", "virtio-serial-pci".into());
        for (id, path, port) in [
            ("qga", self.guest_agent(), "org.qemu.guest_agent.0"),
            ("agent", self.agent(), VIRTIO_PORT),
        ] {
            add(
                "-chardev",
                joined(&format!("socket,id={id},server=on,wait=off,path="), &path),
            );
            add(
                "-device",
                format!("virtserialport,chardev={id},name={port}").into(),
            );
        }
        add(
            "-chardev",
            joined("socket,id=qmp,server=on,wait=off,path=", &self.qmp()),
        );
        add("-mon", "chardev=qmp,mode=control".into());
        // The console goes to the supervisor, which bounds it: a guest could fill the host's disk.
        add("-chardev", "file,id=console,path=/proc/self/fd/1".into());
        add("-serial", "chardev:console".into());
        command.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(OsString::from));
        command
    }

    /// A locally administered address that no other desktop of this host has.
    fn mac(&self) -> String {
        let [a, b, c, d] = self.name.number().to_be_bytes();
        format!("52:54:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
    }
}

/// An option of QEMU that ends with a path; a comma in a value is written twice.
fn joined(option: &str, path: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut bytes = option.as_bytes().to_vec();
    for byte in path.as_os_str().as_bytes() {
        bytes.push(*byte);
        if *byte == b',' {
            bytes.push(b',');
        }
    }
    OsString::from_vec(bytes)
}

/// The loopback address of a desktop: two octets of prefix, then its number, without `.0` and `.255`.
/// After 65 024 desktops the addresses begin again.
pub(super) fn address([first, second]: [u8; 2], name: DesktopName) -> Ipv4Addr {
    let place = name.number() % (256 * 254);
    let octet = |n: u32| u8::try_from(n).unwrap_or(u8::MAX);
    Ipv4Addr::new(first, second, octet(place / 254), octet(place % 254 + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn name(number: u32) -> DesktopName {
        DesktopName::from_number(number).unwrap()
    }

    #[test]
    fn addresses_skip_network_and_broadcast_and_begin_again() {
        let text = |number| address([127, 77], name(number)).to_string();
        assert_eq!(text(0), "127.77.0.1");
        assert_eq!(text(253), "127.77.0.254");
        assert_eq!(text(254), "127.77.1.1");
        assert_eq!(text(65_023), "127.77.255.254");
        assert_eq!(text(65_024), "127.77.0.1");
    }

    #[test]
    fn the_command_line_is_as_reviewed() {
        let machine = Machine::new(
            name(1),
            Path::new("/var/lib/may,fly"),
            Path::new("/run/m"),
            (address([127, 77], name(1)), 3389).into(),
        );
        let image = Image {
            name: "x".into(),
            kernel: "/i/vmlinuz".into(),
            initrd: "/i/initrd.img".into(),
            disk: "/i/disk.qcow2".into(),
            command_line: "root=/dev/vda rw".into(),
            memory_mib: 1536,
        };
        let spec = DesktopSpec {
            name: name(1),
            session: mayfly_api::SessionId::new(),
            in_domain: false,
            playbook: None,
            cpus: 2,
            memory_mib: 1536,
            lifetime: Duration::from_secs(60),
        };
        let lines = |processor, network| {
            machine
                .command(Path::new("qemu"), &image, &spec, processor, network)
                .iter()
                .map(|part| part.to_string_lossy().into_owned())
                .collect::<Vec<_>>()
                .join("\n")
        };
        insta::assert_snapshot!(lines(Processor::Tcg, Network::Uplink));
        let closed = lines(Processor::Kvm, Network::Closed);
        assert!(closed.contains("user,id=net0,restrict=on,hostfwd=tcp:127.77.0.2:3389-:3389"));
        assert!(closed.contains("-accel\nkvm\n"));
    }
}
