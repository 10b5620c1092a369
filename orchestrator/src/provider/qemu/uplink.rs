//! `mayfly-orchestrator uplink`: a machine, its passt, and a filter between the two.
//!
//! passt gives the machine a network without any privilege: every connection of the guest becomes a socket of
//! passt on this host. That is also its weakness: whatever this host can reach over its own addresses, so can the
//! guest. `--no-map-gw` closes the gateway address, but a guest whose root writes `127.0.0.1` into a packet is
//! still served by passt 2023-03 (`tcp_conn_from_tap()`), and the host's own addresses are served by every version.
//!
//! # Guarantees
//! * What leaves the machine is ARP, DHCP, and IPv4 to an address that is not loopback, link-local (the metadata
//!   service of clouds), multicast, broadcast, reserved, or one of this host's own, *whatever the guest does*: the
//!   filter reads the same bytes that passt will.
//! * Nothing of this host's network set-up matters to the guest: it always has the address [`GUEST`].
//! * The machine, passt and this process end together; but a passt that ends by itself is started again, [`RESTARTS`]
//!   times: to the machine that is a short cut of its network, and the person's work is not lost.
//!
//! Both ends speak the framing of QEMU's socket network: a length (4 bytes, big endian) and an Ethernet frame.
//! The machine gets its end as standard input, so there is no socket file that a mandatory access control profile
//! could forbid (Debian's AppArmor profile of passt allows them in few places) or anybody else could open.

use crate::process::Process;
use anyhow::Context;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::SndBuf;
use rustix::process::Signal;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The machine's address: from 198.18.0.0/15, which RFC 2544 keeps off real networks.
const GUEST: Ipv4Addr = Ipv4Addr::new(198, 18, 77, 2);
/// Its gateway; the RDP connections that passt forwards come from there.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(198, 18, 77, 1);
/// Of the gateway; passt would take the host's, which a host without network does not have.
const GATEWAY_MAC: &str = "02:4d:61:79:66:01";
/// The longest frame passt takes.
const MAX_FRAME: usize = 65_535;
/// How many reads from passt may wait for the machine.
const QUEUE: usize = 256;
/// How often passt is started again …
const RESTARTS: u32 = 5;
/// … after this long, twice this long, and so on: what stops it may pass.
const RESTART_PAUSE: Duration = Duration::from_millis(200);
/// The host's addresses are read again when this old.
const ADDRESSES_AGE: Duration = Duration::from_secs(2);

/// Arguments of `uplink`.
#[derive(Clone, Debug, clap::Args)]
pub struct UplinkCommand {
    /// The desktop's folder; passt carries it as its name, so that it is found by it
    #[arg(long, value_name = "DIR")]
    desktop: PathBuf,
    /// The passt program
    #[arg(long, value_name = "PATH")]
    passt: PathBuf,
    /// What is forwarded to the machine, as passt wants it: ADDRESS/PORT
    #[arg(long, value_name = "ADDRESS/PORT")]
    forward: String,
    /// The machine; its network is its standard input
    #[arg(last = true, required = true)]
    machine: Vec<OsString>,
}

