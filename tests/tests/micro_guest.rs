//! Sessions on real machines of the `qemu` provider, with the micro guest in them: cloud kernel, real agent, TLS on 3389.
//!
//! Every scenario ends with nothing left, counted from `/proc`, sockets and files.

use anyhow::{Context, Result, ensure};
use mayfly_api::{
    EndReason, Heartbeat, Keep, ProblemCode, RdpClientState, Session, SessionPhase, StageName,
};
use mayfly_tests::caller::Caller;
use mayfly_tests::lab::{Desk, Lab, Launcher, Orchestrator, Provider, image_folder, until};
use mayfly_tests::sessions::{END, Held, READY};
use secrecy::ExposeSecret;
use std::time::Duration;

async fn start(lab: &Lab, limits: &str) -> Result<Orchestrator> {
    let provider = Provider::Qemu(image_folder("MAYFLY_MICRO_GUEST")?);
    Orchestrator::start(lab, &provider, limits).await
}

#[tokio::test]
async fn a_desktop_shows_the_announced_certificate_and_its_end_leaves_nothing() -> Result<()> {
    let lab = Lab::new("micro end")?;
    let orchestrator = start(&lab, "").await?;
    let held = Held::create(&orchestrator).await?;
    let early = orchestrator
        .client()
        .credentials(held.id, &held.secret)
        .await;
    ensure!(
        early.is_err_and(|e| e.code() == Some(ProblemCode::Conflict)),
        "a password before there is a desktop"
    );

    let session = held.ready(&orchestrator).await?;
    let stages: Vec<StageName> = session.stages.iter().map(|s| s.name).collect();
    assert_eq!(stages, StageName::CREATE);
    assert!(
        session.stages.iter().all(|s| s.duration_ms.is_some()),
        "{:?}",
        session.stages
    );
    let password = orchestrator
        .client()
        .credentials(held.id, &held.secret)
        .await?
        .password;
    assert!(password.expose_secret().len() >= 16);

    let caller = held.call(&orchestrator).await?;
    held.until(&orchestrator, "the connection is seen", END, |s| {
        s.phase == SessionPhase::Connected
    })
    .await?;
    drop(caller);
    held.until(&orchestrator, "its end is seen", END, |s| {
        s.phase == SessionPhase::Disconnected
    })
    .await?;

    let ended = held.destroyed(&orchestrator).await?;
    assert_eq!(
        (ended.phase, ended.end_reason),
        (SessionPhase::Ended, Some(EndReason::Requested))
    );
    let late = orchestrator
        .client()
        .credentials(held.id, &held.secret)
        .await;
    ensure!(
        late.is_err_and(|e| e.code() == Some(ProblemCode::Conflict)),
        "a password after the end"
    );
    lab.nothing_is_left()
}

#[tokio::test]
async fn cancel_in_each_phase_leaves_nothing() -> Result<()> {
    let lab = Lab::new("micro cancel")?;
    let orchestrator = start(&lab, "").await?;
    for stage in StageName::CREATE {
        let held = Held::create(&orchestrator).await?;
        held.reach(&orchestrator, stage).await?;
        let ended = held.destroyed(&orchestrator).await?;
        assert_eq!(
            (ended.phase, ended.end_reason),
            (SessionPhase::Ended, Some(EndReason::Requested)),
            "{stage:?}"
        );
        lab.nothing_is_left()
            .with_context(|| format!("cancelled in {stage:?}"))?;
    }
    Ok(())
}

#[tokio::test]
async fn an_orchestrator_killed_in_each_phase_converges_and_leaves_nothing() -> Result<()> {
    let lab = Lab::new("micro kill")?;
    let mut orchestrator = start(&lab, "").await?;
    for stage in StageName::CREATE {
        let held = Held::create(&orchestrator).await?;
        held.reach(&orchestrator, stage).await?;
        orchestrator.crash().await?;
        orchestrator.start_again(&lab).await?;
        held.ready(&orchestrator)
            .await
            .with_context(|| format!("killed in {stage:?}"))?;

        // And once more while it destroys.
        orchestrator.client().destroy(held.id, &held.secret).await?;
        orchestrator.crash().await?;
        orchestrator.start_again(&lab).await?;
        let ended = held.ended(&orchestrator).await?;
        assert_eq!(ended.phase, SessionPhase::Ended, "{stage:?}");
        lab.nothing_is_left()
            .with_context(|| format!("killed in {stage:?}"))?;
    }
    Ok(())
}

