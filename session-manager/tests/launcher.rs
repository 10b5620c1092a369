//! The whole session manager against an orchestrator at the HTTP edge and a client that is a script.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test")]

mod world;

use mayfly_api::{EndReason, SessionPhase};
use mayfly_session_manager::Exit;
use mayfly_session_manager::record::Records;
use mayfly_session_manager::view::{Action, Countdown, Screen, Settings};
use world::desk::{Desk, in_use, screen};
use world::{Making, PASSWORD, PATIENCE, alive, all_files};

#[tokio::test]
async fn from_the_click_to_destroyed() {
    let desk = Desk::new(Making::Ready).await;
    let handle = desk.launcher(Countdown::TenSeconds);
    handle.act(Action::NewDesktop);
    desk.client.runs().await;
    screen(&handle, "in use", in_use).await;
    desk.orchestrator
        .move_on(|s| s.phase = SessionPhase::Connected);

    // The password went through standard input and nowhere else.
    assert_eq!(desk.client.read("stdin"), format!("{PASSWORD}\n"));
    assert!(!desk.client.read("args").contains(PASSWORD));
    assert!(desk.client.read("args").contains("/v:127.77.0.7:3389"));
    assert_eq!(Records::new(&desk.places().data_dir).all().len(), 1);
    let written = all_files(desk.dir.path());
    assert!(
        !written.contains(PASSWORD) && !written.contains("secret-of"),
        "{written}"
    );

    desk.client.ends(0);
    screen(&handle, "countdown", |s| {
        matches!(s, Screen::Countdown { .. })
    })
    .await;
    assert_eq!(desk.orchestrator.destroys(), 0);
    handle.act(Action::Destroy);
    let home = screen(&handle, "home", |s| matches!(s, Screen::Home { .. })).await;
    assert!(matches!(home, Screen::Home { notice: Some(n) } if n.id == "notice-destroyed"));
    assert_eq!(desk.orchestrator.destroys(), 1);
    world::until("the record is gone", || {
        Records::new(&desk.places().data_dir).all().is_empty()
    })
    .await;
    handle.act(Action::Quit);
    assert_eq!(handle.wait_exit().await, Exit::Clean);
}

#[tokio::test]
async fn a_lost_connection_keeps_the_desktop_and_reconnects() {
    let desk = Desk::new(Making::Ready).await;
    let handle = desk.launcher(Countdown::TenSeconds);
    handle.act(Action::NewDesktop);
    desk.client.runs().await;
    screen(&handle, "in use", in_use).await;
    let windows = handle.windows();
    desk.orchestrator
        .move_on(|s| s.phase = SessionPhase::Connected);
    world::until("the window hides", || windows.borrow().page.is_none()).await;
    desk.client.ends(131);
    desk.orchestrator
        .move_on(|s| s.phase = SessionPhase::Disconnected);
    let held = screen(&handle, "held", |s| {
        matches!(
            s,
            Screen::InUse {
                client_open: false,
                ..
            }
        )
    })
    .await;
    assert!(matches!(held, Screen::InUse { headline, .. } if headline.id == "held-lost"));
    world::until("it is held", || desk.orchestrator.keeps() == [120]).await;
    handle.act(Action::Reconnect);
    desk.client.runs().await;
    screen(&handle, "in use again", in_use).await;
    assert_eq!(
        desk.orchestrator.keeps(),
        [120],
        "until somebody is connected"
    );
    world::until("the hold is given up", || {
        desk.orchestrator
            .move_on(|s| s.phase = SessionPhase::Connected);
        desk.orchestrator.keeps() == [120, 0]
    })
    .await;
    assert_eq!(desk.orchestrator.destroys(), 0);
    handle.act(Action::Quit);
    assert!(matches!(
        handle.wait_exit().await,
        Exit::Acknowledged(_) | Exit::Clean
    ));
}

