//! A launcher after another that crashed, in a process of its own: a lock lives on in what another test is starting meanwhile,
//! between its fork and its exec.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test")]

mod world;

use mayfly_session_manager::Exit;
use mayfly_session_manager::view::{Action, Countdown, Screen};
use world::Making;
use world::desk::{Desk, in_use, screen};

#[tokio::test]
async fn a_launcher_after_a_crash_takes_its_desktop_back() {
    let desk = Desk::new(Making::Ready).await;
    let handle = desk.launcher(Countdown::TenSeconds);
    handle.act(Action::NewDesktop);
    desk.client.runs().await;
    screen(&handle, "in use", in_use).await;
    // Forced out at once, as close to a crash as a test can come without a process of its own.
    desk.orchestrator.refuse_destroys();
    handle.act(Action::Quit);
    assert!(matches!(
        handle.wait_exit().await,
        Exit::LeftBehind(Some(_))
    ));

    let next = desk.launcher(Countdown::TenSeconds);
    let held = screen(&next, "the desktop from before", |s| {
        matches!(
            s,
            Screen::InUse {
                client_open: false,
                ..
            }
        )
    })
    .await;
    assert!(matches!(held, Screen::InUse { headline, .. } if headline.id == "held-recovered"));
    assert_eq!(desk.orchestrator.made().len(), 1);
    next.act(Action::Quit);
    next.act(Action::Quit);
    next.wait_exit().await;
}
