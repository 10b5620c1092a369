//! The demonstration without a screen: everything that a person does with Mayfly, done by itself, on the real thing.
//!
//! A click in the tray, the windows, a real RDP client, a terminal in the desktop, the client closed, the countdown, the machine
//! gone, and a next desktop that knows nothing of the first. Writes `demo.json` and screenshots to `$MAYFLY_REPORTS`.

use anyhow::{Context, Result, bail, ensure};
use mayfly_api::DesktopName;
use mayfly_tests::lab::{Desk, Guest, Lab, Launcher, Orchestrator, Provider, image_folder, until};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// A desktop boots within this, emulated, on a busy machine.
const BOOT: Duration = Duration::from_secs(300);
/// A login shows the desktop within this, likewise.
const LOGIN: Duration = Duration::from_secs(300);
/// A program in the desktop does something small within this.
const INSIDE: Duration = Duration::from_secs(120);
/// A window reacts within this.
const WINDOW: Duration = Duration::from_secs(60);

/// `demo.json`.
#[derive(Debug, Default, Serialize)]
struct Report {
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    image: PathBuf,
    stages: Vec<Stage>,
    screenshots: Vec<PathBuf>,
    leftovers: mayfly_tests::lab::Leftovers,
}

/// A step and how long it took.
#[derive(Debug, Serialize)]
struct Stage {
    name: String,
    ms: u64,
}

/// The demonstration under way.
struct Demo {
    report: Report,
    folder: PathBuf,
    since: Instant,
}