/// Runs machine and network until the machine ends, and ends with its exit code.
///
/// # Errors
/// One of the two programs cannot be started.
pub fn run(command: &UplinkCommand) -> anyhow::Result<()> {
    let (to_machine, machine_end) = UnixStream::pair()?;
    let passt = Passt::start(command)?;
    let from_passt = passt.socket.try_clone()?;
    let passt = Arc::new(Mutex::new(passt));
    let (program, arguments) = command
        .machine
        .split_first()
        .context("there is no machine to start")?;
    let mut machine = Command::new(program)
        .args(arguments)
        .stdin(OwnedFd::from(machine_end))
        .spawn()
        .with_context(|| format!("{} cannot be started", program.to_string_lossy()))?;
    let machine_process = Process::of(i32::try_from(machine.id())?);

    let stop = move |why: &str| {
        eprintln!("the machine has lost its network and is stopped: {why}");
        if let Some(machine) = machine_process {
            // QEMU 7.2 forgets a SIGTERM that comes just after its start.
            machine.signal(Signal::KILL).ok();
        }
    };

    let ended = Arc::new(AtomicBool::new(false));
    std::thread::spawn({
        let from_machine = to_machine.try_clone()?;
        let (ended, passt) = (Arc::clone(&ended), Arc::clone(&passt));
        move || {
            let to_passt = ToPasst(Arc::clone(&passt));
            let result = outward(from_machine, to_passt, &mut HostAddresses::default());
            ended.store(true, Ordering::SeqCst);
            if let Err(error) = result {
                stop(&error.to_string());
            }
            Passt::lock(&passt).socket.shutdown(Shutdown::Both).ok();
        }
    });
    std::thread::spawn({
        let (command, passt) = (command.clone(), Arc::clone(&passt));
        move || {
            let result = hold(&command, &passt, from_passt, &delivery(to_machine), &ended);
            if let Err(error) = result {
                stop(&format!("{error:#}"));
            }
        }
    });
    let status = machine.wait()?;
    // It ends by itself when its socket closes; this is for one that does not. One that takes nothing any more keeps the
    // lock with its writer: then the supervisor kills it, with the rest of the group.
    if let Ok(mut passt) = passt.try_lock() {
        passt.end();
    }
    std::process::exit(status.code().unwrap_or(1));
}

/// A running passt and our end of its socket.
struct Passt {
    child: Child,
    socket: UnixStream,
}

impl Passt {
    fn start(command: &UplinkCommand) -> anyhow::Result<Self> {
        let (socket, passt_end) = UnixStream::pair()?;
        for end in [&socket, &passt_end] {
            // The kernel takes as much of it as net.core.wmem_max allows.
            setsockopt(end, SndBuf, &(1 << 24))?;
        }
        let child = Command::new(&command.passt)
            .arg0(command.desktop.join("passt"))
            .args(passt_arguments(&command.forward))
            .stdin(OwnedFd::from(passt_end))
            .spawn()
            .with_context(|| format!("{} cannot be started", command.passt.display()))?;
        Ok(Self { child, socket })
    }

    fn lock(passt: &Mutex<Self>) -> MutexGuard<'_, Self> {
        passt.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&mut self) -> String {
        self.child.kill().ok();
        self.child
            .wait()
            .map_or_else(|error| error.to_string(), |status| status.to_string())
    }
}

/// The way to whichever passt runs now.
struct ToPasst(Arc<Mutex<Passt>>);

