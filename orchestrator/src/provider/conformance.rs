//! What every provider must do, as a suite that runs on any of them. Part of the tests, not of the service.
//!
//! A provider's test brings a [`World`] and calls each check; a check panics with what is wrong.
//! What is left over is never asked of the provider: the world looks for itself.

use super::{CheckStatus, DesktopSpec, MachineState, Provider, ProviderError, Steps};
use async_trait::async_trait;
use futures_util::future::join_all;
use jiff::Timestamp;
use mayfly_api::agent::{Bootstrap, FromAgent, ToAgent};
use mayfly_api::{DesktopName, SessionId};
use secrecy::{ExposeSecret, SecretString};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A guest under software emulation on a busy host; anything longer is a fault.
const BOOT: Duration = Duration::from_secs(180);

/// Where a provider is tested.
#[async_trait]
pub trait World: Send + Sync {
    /// The provider as an orchestrator has it that has just started; its steps are told to `steps`.
    fn provider(&self, steps: Steps) -> Arc<dyn Provider>;

    /// The steps of its create, in order.
    fn create_steps(&self) -> Vec<&'static str>;

    /// The steps of its destroy, in order.
    fn destroy_steps(&self) -> Vec<&'static str>;

    /// Processors and memory (MiB) of a machine here.
    fn size(&self) -> (u32, u32);

    /// Whether machines here are members of a domain.
    fn in_domain(&self) -> bool {
        false
    }

    /// The playbook that configures machines here.
    fn playbook(&self) -> Option<std::path::PathBuf> {
        None
    }

    /// Whatever of any desktop is left in this world: processes, sockets, files. Not found by asking the provider.
    fn leftovers(&self) -> Vec<String>;
}

/// A provider that is told to go on.
fn fresh(world: &dyn World) -> Arc<dyn Provider> {
    world.provider(Arc::new(|_| Ok(())))
}

/// A provider that stops after `step`, as if the orchestrator had been killed there.
fn stopping(world: &dyn World, step: &'static str) -> Arc<dyn Provider> {
    world.provider(Arc::new(move |reached| {
        if reached == step {
            Err(ProviderError::Failed(format!("stopped after {step:?}")))
        } else {
            Ok(())
        }
    }))
}

fn name(number: u32) -> DesktopName {
    DesktopName::from_number(number).expect("a small number")
}

fn spec(world: &dyn World, name: DesktopName) -> DesktopSpec {
    let (cpus, memory_mib) = world.size();
    DesktopSpec {
        name,
        session: mayfly_api::SessionId::new(),
        in_domain: world.in_domain(),
        playbook: world.playbook(),
        cpus,
        memory_mib,
        lifetime: Duration::from_secs(600),
    }
}

async fn assert_gone(world: &dyn World, provider: &dyn Provider, name: DesktopName) {
    let state = provider.state(name).await.expect("state answers");
    assert_eq!(state, MachineState::Absent, "{name} after destroy");
    let listed = provider.list().await.expect("list answers");
    assert!(!listed.contains(&name), "{name} is gone, but listed");
    assert_eq!(world.leftovers(), Vec::<String>::new(), "left of {name}");
    let words = provider.last_words(name).await;
    assert!(
        words.iter().all(|section| section.text.is_empty()),
        "{name} is gone, and says {words:?}"
    );
}