#[tokio::main]
async fn main() -> ExitCode {
    let mut demo = Demo {
        report: Report::default(),
        folder: Lab::reports(),
        since: Instant::now(),
    };
    let outcome = demo.run().await;
    demo.report.ok = outcome.is_ok();
    demo.report.error = outcome.as_ref().err().map(|error| format!("{error:#}"));
    if let Err(error) = demo.write() {
        eprintln!("demo: {error:#}");
        return ExitCode::FAILURE;
    }
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

impl Demo {
    async fn run(&mut self) -> Result<()> {
        self.report.image = image_folder("MAYFLY_DESKTOP_IMAGE")?;
        let lab = Lab::new("demo")?;
        let outcome = self.in_lab(&lab).await;
        // Counted whatever happened; a failed run is cleared up by the lab.
        self.report.leftovers = lab.leftovers();
        outcome?;
        ensure!(
            self.report.leftovers.is_empty(),
            "{}",
            self.report.leftovers
        );
        self.done("nothing left");
        Ok(())
    }

    async fn in_lab(&mut self, lab: &Lab) -> Result<()> {
        let provider = Provider::Qemu(self.report.image.clone());
        let mut orchestrator = Orchestrator::start(lab, &provider, "").await?;
        self.done("orchestrator answers");
        let desk = Desk::start(lab).await?;
        self.done("screen, panel, notifications and keyring are there");
        let mut launcher = Launcher::start(lab, &desk, orchestrator.url())?;
        let outcome = self
            .in_session(lab, &desk, &orchestrator, &mut launcher)
            .await;
        if outcome.is_err() {
            let picture = desk.screen().picture()?;
            self.shot("failure.png", |path| picture.save(path))?;
        }
        outcome?;
        orchestrator.stop().await?;
        self.done("orchestrator stopped");
        Ok(())
    }

    async fn in_session(
        &mut self,
        lab: &Lab,
        desk: &Desk,
        orchestrator: &Orchestrator,
        launcher: &mut Launcher,
    ) -> Result<()> {
        let screen = desk.screen();
        let tray = launcher.tray(desk).await?;
        self.done("tray icon is in the panel");

        tray.click("New desktop").await?;
        let web = launcher.web(lab).await?;
        web.screen("progress", WINDOW).await?;
        self.done("click in the tray, progress window");
        let shot = self.folder.join("progress.png");
        web.screenshot(&shot).await?;
        self.report.screenshots.push(shot);

        let (window, desktop) = rdp_window(desk).await?;
        self.done("desktop made, RDP client open");
        let guest = orchestrator.guest(desktop);
        desktop_is_up(&guest).await?;
        let picture = screen
            .still_picture(200, Duration::from_secs(3), LOGIN)
            .await?;
        self.done("XFCE visible");
        self.shot("desktop.png", |path| picture.save(path))?;

        let nonce = format!("mayfly-{}", mayfly_api::SessionId::new());
        screen.focus(window)?;
        screen.press("ctrl+alt+t")?;
        process_runs(&guest, "xfce4-terminal").await?;
        screen
            .changed_picture(&picture, Duration::from_secs(3), LOGIN)
            .await?;
        self.done("terminal opened by keyboard through RDP");
        // A shell that is not up yet loses what is typed: once more, then.
        until("the nonce is in the desktop", LOGIN, async || {
            let found = guest.shell("cat /home/*/nonce.txt || true", INSIDE).await?;
            if found.trim() == nonce {
                return Ok(Some(()));
            }
            screen.type_text(&format!("echo {nonce} > nonce.txt"))?;
            screen.press("Return")?;
            tokio::time::sleep(Duration::from_secs(5)).await;
            Ok(None)
        })
        .await?;
        self.done("nonce typed, and read back inside");
        let picture = screen
            .still_picture(200, Duration::from_secs(2), LOGIN)
            .await?;
        self.shot("terminal.png", |path| picture.save(path))?;

        screen.close(window)?;
        web.enter_window().await?;
        web.screen("countdown", WINDOW).await?;
        self.done("client closed, countdown window");
        let shot = self.folder.join("countdown.png");
        web.screenshot(&shot).await?;
        self.report.screenshots.push(shot);
        until("the machine is gone", WINDOW, async || {
            Ok(lab.leftovers().is_empty().then_some(()))
        })
        .await
        .with_context(|| lab.leftovers().to_string())?;
        self.done("countdown over, machine gone");

        tray.click("New desktop").await?;
        let (_, next) = rdp_window(desk).await?;
        ensure!(next != desktop, "{next} was given twice");
        let guest = orchestrator.guest(next);
        let search =
            format!("grep -rlF {nonce} /home /root /tmp /var /run /etc 2>/dev/null || true");
        let found = guest.shell(&search, INSIDE).await?;
        ensure!(
            found.is_empty(),
            "the next desktop knows the nonce: {found}"
        );
        self.done("next desktop knows nothing of the first");
        tray.click("Destroy the desktop and quit").await?;
        let status = launcher.process().exit(WINDOW).await?;
        ensure!(status.success(), "the launcher quit with {status}");
        until("the second machine is gone", WINDOW, async || {
            Ok(lab.leftovers().is_empty().then_some(()))
        })
        .await?;
        self.done("quit, second machine gone");
        Ok(())
    }

    /// A stage is over.
    fn done(&mut self, name: &str) {
        let ms = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.since = Instant::now();
        println!("{:>8.1} s  {name}", Duration::from_millis(ms).as_secs_f64());
        self.report.stages.push(Stage {
            name: name.to_owned(),
            ms,
        });
    }

    fn shot(&mut self, name: &str, save: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let path = self.folder.join(name);
        save(&path)?;
        self.report.screenshots.push(path);
        Ok(())
    }

    fn write(&self) -> Result<()> {
        std::fs::create_dir_all(&self.folder)?;
        let path = self.folder.join("demo.json");
        std::fs::write(&path, serde_json::to_string_pretty(&self.report)? + "\n")
            .with_context(|| format!("writing {}", path.display()))?;
        println!("{}", path.display());
        Ok(())
    }
}

/// Waits for the RDP client's window, which is named after its desktop.
async fn rdp_window(desk: &Desk) -> Result<(u32, DesktopName)> {
    let window = desk.screen().window("desktop-", BOOT).await?;
    for title in desk.screen().windows()? {
        let name = title.split_whitespace().find_map(|word| word.parse().ok());
        if let Some(name) = name {
            return Ok((window, name));
        }
    }
    bail!("the RDP client's window names no desktop")
}

/// Waits until panel and desktop of XFCE run inside.
async fn desktop_is_up(guest: &Guest) -> Result<()> {
    for program in ["xfce4-panel", "xfdesktop"] {
        process_runs(guest, program).await?;
    }
    Ok(())
}

async fn process_runs(guest: &Guest, program: &str) -> Result<()> {
    let what = format!("{program} runs in the desktop");
    until(&what, LOGIN, async || {
        let found = guest
            .run(&["/usr/bin/pgrep", "-x", program], INSIDE)
            .await?;
        Ok((found.code == 0).then_some(()))
    })
    .await
}
