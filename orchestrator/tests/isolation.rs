//! What a desktop reaches, whatever its root does: the test *is* the machine, and writes its packets itself.
//!
//! In a network namespace stands a host with services on loopback, on every address, and the forwarded port of
//! another desktop; behind a link, in a second namespace, an outside server. The machine sends a TCP SYN or a UDP
//! datagram to each. Who was reached is asked on the side of the services, not of the machine. Then its passt is killed,
//! and another one must take its place.
//!
//! Needs passt, iproute2, procps, util-linux, and user namespaces.

#![allow(clippy::unwrap_used, reason = "all of it is a test")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const ROLE: &str = "MAYFLY_ISOLATION_ROLE";
const TARGETS: &str = "MAYFLY_ISOLATION_TARGETS";
const PASST: &str = "MAYFLY_ISOLATION_PASST";
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const PORT: u16 = 8080;

#[test]
fn a_desktop_reaches_the_outside_and_nothing_of_its_host() {
    // Root of a user namespace may make network namespaces, and nothing outside notices.
    let namespaces = r#"
        ip link set lo up
        unshare --net sleep 120 & outside=$!
        trap 'kill $outside' EXIT
        until [ "$(readlink /proc/$outside/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
        ip link add host0 type veth peer name outside0 netns $outside
        ip address add 203.0.113.1/24 dev host0 && ip link set host0 up
        nsenter --target $outside --net sh -c '
            ip link set lo up && ip address add 203.0.113.2/24 dev outside0 && ip link set outside0 up'
        ip route add default via 203.0.113.2
        MAYFLY_ISOLATION_ROLE=outside nsenter --target $outside --net "$@" &
        server=$!
        trap 'kill $outside $server' EXIT
        MAYFLY_ISOLATION_ROLE=host "$@"
    "#;
    let output = Command::new("unshare")
        .args([
            "--user",
            "--map-root-user",
            "--net",
            "sh",
            "-euc",
            namespaces,
            "sh",
        ])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "another_role", "--nocapture"])
        .output()
        .unwrap();
    let words = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{words}");
    assert!(words.contains("the host was left alone"), "{words}");
}

/// Does nothing unless the test above starts it in a role.
#[test]
fn another_role() {
    match std::env::var(ROLE).as_deref() {
        Ok("outside") => outside(),
        Ok("host") => host(),
        Ok("machine") => machine(),
        _ => {}
    }
}

/// A server far away: takes connections for as long as it lives.
fn outside() {
    let listener = TcpListener::bind((OUTSIDE, PORT)).unwrap();
    for stream in listener.incoming() {
        stream.unwrap().write_all(b"outside").ok();
    }
}

struct Service {
    name: &'static str,
    tcp: TcpListener,
    udp: UdpSocket,
}

impl Service {
    fn on(name: &'static str, address: Ipv4Addr, port: u16) -> Self {
        let tcp = TcpListener::bind((address, port)).unwrap();
        tcp.set_nonblocking(true).unwrap();
        let udp = UdpSocket::bind((address, port)).unwrap();
        udp.set_nonblocking(true).unwrap();
        Self { name, tcp, udp }
    }

    fn visits(&self) -> Vec<String> {
        let tcp = self
            .tcp
            .accept()
            .ok()
            .map(|(_, from)| format!("{} over TCP from {from}", self.name));
        let udp = self
            .udp
            .recv_from(&mut [0; 9])
            .ok()
            .map(|(_, from)| format!("{} over UDP from {from}", self.name));
        tcp.into_iter().chain(udp).collect()
    }
}

fn host() {
    let services = [
        Service::on("a service on loopback", Ipv4Addr::LOCALHOST, PORT),
        Service::on(
            "a service on every address",
            Ipv4Addr::UNSPECIFIED,
            PORT + 1,
        ),
        Service::on("another desktop", Ipv4Addr::new(127, 77, 0, 7), 3389),
    ];
    let mut targets: Vec<SocketAddrV4> = Vec::new();
    for address in [
        Ipv4Addr::LOCALHOST,
        Ipv4Addr::UNSPECIFIED,
        HOST,
        Ipv4Addr::new(203, 0, 113, 255),
        Ipv4Addr::new(127, 77, 0, 7),
        Ipv4Addr::new(127, 255, 255, 254),
        // The gateway and the machine itself as it knows them, and where QEMU's own network has its host.
        Ipv4Addr::new(198, 18, 77, 1),
        Ipv4Addr::new(198, 18, 77, 2),
        Ipv4Addr::new(10, 0, 2, 2),
        Ipv4Addr::new(169, 254, 169, 254),
        Ipv4Addr::new(224, 0, 0, 1),
        Ipv4Addr::BROADCAST,
    ] {
        targets.extend([PORT, PORT + 1, 3389].map(|port| SocketAddrV4::new(address, port)));
    }
    targets.push(SocketAddrV4::new(OUTSIDE, PORT));
    let targets: Vec<_> = targets.iter().map(ToString::to_string).collect();

    let folder = tempfile::tempdir().unwrap();
    let desktop = folder.path().join("desktop-0000008");
    let output = Command::new(env!("CARGO_BIN_EXE_mayfly-orchestrator"))
        .arg("uplink")
        .args([
            "--passt",
            "passt",
            "--forward",
            "127.77.0.8/3389",
            "--desktop",
        ])
        .arg(&desktop)
        .arg("--")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "another_role", "--nocapture"])
        .env(ROLE, "machine")
        .env(TARGETS, targets.join(" "))
        .env(PASST, desktop.join("passt"))
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{words}");
    assert!(
        words.contains(&format!("reached {OUTSIDE}:{PORT}\n")),
        "no way out: {words}"
    );
    let visits: Vec<_> = services.iter().flat_map(Service::visits).collect();
    assert_eq!(visits, Vec::<String>::new());
    assert_eq!(words.matches("reached").count(), 1, "{words}");
    assert!(words.contains("a second passt serves it"), "{words}");
    // The services can be visited at all, or the test would prove nothing.
    for service in &services {
        let mut there = service.tcp.local_addr().unwrap();
        if there.ip().is_unspecified() {
            there = SocketAddr::from((HOST, there.port()));
        }
        std::net::TcpStream::connect(there).unwrap();
        UdpSocket::bind("0.0.0.0:0")
            .unwrap()
            .send_to(b"x", there)
            .unwrap();
        let begin = Instant::now();
        let mut visits = 0;
        while visits < 2 {
            visits += service.visits().len();
            assert!(
                begin.elapsed() < Duration::from_secs(10),
                "{}",
                service.name
            );
        }
    }
    println!("the host was left alone");
}

