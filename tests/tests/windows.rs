//! The windows of the real tray app as a person meets them who has no mouse: the whole flow by Tab, Enter and Escape,
//! in both languages, light and dark; axe-core looks at every screen as it is drawn.
//!
//! Machines are simulated, and the RDP client is a stand-in: a script that says it is FreeRDP and ends as it is told.
//! A real client with a real desktop in it is in `desktop.rs`.

use anyhow::{Context, Result, ensure};
use fantoccini::key::Key;
use mayfly_tests::caller::Caller;
use mayfly_tests::lab::{
    Appearance, Desk, Lab, Launcher, Orchestrator, Provider, Scheme, Web, until,
};
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::time::Duration;

/// A window reacts within this, on a busy machine.
const WINDOW: Duration = Duration::from_secs(60);
/// What `FreeRDP` says when nobody answers at the address.
const REFUSED: i32 = 147;

/// A language, and the little of it that is read here.
struct Language {
    tag: &'static str,
    open: &'static str,
    new_desktop: &'static str,
    kept: &'static str,
    destroyed: &'static str,
    check: &'static str,
    not_an_address: &'static str,
}

const ENGLISH: Language = Language {
    tag: "en",
    open: "Open Mayfly",
    new_desktop: "New desktop",
    kept: "Your desktop is kept",
    destroyed: "Your desktop was destroyed.",
    check: "Check that the address in the settings is right",
    not_an_address: "is not an orchestrator address",
};

const FRENCH: Language = Language {
    tag: "fr",
    open: "Ouvrir Mayfly",
    new_desktop: "Nouveau bureau",
    kept: "Votre bureau est conservé",
    destroyed: "Votre bureau a été détruit.",
    check: "Vérifiez que l’adresse dans les réglages est juste",
    not_an_address: "n’est pas une adresse d’orchestrateur",
};

/// The stand-in for the RDP client.
struct StandIn {
    program: PathBuf,
    end: PathBuf,
}

impl StandIn {
    fn make(lab: &Lab) -> Result<Self> {
        let (program, end) = (lab.path("xfreerdp"), lab.path("end-of-client"));
        mkfifo(&end, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let script = format!(
            "#!/bin/sh\n\
             [ \"$1\" = --version ] && echo 'This is FreeRDP version 2.11.7 (stand-in)' && exit\n\
             read -r code < {}\n\
             exit \"$code\"\n",
            end.display()
        );
        fs::write(&program, script)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        Ok(Self { program, end })
    }

    /// Waits until it runs, and ends it with this exit code.
    async fn end(&self, code: i32) -> Result<()> {
        let mut pipe = until("the RDP client runs", WINDOW, async || {
            // Opens only while somebody reads.
            let mut options = fs::OpenOptions::new();
            options.write(true).custom_flags(OFlag::O_NONBLOCK.bits());
            Ok(options.open(&self.end).ok())
        })
        .await?;
        writeln!(pipe, "{code}").context("ending the RDP client")
    }
}

/// A person at their desk, with the window open. The lab goes last.
struct Person {
    language: &'static Language,
    web: Web,
    launcher: Launcher,
    client: StandIn,
    orchestrator: Orchestrator,
    appearance: Appearance,
    desk: Desk,
    lab: Lab,
}

impl Person {
    async fn sit_down(language: &'static Language) -> Result<Self> {
        let lab = Lab::new(&format!("windows from {}", language.tag))?;
        // The first machine fails. The others boot long enough to be met at it, and are not taken away while they are
        // looked at.
        let provider =
            Provider::SimulatedWith("fault = \"create_fails\"\nfault_count = 1\nboot_ms = 4000");
        let orchestrator = Orchestrator::start(&lab, &provider, "idle_s = 600").await?;
        let desk = Desk::start(&lab).await?;
        let appearance = Appearance::start(&desk, Scheme::Light).await?;
        let client = StandIn::make(&lab)?;
        let settings = format!(
            "orchestrator = {:?}\nlanguage = {:?}\ncountdown = \"2min\"\n[rdp]\nclient = {:?}\n",
            orchestrator.url(),
            language.tag,
            client.program
        );
        let mut launcher = Launcher::start_with(&lab, &desk, &settings)?;
        launcher.tray(&desk).await?.click(language.open).await?;
        let web = launcher.web(&lab).await?;
        Ok(Self {
            language,
            web,
            launcher,
            client,
            orchestrator,
            appearance,
            desk,
            lab,
        })
    }