#[tokio::test]
async fn a_restart_in_use_is_not_noticed_and_the_idle_rule_still_ends_it() -> Result<()> {
    let lab = Lab::new("micro restart")?;
    let mut orchestrator = start(&lab, "idle_s = 5").await?;
    let held = Held::create(&orchestrator).await?;
    let before = held.ready(&orchestrator).await?;
    let mut caller = held.call(&orchestrator).await?;
    let connected = |s: &Session| s.phase == SessionPhase::Connected;
    held.until(&orchestrator, "the connection is seen", END, connected)
        .await?;
    let ends = caller.ends()?;

    orchestrator.crash().await?;
    caller.still_there().await?;
    orchestrator.start_again(&lab).await?;
    let after = held
        .until(
            &orchestrator,
            "the connection is seen again",
            END,
            connected,
        )
        .await?;
    assert_eq!(after.desktop, before.desktop);
    caller.still_there().await?;
    assert_eq!(caller.ends()?, ends);

    // Nobody tells the orchestrator: neither launcher nor client.
    drop(caller);
    let ended = held.ended(&orchestrator).await?;
    assert_eq!(
        (ended.phase, ended.end_reason),
        (SessionPhase::Ended, Some(EndReason::Idle))
    );
    lab.nothing_is_left()
}

#[tokio::test]
async fn a_desktop_that_fails_leaves_its_console_without_secrets_and_nothing_else() -> Result<()> {
    let lab = Lab::new("micro words")?;
    let orchestrator = start(&lab, "").await?;
    let held = Held::create(&orchestrator).await?;
    let session = held.ready(&orchestrator).await?;
    let credentials = orchestrator
        .client()
        .credentials(held.id, &held.secret)
        .await?;
    let password = credentials.password.expose_secret();
    let guest = orchestrator.guest(session.desktop.context("a desktop")?);
    let last = format!(
        "printf 'the password is {password}\\033[1m, the last of the console\\n' >/dev/console; poweroff -f"
    );
    // Its answer goes with the machine.
    let _ = guest.shell(&last, END).await;
    let ended = held.ended(&orchestrator).await?;
    assert_eq!(ended.end_reason, Some(EndReason::MachineLost));
    lab.nothing_is_left()?;

    let words = orchestrator.logs(&lab, held.id)?;
    for part in [
        "==== console ====\n",
        "the password is …, the last of the console\n",
    ] {
        ensure!(words.contains(part), "{part:?} in {words}");
    }
    ensure!(!words.contains(password), "a password in {words}");
    Ok(())
}

#[tokio::test]
async fn two_people_at_once_share_nothing() -> Result<()> {
    let lab = Lab::new("micro two")?;
    let orchestrator = start(&lab, "").await?;
    let (one, two) = (
        Held::create(&orchestrator).await?,
        Held::create(&orchestrator).await?,
    );
    let (first, second) = (
        one.ready(&orchestrator).await?,
        two.ready(&orchestrator).await?,
    );
    let rdp = |s: &Session| s.rdp.clone().context("no address");
    let (a, b) = (rdp(&first)?, rdp(&second)?);
    assert_ne!(first.desktop, second.desktop);
    assert_ne!(a.address, b.address);
    assert_ne!(a.certificate_sha256, b.certificate_sha256);
    let password = async |held: &Held| {
        let credentials = orchestrator
            .client()
            .credentials(held.id, &held.secret)
            .await?;
        anyhow::Ok(credentials.password.expose_secret().to_owned())
    };
    assert_ne!(password(&one).await?, password(&two).await?);

    let stranger = orchestrator.client().destroy(two.id, &one.secret).await;
    ensure!(
        stranger.is_err_and(|e| e.code() == Some(ProblemCode::NotFound)),
        "another's secret opens a session"
    );

    one.destroyed(&orchestrator).await?;
    assert_eq!(two.get(&orchestrator).await?.phase, SessionPhase::Ready);
    two.call(&orchestrator).await?;
    two.destroyed(&orchestrator).await?;
    lab.nothing_is_left()
}

