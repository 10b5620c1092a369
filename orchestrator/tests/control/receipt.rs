//! After the end, whoever had the session and the administrator can read what was checked to be gone.

use crate::house::House;
use mayfly_api::{ProblemCode, SessionPhase};
use mayfly_orchestrator::provider::simulated::Fault;
use mayfly_orchestrator::receipt;
use mayfly_orchestrator::secret::Secrets;
use mayfly_orchestrator::store::words::{Kept, Whose};
use secrecy::ExposeSecret;

#[tokio::test]
async fn a_session_that_is_over_has_a_receipt_of_each_of_its_desktops() {
    let house = House::new().await;
    house.machines.inject(Fault::CreateBusy, Some(1));
    let mine = house.create().await;
    let ready = house.reaches(&mine, SessionPhase::Ready).await;
    let early = house.client.receipt(mine.id, &mine.secret).await;
    assert_eq!(early.unwrap_err().code(), Some(ProblemCode::Conflict));
    let before = jiff::Timestamp::now();
    house.client.destroy(mine.id, &mine.secret).await.unwrap();
    house.reaches(&mine, SessionPhase::Ended).await;

    let receipt = house.client.receipt(mine.id, &mine.secret).await.unwrap();
    assert_eq!(receipt.session, mine.id);
    let desktops: Vec<_> = receipt.removals.iter().map(|r| r.desktop).collect();
    assert_eq!(desktops.len(), 2, "the first was in the way of a lock");
    assert_eq!(Some(desktops[1]), ready.desktop);
    for removal in &receipt.removals {
        let checked: Vec<_> = removal.checked.iter().map(|c| c.what.as_str()).collect();
        assert_eq!(checked, ["machine", "secrets"]);
        assert!(removal.by.contains("mayfly-orchestrator"), "{}", removal.by);
    }
    assert!(receipt.removals[1].checked[0].checked_at >= before);

    let other = house.create().await;
    let foreign = house.client.receipt(mine.id, &other.secret).await;
    assert_eq!(foreign.unwrap_err().code(), Some(ProblemCode::NotFound));

    let config = &house.control.shared.config;
    let shown = receipt::show(config, Whose::Session(mine.id)).await;
    let shown = shown.unwrap();
    assert_eq!(shown.matches("no machine: ").count(), 2, "{shown}");
    let one = receipt::show(config, Whose::Desktop(desktops[1])).await;
    assert!(shown.ends_with(&one.unwrap()), "{shown}");
}

#[tokio::test]
async fn a_desktop_that_is_not_gone_has_none_and_a_secret_that_is_kept_is_not_denied() {
    let house = House::new().await;
    let (mine, desktop) = house.ready().await;
    house.machines.inject(Fault::DestroyFails, None);
    house.client.destroy(mine.id, &mine.secret).await.unwrap();
    let shared = &house.control.shared;
    let none = shared.store.receipts(Whose::Desktop(desktop)).await;
    assert_eq!(none.unwrap(), []);

    let secrets = Secrets::open(&house.dir.path().join("secret.key")).unwrap();
    let text = secrets.password(mine.id).expose_secret().to_owned();
    let words = Kept {
        session: mine.id,
        desktop,
        at: jiff::Timestamp::now(),
        text,
    };
    shared.store.keep(&words).await.unwrap();
    house.machines.inject(Fault::None, None);
    house.clock.advance(std::time::Duration::from_secs(60));
    house.reaches(&mine, SessionPhase::Ended).await;
    let receipt = house.client.receipt(mine.id, &mine.secret).await.unwrap();
    let checked = &receipt.removals[0].checked;
    assert!(checked.iter().all(|c| c.what != "secrets"), "{checked:?}");
}