    /// The window comes to this screen, and the focus is here, not lost with the screen before.
    async fn meets(&self, screen: &str, focus: &str) -> Result<()> {
        self.web.screen(screen, WINDOW).await?;
        let found = self.web.focus_is(focus).await;
        found.with_context(|| format!("on the screen {screen}"))
    }

    /// Tab leads here, once around, and nowhere else; the focus is on the first then.
    async fn can_reach(&self, stops: &[&str]) -> Result<()> {
        let found = self.web.stops().await?;
        ensure!(found == stops, "Tab leads to {found:?}, not {stops:?}");
        Ok(())
    }

    async fn presses(&self, key: Key, on: &str) -> Result<()> {
        self.web.tab_to(on).await?;
        self.web.press(key).await
    }

    /// Looks at the screen, light and dark: a picture for the reports, nothing cut off, and nothing for axe-core to find.
    async fn looks(&self, screen: &str) -> Result<()> {
        let language = self.language.tag;
        self.web.element(&format!("html[lang={language}]")).await?;
        for scheme in [Scheme::Dark, Scheme::Light] {
            self.appearance.set(scheme).await?;
            self.web.follows(scheme).await?;
            let name = format!("windows/{language}-{}/{screen}.png", scheme.name());
            self.web.screenshot(&Lab::reports().join(&name)).await?;
            let (found, cut) = (self.web.complaints().await?, self.web.too_wide().await?);
            ensure!(found.is_empty(), "{name}: {}", found.join("\n"));
            ensure!(cut.is_empty(), "{name}: too wide: {}", cut.join("\n"));
        }
        Ok(())
    }

    async fn the_settings(&mut self, language: &'static Language) -> Result<()> {
        self.presses(Key::Enter, "settings").await?;
        self.meets("settings", "h1").await?;
        self.can_reach(&[
            "orchestrator",
            "countdown",
            "language",
            "client",
            "full_screen",
            "multi_monitor",
            "clipboard",
            "sound",
            "back",
            "save",
        ])
        .await?;
        self.web.press_back_tab().await?;
        self.web.focus_is("save").await?;
        self.web.tab_to("sound").await?;
        self.looks("settings").await?;
        self.web.press(Key::Escape).await?;
        self.meets("home", "new_desktop").await?;

        // Refused settings stay, with the reason.
        self.presses(Key::Enter, "settings").await?;
        self.meets("settings", "h1").await?;
        self.web.tab_to("orchestrator").await?;
        self.web.type_text("ftp://desktops").await?;
        self.web.press(Key::Enter).await?;
        self.web.shows(self.language.not_an_address, WINDOW).await?;
        self.web.focus_is("orchestrator").await?;
        self.looks("settings-refused").await?;

        // Coming back to a field by Tab selects what is in it.
        self.web.press_back_tab().await?;
        self.web.tab_to("orchestrator").await?;
        self.web.type_text(self.orchestrator.url()).await?;
        self.web.tab_to("language").await?;
        // Arrows move through a list without opening it, whichever entry it begins at.
        let chosen = "return document.activeElement.value";
        for key in [Key::Up, Key::Up, Key::Down, Key::Down] {
            if self.web.client().execute(chosen, Vec::new()).await? != language.tag {
                self.web.press(key).await?;
            }
        }
        self.presses(Key::Enter, "orchestrator").await?;
        self.meets("home", "new_desktop").await?;
        self.language = language;
        self.web.shows(language.new_desktop, WINDOW).await
    }

    async fn a_desktop_that_cannot_be_made(&self) -> Result<()> {
        self.web.press(Key::Enter).await?;
        self.meets("error", "retry").await?;
        self.web.element("li.failed").await?;
        self.can_reach(&[
            "dismiss",
            "settings",
            "summary",
            "window-copy-diagnostics",
            "retry",
        ])
        .await?;
        self.looks("error-step").await?;
        self.presses(Key::Enter, "retry").await
    }

    async fn a_desktop_cancelled(&mut self) -> Result<()> {
        self.meets("progress", "h1").await?;
        self.web
            .element("li:nth-child(3)[aria-current=step]")
            .await?;
        // While it is looked at, nothing goes on.
        self.orchestrator.process().signal(Signal::SIGSTOP)?;
        self.can_reach(&["summary", "cancel", "settings"]).await?;
        self.web.focus_is("summary").await?;
        self.web.press(Key::Enter).await?;
        self.web.element("details[open]").await?;
        self.looks("progress").await?;
        self.presses(Key::Enter, "cancel").await?;
        self.meets("ending", "h1").await?;
        self.looks("ending").await?;
        self.orchestrator.process().signal(Signal::SIGCONT)?;
        self.meets("home", "new_desktop").await?;
        self.looks("home-cancelled").await
    }

