//! The whole chain: a desktop made by Terraform on a site, a member of a real Active Directory domain, used over RDP by a person of
//! that domain with their network shares, and gone without a trace on either side.
//!
//! The site is a lab and not Proxmox VE; everything else is what a customer has.

use anyhow::{Context, Result, ensure};
use mayfly_api::{CreateSession, Credentials, EndReason, SessionPhase};
use mayfly_orchestrator::store::machines::Machines;
use mayfly_orchestrator::store::sqlite::SqliteStore;
use mayfly_tests::lab::{Desk, Lab, Orchestrator, Provider, image_folder, until};
use mayfly_tests::realm::Realm;
use mayfly_tests::sessions::{END, Held};
use mayfly_tests::site::{FIRST_VM_ID, Site, alone, kill};
use secrecy::ExposeSecret as _;
use serde_json::json;
use std::time::{Duration, Instant};

/// A login over RDP shows XFCE within this, emulated, on a busy machine.
const LOGIN: Duration = Duration::from_secs(300);

/// Milliseconds of each part of the story, for the report.
struct Story {
    begin: Instant,
    parts: Vec<serde_json::Value>,
}

impl Story {
    fn tell(&mut self, what: &str) {
        let ms = u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        println!("{ms:>8} ms  {what}");
        self.parts.push(json!({"what": what, "ms": ms}));
        self.begin = Instant::now();
    }
}

#[test]
fn a_person_of_the_domain_works_with_their_files_and_nothing_is_left() -> Result<()> {
    alone(
        "a_person_of_the_domain_works_with_their_files_and_nothing_is_left",
        whole_chain,
    )
}

async fn whole_chain() -> Result<()> {
    let mut story = Story {
        begin: Instant::now(),
        parts: Vec::new(),
    };
    let realm = Realm::start()?;
    story.tell("domain provisioned");
    let mut site = Site::start(&image_folder("MAYFLY_DESKTOP_IMAGE")?, json!({}))?;
    let lab = Lab::new("domain")?;
    let configuration = format!(
        "{}memory_mib = 1536\n{}{}",
        realm.template(),
        site.configuration()?,
        realm.configuration()
    );
    let provider = Provider::Terraform(configuration);
    // Nobody beats here for the session while a stranger is tried.
    let limits = "idle_s = 5\nlease_s = 1800";
    let orchestrator = Orchestrator::start(&lab, &provider, limits).await?;
    let desk = Desk::start(&lab).await?;
    story.tell("site, orchestrator and desk started");

    let wish = CreateSession {
        user: Some("alice".to_owned()),
        ..CreateSession::default()
    };
    let held = Held::ask(&orchestrator, &wish).await?;
    let session = held.ready(&orchestrator).await?;
    let name = session.desktop.context("a desktop")?;
    let vmid = FIRST_VM_ID + name.number();
    story.tell("desktop made, joined and ready");
    for stage in &session.stages {
        story
            .parts
            .push(json!({"stage": stage.name, "ms": stage.duration_ms}));
    }
    assert_eq!(
        realm.accounts()?,
        [format!("{}$", name.to_string().to_uppercase())]
    );
    let given = orchestrator
        .client()
        .credentials(held.id, &held.secret)
        .await?;
    ensure!(
        given.password.expose_secret().is_empty(),
        "a person of the domain has a password of their own"
    );

    // Another person of the domain, with their right password.
    let bob = credentials(&realm, "bob")?;
    let mut stranger = held.view_as(&lab, &desk, &orchestrator, &bob).await?;
    until("bob is refused", LOGIN, async || {
        let log = site.shell(vmid, "cat /var/log/xrdp-sesman.log")?;
        // By the account, not by the password.
        let refused = log.contains("AUTHFAIL: user=bob") && log.contains("pam_acct_mgmt failed");
        Ok(refused.then_some(()))
    })
    .await?;
    stranger.crash().await?;
    let sessions = site.shell(vmid, "pgrep -x Xorg || true")?;
    ensure!(sessions.is_empty(), "bob got in: {sessions}");
    story.tell("another person refused");

    let alice = credentials(&realm, "alice")?;
    // As the launcher opens it, which knows no password of hers: xrdp's own login window asks for it.
    let mut client = held.view(&lab, &desk, &orchestrator).await?;
    let still = Duration::from_secs(3);
    let window = desk.screen().window("FreeRDP", LOGIN).await?;
    let asked = desk.screen().still_picture(5, still, LOGIN).await?;
    std::fs::create_dir_all(Lab::reports())?;
    asked.save(&Lab::reports().join("login.png"))?;
    desk.screen().focus(window)?;
    desk.screen().type_text(alice.password.expose_secret())?;
    desk.screen().press("Return")?;
    held.until(&orchestrator, "the connection is seen", LOGIN, |s| {
        s.phase == SessionPhase::Connected
    })
    .await?;
    until("XFCE runs as alice", LOGIN, async || {
        client.must_run()?;
        let panel = site.shell(vmid, "pgrep -u alice -x xfce4-panel || true")?;
        Ok((!panel.is_empty()).then_some(()))
    })
    .await?;
    story.tell("alice logged in over RDP");

    let mounts = site.shell(vmid, "findmnt -n -t cifs -o TARGET,OPTIONS")?;
    ensure!(
        mounts.contains("/home/alice/Partage") && mounts.contains("/home/alice/Home"),
        "{mounts}"
    );
    // From her session, as she would: her own process writes until the very end.
    site.shell(
        vmid,
        "runuser -u alice -- sh -c 'echo bonjour > ~/Partage/note.txt'",
    )?;
    assert_eq!(
        std::fs::read_to_string(realm.share("partage/note.txt"))?,
        "bonjour\n"
    );
    site.shell(
        vmid,
        "runuser -u alice -- setsid sh -c 'exec > ~/Home/diary; i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done' \
         </dev/null >/dev/null 2>&1 &",
    )?;
    until("she writes", END, async || {
        Ok(realm.share("home/alice/diary").exists().then_some(()))
    })
    .await?;
    story.tell("shares mounted and written");
    let picture = desk.screen().still_picture(500, still, LOGIN).await?;
    picture.save(&Lab::reports().join("proxmox.png"))?;
    story.tell("her screen has come to rest");

    client.crash().await?;
    held.until(&orchestrator, "it is seen that she left", END, |s| {
        s.phase == SessionPhase::Disconnected || s.phase == SessionPhase::Ending
    })
    .await?;
    let ended = held.ended(&orchestrator).await?;
    assert_eq!(
        (ended.phase, ended.end_reason),
        (SessionPhase::Ended, Some(EndReason::Idle))
    );
    story.tell("client closed, desktop gone");

    // Her file ends with a whole line: it was closed, not cut.
    let diary = std::fs::read_to_string(realm.share("home/alice/diary"))?;
    let lines: Vec<u64> = diary.lines().map(str::parse).collect::<Result<_, _>>()?;
    ensure!(
        diary.ends_with('\n') && !lines.is_empty() && lines.windows(2).all(|w| w[0] + 1 == w[1]),
        "her diary is broken: {} lines",
        lines.len()
    );
    let machines = site.machines()?;
    ensure!(machines.is_empty(), "the site has {machines:?}");
    let accounts = realm.accounts()?;
    ensure!(accounts.is_empty(), "the domain has {accounts:?}");
    lab.nothing_is_left()?;
    let store = SqliteStore::open(&lab.path("state/mayfly.db")).await?;
    let reserved = store.reserved().await?;
    store.close().await;
    ensure!(reserved.is_empty(), "reserved: {reserved:?}");
    story.tell("nothing is left");
    by_script(&mut site, &lab, &desk, &orchestrator, &realm).await?;
    story.tell("bob's session by the prototype's calls, from the request to gone");
    for secret in ["alice", "bob", "svc-mayfly"] {
        let password = realm.password(secret)?;
        ensure!(!told(&lab, &password)?, "the password of {secret} was told");
    }
    let report = json!({"ok": true, "leftovers": [], "story": story.parts});
    std::fs::write(
        Lab::reports().join("proxmox.json"),
        serde_json::to_string_pretty(&report)?,
    )?;
    Ok(())
}

