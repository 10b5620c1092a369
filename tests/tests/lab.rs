//! The lab's own fixtures, together, on the simulated provider: what every scenario stands on.

use mayfly_tests::lab::{Desk, Lab, Launcher, Orchestrator, Provider, until};
use std::time::Duration;

const WINDOW: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn a_click_in_the_tray_opens_a_window_whose_buttons_work_and_quit_leaves_nothing() {
    let lab = Lab::new("tray and window").unwrap();
    let mut orchestrator = Orchestrator::start(&lab, &Provider::Simulated, "")
        .await
        .unwrap();
    let desk = Desk::start(&lab).await.unwrap();
    let mut launcher = Launcher::start(&lab, &desk, orchestrator.url()).unwrap();
    let tray = launcher.tray(&desk).await.unwrap();
    let labels: Vec<String> = tray
        .menu()
        .await
        .unwrap()
        .into_iter()
        .map(|l| l.label)
        .collect();
    assert!(labels.contains(&"New desktop".to_owned()), "{labels:?}");

    let web_processes = || lab.running("WebKit").unwrap().len();
    assert_eq!(web_processes(), 0, "before a window opens");
    tray.click("Open Mayfly").await.unwrap();
    let web = launcher.web(&lab).await.unwrap();
    web.screen("home", WINDOW).await.unwrap();
    assert!(web_processes() > 0, "they are looked for by the right name");
    let before = desk.screen().picture().unwrap();
    assert!(before.colours() > 1, "the window is on the screen");

    web.act("new_desktop").await.unwrap();
    until("the menu offers to quit and destroy", WINDOW, async || {
        let menu = tray.menu().await?;
        Ok(menu
            .iter()
            .any(|line| line.label == "Destroy the desktop and quit")
            .then_some(()))
    })
    .await
    .unwrap();
    assert!(!lab.leftovers().is_empty(), "a machine is not nothing");
    let status = launcher.quit().await.unwrap();
    assert!(
        status.success(),
        "{status}: {}",
        launcher.process().last_words()
    );
    until("nothing is left", WINDOW, async || {
        Ok(lab.leftovers().is_empty().then_some(()))
    })
    .await
    .unwrap_or_else(|error| panic!("{error:#}: {}", lab.leftovers()));
    orchestrator.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crashed_orchestrator_starts_again_on_the_same_state() {
    let lab = Lab::new("orchestrator restart").unwrap();
    let mut orchestrator = Orchestrator::start(&lab, &Provider::Simulated, "")
        .await
        .unwrap();
    let request = mayfly_api::CreateSession::default();
    let created = orchestrator
        .client()
        .create(&request, "once")
        .await
        .unwrap();
    orchestrator.crash().await.unwrap();
    orchestrator.start_again(&lab).await.unwrap();
    let (id, secret) = (created.session.id, created.secret);
    let session = orchestrator.client().get(id, &secret).await.unwrap();
    assert_eq!(session.id, id);
    orchestrator.client().destroy(id, &secret).await.unwrap();
    until("nothing is left", WINDOW, async || {
        Ok(lab.leftovers().is_empty().then_some(()))
    })
    .await
    .unwrap_or_else(|error| panic!("{error:#}: {}", lab.leftovers()));
}
