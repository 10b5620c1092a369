//! Whole scenarios on the real desktop: the tray app, a real RDP client, XFCE in a virtual machine.

use anyhow::{Context, Result, ensure};
use mayfly_api::DesktopName;
use mayfly_tests::lab::{
    Desk, Guest, Lab, Launcher, Orchestrator, Process, Provider, image_folder, program, until,
};
use nix::sys::signal::Signal;
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

/// A desktop boots within this, emulated, on a busy machine; a login shows it within this, likewise.
const BOOT: Duration = Duration::from_secs(300);
/// Something small happens within this.
const SOON: Duration = Duration::from_secs(120);

/// A person whose desktop is open in their RDP client.
struct InUse {
    window: u32,
    client: u32,
    name: DesktopName,
    guest: Guest,
}

impl InUse {
    /// Waits for the RDP client's window and for XFCE behind it.
    async fn wait(lab: &Lab, desk: &Desk, orchestrator: &Orchestrator) -> Result<Self> {
        let window = desk.screen().window("desktop-", BOOT).await?;
        let name = desktops_on_screen(desk)?
            .into_iter()
            .next()
            .context("no desktop's name in a title")?;
        let guest = orchestrator.guest(name);
        until("XFCE runs in the desktop", BOOT, async || {
            let panel = guest
                .run(&["/usr/bin/pgrep", "-x", "xfce4-panel"], SOON)
                .await?;
            Ok((panel.code == 0).then_some(()))
        })
        .await?;
        let client = clients(lab)?
            .into_iter()
            .next()
            .context("no RDP client runs")?;
        Ok(Self {
            window,
            client,
            name,
            guest,
        })
    }

    /// What a person would miss if it changed: the X server and the program that holds their file open.
    async fn inside(&self) -> Result<String> {
        self.guest
            .shell("pgrep -x Xorg; pgrep -f '^sleep 86399$' || true", SOON)
            .await
    }

    /// The RDP client's TCP connection, both ends.
    fn connection(&self) -> Result<String> {
        let sockets = Command::new("ss")
            .args(["-Htnp", "state", "established"])
            .output()?;
        let sockets = String::from_utf8_lossy(&sockets.stdout).into_owned();
        let ours = format!("pid={},", self.client);
        let line = sockets
            .lines()
            .find(|line| line.contains(&ours) && line.contains(":3389"));
        let words = line
            .context("the RDP client has no connection")?
            .split_whitespace();
        Ok(words.skip(2).take(2).collect::<Vec<_>>().join(" "))
    }
}

fn desktops_on_screen(desk: &Desk) -> Result<Vec<DesktopName>> {
    let titles = desk.screen().windows()?;
    Ok(titles
        .iter()
        .filter_map(|t| t.split_whitespace().find_map(|word| word.parse().ok()))
        .collect())
}

/// RDP clients that this lab's launcher started.
fn clients(lab: &Lab) -> Result<Vec<u32>> {
    lab.running("freerdp")
}

async fn start(lab: &Lab, limits: &str) -> Result<Orchestrator> {
    let provider = Provider::Qemu(image_folder("MAYFLY_DESKTOP_IMAGE")?);
    Orchestrator::start(lab, &provider, limits).await
}

/// Root inside tries the gateway, where QEMU's own network has the host, and the host's addresses.
///
/// What root can do by writing packets itself is tried in `orchestrator/tests/isolation.rs`.
async fn nothing_of_the_host_is_reached(guest: &Guest) -> Result<()> {
    let service = TcpListener::bind("0.0.0.0:0")?;
    let port = service.local_addr()?.port();
    let mut addresses = vec!["198.18.77.1".to_owned(), "10.0.2.2".to_owned()];
    for interface in nix::ifaddrs::getifaddrs()? {
        let address = interface
            .address
            .and_then(|a| Some(a.as_sockaddr_in()?.ip()));
        addresses.extend(address.filter(|a| !a.is_loopback()).map(|a| a.to_string()));
    }
    let connect = |to: &str, port: u16| format!("timeout 3 bash -c 'exec 3<>/dev/tcp/{to}/{port}'");
    // Its own RDP server, to see that the attempts are attempts.
    let mut attempts = vec![connect("127.0.0.1", 3389)];
    attempts.extend(addresses.iter().map(|a| format!("! {}", connect(a, port))));
    guest.shell(&attempts.join(" && "), SOON).await?;
    // It can be reached at all, or the test would prove nothing; and ours is the first visit.
    let ours = TcpStream::connect(("127.0.0.1", port))?;
    ensure!(
        service.accept()?.1 == ours.local_addr()?,
        "the guest was here"
    );
    Ok(())
}

