//! An older copy of the database is put in its place: nobody loses a desktop in use, nothing is left, no name comes again.

use crate::crash::{in_phase, orphan};
use crate::house::{House, prompt, quick, until};
use crate::life::slow;
use mayfly_api::{DesktopName, SessionPhase};
use mayfly_orchestrator::config::Limits;
use mayfly_orchestrator::desktop::DesktopPhase;
use mayfly_orchestrator::provider::Provider;
use std::path::Path;
use std::time::Duration;

/// What a site makes between two backups is less.
const FAR: u32 = 60_000;

/// Machines without owner were looked at twice: one that the copy knows, and that nobody has, is removed.
async fn only(house: &House, left: &[DesktopName]) {
    until(&format!("only {left:?} are there"), async || {
        let mut there = house.machines.list().await.unwrap();
        there.sort();
        (there == left).then_some(())
    })
    .await;
}

#[tokio::test]
async fn desktops_that_a_restored_copy_does_not_know_are_left_to_their_people() {
    let mut house = House::new().await;
    house.used(1).await;
    let (mine, known) = house.ready().await;
    let copy = house.copy().await;
    let (_, used) = house.ready().await;
    house.machines.set_connections(used, 1);
    let (_, also_used) = house.ready().await;
    house.machines.create(&orphan(1)).await.unwrap();
    house.restore(&copy).await;
    only(&house, &[known, used, also_used]).await;
    assert_eq!(house.get(&mine).await.phase, SessionPhase::Ready);
    let (_, new) = house.ready().await;
    assert!(new.number() > also_used.number() + FAR, "{new}");

    // Switched off, as its agent does when nobody is there: nobody can lose it any more.
    house.machines.power_off(also_used);
    house.crash().await;
    only(&house, &[known, used, new]).await;

    // No session lasts longer than this.
    let lifetime = Limits::default().lifetime();
    house.clock.advance(lifetime + Duration::from_secs(601));
    house.crash().await;
    house.nothing_is_left().await;
}

#[tokio::test]
async fn a_copy_that_does_not_say_that_it_is_one_is_known_by_what_is_there() {
    let one = Limits {
        max_desktops: 1,
        ..prompt()
    };
    let mut house = House::with(one, quick()).await;
    house.used(1).await;
    let (first, _) = house.ready().await;
    let second = house.create().await;
    let copy = house.dir.path().join("bare copy");
    let bare = |database: &Path| {
        std::fs::copy(database, &copy).unwrap();
    };
    house.crash_with(bare).await;
    house.client.destroy(first.id, &first.secret).await.unwrap();
    let session = house.reaches(&second, SessionPhase::Ready).await;
    let used = session.desktop.unwrap();
    house.machines.set_connections(used, 1);
    house.machines.create(&orphan(1)).await.unwrap();

    // In the copy the second session waits, and now there is a place for it at once. The next number is that of its own machine.
    house.limits.max_desktops = 2;
    house.restore(&copy).await;
    let session = house.reaches(&second, SessionPhase::Ready).await;
    let new = session.desktop.unwrap();
    assert!(new.number() > used.number() + FAR, "{new}");
    only(&house, &[used, new]).await;
}

#[tokio::test]
async fn a_desktop_that_a_copy_knows_as_half_made_is_left_to_who_got_it_since() {
    let mut house = House::with(prompt(), slow(DesktopPhase::Booting)).await;
    house.used(1).await;
    let mine = house.create().await;
    let desktop = in_phase(&house, &mine, DesktopPhase::Booting).await;
    let copy = house.copy().await;
    house.reaches(&mine, SessionPhase::Ready).await;
    house.machines.set_connections(desktop, 1);
    house.machines.create(&orphan(1)).await.unwrap();
    house.restore(&copy).await;
    only(&house, &[desktop]).await;
    assert_eq!(house.get(&mine).await.phase, SessionPhase::Preparing);

    // Once it is off, another is made for the session.
    house.machines.power_off(desktop);
    house.crash().await;
    let session = house.reaches(&mine, SessionPhase::Ready).await;
    let new = session.desktop.unwrap();
    assert!(new.number() > desktop.number() + FAR, "{new}");
    only(&house, &[new]).await;
}
