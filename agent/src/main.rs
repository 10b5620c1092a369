//! The service inside each desktop.
//!
//! It waits for its bootstrap, gives the machine its identity ([`identity`]), starts the RDP server, and then tells the
//! orchestrator over a virtio-serial port ([`port`]), or over the network where there is none ([`line`]), whether a person is
//! there ([`presence`]). It warns that person before the end and when a share is missing ([`notice`], [`shares`]), and powers off a
//! machine that nobody uses and nobody asks for.
//!
//! What is said, and when, is decided by the pure [`talk`]; the threads here carry events to it and its effects out.
//! Every duration is monotonic: the wall clock may jump by hours.

mod bootstrap;
mod certificate;
mod identity;
mod line;
mod locale;
mod notice;
mod port;
mod presence;
mod shares;
mod system;
mod talk;

use anyhow::Context as _;
use clap::Parser;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Instant;
use system::System;
use talk::{Effect, Event, Talk};

/// Gives a Mayfly desktop its identity and reports whether a person uses it.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The virtio-serial port to the orchestrator.
    #[arg(long, default_value_t = format!("/dev/virtio-ports/{}", mayfly_api::agent::VIRTIO_PORT))]
    port: String,
    /// Where the RDP server reads its certificate (PEM).
    #[arg(long, default_value = "/etc/xrdp/mayfly-cert.pem")]
    cert: PathBuf,
    /// Where the RDP server reads its key (PEM); readable by group `xrdp` if there is one.
    #[arg(long, default_value = "/etc/xrdp/mayfly-key.pem")]
    key: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time()
        .init();

    let system: Arc<dyn System> = Arc::new(system::Linux);
    let machine = identity::Machine {
        root: "/".into(),
        certificate: arguments.cert,
        key: arguments.key,
        system: Arc::clone(&system),
    };
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .context("reading the boot id")?;
    let mut talk = Talk::new(
        env!("CARGO_PKG_VERSION"),
        boot_id.trim_end(),
        Instant::now(),
    );

    let (events, inbox) = mpsc::channel();
    let port = Arc::new(port::Port::new(arguments.port.into()));
    {
        let (port, events) = (Arc::clone(&port), events.clone());
        thread::spawn(move || port.listen(&events));
    }
    {
        let events = events.clone();
        thread::spawn(move || identity::take(&machine, &events));
    }
    let mut line = None;
    let mut in_domain = false;
    let (for_line, for_leaving) = (events.clone(), events.clone());
    let for_shares = events.clone();
    let (presence, notices) = (presence::Presence::default(), notice::Notices::default());
    {
        let presence = presence.clone();
        thread::spawn(move || presence.watch(&events));
    }

    while let Ok(event) = inbox.recv() {
        if let Event::Taken(person, calling) = &event {
            presence.follow_input(person);
            notices.start(&system, &presence, person);
            in_domain = person.in_domain;
            if !person.shares.is_empty() {
                let (presence, events) = (presence.clone(), for_shares.clone());
                let places = person.shares.clone();
                thread::spawn(move || shares::watch(&presence, &places, &events));
            }
            line = calling
                .clone()
                .map(|calling| line::Line::open(calling, for_line.clone()));
        }
        for effect in talk.step(event, Instant::now()) {
            match effect {
                Effect::Send(message) => match &line {
                    Some(line) => line.send(message),
                    None => port.send(&message),
                },
                Effect::Notice(notice) => notices.show(notice),
                Effect::Leave => leave(Arc::clone(&system), in_domain, for_leaving.clone()),
                Effect::PowerOff => {
                    tracing::warn!(
                        "nobody is connected and the orchestrator is silent: powering off"
                    );
                    system.power_off();
                }
            }
        }
    }
    anyhow::bail!("every thread of the agent ended")
}

/// In a thread of its own: what the person has open may take its time.
fn leave(system: Arc<dyn System>, in_domain: bool, events: mpsc::Sender<Event>) {
    thread::spawn(move || {
        if in_domain && let Err(error) = system.run(identity::DOMAIN_PROGRAM, &["end"], "") {
            tracing::warn!(%error, "not every share could be unmounted");
        }
        // Without a listener the agent ends.
        let _ = events.send(Event::Left);
    });
}