impl Write for ToPasst {
    fn write(&mut self, frames: &[u8]) -> io::Result<usize> {
        // What a passt that has ended does not take is lost, as on a cut cable.
        (&Passt::lock(&self.0).socket).write_all(frames).ok();
        Ok(frames.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hands the machine what passt says, and starts passt again when it ends, until the machine has ended.
///
/// # Errors
/// passt has ended too often or does not start.
fn hold(
    command: &UplinkCommand,
    passt: &Mutex<Passt>,
    mut from_passt: UnixStream,
    machine: &SyncSender<Vec<u8>>,
    ended: &AtomicBool,
) -> anyhow::Result<()> {
    for restart in 1.. {
        let result = inward(from_passt, machine);
        let mut passt = Passt::lock(passt);
        if ended.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut how = passt.end();
        if let Err(error) = result {
            how = format!("{how}; {error}");
        }
        if restart > RESTARTS {
            anyhow::bail!("passt has ended {restart} times, the last time by {how}");
        }
        eprintln!("passt has ended by {how} and is started again");
        std::thread::sleep(RESTART_PAUSE * restart);
        *passt = Passt::start(command)?;
        from_passt = passt.socket.try_clone()?;
    }
    Ok(())
}

/// passt(1). Tested with 2023-03 (Debian 12) and 2025-05 (Debian 13).
fn passt_arguments(forward: &str) -> Vec<String> {
    let fixed = format!(
        "--foreground --quiet --stderr --ipv4-only --fd 0 --interface lo --address {GUEST} --netmask 24 \
         --gateway {GATEWAY} --mac-addr {GATEWAY_MAC} --no-map-gw --udp-ports none --tcp-ports {forward}"
    );
    let mut arguments: Vec<String> = fixed.split_whitespace().map(str::to_owned).collect();
    let resolvers = resolvers();
    if resolvers.is_empty() {
        arguments.extend(["--dns".to_owned(), "none".to_owned()]);
    }
    for resolver in resolvers {
        arguments.extend(["--dns".to_owned(), resolver.to_string()]);
    }
    arguments
}

/// DNS servers that the machine can use: the host's, but not those that only the host itself can reach.
/// A local stub (systemd-resolved, NetworkManager) keeps the list of the real ones in a file of its own.
#[must_use]
pub fn resolvers() -> Vec<Ipv4Addr> {
    let own = own_addresses().unwrap_or_default();
    [
        "/etc/resolv.conf",
        "/run/systemd/resolve/resolv.conf",
        "/run/NetworkManager/no-stub-resolv.conf",
    ]
    .iter()
    .map(|file| usable_resolvers(&std::fs::read_to_string(file).unwrap_or_default(), &own))
    .find(|found| !found.is_empty())
    .unwrap_or_default()
}

fn usable_resolvers(resolv_conf: &str, own: &[Ipv4Addr]) -> Vec<Ipv4Addr> {
    resolv_conf
        .lines()
        .filter_map(|line| line.strip_prefix("nameserver")?.trim().parse().ok())
        .filter(|address| is_open(*address, own))
        // Three is what resolv.conf(5) takes.
        .take(3)
        .collect()
}

/// IPv4 addresses of this host's interfaces.
fn own_addresses() -> io::Result<Vec<Ipv4Addr>> {
    Ok(nix::ifaddrs::getifaddrs()?
        .filter_map(|interface| Some(interface.address?.as_sockaddr_in()?.ip()))
        .collect())
}

/// The host's addresses, never older than [`ADDRESSES_AGE`] when asked for.
#[derive(Default)]
struct HostAddresses {
    read_at: Option<Instant>,
    list: Vec<Ipv4Addr>,
}

impl HostAddresses {
    fn now(&mut self) -> &[Ipv4Addr] {
        if self.read_at.is_none_or(|at| at.elapsed() > ADDRESSES_AGE) {
            // If they cannot be read the last ones stay in force.
            if let Ok(list) = own_addresses() {
                self.list = list;
            }
            self.read_at = Some(Instant::now());
        }
        &self.list
    }
}

/// Whether a desktop may talk to this address.
fn is_open(address: Ipv4Addr, own: &[Ipv4Addr]) -> bool {
    let [first, ..] = address.octets();
    !(first == 0
        || address.is_loopback()
        || address.is_link_local()
        // Multicast, reserved and broadcast.
        || first >= 224
        || own.contains(&address))
}

/// Whether a frame may leave the machine.
fn passes(frame: &[u8], own: &[Ipv4Addr]) -> bool {
    match frame.get(12..14) {
        Some([0x08, 0x06]) => true,
        Some([0x08, 0x00]) => passes_ipv4(&frame[14..], own),
        _ => false,
    }
}

fn passes_ipv4(packet: &[u8], own: &[Ipv4Addr]) -> bool {
    let Some(&[a, b, c, d]) = packet.get(16..20) else {
        return false;
    };
    let to = Ipv4Addr::new(a, b, c, d);
    if packet[0] >> 4 != 4 {
        return false;
    }
    if to.is_broadcast() {
        let header = usize::from(packet[0] & 0x0f) * 4;
        let is_udp = packet[9] == 17;
        return is_udp && packet.get(header + 2..header + 4) == Some(&[0, 67]);
    }
    is_open(to, own)
}

/// Copies the frames that may pass, until the machine closes its end.
fn outward(
    mut machine: impl Read,
    mut passt: impl Write,
    host: &mut HostAddresses,
) -> io::Result<()> {
    let mut buffer = vec![0; 4 * (4 + MAX_FRAME)];
    let mut filled = 0;
    let mut passed = Vec::with_capacity(buffer.len());
    loop {
        filled += match machine.read(&mut buffer[filled..])? {
            0 => return Ok(()),
            length => length,
        };
        let mut rest = &buffer[..filled];
        while let Some((frame, after)) = first_frame(rest)? {
            if passes(&frame[4..], host.now()) {
                passed.extend_from_slice(frame);
            }
            rest = after;
        }
        let left = rest.len();
        buffer.copy_within(filled - left..filled, 0);
        filled = left;
        passt.write_all(&passed)?;
        passed.clear();
    }
}

/// The first frame, with its length before it, if all of it is there; and what follows.
fn first_frame(bytes: &[u8]) -> io::Result<Option<(&[u8], &[u8])>> {
    let Some(length) = bytes.first_chunk::<4>() else {
        return Ok(None);
    };
    let length = u32::from_be_bytes(*length) as usize;
    if length > MAX_FRAME {
        return Err(io::Error::other("an impossible frame was sent"));
    }
    Ok(bytes.split_at_checked(4 + length))
}

/// Hands the machine what is sent here. What it cannot take yet waits here: passt 2023-03 drops what it cannot hand over
/// at once, and a connection may not recover from that.
fn delivery(mut machine: impl Write + Send + 'static) -> SyncSender<Vec<u8>> {
    let (sender, receiver) = sync_channel::<Vec<u8>>(QUEUE);
    // Nobody waits for it: when the machine has ended, what still waits is of no use.
    std::thread::spawn(move || {
        receiver
            .iter()
            .try_for_each(|frames| machine.write_all(&frames))
    });
    sender
}

/// Copies every whole frame, until passt ends or nobody takes it: the half of one would garble all that follow.
fn inward(mut passt: impl Read, machine: &SyncSender<Vec<u8>>) -> io::Result<()> {
    let mut buffer = vec![0; 2 * (4 + MAX_FRAME)];
    let mut filled = 0;
    loop {
        filled += match passt.read(&mut buffer[filled..])? {
            0 => return Ok(()),
            length => length,
        };
        let mut rest = &buffer[..filled];
        while let Some((_, after)) = first_frame(rest)? {
            rest = after;
        }
        let whole = filled - rest.len();
        if whole > 0 && machine.send(buffer[..whole].to_vec()).is_err() {
            return Ok(());
        }
        buffer.copy_within(whole..filled, 0);
        filled -= whole;
    }
}

/// The command that runs `machine` with a network.
pub(super) fn command(
    orchestrator: &Path,
    desktop: &Path,
    passt: &Path,
    forward: &str,
    machine: Vec<OsString>,
) -> Vec<OsString> {
    let mut command: Vec<OsString> = vec![
        orchestrator.into(),
        "uplink".into(),
        "--desktop".into(),
        desktop.into(),
        "--passt".into(),
        passt.into(),
        "--forward".into(),
        forward.into(),
        "--".into(),
    ];
    command.extend(machine);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: [Ipv4Addr; 1] = [Ipv4Addr::new(192, 168, 1, 10)];

    fn udp(to: [u8; 4], port: u16) -> Vec<u8> {
        let mut frame = vec![0; 14 + 20 + 8];
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        frame[14] = 0x45;
        frame[23] = 17;
        frame[30..34].copy_from_slice(&to);
        frame[36..38].copy_from_slice(&port.to_be_bytes());
        frame
    }

    #[test]
    fn a_desktop_reaches_the_internet_and_its_network() {
        for to in [
            [1, 1, 1, 1],
            [192, 168, 1, 1],
            [10, 0, 0, 5],
            GATEWAY.octets(),
        ] {
            assert!(passes(&udp(to, 53), &OWN), "{to:?}");
        }
    }

    #[test]
    fn a_desktop_reaches_nothing_of_its_host() {
        for to in [
            [127, 0, 0, 1],
            [127, 77, 0, 1],
            [0, 0, 0, 0],
            [192, 168, 1, 10],
            [169, 254, 169, 254],
            [224, 0, 0, 251],
            [255, 255, 255, 255],
        ] {
            assert!(!passes(&udp(to, 53), &OWN), "{to:?}");
        }
    }

    #[test]
    fn broadcast_serves_dhcp_only() {
        assert!(passes(&udp([255; 4], 67), &OWN));
        let mut tcp = udp([255; 4], 67);
        tcp[23] = 6;
        assert!(!passes(&tcp, &OWN));
    }

    #[test]
    fn what_is_not_arp_or_ipv4_stays_inside() {
        let mut frame = udp([1, 1, 1, 1], 53);
        frame[12..14].copy_from_slice(&[0x08, 0x06]);
        assert!(passes(&frame, &OWN));
        for kind in [[0x86, 0xdd], [0x81, 0x00], [0x08, 0x01]] {
            frame[12..14].copy_from_slice(&kind);
            assert!(!passes(&frame, &OWN));
        }
        assert!(!passes(&udp([1, 1, 1, 1], 53)[..30], &OWN));
        assert!(!passes(&[], &OWN));
        let mut version6 = udp([1, 1, 1, 1], 53);
        version6[14] = 0x65;
        assert!(!passes(&version6, &OWN));
    }

    /// Hands out what it holds in pieces of one size.
    struct Pieces<'a>(&'a [u8], usize);

    impl Read for Pieces<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = self.1.min(self.0.len()).min(buffer.len());
            buffer[..length].copy_from_slice(&self.0[..length]);
            self.0 = &self.0[length..];
            Ok(length)
        }
    }