#[tokio::test]
async fn quit_in_use_destroys_and_stops_the_client() {
    let desk = Desk::new(Making::Ready).await;
    let handle = desk.launcher(Countdown::Never);
    handle.act(Action::NewDesktop);
    let pid = desk.client.runs().await;
    screen(&handle, "in use", in_use).await;
    handle.act(Action::Quit);
    assert!(matches!(
        handle.wait_exit().await,
        Exit::Acknowledged(_) | Exit::Clean
    ));
    assert_eq!(desk.orchestrator.destroys(), 1);
    world::until("the client is stopped", || !alive(pid)).await;
    assert!(Records::new(&desk.places().data_dir).all().is_empty());
}

#[tokio::test]
async fn quit_always_ends_even_if_the_orchestrator_refuses() {
    let desk = Desk::new(Making::Stuck).await;
    let handle = desk.launcher(Countdown::TenSeconds);
    handle.act(Action::NewDesktop);
    desk.orchestrator
        .until("it is asked", |made| made.len() == 1)
        .await;
    screen(
        &handle,
        "progress",
        |s| matches!(s, Screen::Progress { headline, .. } if headline.id == "stage-booting"),
    )
    .await;
    desk.orchestrator.refuse_destroys();
    handle.act(Action::Quit);
    let left = tokio::time::timeout(PATIENCE, handle.wait_exit())
        .await
        .unwrap();
    let id = desk.orchestrator.made()[0].id;
    assert_eq!(left, Exit::LeftBehind(Some(id)));
    // The next launcher finds it.
    assert_eq!(Records::new(&desk.places().data_dir).all()[0].id, id);
}

#[tokio::test]
async fn a_failure_keeps_the_step_that_failed_and_retry_asks_anew() {
    let desk = Desk::new(Making::Fails).await;
    let handle = desk.launcher(Countdown::TenSeconds);
    handle.act(Action::NewDesktop);
    let error = screen(&handle, "the error", |s| matches!(s, Screen::Error { .. })).await;
    let Screen::Error {
        hint,
        diagnostics,
        actions,
        ..
    } = error
    else {
        unreachable!();
    };
    assert!(format!("{hint:?}").contains("the image is broken"));
    assert!(diagnostics.contains("Booting"));
    assert!(!diagnostics.contains("secret-of"));
    assert_eq!(actions[0], Action::Retry);
    handle.act(Action::Retry);
    desk.orchestrator
        .until("it is asked anew", |made| made.len() == 2)
        .await;
    handle.act(Action::Quit);
    handle.wait_exit().await;
}

#[tokio::test]
async fn a_desktop_that_ends_by_itself_takes_its_client_with_it() {
    let desk = Desk::new(Making::Ready).await;
    let handle = desk.launcher(Countdown::TenSeconds);
    handle.act(Action::NewDesktop);
    let pid = desk.client.runs().await;
    screen(&handle, "in use", in_use).await;
    desk.orchestrator.move_on(|s| {
        s.phase = SessionPhase::Ended;
        s.end_reason = Some(EndReason::MachineLost);
    });
    let home = screen(&handle, "home", |s| matches!(s, Screen::Home { .. })).await;
    assert!(matches!(home, Screen::Home { notice: Some(n) } if n.id == "notice-machine-lost"));
    world::until("the client is stopped", || !alive(pid)).await;
    handle.act(Action::Quit);
    handle.wait_exit().await;
}

#[tokio::test]
async fn settings_are_saved_used_and_refused() {
    let desk = Desk::new(Making::Ready).await;
    let handle = desk.launcher(Countdown::TenSeconds);
    let french = Settings {
        language: Some("fr".into()),
        ..Settings::default()
    };
    handle.save_settings(french.clone()).await.unwrap();
    let mut views = handle.views();
    views.wait_for(|view| view.language == "fr").await.unwrap();
    assert_eq!(*handle.settings().borrow(), french);
    let senseless = Settings {
        orchestrator: "gopher://".into(),
        ..Settings::default()
    };
    assert!(handle.save_settings(senseless).await.is_err());
    assert_eq!(*handle.settings().borrow(), french);
    handle.act(Action::Quit);
    handle.wait_exit().await;
}