    async fn a_desktop_in_use(&mut self) -> Result<()> {
        self.web.press(Key::Enter).await?;
        self.meets("in_use", "h1").await?;
        self.can_reach(&["window-copy-address", "destroy", "settings"])
            .await?;
        self.looks("in-use").await?;

        // The client does not come through.
        self.client.end(REFUSED).await?;
        self.meets("error", "retry").await?;
        self.can_reach(&[
            "open_settings",
            "destroy",
            "settings",
            "window-copy-address",
            "summary",
            "window-copy-diagnostics",
            "retry",
        ])
        .await?;
        self.looks("error-client").await?;
        self.presses(Key::Enter, "retry").await?;
        self.meets("in_use", "h1").await?;

        // It does: the window goes, and comes back with the countdown when the client is closed.
        let address = self.web.element("main code").await?.text().await?;
        let caller = Caller::connect(address.parse()?).await?;
        until("the window is out of the way", WINDOW, async || {
            let windows = self.web.client().windows().await?;
            Ok(windows.is_empty().then_some(()))
        })
        .await?;
        drop(caller);
        self.client.end(0).await?;
        self.web.enter_window().await?;
        self.meets("countdown", "reconnect").await?;
        self.can_reach(&["keep", "destroy", "settings", "reconnect"])
            .await?;
        self.looks("countdown").await?;
        self.presses(Key::Enter, "reconnect").await?;
        self.meets("in_use", "h1").await?;

        // Closed again, and kept.
        self.client.end(0).await?;
        self.meets("countdown", "reconnect").await?;
        self.web.press(Key::Escape).await?;
        self.meets("in_use", "reconnect").await?;
        self.web.shows(self.language.kept, WINDOW).await?;
        self.can_reach(&["destroy", "settings", "window-copy-address", "reconnect"])
            .await?;
        self.looks("kept").await?;

        self.presses(Key::Enter, "destroy").await?;
        self.meets("home", "new_desktop").await?;
        self.web.shows(self.language.destroyed, WINDOW).await
    }

    async fn an_orchestrator_that_is_away(&mut self) -> Result<()> {
        self.orchestrator.stop().await?;
        self.web.press(Key::Enter).await?;
        self.meets("error", "retry").await?;
        self.web.shows(self.language.check, WINDOW).await?;
        self.web.shows(self.orchestrator.url(), WINDOW).await?;
        self.can_reach(&[
            "dismiss",
            "settings",
            "summary",
            "window-copy-diagnostics",
            "retry",
        ])
        .await?;
        self.looks("error-unreachable").await?;
        self.presses(Key::Enter, "window-copy-diagnostics").await?;
        self.web.element("main .tick").await?;
        self.looks("error-copied").await?;
        self.presses(Key::Enter, "summary").await?;
        self.can_reach(&[
            "pre",
            "window-copy-diagnostics",
            "retry",
            "dismiss",
            "settings",
            "summary",
        ])
        .await?;
        self.looks("error-diagnostics").await?;
        self.presses(Key::Enter, "dismiss").await?;
        self.meets("home", "new_desktop").await
    }

    async fn goes_through_it_all(&mut self, language: &'static Language) -> Result<()> {
        self.meets("home", "new_desktop").await?;
        self.can_reach(&["settings", "new_desktop"]).await?;
        self.looks("home").await?;
        self.the_settings(language).await?;
        self.a_desktop_that_cannot_be_made().await?;
        self.a_desktop_cancelled().await?;
        self.a_desktop_in_use().await?;
        self.an_orchestrator_that_is_away().await
    }
}

async fn the_whole_flow(from: &'static Language, to: &'static Language) -> Result<()> {
    let mut person = Person::sit_down(from).await?;
    let outcome = person.goes_through_it_all(to).await;
    if outcome.is_err() {
        let picture = format!("windows/failure-{}.png", to.tag);
        person
            .desk
            .screen()
            .picture()?
            .save(&Lab::reports().join(picture))?;
    }
    outcome?;
    let status = person.launcher.quit().await?;
    ensure!(status.success(), "the launcher quit with {status}");
    let left = person.lab.leftovers();
    ensure!(left.is_empty(), "{left}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn english_is_chosen_and_everything_works_by_keyboard_light_and_dark() -> Result<()> {
    the_whole_flow(&FRENCH, &ENGLISH).await
}

#[tokio::test(flavor = "multi_thread")]
async fn french_is_chosen_and_everything_works_by_keyboard_light_and_dark() -> Result<()> {
    the_whole_flow(&ENGLISH, &FRENCH).await
}