    #[test]
    fn frames_are_sifted_however_they_arrive() {
        let framed = |frame: &[u8]| {
            let mut bytes = u32::try_from(frame.len()).unwrap().to_be_bytes().to_vec();
            bytes.extend_from_slice(frame);
            bytes
        };
        let mut long = udp([1, 1, 1, 1], 443);
        long.resize(MAX_FRAME, 7);
        let good = [framed(&udp([1, 1, 1, 1], 53)), framed(&long)].concat();
        let sent = [
            framed(&udp([127, 0, 0, 1], 53)),
            good.clone(),
            framed(&udp(OWN[0].octets(), 53)),
        ]
        .concat();
        for size in [1, 3, 4, 1000, 70_000, usize::MAX] {
            let mut host = HostAddresses {
                read_at: Some(Instant::now()),
                list: OWN.to_vec(),
            };
            let mut passed = Vec::new();
            outward(Pieces(&sent, size), &mut passed, &mut host).unwrap();
            assert!(passed == good, "in pieces of {size}");
        }
    }

    #[test]
    fn the_half_of_a_frame_is_never_delivered() {
        let whole = [&[0, 0, 0, 3][..], b"abc", &[0, 0, 0, 0]].concat();
        let cut = [&whole[..], &[0, 0, 0, 9], b"half"].concat();
        for size in [1, 4, 7, usize::MAX] {
            let (sender, receiver) = sync_channel(QUEUE);
            inward(Pieces(&cut, size), &sender).unwrap();
            drop(sender);
            assert_eq!(receiver.iter().collect::<Vec<_>>().concat(), whole);
        }
        let (sender, _receiver) = sync_channel(QUEUE);
        assert!(inward(&[0xff; 8][..], &sender).is_err());
    }

    #[test]
    fn a_resolver_that_only_the_host_reaches_is_not_offered() {
        let conf = "# c\nnameserver 127.0.0.53\nnameserver\t192.168.1.10\nnameserver 192.168.1.1\nnameserver fe80::1\n";
        assert_eq!(
            usable_resolvers(conf, &OWN),
            [Ipv4Addr::new(192, 168, 1, 1)]
        );
    }
}