async fn nothing_is_left(lab: &Lab) -> Result<()> {
    let gone = until("nothing is left", SOON, async || {
        Ok(lab.leftovers().is_empty().then_some(()))
    })
    .await;
    gone.with_context(|| lab.leftovers().to_string())
}

#[tokio::test]
async fn the_demonstration_runs_by_itself() -> Result<()> {
    let reports = Lab::reports();
    let status = tokio::task::spawn_blocking(move || {
        Command::new(env!("CARGO_BIN_EXE_demo"))
            .env("MAYFLY_REPORTS", reports)
            .status()
    })
    .await??;
    ensure!(status.success(), "the demonstration failed: {status}");
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(Lab::reports().join("demo.json"))?)?;
    assert_eq!(report["ok"], true);
    assert_eq!(report["leftovers"], serde_json::json!([]));
    Ok(())
}

#[tokio::test]
async fn a_person_keeps_their_work_through_a_restart_and_a_cut_and_meets_no_impostor() -> Result<()>
{
    let lab = Lab::new("desktop in use")?;
    let mut orchestrator = start(&lab, "").await?;
    let desk = Desk::start(&lab).await?;
    let mut launcher = Launcher::start(&lab, &desk, orchestrator.url())?;
    let tray = launcher.tray(&desk).await?;
    tray.click("New desktop").await?;
    let web = launcher.web(&lab).await?;
    let used = InUse::wait(&lab, &desk, &orchestrator).await?;

    let told = |title: &str| {
        desk.notifications()
            .iter()
            .any(|note| note.summary == title)
    };
    ensure!(told("Your desktop is ready"), "{:?}", desk.notifications());

    // A program of theirs that has a file open.
    let screen = desk.screen();
    let still = Duration::from_secs(3);
    let before = screen.still_picture(200, still, BOOT).await?;
    screen.focus(used.window)?;
    screen.press("ctrl+alt+t")?;
    screen.changed_picture(&before, still, BOOT).await?;
    // A shell that is not up yet loses what is typed: once more, then.
    let work = until("their program runs", BOOT, async || {
        let inside = used.inside().await?;
        if inside.lines().count() == 2 {
            return Ok(Some(inside));
        }
        screen.type_text("sleep 86399 > work.txt")?;
        screen.press("Return")?;
        tokio::time::sleep(Duration::from_secs(10)).await;
        Ok(None)
    })
    .await?;

    // The orchestrator is killed and comes back: nobody notices.
    let connection = used.connection()?;
    orchestrator.crash().await?;
    orchestrator.start_again(&lab).await?;
    tray.click("Open Mayfly").await?;
    web.enter_window().await?;
    web.screen("in_use", SOON).await?;
    assert_eq!(used.connection()?, connection);
    assert_eq!(used.inside().await?, work);
    assert_eq!(clients(&lab)?, [used.client]);

    nothing_of_the_host_is_reached(&used.guest).await?;

    // The network is cut until the client gives up: the desktop waits, and a new client shows the same work.
    let address = connection.split_whitespace().last();
    let address = address.context("no address")?.to_owned();
    until("the client gives up", BOOT, async || {
        let root = nix::unistd::geteuid().is_root();
        let cut = Command::new(if root { "ss" } else { "sudo" })
            .args(if root { &[][..] } else { &["-n", "ss"] })
            .args(["-K", "dst", &address])
            .output()?;
        ensure!(
            cut.status.success(),
            "ss: {}",
            String::from_utf8_lossy(&cut.stderr)
        );
        Ok(clients(&lab)?.is_empty().then_some(()))
    })
    .await?;
    web.enter_window().await?;
    web.shows("The connection was lost", SOON).await?;
    let lost = "The connection was lost; your desktop is still there";
    ensure!(told(lost), "{:?}", desk.notifications());
    web.act("reconnect").await?;
    let again = InUse::wait(&lab, &desk, &orchestrator).await?;
    assert_eq!(again.name, used.name);
    assert_eq!(again.inside().await?, work);

    // Somebody else answers at its address: refused and explained.
    again
        .guest
        .shell(
            "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=impostor \
             -keyout /etc/xrdp/mayfly-key.pem -out /etc/xrdp/mayfly-cert.pem 2>&1 && systemctl restart xrdp",
            SOON,
        )
        .await?;
    until("the impostor is refused and explained", BOOT, async || {
        web.enter_window().await?;
        let words = web.text().await?;
        if words.contains("This is not the desktop that was announced") {
            return Ok(Some(()));
        }
        // xrdp says goodbye when it restarts, or is not up again yet: then the person tries once more.
        let menu = tray.menu().await?;
        let again = ["Reconnect", "Try again"];
        let offered = again
            .into_iter()
            .find(|label| menu.iter().any(|l| l.enabled && l.label == *label));
        if let Some(label) = offered {
            tray.click(label).await?;
        }
        Ok(None)
    })
    .await?;

    tray.click("Destroy the desktop and quit").await?;
    let status = launcher.process().exit(SOON).await?;
    ensure!(status.success(), "the launcher ended with {status}");
    nothing_is_left(&lab).await
}