#[tokio::test]
async fn a_kept_desktop_outlives_the_idle_rule_until_it_is_given_up() -> Result<()> {
    let lab = Lab::new("micro keep")?;
    let orchestrator = start(&lab, "idle_s = 3").await?;
    let held = Held::create(&orchestrator).await?;
    held.ready(&orchestrator).await?;
    let caller = held.call(&orchestrator).await?;
    held.until(&orchestrator, "the connection is seen", END, |s| {
        s.phase == SessionPhase::Connected
    })
    .await?;
    let keep = |seconds| {
        orchestrator
            .client()
            .keep(held.id, &held.secret, Keep { seconds })
    };
    let kept = keep(600).await?;
    drop(caller);
    let disconnected = |s: &Session| s.phase == SessionPhase::Disconnected;
    let session = held
        .until(&orchestrator, "its end is seen", END, disconnected)
        .await?;
    let ends_at = session
        .ends_at
        .context("a kept desktop says when it ends")?;
    let left = ends_at.duration_since(kept.last_activity).as_secs();
    assert!(
        (590..=620).contains(&left),
        "kept for 600 s, ends {left} s later"
    );

    keep(0).await?;
    let ended = held.ended(&orchestrator).await?;
    assert_eq!(ended.end_reason, Some(EndReason::Idle));
    lab.nothing_is_left()
}

#[tokio::test]
async fn a_launcher_that_vanishes_while_its_desktop_is_made_leaves_nothing() -> Result<()> {
    let lab = Lab::new("micro abandoned")?;
    let orchestrator = start(&lab, "lease_s = 2").await?;
    let held = Held::create(&orchestrator).await?;
    let beat = Heartbeat {
        client: RdpClientState::NotStarted,
    };
    orchestrator
        .client()
        .heartbeat(held.id, &held.secret, beat)
        .await?;
    let ended = held.ended(&orchestrator).await?;
    assert_eq!(
        (ended.phase, ended.end_reason),
        (SessionPhase::Ended, Some(EndReason::Abandoned))
    );
    lab.nothing_is_left()
}

#[tokio::test]
async fn the_prototypes_three_calls_still_work_and_a_caller_that_hangs_up_cancels_nothing()
-> Result<()> {
    let lab = Lab::new("micro prototype")?;
    let orchestrator = start(&lab, "").await?;
    let http = reqwest::Client::builder().no_proxy().build()?;
    let url = |path: &str| format!("{}{path}", orchestrator.url());

    // Somebody asks and hangs up.
    let hasty = http
        .post(url("/api/session/create"))
        .json(&serde_json::json!({"username": "ada"}));
    let _ = hasty.timeout(Duration::from_millis(500)).send().await;
    let listed = until(
        "the desktop of the one who hung up is ready",
        READY,
        async || {
            let list: serde_json::Value =
                http.get(url("/api/sessions")).send().await?.json().await?;
            let session = list["sessions"][0].clone();
            Ok((session["status"] == "ready").then_some(session))
        },
    )
    .await?;
    assert_eq!(listed["username"], "ada");
    assert!(listed["last_activity"].is_string(), "{listed}");
    assert!(listed.get("password").is_none(), "a list shows no password");

    let made: serde_json::Value = http
        .post(url("/api/session/create"))
        .json(&serde_json::json!({"username": "grace"}))
        .send()
        .await?
        .error_for_status()?
        .json()
        .await?;
    for field in [
        "session_id",
        "vm_name",
        "vm_ip",
        "username",
        "created_at",
        "status",
        "password",
        "last_activity",
    ] {
        assert!(made[field].is_string(), "{field} is missing in {made}");
    }
    let address = format!("{}:3389", made["vm_ip"].as_str().unwrap_or_default());
    Caller::connect(address.parse()?).await?;

    for session in [&listed, &made] {
        let gone = http
            .post(url("/api/session/destroy"))
            .json(&serde_json::json!({"session_id": session["session_id"]}))
            .send()
            .await?;
        assert!(gone.status().is_success(), "{}", gone.text().await?);
    }
    lab.nothing_is_left()
}

#[tokio::test]
async fn quitting_the_launcher_while_its_desktop_is_made_leaves_nothing() -> Result<()> {
    let lab = Lab::new("micro quit")?;
    let orchestrator = start(&lab, "").await?;
    let desk = Desk::start(&lab).await?;
    let mut launcher = Launcher::start(&lab, &desk, orchestrator.url())?;
    let tray = launcher.tray(&desk).await?;
    tray.click("New desktop").await?;
    until("a machine is being made", READY, async || {
        Ok((!lab.leftovers().is_empty()).then_some(()))
    })
    .await?;
    tray.click("Cancel and quit").await?;
    let status = launcher.process().exit(END).await?;
    ensure!(status.success(), "the launcher ended with {status}");
    let gone = until("nothing is left", END, async || {
        Ok(lab.leftovers().is_empty().then_some(()))
    })
    .await;
    gone.with_context(|| lab.leftovers().to_string())
}