/// Waits until `look` finds something.
async fn wait_for<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(begin.elapsed() < BOOT, "{what}: not within {BOOT:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A desktop is made, takes its identity, answers at its address, is found again by a new orchestrator, and goes.
pub async fn a_desktop_lives_and_dies(world: &dyn World) {
    let provider = fresh(world);
    let name = name(1);
    let spec = spec(world, name);
    for check in provider.preflight().await {
        assert_ne!(check.status, CheckStatus::Error, "{check:?}");
    }
    assert_eq!(
        provider.state(name).await.expect("state"),
        MachineState::Absent
    );
    provider.create(&spec).await.expect("create");
    assert!(provider.create(&spec).await.is_err(), "a name is used once");
    assert_eq!(
        provider.state(name).await.expect("state"),
        MachineState::Running
    );
    assert_eq!(provider.list().await.expect("list"), [name]);

    let bootstrap = Bootstrap {
        session: SessionId::new(),
        host_name: name.to_string(),
        token: SecretString::from("a token for this test alone"),
        user: "ada".to_owned(),
        password: SecretString::from("a password for this test alone"),
        now: Timestamp::now(),
        language: None,
        time_zone: None,
        keyboard: None,
        silence_limit_s: 600,
        domain: None,
        line: None,
    };
    wait_for("the bootstrap is taken", async || {
        match provider.bootstrap(name, &bootstrap).await {
            Ok(()) => Some(()),
            Err(ProviderError::NotYet(_)) => None,
            Err(error) => panic!("bootstrap: {error}"),
        }
    })
    .await;
    let token = ready(provider.as_ref(), name).await;
    assert_eq!(token.expose_secret(), bootstrap.token.expose_secret());
    let address = provider.rdp_address(name).await.expect("an address");
    wait_for("the RDP address answers", async || {
        tokio::net::TcpStream::connect(address).await.ok()
    })
    .await;

    drop(provider);
    let provider = fresh(world);
    assert_eq!(provider.list().await.expect("list"), [name]);
    assert_eq!(
        provider.state(name).await.expect("state"),
        MachineState::Running
    );
    assert_eq!(
        provider.rdp_address(name).await.expect("an address"),
        address
    );
    let mut channel = provider.agent(name).await.expect("the agent, once more");
    let heard = tokio::time::timeout(BOOT, channel.from_agent.recv()).await;
    assert!(
        matches!(heard, Ok(Some(_))),
        "the agent speaks to a new orchestrator: {heard:?}"
    );
    drop(channel);
    let words = provider.last_words(name).await;
    let said = words.iter().any(|section| !section.text.trim().is_empty());
    assert!(said, "a machine that runs has said something: {words:?}");

    provider.destroy(name).await.expect("destroy");
    assert_gone(world, provider.as_ref(), name).await;
    provider.destroy(name).await.expect("destroy, once more");
    assert_gone(world, provider.as_ref(), name).await;
}

/// Waits for the agent's `Ready`, answers it, and returns the token in it.
async fn ready(provider: &dyn Provider, name: DesktopName) -> SecretString {
    let mut channel = provider.agent(name).await.expect("the agent");
    let listen = async {
        while let Some(message) = channel.from_agent.recv().await {
            channel
                .to_agent
                .send(ToAgent::Ack)
                .await
                .expect("an answer");
            match message {
                FromAgent::Ready { token, .. } => return token,
                FromAgent::Failed { step, message } => panic!("{step}: {message}"),
                FromAgent::Hello { .. }
                | FromAgent::Evidence { .. }
                | FromAgent::Trouble { .. }
                | FromAgent::Left => {}
            }
        }
        panic!("the channel ended before the agent was ready");
    };
    tokio::time::timeout(BOOT, listen)
        .await
        .expect("the agent becomes ready")
}

/// Destroying what never existed is no error, and nobody is there to talk to.
pub async fn nothing_is_destroyed_without_complaint(world: &dyn World) {
    let provider = fresh(world);
    provider.destroy(name(2)).await.expect("destroy of nothing");
    assert_gone(world, provider.as_ref(), name(2)).await;
    assert!(provider.agent(name(2)).await.is_err());
}

/// Wherever a create or destroy is cut off, a new orchestrator finds what is left and removes it.
pub async fn a_crash_between_any_two_steps_leaves_nothing(world: &dyn World) {
    let name = name(3);
    let spec = spec(world, name);
    for step in world.create_steps() {
        let stopped = stopping(world, step).create(&spec).await;
        assert!(stopped.is_err(), "create goes past {step:?}");
        recover(world, name, step).await;
    }
    for step in world.destroy_steps() {
        fresh(world).create(&spec).await.expect("create");
        let stopped = stopping(world, step).destroy(name).await;
        assert!(stopped.is_err(), "destroy goes past {step:?}");
        recover(world, name, step).await;
    }
}

/// What a new orchestrator must be able to do after a crash, wherever it was.
pub async fn recover(world: &dyn World, name: DesktopName, after: &str) {
    let provider = fresh(world);
    let left = world.leftovers();
    let listed = provider.list().await.expect("list");
    assert_eq!(
        listed.contains(&name),
        !left.is_empty(),
        "after {after:?} the list must name it exactly if something is left: {left:?}"
    );
    let state = provider.state(name).await.expect("state");
    assert_eq!(
        state == MachineState::Absent,
        left.is_empty(),
        "after {after:?}: {left:?}"
    );
    provider.destroy(name).await.expect("destroy of a part");
    assert_gone(world, provider.as_ref(), name).await;
}

/// Creates and destroys run at the same time, of different desktops and of the same one.
pub async fn many_at_once(world: &dyn World) {
    let provider = fresh(world);
    let provider = provider.as_ref();
    let names: Vec<_> = (10..13).map(name).collect();
    // Every name is asked for twice; one of the two must win.
    let asked = names
        .iter()
        .chain(&names)
        .map(|name| async { provider.create(&spec(world, *name)).await.is_ok() });
    let made = join_all(asked)
        .await
        .into_iter()
        .filter(|made| *made)
        .count();
    assert_eq!(made, names.len(), "each name is used once");
    assert_eq!(provider.list().await.expect("list"), names);
    for name in &names {
        assert_eq!(
            provider.state(*name).await.expect("state"),
            MachineState::Running
        );
    }
    let ended = names
        .iter()
        .chain(&names)
        .map(|name| provider.destroy(*name));
    for result in join_all(ended).await {
        result.expect("destroy, twice at once");
    }
    for name in names {
        assert_gone(world, provider, name).await;
    }
    // A create and a destroy of the same name: whichever comes first, one more destroy leaves nothing.
    let spec = spec(world, name(20));
    let (_, destroyed) = tokio::join!(provider.create(&spec), provider.destroy(spec.name));
    destroyed.expect("destroy during a create");
    provider.destroy(spec.name).await.expect("destroy");
    assert_gone(world, provider, spec.name).await;
}

/// A machine's lifetime ends without any orchestrator, and the machine stays to be seen until it is destroyed.
pub async fn a_lifetime_ends_by_itself(world: &dyn World) {
    let spec = DesktopSpec {
        lifetime: Duration::from_secs(2),
        ..spec(world, name(30))
    };
    fresh(world).create(&spec).await.expect("create");
    let provider = fresh(world);
    let reason = wait_for("the lifetime ends", async || {
        match provider.state(spec.name).await.expect("state") {
            MachineState::Dead { reason } => Some(reason),
            MachineState::Running => None,
            MachineState::Absent => {
                panic!("a machine that ended is still there until it is destroyed")
            }
        }
    })
    .await;
    assert!(reason.contains("lifetime"), "{reason}");
    assert_eq!(provider.list().await.expect("list"), [spec.name]);
    provider.destroy(spec.name).await.expect("destroy");
    assert_gone(world, provider.as_ref(), spec.name).await;
}