#[tokio::test]
async fn a_killed_launcher_ends_nothing_the_next_finds_the_desktop_and_the_idle_rule_ends_it()
-> Result<()> {
    let lab = Lab::new("desktop launcher killed")?;
    let orchestrator = start(&lab, "idle_s = 10").await?;
    let desk = Desk::start(&lab).await?;
    // A French keyboard, which the RDP client tells the desktop of.
    let mut keyboard = lab.command("setxkbmap");
    desk.environment(&mut keyboard);
    ensure!(keyboard.arg("fr").status()?.success(), "setxkbmap failed");
    let mut launcher = Launcher::start(&lab, &desk, orchestrator.url())?;
    launcher.tray(&desk).await?.click("New desktop").await?;
    let used = InUse::wait(&lab, &desk, &orchestrator).await?;
    let connection = used.connection()?;
    let layout =
        "DISPLAY=:10 XAUTHORITY=$(echo /home/*/.Xauthority) setxkbmap -query | grep layout";
    let layout = used.guest.shell(layout, SOON).await?;
    ensure!(
        layout.trim().ends_with(" fr"),
        "the keyboard in the desktop: {layout}"
    );

    launcher.crash().await?;
    // Still theirs, without a launcher: the guest answers and the connection is the same.
    used.guest.shell("pgrep -x Xorg", SOON).await?;
    assert_eq!(used.connection()?, connection);

    // The next launcher has the session's secret from the keyring, and shows what is there.
    let mut next = Launcher::start(&lab, &desk, orchestrator.url())?;
    let tray = next.tray(&desk).await?;
    until("the next launcher shows the desktop", SOON, async || {
        let menu = tray.menu().await?;
        Ok(menu
            .iter()
            .any(|line| line.label == "Reconnect")
            .then_some(()))
    })
    .await?;
    assert_eq!(clients(&lab)?, [used.client]);
    next.crash().await?;

    desk.screen().close(used.window)?;
    until("the client ends", SOON, async || {
        Ok(clients(&lab)?.is_empty().then_some(()))
    })
    .await?;
    nothing_is_left(&lab).await
}

#[tokio::test]
async fn two_people_in_the_terminal_at_once_and_ctrl_c_ends_only_ones_own() -> Result<()> {
    let lab = Lab::new("desktop two in the terminal")?;
    let orchestrator = start(&lab, "").await?;
    let desk = Desk::start(&lab).await?;
    let connect = |person: &str| -> Result<Process> {
        let mut command = lab.command(program("mayfly")?);
        desk.environment(&mut command);
        let home = lab.path(person);
        std::fs::create_dir(&home)?;
        command
            .args([
                "connect",
                "--user",
                person,
                "--orchestrator",
                orchestrator.url(),
            ])
            .env("MAYFLY_CONFIG_DIR", home.join("config"))
            .env("MAYFLY_DATA_DIR", home.join("data"));
        lab.start(person, command)
    };
    let mut ada = connect("ada")?;
    let mut grace = connect("grace")?;
    until("both desktops are on the screen", BOOT, async || {
        ada.must_run()?;
        grace.must_run()?;
        Ok((desktops_on_screen(&desk)?.len() == 2).then_some(()))
    })
    .await?;
    let mut of_ada = None;
    for name in desktops_on_screen(&desk)? {
        let guest = orchestrator.guest(name);
        until("XFCE runs in the desktop", BOOT, async || {
            let panel = guest
                .run(&["/usr/bin/pgrep", "-x", "xfce4-panel"], SOON)
                .await?;
            Ok((panel.code == 0).then_some(()))
        })
        .await?;
        if guest.run(&["/usr/bin/id", "ada"], SOON).await?.code == 0 {
            of_ada = Some(name);
        }
    }
    let of_ada = of_ada.context("no desktop is Ada's")?;

    ada.signal(Signal::SIGINT)?;
    ada.exit(SOON).await?;
    let left = desktops_on_screen(&desk)?;
    ensure!(
        left.len() == 1 && left[0] != of_ada,
        "on the screen: {left:?}, Ada's was {of_ada}"
    );
    grace.must_run()?;
    orchestrator
        .guest(left[0])
        .shell("pgrep -x xfce4-panel", SOON)
        .await?;

    // The other closes the client, and the countdown runs out.
    let window = desk.screen().window("desktop-", SOON).await?;
    desk.screen().close(window)?;
    let status = grace.exit(SOON).await?;
    ensure!(
        status.success(),
        "mayfly connect ended with {status}: {}",
        grace.last_words()
    );
    nothing_is_left(&lab).await
}