/// Somebody else's session, by a script that knows the prototype's calls alone.
async fn by_script(
    site: &mut Site,
    lab: &Lab,
    desk: &Desk,
    orchestrator: &Orchestrator,
    realm: &Realm,
) -> Result<()> {
    let file = lab.path("tmp").join("password");
    std::fs::write(&file, realm.password("bob")?)?;
    let mut command = lab.command("sh");
    desk.environment(&mut command);
    command
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/prototype.sh"))
        .args([orchestrator.url(), "bob"])
        .arg(&file);
    let mut script = lab.start("prototype", command)?;
    until("XFCE runs as bob", LOGIN, async || {
        script.must_run()?;
        let machine = site.machines()?.into_iter().find(|m| m.running);
        let Some(machine) =
            machine.filter(|_| lab.running("xfreerdp").is_ok_and(|r| !r.is_empty()))
        else {
            return Ok(None);
        };
        let panel = site.shell(machine.vmid, "pgrep -u bob -x xfce4-panel || true")?;
        Ok((!panel.is_empty()).then_some(()))
    })
    .await?;
    for pid in lab.running("xfreerdp")? {
        kill(pid)?;
    }
    let exit = script.exit(END).await?;
    ensure!(exit.success(), "{exit}: {}", script.last_words());
    std::fs::remove_file(&file)?;
    let machines = site.machines()?;
    ensure!(machines.is_empty(), "the site has {machines:?}");
    let accounts = realm.accounts()?;
    ensure!(accounts.is_empty(), "the domain has {accounts:?}");
    lab.nothing_is_left()
}

/// Whether it is in a log or a file of the state.
fn told(lab: &Lab, secret: &str) -> Result<bool> {
    let found = std::process::Command::new("grep")
        .args([
            "--recursive",
            "--quiet",
            "--text",
            "--fixed-strings",
            "--",
            secret,
        ])
        .arg(lab.path("log"))
        .arg(lab.path("state"))
        .status()?;
    ensure!(found.code().is_some_and(|code| code < 2), "grep: {found}");
    Ok(found.success())
}

fn credentials(realm: &Realm, user: &str) -> Result<Credentials> {
    Ok(Credentials {
        user: user.to_owned(),
        password: realm.password(user)?.into(),
    })
}