/// The machine: its network is standard input.
fn machine() {
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let mut network = UnixStream::from(stdin);
    network
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let targets = std::env::var(TARGETS).unwrap();
    let targets: Vec<SocketAddrV4> = targets
        .split(' ')
        .map(|text| text.parse().unwrap())
        .collect();
    for (index, target) in targets.iter().enumerate() {
        let source = 40_000 + u16::try_from(index).unwrap();
        send(
            &mut network,
            &packet(6, *target, &tcp_syn(source, target.port())),
        );
        let udp = [
            source.to_be_bytes(),
            target.port().to_be_bytes(),
            [0, 9],
            [0, 0],
        ]
        .concat();
        send(
            &mut network,
            &packet(17, *target, &[&udp[..], b"x"].concat()),
        );
    }
    // Answers come in any order; the one from outside is the slowest.
    let mut received = Vec::new();
    for who in answers(&mut network, &mut received, Duration::from_secs(3)) {
        println!("reached {who}");
    }

    let passt = std::env::var(PASST).unwrap();
    let killed = Command::new("pkill")
        .args(["-KILL", "-f", &format!("^{passt} ")])
        .status();
    assert!(killed.unwrap().success(), "{passt} does not run");
    let outside = SocketAddrV4::new(OUTSIDE, PORT);
    let begin = Instant::now();
    for source in 50_000.. {
        send(&mut network, &packet(6, outside, &tcp_syn(source, PORT)));
        let answers = answers(&mut network, &mut received, Duration::from_millis(500));
        if answers.contains(&outside) {
            break;
        }
        assert!(
            begin.elapsed() < Duration::from_secs(30),
            "its network does not come back"
        );
    }
    println!("a second passt serves it");
}

/// Who takes a connection, as told by the segments with SYN and ACK that arrive within `time`.
fn answers(network: &mut UnixStream, received: &mut Vec<u8>, time: Duration) -> Vec<SocketAddrV4> {
    let begin = Instant::now();
    let mut found = Vec::new();
    let mut buffer = [0; 4096];
    while begin.elapsed() < time {
        if let Ok(length) = network.read(&mut buffer) {
            received.extend_from_slice(&buffer[..length]);
        }
        while received.len() >= 4 {
            let length = u32::from_be_bytes(received[..4].try_into().unwrap()) as usize;
            if received.len() < 4 + length {
                break;
            }
            let frame: Vec<u8> = received.drain(..4 + length).skip(4).collect();
            if frame.len() >= 54
                && frame[12..14] == [8, 0]
                && frame[23] == 6
                && frame[47] & 0x12 == 0x12
            {
                let from = Ipv4Addr::new(frame[26], frame[27], frame[28], frame[29]);
                let port = u16::from_be_bytes([frame[34], frame[35]]);
                found.push(SocketAddrV4::new(from, port));
            }
        }
    }
    found
}

fn send(network: &mut UnixStream, frame: &[u8]) {
    let length = u32::try_from(frame.len()).unwrap().to_be_bytes();
    network.write_all(&[&length[..], frame].concat()).unwrap();
}

fn tcp_syn(source: u16, destination: u16) -> Vec<u8> {
    let mut segment = [source.to_be_bytes(), destination.to_be_bytes()].concat();
    segment.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    segment
}

/// An Ethernet frame with an IPv4 packet, checksums included.
fn packet(protocol: u8, to: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    let from = [198, 18, 77, 2];
    let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut header = [
        &[0x45, 0][..],
        &length,
        &[0, 0, 0x40, 0, 64, protocol, 0, 0],
        &from,
        &to.ip().octets(),
    ]
    .concat();
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum);
    let mut payload = payload.to_vec();
    let segment = u16::try_from(payload.len()).unwrap().to_be_bytes();
    let pseudo = [
        &from[..],
        &to.ip().octets(),
        &[0, protocol],
        &segment,
        &payload,
    ]
    .concat();
    let place = if protocol == 6 { 16 } else { 6 };
    payload[place..place + 2].copy_from_slice(&checksum(&pseudo));
    let addresses = [
        0x02, 0x4d, 0x61, 0x79, 0x66, 0x01, 0x52, 0x54, 0, 0, 0, 1, 8, 0,
    ];
    [&addresses[..], &header, &payload].concat()
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or_default()));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap()).to_be_bytes()
}
